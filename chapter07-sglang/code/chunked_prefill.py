"""A long prompt among others' answers: what it does to their TPOT, and what chunks do about it.

A step takes about a + b * tokens: what it costs at all, and each token's part. Whoever decodes gets
a token a step, so a prompt of L tokens in one step makes everybody wait a + b * L. In steps of at
most C tokens, D of them the others' next ones, nobody waits longer than one step, and the prompt
pays the constant, and the others' tokens, once for each of its k = ceil(L / (C - D)) chunks:

    worst gap = a + b * min(C, L + D)          TTFT of the prompt = k * (a + b * D) + b * L

a and b are fitted to two chunk sizes, the others are predicted by them. Attention to a longer
context makes the later chunks slower than the first, which the line does not know.

Run:
    python chapter07-sglang/code/chunked_prefill.py --figures build/figures
    python chapter07-sglang/code/chunked_prefill.py --sglang-url http://127.0.0.1:30000

You should see: the worst gap growing with the chunk, the prompt's TTFT falling with it, as
predicted: a frontier from which to choose by the SLO. With --sglang-url a running SGLang is asked
too; its chunk is its own (--chunked-prefill-size, and --enable-mixed-chunk to decode meanwhile).

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve"
(OSDI 2024).
"""

import asyncio
import json
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np

from distlab import script
from distlab.display import side_by_side
from distlab.errors import RunError, UsageError
from distlab.hardware import chosen_device
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.loading import load_tokenizer, read_shape
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke", "decoding": 4, "prompt_tokens": 512, "chunks": [32, 128, 544],
              "repeats": 3},
    "laptop": {"size": "laptop", "decoding": 8, "prompt_tokens": 1536,
               "chunks": [32, 64, 128, 256, 512, 1024, 1544], "repeats": 5},
    "gpu": {"size": "laptop", "decoding": 32, "prompt_tokens": 1900,
            "chunks": [64, 128, 256, 512, 1024, 1932], "repeats": 9},
}  # fmt: skip
CONTEXT = 32  # tokens of each of the others' prompts
AHEAD = 4  # steps that the others decode before the long prompt comes
VOCABULARY = 256  # random tokens: every model here has more


