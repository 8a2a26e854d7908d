"""Read what genai-bench wrote, check its formulas, and hold it against a client of our own.

genai-bench's users are a closed loop: each sends its next request when it has its answer. Its TTFT
ends with the first piece of text, its TPOT is (latency - TTFT) / (output tokens - 1). Both are
computed again here from the single requests. A scenario's prompt length is a wish: the text is cut
by words, and the measured length stands beside it.

With --base-url the same load is sent by our own client: as many requests at once, prompts of as
many tokens, answers as long. In a closed loop of c users the throughput is c * tokens / latency,
for both in the same way, whatever start and end the run has.

Run, after `bash chapter07-sglang/code/genai_bench.sh`:
    python chapter07-sglang/code/read_genai_bench.py build/genai_bench/run
    python chapter07-sglang/code/read_genai_bench.py build/genai_bench/run \
        --base-url http://127.0.0.1:8200/v1

You should see: a row for each scenario and concurrency, no failed request, the same medians from
the single requests, and with --base-url a throughput close to our own client's.
"""

import asyncio
import json
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from distlab import script
from distlab.data.corpus import read_corpus
from distlab.errors import RunError, UsageError
from distlab.run import Run
from distlab.serving.clients import Server, connected
from distlab.serving.tiny_model import add_model_flags, model_directory

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke"}, "laptop": {"size": "smoke"}, "gpu": {"size": "gpu"},
}  # fmt: skip
COLUMNS = ["scenario", "concurrency", "requests", "prompt tokens, measured",
           "output tok/s", "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms"]  # fmt: skip
TEXT_BYTES = 100_000


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results = read_results(Path(args.folder))
    with script.run(args) as run:
        report(run, results)
        check(run, results)
        if args.base_url:
            asyncio.run(beside_our_own(run, results, args))
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("folder", metavar="DIR", help="genai-bench's experiment folder")
    parser.add_argument("--base-url", metavar="URL", help="send the same load to this server")
    parser.add_argument("--timeout", type=script.positive_float, default=120.0, metavar="S")
    add_model_flags(parser)
    return parser.parse_args(argv)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """One for each run, by scenario and concurrency; times are seconds."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; genai_bench.sh writes one, and prints its name")
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is no JSON ({error}); run genai-bench again") from error
        if isinstance(found, dict) and "aggregated_metrics" in found:
            if found.get("_time_unit", "s") != "s":
                raise UsageError(f"{path} is in {found['_time_unit']}; use --metrics-time-unit s")
            results.append(found)
    if not results:
        raise UsageError(f"{folder} has no results of genai-bench; run genai_bench.sh first")
    return sorted(
        results,
        key=lambda r: (
            r["aggregated_metrics"]["scenario"],
            r["aggregated_metrics"]["num_concurrency"],
        ),
    )


def answered(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in result["individual_request_metrics"] if not r["error_code"]]


def column(result: dict[str, Any], name: str) -> np.ndarray:
    return np.array([r[name] for r in answered(result) if r[name] is not None])


def loop_rate(result: dict[str, Any]) -> float:
    """Output tokens/s of a closed loop: its users times tokens over latency."""
    users = result["aggregated_metrics"]["num_concurrency"]
    return float(users * column(result, "num_output_tokens").mean()
                 / column(result, "e2e_latency").mean())  # fmt: skip


def report(run: Run, results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        all_of = result["aggregated_metrics"]
        ttft, tpot = 1000 * column(result, "ttft"), 1000 * column(result, "tpot")
        rows.append([
            all_of["scenario"], all_of["num_concurrency"], all_of["num_completed_requests"],
            float(column(result, "num_input_tokens").mean()),
            all_of["mean_output_throughput_tokens_per_s"],
            *(float(np.percentile(ttft, q)) for q in (50, 99)), float(np.median(tpot)),
        ])  # fmt: skip
    run.table("genai_bench", COLUMNS, rows, caption="genai-bench, a closed loop")
    run.metric("most_output_tokens", max(row[4] for row in rows), "tok/s")
    scenarios = sorted({row[0] for row in rows})
    run.figure(
        "genai_bench",
        kind="line",
        title="genai-bench: throughput against the time per token",
        x_label="TPOT, median (ms)",
        y_label="output tokens/s",
        series=[
            {
                "label": name,
                "x": [row[7] for row in rows if row[0] == name],
                "y": [row[4] for row in rows if row[0] == name],
            }
            for name in scenarios
        ],
    )


def check(run: Run, results: list[dict[str, Any]]) -> None:
    """No failed request, and the two formulas, for every single request."""
    failed = sum(result["aggregated_metrics"]["num_error_requests"] for result in results)
    run.check_equal("failed requests", failed, 0)
    worst = 0.0
    for result in results:
        for r in answered(result):
            if r["tpot"] is not None:
                tpot = (r["e2e_latency"] - r["ttft"]) / (r["num_output_tokens"] - 1)
                worst = max(worst, abs(r["tpot"] - tpot))
        for name in ("ttft", "tpot"):
            told = result["aggregated_metrics"]["stats"][name]["p50"]
            worst = max(worst, abs(told - float(np.median(column(result, name)))))
    run.check_equal("its times differ from the formulas by more than 1 µs", worst > 1e-6, False)


async def beside_our_own(run: Run, results: list[dict[str, Any]], args: Namespace) -> None:
    rows = []
    async with connected(args.base_url, args.timeout) as server:
        for number, result in enumerate(results):
            all_of = result["aggregated_metrics"]
            users, requests = all_of["num_concurrency"], len(answered(result))
            shapes = [(r["num_input_tokens"], r["num_output_tokens"]) for r in answered(result)]
            asked = prompts(model_directory(args), [length for length, _ in shapes], number)
            latency = await closed_loop(server, asked, [out for _, out in shapes], users)
            ours = users * float(np.mean([out for _, out in shapes])) / latency
            rows.append([all_of["scenario"], users, requests, loop_rate(result), ours])
            run.compare(f"{all_of['scenario']}_at_{users}", loop_rate(result), ours, "tok/s")
    columns = ["scenario", "concurrency", "requests", "genai-bench, tok/s", "our client, tok/s"]
    run.table("beside our own", columns, rows, caption="users * tokens / latency, of both")


def prompts(model: Path, lengths: list[int], seed: int) -> list[str]:
    """Windows of the standard library's sources with so many tokens each, up to a few."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # it warns that the text is longer than the model's context
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n".join(read_corpus("stdlib", TEXT_BYTES)))["input_ids"]
    chance = random.Random(seed)
    starts = [chance.randrange(len(ids) - length) for length in lengths]
    return [
        tokenizer.decode(ids[start : start + length])
        for start, length in zip(starts, lengths, strict=True)
    ]


async def closed_loop(server: Server, asked: list[str], new_tokens: list[int], users: int) -> float:
    """The mean latency in seconds of chats, `users` at a time, with answers of exactly so long."""
    places = asyncio.Semaphore(users)

    async def one(prompt: str, length: int) -> float:
        async with places:
            started = time.perf_counter()
            stream = await server.client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=length,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                pass
            return time.perf_counter() - started

    pairs = zip(asked, new_tokens, strict=True)
    return float(np.mean(await asyncio.gather(*(one(*pair) for pair in pairs))))


if __name__ == "__main__":
    script.exit(main)
