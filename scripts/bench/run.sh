#!/usr/bin/env bash
# All CPU benchmarks beside their peers, each row with its bar, and the bar chart of the README.
#
#   bash scripts/bench/run.sh [--rounds N]
#
# Tables go to build/bench/, the chart to docs/bench.svg. The layers are run twice: as they are, and with malloc keeping
# freed memory (the hint of the launch recipes). About 8 minutes on two cores, which should have nothing else to do.
set -euo pipefail
cd "$(dirname "$0")/../.."

[[ -x build/peers/bin/python ]] || bash scripts/bench/peers.sh
python=$PWD/build/peers/bin/python
mkdir -p build/bench
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

table() {
    echo "--- $1" >&2
    "${@:2}" 2>"build/bench/$1.log" | tee "build/bench/$1.txt"
}

warm_malloc=(env MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184)
two_ranks=("$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m)
table layers "$python" -m scripts.bench.layers "$@"
table layers-without-units "$python" -m scripts.bench.layers --no-units linear "$@"
table layers-warm-malloc "${warm_malloc[@]}" "$python" -m scripts.bench.layers norm embedding rope cross "$@"
table steps "${two_ranks[@]}" scripts.bench.steps "$@"
table steps-gloo "${two_ranks[@]}" scripts.bench.steps --gloo "$@"
table all-reduce "$python" -m scripts.bench.all_reduce --ranks 2 "$@"
table simulation "$python" -m scripts.bench.simulation "$@"
table start "$python" -m scripts.bench.start
"$python" -m scripts.bench.chart build/bench/layers.txt build/bench/layers-without-units.txt \
    build/bench/steps.txt build/bench/steps-gloo.txt build/bench/all-reduce.txt build/bench/simulation.txt