@dataclass
class Seen:
    """One run: the long prompt's answer, seconds to its first token, and the others' worst gap."""

    answer: list[int]
    ttft: float
    gap: float


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        seen = sweep(run, args)
        show(run, args, seen)
        if args.sglang_url:
            ask_sglang(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--decoding", **positive, help="other requests, which are being answered")
    parser.add_argument("--prompt-tokens", **positive, help="of the long prompt")
    parser.add_argument("--chunks", **positive, nargs="+", metavar="C", help="tokens of a step")
    parser.add_argument("--repeats", **positive, help="of each chunk size, in turns")
    parser.add_argument("--sglang-url", metavar="URL", help="of a running SGLang server")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    args.chunks = sorted(set(args.chunks))
    if len(args.chunks) < 3:
        raise UsageError(f"--chunks {args.chunks}: two are fitted, one predicted; use 3 or more")
    if args.chunks[0] <= args.decoding:
        raise UsageError(
            f"--chunks {args.chunks[0]} has no room beside {args.decoding} that decode; "
            f"use {args.decoding + 1} or more"
        )
    room = read_shape(model_directory(args)).max_length
    if args.prompt_tokens >= room:
        raise UsageError(
            f"--prompt-tokens {args.prompt_tokens} does not fit into the model's {room} positions; "
            f"use {room - 1} or fewer"
        )
    return args


def prompts_of(args: Namespace) -> tuple[list[list[int]], list[int]]:
    """The others' prompts and the long one."""
    draw = np.random.default_rng(0)
    others = draw.integers(VOCABULARY, size=(args.decoding, CONTEXT)).tolist()
    return others, draw.integers(VOCABULARY, size=args.prompt_tokens).tolist()


def sweep(run: Run, args: Namespace) -> dict[int, list[Seen]]:
    """Every chunk size, in turns, on one model."""
    tokens = args.prompt_tokens + args.decoding * (CONTEXT + 2 * AHEAD + args.prompt_tokens)
    config = EngineConfig(
        model_directory(args), device=chosen_device(args.device), num_blocks=tokens // 16 + 1,
        max_sequences=args.decoding + 1, prefix_caching=False,
    )  # fmt: skip
    runner, tokenizer = ModelRunner(config), load_tokenizer(config.model)
    engines = {
        chunk: Engine(replace(config, max_batch_tokens=chunk), runner, tokenizer)
        for chunk in args.chunks
    }
    for engine in engines.values():  # the first run of a size pays for its memory
        measure_once(args, engine)
    seen: dict[int, list[Seen]] = {chunk: [] for chunk in args.chunks}
    for _ in run.progress(range(args.repeats), "turns"):
        for chunk, engine in engines.items():
            seen[chunk].append(measure_once(args, engine))
    runner.close()
    return seen


def measure_once(args: Namespace, engine: Engine) -> Seen:
    """Some decode; the long prompt comes; until its first token every step's time is their gap."""
    others, long = prompts_of(args)
    endless = SamplingParams(temperature=0, max_tokens=engine.max_model_len, ignore_eos=True)
    names = [engine.add_request(prompt, endless) for prompt in others]
    begun = set[str]()
    while len(begun) < len(names):
        begun |= {output.request_id for output in engine.step()}
    for _ in range(AHEAD):
        engine.step()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    name = engine.add_request(long, params)
    started = last = time.perf_counter()
    gaps, answer, ttft = list[float](), list[int](), 0.0
    while len(answer) < params.max_tokens:
        outputs = engine.step()
        now = time.perf_counter()
        if not answer:
            gaps.append(now - last)
            ttft = now - started
        last = now
        answer += [token for one in outputs if one.request_id == name for token in one.token_ids]
    for other in names:
        engine.cancel(other)
    return Seen(answer, ttft, max(gaps))


def show(run: Run, args: Namespace, seen: dict[int, list[Seen]]) -> None:
    """Lower quartiles of the repeats: what disturbs a step can only make it longer."""
    gaps, ttfts = ({chunk: float(np.quantile([getattr(one, name) for one in some], 0.25))
                    for chunk, some in seen.items()} for name in ("gap", "ttft"))  # fmt: skip
    # The fit is to whole prompts in chunks: their mean step, not the worst, which noise makes.
    fitted = args.chunks[0], args.chunks[-1]
    steps = {chunk: -(-args.prompt_tokens // (chunk - args.decoding)) for chunk in args.chunks}
    tokens = {chunk: args.decoding + args.prompt_tokens / steps[chunk] for chunk in args.chunks}
    small, large = (ttfts[chunk] / steps[chunk] for chunk in fitted)
    b = (large - small) / (tokens[fitted[1]] - tokens[fitted[0]])
    a = small - b * tokens[fitted[0]]
    run.metric("step_constant", a, "s", "a")
    run.metric("step_token", b, "s", "b")
    rows = []
    for chunk in args.chunks:
        worst = a + b * min(chunk, args.decoding + args.prompt_tokens)
        total = steps[chunk] * (a + b * args.decoding) + b * args.prompt_tokens
        rows.append([chunk, "fitted" if chunk in fitted else "predicted",
                     *side_by_side(worst, gaps[chunk], 1e3),
                     *side_by_side(total, ttfts[chunk], 1e3)])  # fmt: skip
    run.table(
        "chunks", ["tokens of a step", "the line is", "predicted gap, ms", "measured gap, ms",
                   "error, %", "predicted TTFT, ms", "measured TTFT, ms", "error, %"], rows,
        caption=f"a prompt of {args.prompt_tokens} tokens among {args.decoding} that decode",
    )  # fmt: skip
    run.figure(
        "chunked_prefill", kind="line", log_x=True, log_y=True,
        title="A long prompt in chunks: its own TTFT against the others' worst gap",
        x_label="worst gap of those who decode, ms", y_label="TTFT of the long prompt, ms",
        series=[{"label": "measured", "x": [row[3] for row in rows], "y": [r[6] for r in rows]},
                {"label": "predicted", "x": [row[2] for row in rows], "y": [r[5] for r in rows],
                 "dashed": True}],
    )  # fmt: skip
    answers = [one.answer for some in seen.values() for one in some]
    run.check_equal("the prompt's answer, whatever the chunks", answers, answers[:1] * len(answers))
    pairs = zip(seen[fitted[1]], seen[fitted[0]], strict=True)
    run.check_within("worst gap, one chunk to the smallest", [x.gap / y.gap for x, y in pairs],
                     at_least=1.0)  # fmt: skip


def ask_sglang(run: Run, args: Namespace) -> None:
    """The same traffic by HTTP, on the chunk size that the server has."""
    try:
        seen, chunk = asyncio.run(by_http(args))
    except httpx.HTTPError as error:
        raise RunError(
            f"--sglang-url {args.sglang_url} does not answer ({type(error).__name__}: {error}); "
            "start SGLang there, or name another"
        ) from error
    run.metric("sglang_chunk", chunk, "tokens")
    run.metric("sglang_ttft", float(np.median([one.ttft for one in seen])), "s", "the long prompt")
    run.metric("sglang_worst_gap", float(np.median([one.gap for one in seen])), "s", "the others")


async def by_http(args: Namespace) -> tuple[list[Seen], int]:
    others, long = prompts_of(args)
    limits = httpx.Limits(max_connections=args.decoding + 2)
    async with httpx.AsyncClient(base_url=args.sglang_url, timeout=60, limits=limits) as client:
        info = (await client.get("/server_info")).raise_for_status().json()
        seen = []
        for turn in range(args.repeats + 1):  # the first one warms up
            shift = [
                [(token + turn) % VOCABULARY for token in prompt] for prompt in (*others, long)
            ]
            times: list[list[float]] = [[] for _ in others]
            tasks = [
                asyncio.create_task(stream(client, prompt, 4096, own))
                for prompt, own in zip(shift[:-1], times, strict=True)
            ]
            while min(map(len, times)) < AHEAD:
                if ended := [task for task in tasks if task.done()]:
                    await ended[0]
                    raise RunError("an answer of SGLang ended before the long prompt came")
                await asyncio.sleep(0.005)
            started, first = time.perf_counter(), list[float]()
            await stream(client, shift[-1], 1, first)
            ttft = first[0] - started
            await asyncio.sleep(ttft / 4)  # the token after the gap
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gaps = [b - a for own in times for a, b in zip(own, own[1:], strict=False)
                    if b > started and a < first[0]]  # fmt: skip
            seen.append(Seen([], ttft, max(gaps, default=ttft)))
    return seen[1:], int(info.get("chunked_prefill_size") or 0)


async def stream(
    client: httpx.AsyncClient, prompt: list[int], count: int, times: list[float]
) -> None:
    """Ask SGLang's own route for greedy tokens, and note when each comes."""
    question = {
        "input_ids": prompt, "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
    }  # fmt: skip
    async with client.stream("POST", "/generate", json=question) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if "error" in (told := json.loads(line.removeprefix("data: "))):
                    raise RunError(f"SGLang refuses the request: {told['error']}")
                times.append(time.perf_counter())


if __name__ == "__main__":
    script.exit(main)
