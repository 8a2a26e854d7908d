#!/bin/bash
# Serve a model with vLLM, under OpenAI's HTTP interface: on a GPU, or on a CPU with what it needs.
#
#     bash chapter06-vllm/code/vllm_server.sh [--model DIR] [--config FILE] [FLAG of vllm serve ...]
#
#   --model DIR     a Hugging Face folder (default: a tiny model, trained here)
#   --config FILE   flags of `vllm serve` (default: chapter06-vllm/configs/vllm_server.yaml)
#
# Every other flag goes to vLLM and wins: --port 9000, --tensor-parallel-size 2, --dtype bfloat16.
# The model is called by the name of its folder, and the server has /v1/completions, /health and
# /metrics. Run it in the environment vllm (python3 scripts/lab.py env vllm). Ctrl-C ends it.
#
# On a CPU the cache has VLLM_SERVER_CACHE_BYTES (default 512 MiB), and every core that the process
# may use computes; VLLM_CPU_OMP_THREADS_BIND chooses others. LAB_PRESET=smoke starts without
# compiling and with a small cache, for tests.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config=$here/../configs/vllm_server.yaml
model=()
rest=()

need_value() {
    if [ $# -lt 2 ]; then
        echo "error: $1 needs a value; see --help" >&2
        exit 2
    fi
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        --model) need_value "$@"; model=(--model "$2"); shift 2 ;;
        --config) need_value "$@"; config=$2; shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
if [ ! -f "$config" ]; then
    echo "error: --config $config is no file; use one such as chapter06-vllm/configs/vllm_server.yaml" >&2
    exit 2
fi

directory=$(python -m distlab.serving.tiny_model "${model[@]}") # or one line that says what is wrong
flags=(--served-model-name "$(basename "$directory")")
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"

if ! python -c 'from distlab.hardware import has_cuda; raise SystemExit(not has_cuda())'; then
    # By itself vLLM takes half of the memory for the cache, and ends where less is free.
    default_bytes=536870912
    if [ "${LAB_PRESET:-}" = smoke ]; then
        default_bytes=67108864
        flags+=(--enforce-eager)
    fi
    flags+=(--kv-cache-memory-bytes "${VLLM_SERVER_CACHE_BYTES:-$default_bytes}")
    flags+=(--gpu-memory-utilization 0.1 --block-size 32 --dtype float32)
    # By itself it leaves one core to the server, half of a laptop's two. OMP_NUM_THREADS below the
    # number of cores says that others compute here too: then no thread is bound to a core.
    if [ -z "${VLLM_CPU_OMP_THREADS_BIND:-}" ]; then
        if [ "$(nproc)" -lt "$(env -u OMP_NUM_THREADS nproc)" ]; then
            export VLLM_CPU_OMP_THREADS_BIND=nobind
        elif cores=$(taskset -cp $$ 2>/dev/null); then
            export VLLM_CPU_OMP_THREADS_BIND="${cores##*: }"
        fi
    fi
fi

# exec: vLLM is this process from here on, so that a signal reaches it.
exec python -m inference.vllm_command serve "$directory" --config "$config" "${flags[@]}" "${rest[@]}"
