#!/bin/bash
# Serve a model with SGLang, under OpenAI's HTTP interface and its own: on a GPU, or on a CPU.
#
#     bash chapter07-sglang/code/sglang_server.sh [--model DIR] [--config FILE] [FLAG of SGLang ...]
#
#   --model DIR     a Hugging Face folder (default: a tiny model, trained here)
#   --config FILE   flags of `sglang serve` (default: chapter07-sglang/configs/sglang_server.yaml)
#
# Every other flag goes to SGLang and wins: --port 9000, --tp 2, --disable-radix-cache. The command
# that it comes to is printed; on a CPU that is, besides your flags,
#
#     python -m sglang.launch_server --model-path DIR --device cpu --attention-backend torch_native \
#         --dtype float32 --max-total-tokens N
#
# and on a GPU without the second half. The model is called by the name of its folder; the server has
# /v1/completions, /v1/chat/completions, /generate, /flush_cache, /server_info, /health and /metrics.
# Run it in the environment sglang (python3 scripts/lab.py env sglang). Ctrl-C ends it.
set -euo pipefail
case "${1:-}" in
    --help | -h)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
esac
exec python -m radix.sglang_server "$@"
