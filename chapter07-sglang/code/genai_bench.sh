#!/bin/bash
# Load a server with genai-bench: the scenarios of a file, at each number of requests at once.
#
#     bash chapter07-sglang/code/genai_bench.sh [--base-url URL] [--out DIR] [FLAG of genai-bench ...]
#
#   --base-url URL    without /v1 (default http://127.0.0.1:8200, sglang_server.sh's)
#   --model DIR       the served model's folder, for its tokenizer (default: the tiny model)
#   --engine NAME     SGLang (default) or vLLM, whose requests may ask to ignore the end of text,
#                     as paged_engine's may: so that all answers have their length
#   --scenarios FILE  scenarios, one a line (default: chapter07-sglang/configs/genai_bench.txt)
#   --out DIR         where the results go (default: build/genai_bench)
#
# Every other flag goes to genai-bench: --num-concurrency 32, --max-requests-per-run 100. A file of
# results for each scenario and concurrency, a table (xlsx) and plots are written to DIR/run; then
# `python chapter07-sglang/code/read_genai_bench.py DIR/run` reads them. Run it in the environment
# bench (python3 scripts/lab.py env bench). LAB_PRESET=smoke makes it short, for tests.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
url=http://127.0.0.1:8200
scenarios=$here/../configs/genai_bench.txt
out=build/genai_bench
engine=SGLang
model=()
rest=()

refuse() {
    echo "error: $1" >&2
    exit "${2:-2}"
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        --base-url | --model | --engine | --scenarios | --out)
            [ -n "${2-}" ] || refuse "$1 needs a value; see --help"
            case $1 in
                --base-url) url=${2%/} url=${url%/v1} ;;
                --model) model=(--model "$2") ;;
                --engine) engine=$2 ;;
                --scenarios) scenarios=$2 ;;
                --out) out=$2 ;;
            esac
            shift 2
            ;;
        *) rest+=("$1"); shift ;;
    esac
done
[ -f "$scenarios" ] || refuse "--scenarios $scenarios is no file; use one such as chapter07-sglang/configs/genai_bench.txt"
case $engine in SGLang | vLLM) ;; *) refuse "--engine $engine is not known here; use SGLang or vLLM" ;; esac
command -v genai-bench >/dev/null || refuse "there is no genai-bench; run this in the environment that 'python3 scripts/lab.py env bench' builds"

directory=$(python -m distlab.serving.tiny_model "${model[@]}") # or one line that says what is wrong
names=$(python - "$url" <<'PY'
import json, sys, urllib.request
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with direct.open(sys.argv[1] + "/v1/models", timeout=10) as answer:
        print(json.load(answer)["data"][0]["id"])
except (OSError, ValueError, LookupError):
    pass
PY
)
[ -n "$names" ] || refuse "no server answers at $url; start one, or name another by --base-url" 1

flags=()
while read -r scenario; do
    case $scenario in '' | '#'*) ;; *) flags+=(--traffic-scenario "$scenario") ;; esac
done <"$scenarios"
[ ${#flags[@]} -gt 0 ] || refuse "--scenarios $scenarios has no scenario; write one such as D(50,20)"
case "${LAB_PRESET:-laptop}" in # minutes are its unit: the number of requests is what ends a run
    smoke) flags=("${flags[@]:0:2}" --num-concurrency 4 --max-requests-per-run 16) ;;
    gpu) flags+=(--num-concurrency 1 --num-concurrency 16 --num-concurrency 128 --max-requests-per-run 512) ;;
    *) flags+=(--num-concurrency 4 --num-concurrency 16 --max-requests-per-run 48) ;;
esac
if [ -e "$out/run" ] && [ ! -f "$out/run/experiment_metadata.json" ]; then
    refuse "--out $out has a folder run that is none of genai-bench's; name another"
fi
mkdir -p "$out" || refuse "--out $out cannot be made; name another"
rm -rf "${out:?}/run"
echo "genai-bench loads $url for some minutes; what it says goes to $out/log.txt" >&2
export HF_HUB_OFFLINE=1 NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost
genai-bench benchmark --api-backend "${engine,,}" --api-base "$url" --api-key "${OPENAI_API_KEY:-none}" \
    --api-model-name "$names" --task text-to-text --model-tokenizer "$directory" \
    --server-engine "$engine" --max-time-per-run 5 \
    --experiment-base-dir "$out" --experiment-folder-name run --log-dir "$out/logs" \
    "${flags[@]}" "${rest[@]}" >"$out/log.txt" 2>&1 ||
    { tail -n 5 "$out/log.txt" >&2; refuse "genai-bench ended with an error; see $out/log.txt" 1; }
ls "$out/run"/*.json | grep -q -v experiment_metadata || refuse "genai-bench wrote no results; see $out/log.txt" 1
echo "results: $out/run ($(ls "$out/run"/*.json | grep -c -v experiment_metadata) runs)"
