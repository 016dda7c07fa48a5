#!/usr/bin/env bash
# The environment in which the benchmarks find their peers; none of them is a dependency.
#
#   scripts/bench/peers.sh && build/peers/bin/python -m scripts.bench.layers
#
# PYTHON names the interpreter to build it with.
set -euo pipefail
cd "$(dirname "$0")/../.."

"${PYTHON:-python3}" -m venv build/peers
pip=(build/peers/bin/python -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy transformers==5.23.0 matplotlib psutil
"${pip[@]}" --no-deps megatron-core==0.16.1 accelerate==1.15.0
