# Sourced by run.sh and test.sh: finds or makes a Python environment with this project installed; sets PYTHON.
#
# A torch >= 2.11 in the active environment is kept. Otherwise .venv gets TORCH_SPEC (default below).
# Nothing is installed again until pyproject.toml changes.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
TORCH_SPEC=${TORCH_SPEC-torch==2.13.0}
EXTRAS="train,hf,test,hf-test,lint"

fail() {
    echo "error: $*" >&2
    exit 1
}

has_torch() {
    "$1" -c 'import torch; v = torch.__version__.split("+")[0].split(".")[:2]; assert tuple(map(int, v)) >= (2, 11)' \
        2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found"
}

make_venv() {
    if ! "$1" -m venv "${@:2}" .venv || ! .venv/bin/python -m pip --version >/dev/null; then
        rm -rf .venv
        fail "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv"
    fi
}

PYTHON=$(find_python)
if has_torch "$PYTHON" && [[ -n ${VIRTUAL_ENV-} ]]; then
    TORCH_SPEC=""
else
    if [[ ! -x .venv/bin/python ]]; then
        echo "making .venv" >&2
        if has_torch "$PYTHON"; then make_venv "$PYTHON" --system-site-packages; else make_venv "$PYTHON"; fi
    fi
    PYTHON=$PWD/.venv/bin/python
    if has_torch "$PYTHON"; then TORCH_SPEC=""; fi
fi

stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.isoshard-$(cksum pyproject.toml | cut -d ' ' -f 1)"
if [[ ! -e $stamp || $(cat "$stamp") != "$PWD" ]]; then
    echo "installing ${TORCH_SPEC:+$TORCH_SPEC and }isoshard[$EXTRAS] (once)" >&2
    # shellcheck disable=SC2086  # TORCH_SPEC may be several words, or none
    "$PYTHON" -m pip install --quiet --disable-pip-version-check $TORCH_SPEC -e ".[$EXTRAS]" ||
        fail "the installation failed; TORCH_SPEC chooses another torch, for example TORCH_SPEC='torch>=2.11'"
    echo "$PWD" >"$stamp"
fi
