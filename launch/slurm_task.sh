#!/usr/bin/env bash
# One SLURM task per rank, without torchrun: srun starts the ranks and binds them to cores and GPUs.
#
#     srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1 \
#         bash launch/slurm_task.sh --heads 16 --steps 2000
#
# Every task must see all GPUs of its node (--gpus-per-node, not --gpus-per-task): rank r takes GPU SLURM_LOCALID.
# Nothing is started again after a failure; launch/slurm.sbatch with MAX_RESTARTS does that.
# Not run on a cluster: tried with two processes and SLURM's variables set by hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${SLURM_PROCID:?start this script with srun}"
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_STEP_NUM_TASKS"
export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"  # "8(x2)": eight tasks on each of two nodes
mapfile -t nodes < <(scontrol show hostnames "$SLURM_STEP_NODELIST")
: "${nodes[0]:?scontrol show hostnames $SLURM_STEP_NODELIST named no node}"
export MASTER_ADDR="${nodes[0]}" MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # as torchrun sets it
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

exec "$python" -m scripts.train "$@"
