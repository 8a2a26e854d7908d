"""Read what genai-bench wrote, check its formulas, and hold it against a client of our own.

genai-bench's users are a closed loop: each sends its next request when it has its answer. Its TTFT
ends with the first piece of text, its TPOT is (latency - TTFT) / (output tokens - 1). Both are
computed again here from the single requests. A scenario's prompt length is the text's; what the
server counts, and stands here, has its chat template around it.

With --base-url the same load is sent by our own client: as many users, requests drawn by
genai-bench's own sampler. In a closed loop of c users the throughput is c * tokens / latency, for
both in the same way, whatever start and end the run has.

Run, after `bash chapter07-sglang/code/genai_bench.sh`:
    python chapter07-sglang/code/read_genai_bench.py build/genai_bench/run
    python chapter07-sglang/code/read_genai_bench.py build/genai_bench/run \
        --base-url http://127.0.0.1:8200/v1

You should see: a row for each scenario and concurrency, no failed request, the same medians from
the single requests, and with --base-url our own client's throughput beside it: within 5 % on a
server whose processor the client does not share.
"""

import asyncio
import json
import time
import warnings
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from distlab import script
from distlab.display import side_by_side
from distlab.errors import RunError, UsageError
from distlab.run import Run
from distlab.serving.clients import connected
from distlab.serving.tiny_model import add_model_flags, model_directory

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke"}, "laptop": {"size": "laptop"}, "gpu": {"size": "gpu"},
}  # fmt: skip
COLUMNS = ["scenario", "concurrency", "requests", "prompt tokens, measured",
           "output tok/s", "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms"]  # fmt: skip

DRAWING_S = 120.0


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
            if not answered(found):
                raise RunError(f"{path}: no request was answered; its error_message tells why")
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
    run.check_below("its times less the formulas', at most", 1e6 * worst, 1.0, "µs")


async def beside_our_own(run: Run, results: list[dict[str, Any]], args: Namespace) -> None:
    """As many requests, drawn by genai-bench's own sampler, from as many users of our client."""
    rows = []
    wanted = [
        (r["aggregated_metrics"]["scenario"], len(answered(r))) for r in results
    ]  # fmt: skip
    # In a process of its own, since genai-bench patches asyncio's sockets and threads.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        drawn = apart.submit(draw, str(model_directory(args)), wanted).result(timeout=DRAWING_S)
    async with connected(args.base_url, args.timeout) as server:
        for result, requests in zip(results, drawn, strict=True):
            all_of = result["aggregated_metrics"]
            name, users = all_of["scenario"], all_of["num_concurrency"]
            asked = [body_of(server.model, *request) for request in requests]
            seen = await closed_loop(args.base_url, args.timeout, asked, users)
            theirs = loop_rate(result)
            ours = users * sum(one.tokens for one in seen) / sum(one.seconds for one in seen)
            rows.append([
                name, users, float(column(result, "num_input_tokens").mean()),
                float(np.mean([one.prompt_tokens for one in seen])),
                *side_by_side(theirs, ours),
                1000 * float(np.median(column(result, "ttft"))),
                1000 * float(np.median([one.ttft for one in seen])),
            ])  # fmt: skip
            run.compare(f"{name}_at_{users}", theirs, ours, "tok/s")
    columns = ["scenario", "concurrency", "prompt tokens, genai-bench", "ours",
               "genai-bench, tok/s", "our client, tok/s", "difference, %",
               "TTFT p50, genai-bench, ms", "our client, ms"]  # fmt: skip
    run.table("beside our own", columns, rows, caption="users * tokens / latency, of both")


def draw(model: str, wanted: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """For each scenario so many prompts with their answers' lengths, drawn as genai-bench does."""
    warnings.filterwarnings("ignore")  # of gevent, that it patches what is imported already
    from genai_bench.data.config import DatasetConfig
    from genai_bench.data.loaders.factory import DataLoaderFactory
    from genai_bench.sampling.text import TextSampler
    from genai_bench.scenarios.base import Scenario
    from transformers import AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # it warns that the text is longer than the model's context
    config = DatasetConfig.from_cli_args()
    lines = DataLoaderFactory.load_data_for_task("text-to-text", config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sampler = TextSampler(tokenizer, "", "text", lines, dataset_config=config)
    requests = [
        [sampler.sample(Scenario.from_string(name)) for _ in range(n)] for name, n in wanted
    ]
    return [[(one.prompt, one.max_tokens) for one in some] for some in requests]


def body_of(model: str, prompt: str, max_tokens: int) -> bytes:
    """A chat as genai-bench sends it."""
    return json.dumps({
        "model": model, "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip


@dataclass
class Seen:
    """One request: seconds to the first text and to the end, and tokens as the server counts."""

    ttft: float
    seconds: float
    prompt_tokens: int
    tokens: int


async def closed_loop(
    base_url: str, timeout_s: float, bodies: list[bytes], users: int
) -> list[Seen]:
    """All of them, `users` at a time. Lean: the engine may share this processor."""
    import aiohttp

    waiting = iter(bodies)
    headers = {"content-type": "application/json", "connection": "close"}  # as genai-bench's

    async def one(http: aiohttp.ClientSession, body: bytes) -> Seen:
        started, first, usage = time.perf_counter(), 0.0, dict[str, int]()
        url = base_url.rstrip("/") + "/chat/completions"
        async with http.post(url, data=body, headers=headers) as answer:
            if answer.status != 200:
                raise RunError(f"{url} answered {answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if not first and b'"content":"' in line and b'"content":""' not in line:
                    first = time.perf_counter() - started
                if b'"usage":{' in line:
                    usage = json.loads(line.removeprefix(b"data:"))["usage"]
        seconds = time.perf_counter() - started
        if not usage:
            raise RunError(f"{url} ended a stream without usage; its tokens cannot be counted")
        return Seen(first or seconds, seconds, usage["prompt_tokens"], usage["completion_tokens"])

    async def user(http: aiohttp.ClientSession) -> list[Seen]:
        return [await one(http, body) for body in waiting]

    limit = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=limit, connector=connector) as http:
            each = await asyncio.gather(*(user(http) for _ in range(users)))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RunError(f"{base_url} failed under the load: {error or 'too late'}") from error
    return [seen for own in each for seen in own]


if __name__ == "__main__":
    script.exit(main)
