"""What each way of giving out cache memory wastes, and how many sequences fit because of it.

Nobody knows how long an answer becomes. A server that gives each request one contiguous piece of
cache must reserve for the worst case (--max-len), and most of it is never used. Were the lengths
known in advance, pieces of the right size would still leave holes between them that fit nobody, and
every piece would lie empty until its tokens come. Paging gives a block when the last one is full:
what a sequence wastes is the empty end of its last block, (B - 1) / 2 tokens on average, and any
free block fits anyone.

The same requests are replayed through four real allocators under full load (a request waits at all
times): reservation of --max-len, a buddy allocator (powers of two) and best fit, both of which are
told the final lengths, and paged_engine's own BlockManager for each block size.

Run:
    python chapter06-vllm/code/fragmentation.py --figures build/figures
    python chapter06-vllm/code/fragmentation.py --prompt-mean 19.31 --output-mean 58.45

You should see: reservation uses a small part of its memory; knowing the lengths, which nobody does,
helps, and paging is better still. Its waste follows the formula. Large blocks cost more than that:
when a sequence is admitted the engine wants a block free for each that runs, to grow into. Small
ones fill the cache to the brim, so that some sequences are preempted, and computed again.

Lengths: lognormal with the means of ShareGPT's prompts and answers in Kwon et al. (arXiv
2309.06180), figure 11; their spread (--sigma) is our assumption. The categories are their figure 2.
"""

from argparse import Namespace
from collections import deque
from itertools import count
from typing import Any

import numpy as np

from distlab import script
from distlab.script import Run, UsageError
from inference.allocators import CONTIGUOUS, Allocator, Job, Row, Usage, make_allocator

