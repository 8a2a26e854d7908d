"""Tune vLLM: sweep its four settings under growing load, and read the frontier that they span.

There is no best setting, only one for a goal. max-num-seqs bounds how many requests share a step:
more give more tokens/s, and each request slower ones. max-num-batched-tokens bounds the tokens of a
step: much, and a long prompt holds up everybody's next token; little, and prompts take many steps
to begin. The block size is how finely the cache is dealt out, and how short a beginning can be
shared. Prefix caching costs a hash per block, and saves the whole beginning where prompts share it.

Each setting gets an engine in a process of its own, and the same requests, half of them with one
long beginning, at each concurrency. A point is on the frontier when no other has both more output
tokens/s and a lower latency; the verdicts choose from there, one for each goal.

Run (in the environment vllm):
    python chapter06-vllm/code/tune_vllm.py
    python chapter06-vllm/code/tune_vllm.py --model DIR --settings seqs-4 default --requests 64

You should see: a table with a row for each setting and concurrency, the same tokens from all of
them (in float32), and which setting to take for throughput, for TTFT and for TPOT. --figures DIR
draws the frontier.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlab import script
from distlab.errors import UsageError
from distlab.hardware import has_cuda
from distlab.model import read_config
from distlab.run import Run
from distlab.serving.frontier import report
from distlab.serving.tiny_model import add_model_flags, model_directory
from inference.engine_process import Load, Prompts, engine_process
from inference.vllm_settings import CPU_CACHE_BYTES, refuse

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "seqs-4": {"max_num_seqs": 4},
    "tokens-128": {"max_num_batched_tokens": 128, "max_num_seqs": 64},
    "block-128": {"block_size": 128},
    "no-prefix-cache": {"enable_prefix_caching": False},
}
BASE = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "block_size": 32}
PRESETS = {
    "smoke": {
        "size": "smoke", "dtype": "float32", "settings": ["default", "seqs-4"],
        "concurrency": [1, 8], "requests": 8, "new_tokens": 8, "shared_tokens": 64,
    },
    "laptop": {
        "size": "laptop", "dtype": "float32", "settings": list(SETTINGS),
        "concurrency": [1, 8, 32], "requests": 32, "new_tokens": 32, "shared_tokens": 192,
    },
    "gpu": {
        "size": "gpu", "dtype": "bfloat16", "settings": list(SETTINGS),
        "concurrency": [1, 16, 64, 256], "requests": 256, "new_tokens": 128, "shared_tokens": 1024,
    },
}  # fmt: skip
PROMPT_TOKENS, OWN_TOKENS = 41, 24


@dataclass(frozen=True)
class Point:
    """One setting at one concurrency."""

    setting: str
    concurrency: int
    load: Load

    @property
    def rate(self) -> float:
        return self.load.tokens_per_second

    @property
    def latency(self) -> float:
        """Seconds from the request to the end of its answer, the median request's."""
        return self.load.percentile("ttft", 50) + self.load.percentile("tpot", 50) * (
            len(self.load.tokens[0]) - 1
        )

    @property
    def cached(self) -> int:
        return self.load.cached

    def percentile(self, name: str, q: float) -> float:
        """Of `ttft` or `tpot`, in seconds."""
        return self.load.percentile(name, q)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        model = model_directory(args)
        refuse(model, longest(args))
        points = [
            point
            for setting in run.progress(args.settings, "settings")
            for point in sweep(model, setting, args)
        ]
        report(run, points, "from cache", args.requests)
        check_same_tokens(run, args, points)
        say_verdicts(run, points)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add_model_flags(parser)
    add("--dtype", choices=["float32", "bfloat16"])
    add("--settings", nargs="+", choices=list(SETTINGS))
    add("--concurrency", nargs="+", type=script.positive_int, metavar="N", help="requests at once")
    add("--requests", type=script.positive_int, metavar="N", help="at each concurrency")
    add("--new-tokens", type=script.positive_int, metavar="N", help="of each answer")
    add("--shared-tokens", type=script.positive_int, metavar="N", help="of the shared beginning")
    add("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        raise UsageError(f"--new-tokens {args.new_tokens} has no time per token; use 2 or more")
    return args


def longest(args: Namespace) -> int:
    return max(2 * PROMPT_TOKENS, args.shared_tokens + OWN_TOKENS) + args.new_tokens


def sweep(model: Path, setting: str, args: Namespace) -> list[Point]:
    """One engine, loaded at each concurrency."""
    prompts = Prompts(model, read_config(model).vocab_size, args.seed)
    points = []
    with engine_process("vllm", model, args.dtype, engine_options(setting, args)) as engine:
        engine.generate(batch(prompts, args, "warm-up"), args.new_tokens)
        for concurrency in args.concurrency:
            asked = batch(prompts, args, str(concurrency))
            load = engine.generate(asked, args.new_tokens, concurrency)
            points.append(Point(setting, concurrency, load))
    return points


def engine_options(setting: str, args: Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: those of all settings, then the setting's own."""
    base: dict[str, Any] = {**BASE, "max_model_len": longest(args), "enforce_eager": not has_cuda()}
    if has_cuda():
        base |= {"gpu_memory_utilization": 0.85, "multiprocessing": True}
        del base["block_size"]  # the attention kernel's own choice, unless it is what is tuned
    else:
        cache = CPU_CACHE_BYTES[args.preset]
        base |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache}
    return {**base, **SETTINGS[setting]}


def batch(prompts: Prompts, args: Namespace, key: str) -> list[list[int]]:
    """Requests of mixed lengths, every other one with the beginning that they share."""
    half = args.requests // 2
    own = prompts.mixed(args.requests - half, PROMPT_TOKENS, f"own {key}")
    shared = prompts.shared(half, args.shared_tokens, OWN_TOKENS, f"shared {key}")
    mixed = [prompt for pair in zip(own, shared, strict=False) for prompt in pair]
    return mixed + own[half:]


def check_same_tokens(run: Run, args: Namespace, points: list[Point]) -> None:
    """A setting changes when a token is computed, never which; and limits are kept."""
    if args.dtype == "float32":
        for concurrency in args.concurrency:
            made = [p.load.tokens for p in points if p.concurrency == concurrency]
            run.check_equal(
                f"all settings give the same tokens at concurrency {concurrency}",
                made,
                [made[0]] * len(made),
            )
    wanted = len(points) * args.requests * args.new_tokens
    got = sum(len(tokens) for point in points for tokens in point.load.tokens)
    run.check_equal("output tokens of all points", got, wanted)


def say_verdicts(run: Run, points: list[Point]) -> None:
    """Which setting for which goal, of those measured here."""
    busiest = max(point.concurrency for point in points)
    loaded = [point for point in points if point.concurrency == busiest]
    goals = [
        ("the most tokens/s, as for offline work", max(points, key=lambda p: p.rate)),
        (
            f"the first token soonest with {busiest} at once",
            min(loaded, key=lambda p: p.percentile("ttft", 99)),
        ),
        (
            f"the steadiest stream with {busiest} at once",
            min(loaded, key=lambda p: p.percentile("tpot", 99)),
        ),
    ]
    for goal, point in goals:
        run.print(f"verdict: {goal}: {point.setting} at concurrency {point.concurrency}")


if __name__ == "__main__":
    script.exit(main)
