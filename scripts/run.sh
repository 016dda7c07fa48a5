#!/usr/bin/env bash
# The main job: trains a small Llama-style model tensor-parallel over two processes and shows the result.
#
#     bash scripts/run.sh [arguments of scripts.train]
#
# Sets everything up the first time. Arguments replace the defaults below; NPROC=4 runs four processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC:-2}" \
    -m scripts.train --out "runs/$(date +%Y%m%d-%H%M%S)" "$@"