PRESETS = {
    "smoke": {"requests": 150, "seeds": 1, "capacity": 1024, "max_len": 256,
              "prompt_mean": 20.0, "output_mean": 40.0, "block_sizes": [1, 2, 16, 64]},
    "laptop": {"requests": 300, "seeds": 2, "capacity": 16384, "max_len": 2048,
               "prompt_mean": 161.31, "output_mean": 337.99,
               "block_sizes": [1, 4, 8, 16, 32, 64, 128, 256]},
    "gpu": {"requests": 1000, "seeds": 3, "capacity": 16384, "max_len": 2048,
            "prompt_mean": 161.31, "output_mean": 337.99,
            "block_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
}  # fmt: skip
WARMUP = 1 / 4  # of the requests are admitted before anything is counted: they all begin at once
OBSERVE_EVERY = 7  # steps; no divisor of a block size, so that no place in a block is preferred
SHARES = ["tokens", "reserved for later", "never used", "not given out"]
FORMULA_HOLDS = 10  # blocks in a prompt from which on sequences end anywhere in their last one


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        traces = [draw_requests(args, seed) for seed in range(args.seeds)]
        ways = [*CONTIGUOUS, *((f"paged, {size}", size) for size in args.block_sizes)]
        rows = [replay_all(args, traces, *way) for way in run.progress(ways, "allocators")]
        show(run, args, rows)
        check(run, args, traces, rows)
        draw(run, rows)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    number: dict[str, Any] = {"type": script.positive_float}
    parser.add_argument("--requests", **positive, help="in each trace")
    parser.add_argument("--seeds", **positive, help="traces that are averaged")
    parser.add_argument("--capacity", **positive, help="tokens that the cache holds")
    parser.add_argument("--max-len", **positive, help="tokens that a request may have")
    parser.add_argument("--prompt-mean", **number, help="tokens")
    parser.add_argument("--output-mean", **number, help="tokens")
    parser.add_argument("--sigma", **number, default=1.0, help="of the logarithm of both lengths")
    parser.add_argument("--block-sizes", **positive, nargs="+", metavar="B")
    args = parser.parse_args(argv)
    args.block_sizes = sorted(set(args.block_sizes))
    if args.max_len < 2:
        raise UsageError("--max-len 1 has no room for a prompt and an answer; use at least 2")
    if args.max_len > args.capacity:
        raise UsageError(
            f"--max-len {args.max_len} is more than --capacity {args.capacity}: one request would "
            f"not fit; use --capacity {args.max_len} or more"
        )
    if (large := args.block_sizes[-1]) > args.capacity // 4:
        raise UsageError(
            f"--block-sizes {large} leaves fewer than 4 blocks of --capacity {args.capacity}; "
            f"use blocks of at most {args.capacity // 4} tokens"
        )
    if args.requests < 8:
        raise UsageError(f"--requests {args.requests} keeps no queue waiting; use at least 8")
    return args


def draw_requests(args: Namespace, seed: int) -> np.ndarray:
    """Prompt and output lengths [requests, 2], together at most --max-len."""
    means = np.array([args.prompt_mean, args.output_mean])
    location = np.log(means) - args.sigma**2 / 2  # so that the mean of the lognormal is `means`
    drawn = np.random.default_rng(seed).lognormal(location, args.sigma, (args.requests, 2))
    lengths = np.maximum(1, np.rint(drawn)).astype(int)
    lengths[:, 0] = np.minimum(lengths[:, 0], args.max_len - 1)
    lengths[:, 1] = np.minimum(lengths[:, 1], args.max_len - lengths[:, 0])
    return lengths


def replay(lengths: np.ndarray, allocator: Allocator, usage: Usage) -> None:
    """Every step each running request grows by a token, and who is done makes room for others."""
    jobs = [Job(int(prompt), int(prompt + output)) for prompt, output in lengths]
    waiting, running = deque(jobs), list[Job]()
    for step in count():
        while waiting and allocator.admit(waiting[0], len(running)):
            running.append(waiting.popleft())
        if not waiting:
            break
        if step % OBSERVE_EVERY == 0 and len(jobs) - len(waiting) >= WARMUP * len(jobs):
            usage.observe(running, allocator)
        grow(running, waiting, allocator, usage)
    for job in running:
        allocator.release(job)


def grow(running: list[Job], waiting: deque[Job], allocator: Allocator, usage: Usage) -> None:
    """One token more for each, the oldest first; the latest gives way when there is no room."""
    position = 0
    while position < len(running):
        job = running[position]
        if job.length + 1 == job.final:
            allocator.release(job)
            running.pop(position)
        elif allocator.grow(job):
            job.length += 1
            position += 1
        else:
            allocator.release(running[-1])
            usage.recomputed += running[-1].length
            waiting.appendleft(running.pop())


def replay_all(args: Namespace, traces: list[np.ndarray], name: str, size: int) -> Row:
    """Replay every trace through a new allocator; what was given out must come back."""
    usage, left = Usage(), 0
    for lengths in traces:
        allocator = make_allocator(name, size, args.capacity, args.max_len)
        replay(lengths, allocator, usage)
        left += allocator.capacity - allocator.free
    if usage.steps == 0:
        raise UsageError(
            f"--requests {args.requests} leave no queue behind {args.capacity} tokens of cache; "
            f"use at least {4 * args.requests}, or a smaller --capacity"
        )
    predicted = np.mean([predict_sequences(args, lengths, name, size) for lengths in traces])
    tokens = sum(int(lengths.sum()) for lengths in traces)
    return Row(name, size, args.capacity, usage, float(predicted), tokens, left)


def predict_sequences(args: Namespace, lengths: np.ndarray, name: str, size: int) -> float:
    """How many sequences fit at once: the capacity over what one holds, averaged over its life.

    A request of p and o tokens is seen in o steps, with p to p + o - 1 tokens in its cache.
    """
    prompt, output = lengths.T
    if size:
        live = float(np.sum(output * (prompt + (output - 1) / 2)) / output.sum())
        spare = size  # free for each when another is admitted, to grow into
        return args.capacity / (live + (size - 1) / 2 + spare)
    if name == "reserve max":
        return args.capacity // args.max_len
    final = prompt + output
    held = final if name.startswith("best") else 2.0 ** np.ceil(np.log2(final))
    return args.capacity / float(np.sum(output * held) / output.sum())


def show(run: Run, args: Namespace, rows: list[Row]) -> None:
    run.table(
        "use",
        ["allocator", *(f"{name} %" for name in SHARES), "sequences", "predicted",
         "waste per sequence", "recomputed %"],
        [[row.name, *row.shares, row.sequences, row.predicted, row.waste,
          100 * row.usage.recomputed / row.tokens]
         for row in rows],
        caption=f"Use of a cache of {args.capacity:,} tokens under full load; means over the steps",
    )  # fmt: skip
    reserved, *_ = rows
    paged = [row for row in rows if row.block_size]
    usual = min(paged, key=lambda row: abs(row.block_size - 16))
    for row in (reserved, usual, paged[-1]):
        run.compare(f"sequences at once, {row.name}", row.predicted, row.sequences)
    run.compare(
        f"waste per sequence, {usual.name}, (block size - 1) / 2",
        (usual.block_size - 1) / 2, usual.waste, "tokens",
    )  # fmt: skip
    run.metric(
        "gain", usual.sequences / reserved.sequences, "times as many sequences",
        f"{usual.name} against reservation",
    )  # fmt: skip


def draw(run: Run, rows: list[Row]) -> None:
    run.figure(
        "fragmentation_use", kind="bar",
        title="Where the cache goes", x_label="allocator", y_label="% of the cache",
        series=[{"label": name, "x": [row.name for row in rows],
                 "y": [row.shares[i] for row in rows]} for i, name in enumerate(SHARES)],
    )  # fmt: skip
    paged = [row for row in rows if row.block_size]
    sizes = [row.block_size for row in paged]
    run.figure(
        "fragmentation_sequences", kind="line", log_x=True,
        title="Paging by block size, against contiguous pieces",
        x_label="block size (tokens)", y_label="sequences at once",
        series=[{"label": "paged, measured", "x": sizes, "y": [r.sequences for r in paged]},
                {"label": "predicted", "x": sizes, "y": [r.predicted for r in paged],
                 "dashed": True}],
        lines=[{"label": row.name, "y": row.sequences} for row in rows if not row.block_size],
    )  # fmt: skip


def check(run: Run, args: Namespace, traces: list[np.ndarray], rows: list[Row]) -> None:
    run.check_equal("every token of cache came back", [row.left for row in rows], [0] * len(rows))
    paged = [row for row in rows if row.block_size]
    run.check_true(
        "no sequence ever wasted a whole block",
        all(row.usage.worst < row.block_size for row in paged),
        ", ".join(f"{row.usage.worst} of {row.block_size}" for row in paged),
    )
    prompts = float(np.mean(np.concatenate(traces)[:, 0]))
    short = [row for row in paged if row.block_size * FORMULA_HOLDS <= prompts]
    run.check_below(
        "waste per sequence is (block size - 1) / 2 where blocks are much shorter than prompts",
        max((abs(row.waste - (row.block_size - 1) / 2) for row in short), default=0.0),
        0.5, "tokens away at most",
    )  # fmt: skip
    smallest, reserved = paged[0].sequences, rows[0].sequences
    run.check_above("paging fits more sequences than reservation", smallest, reserved)
    best = max(row.sequences for row in rows if not row.block_size)
    run.check_above("and more than any contiguous allocator told the lengths", smallest, best)


if __name__ == "__main__":
    script.exit(main)
