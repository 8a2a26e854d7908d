"""Tune SGLang: five settings under growing load, and the frontier of throughput and latency.

max-running-requests bounds how many requests decode together: more give more tokens/s, and each one
slower tokens. chunked-prefill-size bounds the tokens of a prompt in one step: much, and a long
prompt holds up everybody's next token; little, and it takes many steps to begin. schedule-policy
says who is taken from the queue: the oldest (fcfs), or who has most in the cache (lpm). And the
radix cache itself can be turned off.

Each setting gets a server of its own, and the same requests, half of them with one long beginning,
at each concurrency. A point is on the frontier when no other has both more tokens/s and a lower
latency; the verdicts choose from there, one for each goal.

Run (in the environment sglang):
    python chapter07-sglang/code/tune_sglang.py
    python chapter07-sglang/code/tune_sglang.py --model DIR --settings default fcfs --requests 64

You should see: a row for each setting and concurrency, the same answers from all of them (in
float32), and which setting to take for throughput, for TTFT and for TPOT. --figures DIR draws them.
"""

import asyncio
import random
import re
import sys
import urllib.request
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distlab import script
from distlab.data.corpus import read_corpus
from distlab.errors import RunError
from distlab.files import repo_root
from distlab.run import Run
from distlab.service import free_port, service
from distlab.serving.clients import Answer, connected, counted_tokens
from distlab.serving.frontier import report
from distlab.serving.tiny_model import add_model_flags, model_directory
from radix.sglang_server import refuse_without_sglang

SETTINGS: dict[str, list[str]] = {
    "default": [],
    "running-4": ["--max-running-requests", "4"],
    "chunk-64": ["--chunked-prefill-size", "64"],
    "fcfs": ["--schedule-policy", "fcfs"],
    "no-radix": ["--disable-radix-cache"],
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "size": "smoke", "settings": ["default", "no-radix"], "concurrency": [1, 8],
        "requests": 8, "max_tokens": 8, "shared_chars": 400,
    },
    "laptop": {
        "size": "laptop", "settings": list(SETTINGS), "concurrency": [1, 8, 32],
        "requests": 32, "max_tokens": 32, "shared_chars": 1500,
    },
    "gpu": {
        "size": "gpu", "settings": list(SETTINGS), "concurrency": [1, 16, 64, 256],
        "requests": 256, "max_tokens": 128, "shared_chars": 4000,
    },
}  # fmt: skip
OWN_CHARS, TEXT_BYTES = 100, 400_000
TIMEOUT_S = 300.0
CACHED = re.compile(r"^sglang:cached_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One setting at one concurrency."""

    setting: str
    concurrency: int
    answers: list[Answer]
    seconds: float
    cached: int  # prompt tokens that the radix cache had

    @property
    def rate(self) -> float:
        return counted_tokens(self.answers) / self.seconds

    @property
    def latency(self) -> float:
        """Seconds from the request to the end of its answer, the median request's."""
        return float(np.median([answer.seconds for answer in self.answers]))

    def percentile(self, name: str, q: float) -> float:
        """Of `ttft` or `tpot`, in seconds."""
        values = [getattr(answer, name) for answer in self.answers]
        return float(np.percentile([value for value in values if value is not None] or [0.0], q))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        refuse_without_sglang()
        model = model_directory(args)
        points = [
            point
            for setting in run.progress(args.settings, "settings")
            for point in measure(model, setting, args)
        ]
        report(run, points, "cached tokens", args.requests)
        check(run, args, points)
        say_verdicts(run, points)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add_model_flags(parser)
    add("--settings", nargs="+", choices=list(SETTINGS))
    add("--concurrency", nargs="+", type=script.positive_int, metavar="N", help="requests at once")
    add("--requests", type=script.positive_int, metavar="N", help="at each concurrency")
    add("--max-tokens", type=script.positive_int, metavar="N", help="of each answer")
    add("--shared-chars", type=script.positive_int, metavar="N", help="of the shared beginning")
    add("--seed", type=script.seed, default=0)
    return parser.parse_args(argv)


def measure(model: Path, setting: str, args: Namespace) -> list[Point]:
    """One server, loaded at each concurrency."""
    port = free_port()
    line = [sys.executable, "-m", "radix.sglang_server", "--model", str(model)]
    line += ["--preset", args.preset, "--port", str(port), *SETTINGS[setting]]
    url = f"http://127.0.0.1:{port}"
    with service(line, f"{url}/health", cwd=repo_root(), name=f"SGLang ({setting})"):
        return asyncio.run(sweep(url, setting, args))


async def sweep(url: str, setting: str, args: Namespace) -> list[Point]:
    points = []
    async with connected(f"{url}/v1", TIMEOUT_S) as server:
        await server.ask_all(prompts(args, "warm-up"), args.max_tokens, 8)
        for concurrency in args.concurrency:
            before = cached_tokens(url)
            asked = prompts(args, str(concurrency))
            answers, seconds = await server.ask_all(asked, args.max_tokens, concurrency)
            cached = cached_tokens(url) - before
            points.append(Point(setting, concurrency, answers, seconds, cached))
    return points


def cached_tokens(url: str) -> int:
    """Prompt tokens found in the radix cache since the server's start, from its /metrics."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        text = answer.read().decode()
    if "# TYPE sglang:" not in text:
        raise RunError(f"{url}/metrics has none of SGLang's metrics; see --enable-metrics")
    return int(sum(float(value) for value in CACHED.findall(text)))


def prompts(args: Namespace, key: str) -> list[str]:
    """Windows of the standard library's sources, every other one with a beginning in common."""
    text = "\n".join(read_corpus("stdlib", TEXT_BYTES))
    chance = random.Random(f"{args.seed} {key}")

    def window(length: int) -> str:
        start = chance.randrange(len(text) - length)
        return text[start : start + length]

    shared = window(args.shared_chars)
    return [
        (shared if number % 2 else "") + window(chance.randint(OWN_CHARS // 2, 2 * OWN_CHARS))
        for number in range(args.requests)
    ]


def check(run: Run, args: Namespace, points: list[Point]) -> None:
    """A setting changes when a token is computed, never which; and what is off finds nothing."""
    for concurrency in args.concurrency:
        said = [[a.text for a in p.answers] for p in points if p.concurrency == concurrency]
        run.check_equal(
            f"all settings give the same answers at concurrency {concurrency}",
            said,
            [said[0]] * len(said),
        )
    # Requests that all come at once may all be computed before one of them is in the cache.
    off = [p for p in points if p.setting == "no-radix"]
    alone = [p for p in points if p not in off and p.concurrency == 1 and args.requests > 3]
    wrong = [p for p in off if p.cached] + [p for p in alone if not p.cached]
    run.check_equal("points whose cached tokens do not fit their setting", len(wrong), 0)


def say_verdicts(run: Run, points: list[Point]) -> None:
    """Which setting for which goal, of those measured here."""
    busiest = max(point.concurrency for point in points)
    loaded = [point for point in points if point.concurrency == busiest]
    soonest = min(loaded, key=lambda p: p.percentile("ttft", 99))
    steadiest = min(loaded, key=lambda p: p.percentile("tpot", 99))
    most = max(points, key=lambda p: p.rate)
    run.print(f"verdict: the most tokens/s: {most.setting} at concurrency {most.concurrency}")
    run.print(f"verdict: the first token soonest with {busiest} at once: {soonest.setting}")
    run.print(f"verdict: the steadiest stream with {busiest} at once: {steadiest.setting}")


if __name__ == "__main__":
    script.exit(main)
