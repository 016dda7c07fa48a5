#!/usr/bin/env bash
# Trains on this machine, one process per rank:
#
#     bash launch/local.sh [nproc] [arguments of scripts.train]
#     bash launch/local.sh 2 --steps 200
#     bash launch/local.sh gpu --steps 2000 --resume    # one process per GPU
#
# nproc is a number, "gpu" or "cpu", 2 unless given. It must divide the heads of the model (8).
# Assumes a set-up checkout: .venv, or else a python3 that has torch. A free port is chosen, so runs may go side by
# side. Ranks, addresses and OMP_NUM_THREADS are set by torchrun. Tried with 2
# processes on one machine without GPUs. launch/README.md, "Memory on CPUs", has a
# setting of malloc that spares page faults.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nproc=2
if [[ ${1-} =~ ^([0-9]+|gpu|cpu)$ ]]; then
    nproc=$1
    shift
fi
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$nproc" -m scripts.train "$@"
