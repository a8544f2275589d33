#!/usr/bin/env bash
# Regenerate constraints.txt: `make lock`, or `bash ci/lock.sh` (needs uv: pip install uv). Versions that are there stay while they
# fit pyproject.toml; `make lock ARGS=--upgrade` takes the newest.
# torch is pinned to the release the records were made with. The nvidia/cuda/triton lines that only the CUDA build of torch
# pulls in are dropped, so the same file serves CPU wheels, CUDA wheels and a torch that is already installed.
set -euo pipefail
cd "$(dirname "$0")/.."
raw=$(mktemp)
trap 'rm -f "$raw"' EXIT
cp constraints.txt "$raw"
uv pip compile "$@" --universal --python-version 3.11 --all-extras --no-annotate --no-header -q \
    --constraint <(echo "torch==2.13.0") pyproject.toml -o "$raw"
{
    echo "# Written by ci/lock.sh; do not edit. Tested versions, Python 3.11 and later."
    grep -vE '^(nvidia-|cuda-|triton|tnlib)' "$raw" | sed -E 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/'
} >constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
