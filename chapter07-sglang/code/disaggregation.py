"""Prompts on one worker, decoding on another: what it buys, and the link that it needs.

A prompt's chunk takes as long as many decode steps, so where both are computed by one engine every
prompt makes everybody's next token late. Here some workers compute prompts only and send the keys
and values, chunk by chunk while they go on, to workers that only decode (radix/disaggregated.py).
TTFT then queues behind prompts alone, TPOT is that of undisturbed steps, plus the last piece's time
on the link, shared among the answer's tokens:

    TPOT(rate) = TPOT(no link) + E[delivered(last piece) - computed(last piece)] / (tokens - 1)

where delivered[i] = max(computed[i], delivered[i - 1]) + bytes[i] / rate. The rate at which that
is the TPOT of co-located serving is the one below which it does not pay.

Run:
    python chapter07-sglang/code/disaggregation.py --figures build/figures
    python chapter07-sglang/code/disaggregation.py --decode-block-size 32      # is refused

You should see: the answers of one engine, token for token, and again while workers are killed; a
TPOT p90 well below co-located serving's, for a TTFT above it, as one of two workers computes all
the prompts; and on the links of virtual nodes that this is lost below the predicted rate. On
machines of yours, with torchrun (a router and two or more workers) and --link-rate, it measures
their link.

Sources: Zhong et al., "DistServe" (OSDI 2024); Patel et al., "Splitwise" (ISCA 2024).
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distlab import runtime, script
from distlab.cluster import unavailable
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep
from distlab.queueing import poisson_arrivals
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from paged_engine.config import EngineConfig
from paged_engine.llm import LLM
from paged_engine.loading import read_shape
from paged_engine.sampling_params import SamplingParams
from radix.disaggregated import Job
from radix.fleet import Fleet, fleet_of_ranks, local_fleet
from radix.kv_transfer import break_even, late

LAPTOP = {"size": "laptop", "requests": 24, "prompt_tokens": 1536, "output_tokens": 48,
          "max_batch_tokens": 128, "load": 0.7, "repeats": 3, "sides": [0.3, 3.0]}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke", "requests": 8, "prompt_tokens": 200, "output_tokens": 12,
              "max_batch_tokens": 64, "load": 0.6, "repeats": 1, "sides": []},
    "laptop": LAPTOP,
    "gpu": {**LAPTOP, "requests": 200, "prompt_tokens": 1500, "max_batch_tokens": 512, "sides": []},
}  # fmt: skip
FOR_THE_NODES = ("preset", "model", "size", "requests", "prompt_tokens", "output_tokens",
                 "max_batch_tokens", "block_size", "rate", "repeats", "slo_ttft", "slo_tpot",
                 "seed", "timeout")  # fmt: skip
WAYS = ["co-located", "disaggregated"]
PAIR = ([0], [1])  # who computes prompts, and who decodes
SLOWER = (5.0, 2.0)  # than a request alone: TTFT and TPOT that are good enough, if no SLO is named


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with model_without_tokenizer(args) as folder:
        if "RANK" in os.environ:
            return measure_ranks(args, folder)
        with script.run(args) as run:
            compute_elsewhere(run, args, folder)
            with local_fleet([engine_config(args, folder)] * 2, args.timeout) as fleet:
                check_gain(run, serve_under_load(run, args, fleet))
            compare_links(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--requests", **positive)
    parser.add_argument("--prompt-tokens", **positive, help="of the longest; half of it at least")
    parser.add_argument("--output-tokens", **positive)
    parser.add_argument("--max-batch-tokens", **positive, help="of a step: a prompt's chunk")
    parser.add_argument("--block-size", **positive, default=16)
    parser.add_argument("--decode-block-size", **positive, help="of the workers that decode")
    parser.add_argument(
        "--load",
        type=script.positive_float,
        help="of what two workers can do, one request at a time",
    )
    parser.add_argument(
        "--rate", type=script.positive_float, help="of requests, in place of --load"
    )
    parser.add_argument("--repeats", **positive, help="of the load, in turns")
    parser.add_argument("--slo-ttft", type=script.positive_float, metavar="S", help="for goodput")
    parser.add_argument("--slo-tpot", type=script.positive_float, metavar="S", help="for goodput")
    parser.add_argument("--link-rate", metavar="RATE", help="with torchrun: of the workers' links")
    parser.add_argument("--sides", nargs="*", type=script.positive_float, metavar="X", help="links "
                        "of virtual nodes: so many times the rate from which it pays")  # fmt: skip
    args = parser.parse_args(argv)
    if args.output_tokens < 2:
        raise script.UsageError("--output-tokens 1 has no TPOT; use 2 or more")
    if args.prompt_tokens < 2:
        raise script.UsageError("--prompt-tokens 1 is nothing to send; use 2 or more")
    if args.link_rate:
        parse_rate(args.link_rate, f"--link-rate {args.link_rate}")
    return args


@contextmanager
def model_without_tokenizer(args: Namespace) -> Iterator[Path]:
    """A folder with the model's weights alone: tokens go in and out, and workers start sooner."""
    source = model_directory(args)
    longest, room = args.prompt_tokens + args.output_tokens, read_shape(source).max_length
    if longest > room:
        raise script.UsageError(
            f"--prompt-tokens {args.prompt_tokens} and --output-tokens {args.output_tokens} are "
            f"more than the model's {room}; use fewer"
        )
    with tempfile.TemporaryDirectory() as folder:
        for file in [source / "config.json", *source.glob("*.safetensors*")]:
            Path(folder, file.name).symlink_to(file.resolve())
        yield Path(folder)


