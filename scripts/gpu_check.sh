#!/usr/bin/env bash
# Smoke every script on this machine's GPU, record the numbers, run the tests that need a GPU: one
# command, no network needed.
#
#   bash scripts/gpu_check.sh [OUT [--chapters N ...] [--steps smoke|record|tests ...]]
#
# 1. every command of every lesson at smoke size with NCCL at world size 1;
# 2. the torchrun commands with two ranks that share the GPU over gloo;
# 3. what an issue asks to be recorded at gpu size, into OUT/NAME@GPU.json;
# 4. the tests that need a GPU, where there is pytest.
# OUT defaults to build/gpu. A lease of ten minutes has time for a chapter and a step or two.
# It uses the python3 on the PATH with the torch that is there (2.11 or newer). Exit status: 0 when
# everything ran, 1 when something failed, 77 when there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
export PYTHONPATH="$PWD/src:$PWD/chapter06-vllm/code${PYTHONPATH:+:$PYTHONPATH}" DISTLAB_CACHE="$out/cache"
python=${PYTHON:-python3}
"$python" -m distlab.lab.gpu_check --out "$out" "${@:2}"
