"""KV blocks in three tiers: to fetch a prefix that has left the GPU, or to compute it again.

A prefix that returns after its blocks were evicted is computed again, unless they lie in a lower
tier (radix/tiers.py): the host's memory, or a disk. To bring n blocks of g tokens back takes their
bytes, to compute them their tokens:

    fetch = n * block bytes / bandwidth          recompute = n * g * seconds of a token

Both are n times a constant, so a tier is worth it or it is not: at the bandwidth block bytes /
(g * seconds of a token) the two are equal. Bandwidths and the token are measured here, then
conversations return, and the time to their first token is compared with the formula's.

Run:
    python chapter07-sglang/code/kv_tiers.py --figures build/figures
    python chapter07-sglang/code/kv_tiers.py --prompt-tokens 1536 --host-blocks 48

You should see: the blocks fetched that were predicted, to the block; the host's memory far above
the break-even bandwidth, so that fetching is much faster; on a disk with a planted limit below it,
the cost model computing instead, and being right; and the same answers in every case, also when
files are torn, which their checksums tell.

Source: SGLang's hierarchical cache (HiCache); Qin et al., "Mooncake" (FAST 2025).
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlab import script
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.hardware import chosen_device
from distlab.measure import compare, measure
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.loading import load_tokenizer
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams
from radix.tiers import Costs, DiskTier, HostTier, Tier, TieredBlocks, drop_from_page_cache

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke", "conversations": 4, "prompt_tokens": 200, "host_blocks": 24,
              "repeats": 3},
    "laptop": {"size": "laptop", "conversations": 6, "prompt_tokens": 768, "host_blocks": 144,
               "repeats": 5},
    "gpu": {"size": "laptop", "conversations": 32, "prompt_tokens": 1536, "host_blocks": 1536,
            "repeats": 5},
}  # fmt: skip
BLOCK_SIZE = 16
ANSWER = 4  # tokens
VOCABULARY = 256  # random tokens: every model here has more
Answers = list[list[int]]  # tokens of each request
SIDES = (0.2, 5.0)  # of the break-even bandwidth: planted limits, with the answer beyond doubt


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        measured = measure_costs(run, bench)
        answers = bring_back(run, bench, measured)
        choose(run, bench, measured, answers)
        tear(run, bench, answers)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--conversations", **positive, help="whose prefixes return, in turns")
    parser.add_argument("--prompt-tokens", **positive)
    parser.add_argument("--host-blocks", **positive, help="room of the second tier")
    parser.add_argument("--repeats", **positive, help="returns of every conversation")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    if args.conversations < 2:
        raise UsageError("--conversations 1 is never evicted; use 2 or more")
    if args.prompt_tokens < 4 * BLOCK_SIZE:
        raise UsageError(
            f"--prompt-tokens {args.prompt_tokens} fill few blocks; use {4 * BLOCK_SIZE} or more"
        )
    return args


class Bench:
    """A model, its conversations, and engines whose first tier holds a single one of them."""

    def __init__(self, args: Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        draw = np.random.default_rng(0)
        size = (args.conversations, args.prompt_tokens)
        self.prompts: list[list[int]] = draw.integers(VOCABULARY, size=size).tolist()
        self.config = EngineConfig(
            model_directory(args), device=chosen_device(args.device), block_size=BLOCK_SIZE,
            num_blocks=-(-(args.prompt_tokens + ANSWER) // BLOCK_SIZE) + 2,
            max_batch_tokens=args.prompt_tokens,
        )  # fmt: skip
        self.runner = ModelRunner(self.config)
        self.tokenizer = load_tokenizer(self.config.model)
        self.block_bytes = self.runner.block_bytes
        self.full = (args.prompt_tokens - 1) // BLOCK_SIZE  # blocks of a prompt that can return

    @contextmanager
    def engine(self, tiers: Sequence[Tier], costs: Costs | None = None) -> Iterator[Engine]:
        """The same runner each time: what is left in its cache nobody knows any more."""
        blocks = TieredBlocks(self.runner, tiers, costs)
        yield Engine(self.config, self.runner, self.tokenizer, blocks)

    @contextmanager
    def disk(self, bytes_per_s: float | None = None) -> Iterator[DiskTier]:
        """A third tier with room for everything, in a folder of its own."""
        room = self.args.conversations * (self.full + 1)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield DiskTier(Path(folder), room, bytes_per_s)

    def answer(self, engine: Engine, prompt: list[int]) -> tuple[list[int], float]:
        """Its greedy tokens, and the seconds to the first one."""
        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        engine.add_request(prompt, params)
        tokens, first = list[int](), 0.0
        started = time.perf_counter()
        while engine.has_work:
            for output in engine.step():
                first = first or time.perf_counter() - started
                tokens += output.token_ids
        return tokens, first

    def returns(
        self, engine: Engine, times: int, disk: DiskTier | None = None
    ) -> tuple[list[list[int]], list[float]]:
        """All conversations in turn, once and then so many times; answers and TTFTs of the latter.

        Each turn evicts the blocks of the one before: in the order of a circle, which is LRU's
        worst, none is left in the first tier when its prefix returns. And none of `disk`'s is in
        the page cache, which would make a disk of the host's memory.
        """
        for prompt in self.prompts:
            self.answer(engine, prompt)
        made = []
        for prompt in self.prompts * times:
            for path in disk.folder.glob("*.kv") if disk is not None else ():
                drop_from_page_cache(path)
            made.append(self.answer(engine, prompt))
        return [tokens for tokens, _ in made], [ttft for _, ttft in made]


def measure_costs(run: Run, bench: Bench) -> dict[str, float]:
    """Seconds of a token, of a step but for its tokens, of what follows a prompt's last full block,
    and of a block from a tier, which drives another one out of the first."""
    length, rest = bench.args.prompt_tokens, bench.args.prompt_tokens - bench.full * BLOCK_SIZE
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with bench.engine([]) as engine:
        engine.blocks.prefix_caching = False

        def compute(tokens: int) -> None:
            engine.add_request(bench.prompts[0][:tokens], params)
            while engine.has_work:
                engine.step()

        steps = {n: (lambda n=n: compute(n)) for n in (rest, length // 4, length // 2)}
        took = compare({str(n): step for n, step in steps.items()}, 1, 2 * bench.args.repeats)
    rest_s, quarter, half = (timing.median for timing in took.values())
    # Where others compute too, the longer prompt may once have been the faster one.
    token = max(half - quarter, 1e-6) / (length // 2 - length // 4)
    cache, held = bench.runner.cache, list(range(bench.full))
    kept = [cache.read([block])[0].cpu() for block in held]

    def exchange() -> None:
        for block in held:
            cache.read([block])[0].cpu()
        cache.write(held, torch.stack(kept))

    host = measure(exchange, 2, 2 * bench.args.repeats).median / bench.full
    with bench.disk() as disk:
        digests = [f"{place:032}".encode() for place in held]
        for digest, contents in zip(digests, kept, strict=True):
            disk.put(digest, contents)

        def read_all() -> list[Any]:
            return [disk.get(digest) for digest in digests]

        warm, cold = measure(read_all, 1, 3).median, list[float]()
        for _ in range(bench.args.repeats):
            for digest in digests:
                drop_from_page_cache(disk.path(digest))
            started = time.perf_counter()
            read_all()
            cold.append(time.perf_counter() - started)
    kinds = ("host", 0.0), ("disk, in the page cache", warm), ("disk", float(np.median(cold)))
    reads = {name: host + seconds / bench.full for name, seconds in kinds}
    rows = [
        [name, bench.block_bytes / block_s / 1e6, BLOCK_SIZE * token / block_s]
        for name, block_s in reads.items()
    ]
    even = bench.block_bytes / (BLOCK_SIZE * token)
    caption = f"blocks of {bench.block_bytes:,} bytes; break-even at {even / 1e6:.3g} MB/s"
    run.table("tiers", ["tier", "bandwidth, MB/s", "times break-even"], rows, caption)
    return {"token": token, "base": quarter - token * (length // 4), "rest": rest_s, **reads}


def bring_back(run: Run, bench: Bench, measured: dict[str, float]) -> Answers:
    """Conversations return, with more and more tiers; TTFT and fetched blocks as predicted."""
    args = bench.args
    rows: list[list[Any]] = []
    answers: list[Answers] = []
    fetched: list[list[int]] = []
    all_blocks = args.conversations * (args.prompt_tokens // BLOCK_SIZE)
    for name in ("none", "host", "host and disk"):
        with bench.disk() as disk:
            host = HostTier(all_blocks if name == "host" else args.host_blocks)
            tiers: list[Tier] = [host, disk][: len(answers)]  # type: ignore[assignment]
            with bench.engine(tiers) as engine:
                made, ttfts = bench.returns(engine, args.repeats, disk if tiers[1:] else None)
                assert isinstance(engine.blocks, TieredBlocks)
                fetched.append(list(engine.blocks.fetched.values()))
        answers.append(made)
        took = float(np.median(ttfts))
        below = sum(fetched[-1][1:]) / max(1, sum(fetched[-1]))
        block = (1 - below) * measured["host"] + below * measured["disk"]
        whole = measured["base"] + measured["token"] * args.prompt_tokens
        predicted = measured["rest"] + bench.full * block if tiers else whole
        rows.append([name, sum(fetched[-1]), 100 * below, *side_by_side(predicted, took, 1e3)])
    run.table(
        "returns", ["lower tiers", "blocks fetched", "of them from disk, %", "predicted TTFT, ms",
                    "measured TTFT, ms", "error, %"], rows,
        caption=f"{args.conversations} conversations return {args.repeats} times, in a first tier "
                f"with room for one",
    )  # fmt: skip
    expected = args.repeats * args.conversations * bench.full
    counted = [sum(tiers) for tiers in fetched]
    run.check_equal("blocks fetched are those predicted", counted, [0, expected, expected])
    run.check_equal("answers are those without tiers", answers[1:], [answers[0]] * 2)
    run.metric("gain", rows[0][4] / rows[1][4], "times", "TTFT without tiers to TTFT from the host")
    run.figure(
        "kv_tiers", kind="bar", title="A prefix returns: time to its first token",
        x_label="lower tiers", y_label="TTFT, ms",
        series=[{"label": "measured", "x": [row[0] for row in rows], "y": [r[4] for r in rows]}],
    )  # fmt: skip
    return answers[0][: args.conversations]


def choose(run: Run, bench: Bench, measured: dict[str, float], made_before: Answers) -> None:
    """A third tier limited to either side of break-even: fetched always, never, and by cost."""
    even = bench.block_bytes / (BLOCK_SIZE * measured["token"])
    rows = []
    for side in SIDES:
        limit = side * even
        disk_s = bench.block_bytes / limit  # what a block's copy takes besides is far less
        took: dict[str, float] = {}
        ways = {"fetch": Costs(), "recompute": Costs(0.0, {"disk": 1.0}),
                "by cost": Costs(measured["token"], {"disk": disk_s})}  # fmt: skip
        for name, costs in ways.items():
            with bench.disk(limit) as disk, bench.engine([disk], costs) as engine:
                made, ttfts = bench.returns(engine, 1)
                took[name] = float(np.median(ttfts))
                assert isinstance(engine.blocks, TieredBlocks)
                chosen = "fetch" if engine.blocks.fetched["disk"] else "recompute"
            run.check_equal(f"answers at {side:g} of break-even, {name}", made, made_before)
        wanted = "fetch" if side > 1 else "recompute"
        run.check_equal(f"what the cost model chooses at {side:g} of break-even", chosen, wanted)
        rows.append([side, *(1e3 * took[name] for name in ways), chosen])
        other = "recompute" if chosen == "fetch" else "fetch"
        run.check_below(f"and it is the faster one, at {side:g}", took[chosen] / took[other], 1.0,
                        of_time=True)  # fmt: skip
    run.table(
        "choice", ["bandwidth to break-even", "fetched always, ms", "computed always, ms",
                   "by cost, ms", "chosen"], rows,
        caption="TTFT with a disk of planted bandwidth, median of the conversations",
    )  # fmt: skip


def tear(run: Run, bench: Bench, answers: Answers) -> None:
    """One file loses its end, another a bit, a third is gone: noticed, and computed again."""
    with bench.disk() as disk, bench.engine([disk]) as engine:
        for prompt in bench.prompts:
            bench.answer(engine, prompt)
        assert isinstance(engine.blocks, TieredBlocks)
        # The last blocks of a prompt leave first; the very last have tokens of the answer in them.
        torn = sorted(disk.folder.glob("*.kv"), key=lambda path: path.stat().st_mtime_ns)[2:5]
        content = torn[0].read_bytes()
        torn[0].write_bytes(content[: len(content) // 2])
        flipped = bytearray(torn[1].read_bytes())
        flipped[-1] ^= 1
        torn[1].write_bytes(flipped)
        torn[2].unlink()
        made = [bench.answer(engine, prompt)[0] for _ in range(3) for prompt in bench.prompts]
        run.check_equal("damaged files that were noticed", disk.damaged, 3)
        run.check_equal("answers with damaged files", made, answers * 3)


if __name__ == "__main__":
    script.exit(main)
