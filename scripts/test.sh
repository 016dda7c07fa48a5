#!/usr/bin/env bash
# The test suite, on simulated ranks and gloo processes; GPU tests run where there are GPUs.
#
#     bash scripts/test.sh [arguments of pytest]
#     bash scripts/test.sh --all                   the slow tests, too
#
# Sets everything up the first time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

selection=(-m "not slow")
if [[ ${1-} == --all ]]; then
    selection=()
    shift
fi
exec "$PYTHON" -m pytest ${selection[@]+"${selection[@]}"} "$@"
