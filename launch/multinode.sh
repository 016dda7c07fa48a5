#!/usr/bin/env bash
# Trains on several machines. Run the same command on each of them, in any order:
#
#     HEAD=node0:29500 NNODES=2 NPROC_PER_NODE=8 bash launch/multinode.sh --steps 2000
#
# HEAD            host:port of one of the machines, reachable from all; the rendezvous is kept there
# NNODES          number of machines
# NPROC_PER_NODE  processes on each
# RUN_ID          optional: a name that tells runs on one HEAD apart
# NODE_RANK       optional: 0, 1, … on the machines, where they are to be numbered by hand; HEAD is then that of rank 0
# MAX_RESTARTS    optional: how often all ranks are started again after a failure, 0 unless given. Pass --resume as
#                 well, else every attempt begins at step 0.
#
# Without NODE_RANK the c10d rendezvous numbers the machines. Assumes the same checkout and environment on every
# machine, and a runs/ directory that all of them share (checkpoints and the corpus lie there).
# Tested with two launchers on one machine over gloo, both ways (tests/test_launch_recipes.py); not tried on separate
# machines or over NCCL. For 2 x 8 processes pass --heads 16: they must divide the heads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${HEAD:?set HEAD to host:port of the first machine}"
: "${NNODES:?set NNODES to the number of machines}"
: "${NPROC_PER_NODE:?set NPROC_PER_NODE to the processes on each machine}"
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# By default the ranks reuse the store of the rendezvous, in which a restarted attempt finds the keys of the failed
# one and hangs. This gives every attempt a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ -n ${NODE_RANK-} ]]; then
    meet=(--node-rank="$NODE_RANK" --master-addr="${HEAD%:*}" --master-port="${HEAD##*:}")
else
    meet=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-isoshard}")
fi
exec "$python" -m torch.distributed.run \
    --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" --max-restarts="${MAX_RESTARTS:-0}" "${meet[@]}" \
    -m scripts.train "$@"
