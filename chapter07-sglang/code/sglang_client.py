"""Ask SGLang under load, and see what its radix cache finds: to the token, and in time.

Through OpenAI's interface, so with the official `openai` package. First the load of chapter 6's
client: throughput, TTFT and TPOT against the concurrency. Then prompts that share their beginning,
sent as token ids: the first finds nothing in the flushed cache and computes it, the others find all
of it, since a radix tree matches at any token and not in whole blocks. The server says so in
usage.prompt_tokens_details.cached_tokens (with --enable-cache-report), and it is predicted here.

Run, with a server in another terminal (`bash chapter07-sglang/code/sglang_server.sh`):
    python chapter07-sglang/code/sglang_client.py
    python chapter07-sglang/code/sglang_client.py --shared 1000 --concurrency 1 16 --reference

You should see: cached tokens as predicted, first tokens that come sooner with a cached beginning,
and, with --reference, the answers that transformers gives.
"""

import asyncio
import random
import statistics
import time
from argparse import Namespace
from typing import Any

import httpx
import numpy as np

from distlab import script
from distlab.errors import RunError
from distlab.run import Run
from distlab.serving.clients import Answer, Server, add_server_flags, connected
from distlab.serving.tiny_model import tiny_model, transformers_greedy

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"requests": 8, "max_tokens": 8, "concurrency": [1, 4], "shared": 200},
    "laptop": {"requests": 32, "max_tokens": 32, "concurrency": [1, 4, 16], "shared": 1000},
    "gpu": {"requests": 256, "max_tokens": 128, "concurrency": [1, 8, 64, 256], "shared": 1900},
}
URL = "http://127.0.0.1:8200/v1"
TINY = "tiny"
OWN_TOKENS, FOLLOWERS, ROUNDS = 7, 4, 3
TOKEN_IDS = range(1, 400)  # which every vocabulary has
COLUMNS = ["concurrency", "requests", "output tok/s", "TTFT p50, ms", "TTFT p99, ms",
           "TPOT p50, ms", "TPOT p99, ms"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        asyncio.run(drive(run, args))
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_server_flags(parser)
    parser.set_defaults(base_url=URL)
    add = parser.add_argument
    add("--requests", type=script.positive_int, metavar="N", help="at each concurrency")
    add("--concurrency", type=script.positive_int, nargs="+", metavar="N", help="requests at once")
    add("--shared", type=script.positive_int, metavar="TOKENS", help="of the shared beginning")
    add("--reference", nargs="?", const=TINY, metavar="DIR",
        help="compare with transformers, from this folder (default: the tiny model's)")  # fmt: skip
    add("--seed", type=script.seed, default=0)
    return parser.parse_args(argv)


async def drive(run: Run, args: Namespace) -> None:
    async with connected(args.base_url, args.timeout, args.model) as server:
        run.print(f"job: {server.model} at {args.base_url}")
        await load(run, server, args)
        await share(run, server, args)
        if args.reference is not None:
            asked = prompts(4, 0)
            answered = [(await server.ask(p, args.max_tokens)).text for p in asked]
            run.check_equal("answers equal transformers'", answered, reference(args, asked))


async def load(run: Run, server: Server, args: Namespace) -> None:
    """A closed loop at each concurrency."""
    await server.ask_all(prompts(4, -1), args.max_tokens, 4)  # warms up
    rows, reasons = [], []
    for level, concurrency in enumerate(args.concurrency):
        asked = prompts(args.requests, level)
        made, seconds = await server.ask_all(asked, args.max_tokens, concurrency)
        counts = [answer.tokens for answer in made]
        rate = None if None in counts else sum(filter(None, counts)) / seconds
        rows.append([concurrency, len(made), rate, *percentiles(made)])
        reasons += [answer.finish_reason for answer in made]
        run.metric(f"output_tokens_at_{concurrency}", rate, "tok/s")
    run.table("load", COLUMNS, rows, caption="a closed loop: an answer, then the next request")
    endings = sum(reason not in ("length", "stop") for reason in reasons)
    run.check_equal("requests without an ordinary end", endings, 0)


def prompts(count: int, level: int) -> list[str]:
    """Prompts of different lengths; no two begin alike, so that no cached prefix helps."""
    return [
        f"# {level}.{i} of {count}\ndef function_{i}(value):\n" + "    value += 1\n" * (i % 8)
        for i in range(count)
    ]


def percentiles(answers: list[Answer]) -> list[float | None]:
    """TTFT's and TPOT's median and 99th percentile, in milliseconds."""
    first = [answer.ttft for answer in answers]
    each = [answer.tpot for answer in answers if answer.tpot is not None]
    return [
        1000 * float(np.percentile(values, q)) if values else None
        for values in (first, each)
        for q in (50, 99)
    ]


async def share(run: Run, server: Server, args: Namespace) -> None:
    """Prompts with one beginning of --shared tokens, each round from an empty cache."""
    chance = random.Random(args.seed)
    cold, warm, found = list[float](), list[float](), list[int]()
    for _ in range(ROUNDS):
        await flush(args)
        beginning = chance.choices(TOKEN_IDS, k=args.shared)
        for follower in range(FOLLOWERS + 1):
            # Its first own token is another one in each, so that they share the beginning only.
            own = [TOKEN_IDS[follower], *chance.choices(TOKEN_IDS, k=OWN_TOKENS - 1)]
            cached, ttft = await first_token(server, beginning + own)
            found.append(cached)
            (warm if follower else cold).append(ttft)
    predicted = [args.shared * (number > 0) for number in range(FOLLOWERS + 1)] * ROUNDS
    run.check_equal("cached tokens of each request are those that it shares", found, predicted)
    run.compare("cached_share", args.shared * FOLLOWERS / prompt_tokens(args),
                sum(found) / ROUNDS / prompt_tokens(args))  # fmt: skip
    run.table(
        "shared beginning",
        ["request", "prompt tokens", "cached, predicted", "cached, measured", "TTFT p50, ms"],
        [
            ["the first", args.shared + OWN_TOKENS, 0, found[0], 1000 * statistics.median(cold)],
            ["the others", args.shared + OWN_TOKENS, args.shared, found[1],
             1000 * statistics.median(warm)],
        ],
        caption=f"{ROUNDS} rounds, each from an empty cache, one request after the other",
    )  # fmt: skip
    run.metric("ttft_cold_over_cached", statistics.median(cold) / statistics.median(warm))


def prompt_tokens(args: Namespace) -> int:
    """Of one round."""
    return (args.shared + OWN_TOKENS) * (FOLLOWERS + 1)


async def flush(args: Namespace) -> None:
    """Empty the radix cache; OpenAI's interface has no word for that."""
    url = args.base_url.rstrip("/").removesuffix("/v1") + "/flush_cache"
    async with httpx.AsyncClient(timeout=args.timeout, trust_env=False) as client:
        answer = await client.post(url)
    if answer.status_code != 200:
        raise RunError(f"{url} answered {answer.status_code}; is it an SGLang server, and idle?")


async def first_token(server: Server, prompt: list[int]) -> tuple[int, float]:
    """One token after `prompt`: how many of it were cached, and the seconds until it came."""
    started = time.perf_counter()
    made = await server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=1, temperature=0.0
    )
    seconds = time.perf_counter() - started
    if made.usage is None or made.usage.prompt_tokens_details is None:
        raise RunError("the server tells no cached tokens; start it with --enable-cache-report")
    return made.usage.prompt_tokens_details.cached_tokens or 0, seconds


def reference(args: Namespace, asked: list[str]) -> list[str]:
    """What transformers says to them, greedily and in float32, with the model of --reference."""
    from transformers import AutoTokenizer

    folder = tiny_model(args.preset) if args.reference == TINY else args.reference
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = transformers_greedy(folder, asked, args.max_tokens, "float32")
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


if __name__ == "__main__":
    script.exit(main)
