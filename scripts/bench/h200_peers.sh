#!/usr/bin/env bash
# Fetches what scripts.bench.h200 measures against into .peers/, which git ignores; nothing of it is installed.
#
#   scripts/bench/h200_peers.sh
#
# PYTHON needs pip and torch: two of the packages come as source and ask for torch when their metadata is read.
# quack runs only where its own dependencies (nvidia-cutlass-dsl, apache-tvm-ffi, torch-c-dlpack-ext) are installed.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export MAMBA_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE
download=("$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch")

"${download[@]}" liger_kernel==0.8.5 quack_kernels==0.6.5 transformer_engine==2.20.2 einops==0.8.1
"${download[@]}" --no-build-isolation --no-binary :all: mamba-ssm==2.2.5 flash-attn==2.8.3
rm -rf .peers
mkdir .peers
for wheel in "$scratch"/*.whl; do
    "$python" -m zipfile -e "$wheel" .peers
done
for source in "$scratch"/*.tar.gz; do
    tar -xzf "$source" -C .peers --strip-components=1 --wildcards '*/ops/triton/*.py'
done
du -sh .peers