def engine_config(args: Namespace, folder: Path) -> EngineConfig:
    """Room for every request at once; no prefix is found, so that all of each is sent."""
    longest = args.prompt_tokens + args.output_tokens
    return EngineConfig(
        folder, device=args.device, block_size=args.block_size, max_model_len=longest,
        num_blocks=(args.requests + 1) * (longest // args.block_size + 1), prefix_caching=False,
        max_batch_tokens=args.max_batch_tokens, max_sequences=args.requests + 1,
    )  # fmt: skip


def new_jobs(args: Namespace, vocabulary: int, seed: int, rate: float | None = None) -> list[Job]:
    """Prompts of random tokens, from half of --prompt-tokens to all, at once or at a rate."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(args.prompt_tokens // 2, args.prompt_tokens + 1, args.requests)
    arrivals = poisson_arrivals(rate, args.requests, seed) if rate else np.zeros(args.requests)
    return [
        Job(draw.integers(vocabulary, size=length).tolist(), args.output_tokens, float(at))
        for length, at in zip(lengths, arrivals, strict=True)
    ]


def compute_elsewhere(run: Run, args: Namespace, folder: Path) -> None:
    """One engine's answers, from two workers of each kind, then while one of each is killed."""
    config = engine_config(args, folder)
    decode = replace(config, block_size=args.decode_block_size or args.block_size)
    vocabulary = read_shape(folder).config.vocab_size
    jobs = new_jobs(args, vocabulary, args.seed)
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    with local_fleet([config, config, decode, decode], args.timeout) as fleet:
        fleet.router.serve(jobs, [0, 1], [2, 3])
        with LLM(engine=None, **vars(config)) as llm:
            made = llm.generate([job.prompt for job in jobs], params)
        wanted = [one.outputs[0].token_ids for one in made]
        run.check_equal("disaggregated answers are one engine's", tokens_of(jobs), wanted)
        for victim, kind in ((0, "a prefill worker"), (2, "a decode worker")):
            jobs = new_jobs(args, vocabulary, args.seed)
            kill_in_the_middle(fleet, victim, jobs)
            run.check_equal(f"and while {kind} is killed", tokens_of(jobs), wanted)
            again = sum(job.attempts > 1 for job in jobs)
            run.metric(f"computed again without {kind}", again, f"of {len(jobs)} requests")
        run.check_equal("workers that were killed", sorted(fleet.router.dead), [0, 2])


def tokens_of(jobs: Sequence[Job]) -> list[list[int]]:
    return [job.tokens for job in jobs]


def kill_in_the_middle(fleet: Fleet, victim: int, jobs: Sequence[Job]) -> None:
    """Serve the jobs, and kill the victim when a quarter of them have their first token."""
    begun = set[int]()

    def after(job: Job) -> None:
        begun.add(id(job))
        if len(begun) == 1 + len(jobs) // 4:
            fleet.kill(victim)

    fleet.router.serve(jobs, [0, 1], [2, 3], after)


def serve_under_load(run: Run, args: Namespace, fleet: Fleet) -> dict[str, list[Job]]:
    """The same requests both ways, in turns: TTFT, TPOT and goodput. Gives the jobs of each way."""
    vocabulary = 256  # every model here has more, and random tokens need no more
    for prefills, decodes in (PAIR, ([], [0, 1])):  # who is first to compute pays for the pages
        fleet.router.serve(new_jobs(args, vocabulary, args.seed)[:2], prefills, decodes)
    [alone] = new_jobs(args, vocabulary, args.seed)[:1]
    fleet.router.serve([alone], [], [0])
    slo = (args.slo_ttft or SLOWER[0] * alone.ttft, args.slo_tpot or SLOWER[1] * alone.tpot)
    # Each worker alone would take so long for a prompt, and for a token, of each request.
    rate = args.rate = args.rate or args.load * 2 / alone.times[-1]  # the same on all links
    done: dict[str, list[Job]] = {way: [] for way in WAYS}
    for turn in range(args.repeats):
        for way, (prefills, decodes) in zip(WAYS, (([], [0, 1]), PAIR), strict=True):
            jobs = new_jobs(args, vocabulary, args.seed + turn, rate)
            fleet.router.serve(jobs, prefills, decodes)
            done[way] += jobs
    run.print(f"{rate:.3g} requests/s; good: TTFT <= {1e3 * slo[0]:.3g} ms and "
              f"TPOT <= {1e3 * slo[1]:.3g} ms")  # fmt: skip
    run.table(
        "load",
        ["way", "TTFT p50, ms", "TTFT p90, ms", "TPOT p50, ms", "TPOT p90, ms", "goodput, %"],
        [[way, *row_of(jobs, slo)] for way, jobs in done.items()],
        caption=f"{args.requests} requests, {args.repeats} times, on the same two workers",
    )  # fmt: skip
    return done


def check_gain(run: Run, done: dict[str, list[Job]]) -> None:
    slow = {way: float(np.quantile([job.tpot for job in jobs], 0.9)) for way, jobs in done.items()}
    run.check_below(
        "TPOT p90, disaggregated", 1e3 * slow["disaggregated"], 1e3 * slow["co-located"],
        "ms, co-located", of_time=True,
    )  # fmt: skip


def row_of(jobs: Sequence[Job], slo: tuple[float, float]) -> list[float]:
    ttft, tpot = (np.array([getattr(job, name) for job in jobs]) for name in ("ttft", "tpot"))
    times = [1e3 * float(np.quantile(of, share)) for of in (ttft, tpot) for share in (0.5, 0.9)]
    return [*times, 100 * float(np.mean((ttft <= slo[0]) & (tpot <= slo[1])))]


def measure_ranks(args: Namespace, folder: Path) -> int:
    """The ranks of this job, on the links that they have: rank 0 routes, the others work."""
    config = engine_config(args, folder)
    with fleet_of_ranks(config, args.timeout, args.backend, args.device) as fleet:
        if fleet is None:
            return 0
        with script.run(args) as run:
            done = serve_under_load(run, args, fleet)
            mean = {way: float(np.mean([job.tpot for job in jobs])) for way, jobs in done.items()}
            size = fleet.router.layouts[0].block_bytes
            run.extra(tpot=mean, pieces=pieces_of(done["disaggregated"], args.requests, size))
    return run.status


def pieces_of(jobs: Sequence[Job], turn: int, block_bytes: int) -> list[list[list[float]]]:
    """Of each turn's jobs the pieces [ready at, bytes, whether it is its prompt's last], in order.

    A turn begins when the one before has ended, so that no piece waits for another turn's.
    """
    turns = [jobs[at : at + turn] for at in range(0, len(jobs), turn)]
    return [
        sorted(
            [at, count * block_bytes, float(place == len(job.pieces) - 1)]
            for job in some
            for place, (at, count) in enumerate(job.pieces)
        )
        for some in turns
    ]


def compare_links(run: Run, args: Namespace) -> None:
    """Virtual nodes: without limits to predict, then on links slower and faster than break-even."""
    if not args.sides:
        return
    if why := unavailable():
        run.print(f"links: {why}")
        return
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    free = sweep.on_nodes(3, None)
    tpot, gaps = free["tpot"], args.output_tokens - 1
    saved = (tpot["co-located"] - tpot["disaggregated"]) * gaps
    run.metric("saved_by_disaggregation", saved, "s", "of each request's decoding, no link's limit")
    if saved <= 0:
        run.check_above("there is something that a link could take away", saved, 0, "s", True)
        return
    rate = break_even(free["pieces"], saved)
    run.metric("break_even_predicted", 8 * rate, "bit/s", "below it disaggregation does not pay")
    rows = []
    for side in run.progress(sorted(args.sides), "links"):
        bits = round(8 * rate * side)
        measured = sweep.on_nodes(3, f"{bits}bit")["tpot"]
        predicted = tpot["disaggregated"] + late(free["pieces"], rate * side) / gaps
        rows.append([bits / 1e6, 1e3 * predicted, 1e3 * measured["disaggregated"],
                     1e3 * measured["co-located"]])  # fmt: skip
        pays = measured["disaggregated"] < measured["co-located"]
        run.check_true(f"at {bits / 1e6:.3g} Mbit/s it {'pays' if side > 1 else 'does not pay'}",
                       pays == (side > 1) or args.preset == "smoke",
                       "TPOT to co-located's: "
                       f"{measured['disaggregated'] / measured['co-located']:.3g}")  # fmt: skip
    run.table("links", ["link, Mbit/s", "predicted TPOT, ms", "measured TPOT, ms",
                        "co-located TPOT, ms"], rows,
              caption="mean TPOT, disaggregated, on virtual nodes")  # fmt: skip
    run.check_equal("every job on the nodes is sound", sweep.sound, [True] * len(sweep.sound))


if __name__ == "__main__":
    script.exit(main)
