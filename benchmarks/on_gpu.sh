#!/usr/bin/env bash
# Measures what a GPU has to show, within nine minutes, and writes one JSON file (docs/how-to/gpu.md).
#
#     benchmarks/on_gpu.sh [OUT.json] [--tiny] [--parts NAME ...]
#
# Each part has a limit in seconds. A part that fails is recorded with its error, and the others run.
# --tiny runs every part at tiny size on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec timeout --kill-after=10 540 "${PYTHON:-python3}" -m benchmarks.on_gpu "$@" --limits \
    teacher=40,loss=100,accuracy=25,step=100,attention=45,fsdp=40,compress=70,search=60,tests=50
