"""Ask an OpenAI server under load, and measure what its users feel: TTFT, TPOT, throughput.

The client is the official `openai` package, so it drives any server that speaks OpenAI's interface:
vLLM's, paged_engine's, a paid one. Answers are streamed. TTFT, the time to the first token, has the
wait in the queue and the prompt's computation; TPOT, the time per output token after it, is one
decoding step. More requests at once raise the throughput of all and the TPOT of each, since a step
of many takes longer than a step of one; where the batch is full, requests wait and TTFT explodes.

Run, with a server in another terminal (`bash chapter06-vllm/code/vllm_server.sh`):
    python chapter06-vllm/code/vllm_client.py
    python chapter06-vllm/code/vllm_client.py --base-url http://127.0.0.1:8000/v1 --concurrency 1 16

You should see: a throughput that grows with the concurrency, a TPOT that grows too, and streams
that say word for word what the server says in one piece.
"""

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from distlab import script
from distlab.run import Run
from distlab.serving.clients import Answer, Server, add_server_flags, connected
from distlab.serving.tiny_model import tiny_model, transformers_greedy

PRESETS = {
    "smoke": {"requests": 8, "max_tokens": 8, "concurrency": [1, 4]},
    "laptop": {"requests": 32, "max_tokens": 32, "concurrency": [1, 4, 16]},
    "gpu": {"requests": 256, "max_tokens": 128, "concurrency": [1, 8, 64, 256]},
}
TINY = "tiny"
COLUMNS = [
    "concurrency",
    "requests",
    "output tok/s",
    "TTFT p50, ms",
    "TTFT p99, ms",
    "TPOT p50, ms",
    "TPOT p99, ms",
]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        asyncio.run(drive(run, args))
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_server_flags(parser)
    add = parser.add_argument
    add("--requests", type=script.positive_int, metavar="N", help="at each concurrency")
    add("--concurrency", type=script.positive_int, nargs="+", metavar="N", help="requests at once")
    add("--reference", nargs="?", const=TINY, metavar="DIR",
        help="compare with transformers, from this folder (default: the tiny model's)")  # fmt: skip
    return parser.parse_args(argv)


async def drive(run: Run, args: Namespace) -> None:
    """Load the server at each concurrency, and check what it said."""
    async with connected(args.base_url, args.timeout, args.model) as server:
        run.print(f"job: {server.model} at {args.base_url}")
        await server.ask_all(prompts(4, -1), args.max_tokens, 4)  # warms up
        rows, answers, rates = [], [], {}
        for level, concurrency in enumerate(args.concurrency):
            asked = prompts(args.requests, level)
            made, seconds = await server.ask_all(asked, args.max_tokens, concurrency)
            rates[concurrency] = tokens_per_second(made, seconds)
            rows.append([concurrency, len(made), rates[concurrency], *percentiles(made)])
            answers += list(zip(asked, made, strict=True))
        run.table("load", COLUMNS, rows, caption="a closed loop: an answer, then the next request")
        for concurrency, rate in rates.items():
            run.metric(f"output_tokens_at_{concurrency}", rate, "tok/s")
        draw(run, rows)
        await check(run, server, answers[-1], args)
        ended = [answer.finish_reason in ("length", "stop") for _, answer in answers]
        run.check_equal("requests without an ordinary end", ended.count(False), 0)
        if args.reference is not None:
            answered = [await server.ask_whole(p, args.max_tokens) for p in prompts(4, 0)]
            expected = transformers_answers(args)
            run.check_equal("answers equal transformers'", [text for text, _ in answered], expected)


def tokens_per_second(answers: Sequence[Answer], seconds: float) -> float | None:
    """None where the server does not tell how many tokens an answer has: unknown is not 0."""
    counts = [answer.tokens for answer in answers]
    return None if None in counts else sum(filter(None, counts)) / seconds


def prompts(count: int, level: int) -> list[str]:
    """Prompts of different lengths; no two begin alike, so that no cached prefix helps."""
    return [
        f"# {level}.{i} of {count}\ndef function_{i}(value):\n" + "    value += 1\n" * (i % 8)
        for i in range(count)
    ]


def percentiles(answers: Sequence[Answer]) -> list[float | None]:
    """TTFT's and TPOT's median and 99th percentile, in milliseconds."""
    first = [answer.ttft for answer in answers]
    each = [answer.tpot for answer in answers if answer.tpot is not None]
    return [
        1000 * float(np.percentile(values, q)) if values else None
        for values in (first, each)
        for q in (50, 99)
    ]


async def check(run: Run, server: Server, pair: tuple[str, Answer], args: Namespace) -> None:
    """One of the streamed answers again, in one piece and alone: the same text, as many tokens.

    Beside other requests a narrow type may round otherwise than alone, so both are asked again.
    """
    prompt, _ = pair
    streamed = await server.ask(prompt, args.max_tokens)
    text, tokens = await server.ask_whole(prompt, args.max_tokens)
    run.print(f"sample: {prompt.splitlines()[-1] + text!r}")
    run.check_equal("a stream says what the whole answer says", streamed.text, text)
    if tokens is None:
        run.print("tokens: unknown; this server tells no usage, so there is no throughput")
    else:
        run.check_equal("and counts as many tokens", streamed.tokens, tokens)


def transformers_answers(args: Namespace) -> list[str]:
    """What transformers says to the same prompts, greedily and in float32, from --reference."""
    from transformers import AutoTokenizer

    folder = tiny_model(args.preset) if args.reference == TINY else args.reference
    answers = transformers_greedy(folder, prompts(4, 0), args.max_tokens, "float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def draw(run: Run, rows: Sequence[Sequence[Any]]) -> None:
    rows = [row for row in rows if row[2] is not None and row[5] is not None]
    if not rows:
        return
    run.figure(
        "load",
        kind="line",
        title="what more requests at once do to throughput and to each token",
        x_label="TPOT, median (ms)",
        y_label="output tokens/s",
        series=[{"label": "server", "x": [row[5] for row in rows], "y": [row[2] for row in rows]}],
    )


if __name__ == "__main__":
    script.exit(main)
