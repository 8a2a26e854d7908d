"""Every collective over sizes: nccl-tests' columns, a fitted alpha and beta, and a prediction.

time = alpha·steps + beta·bytes·share: a small message pays the latency alpha of each step, a large
one the link's seconds per byte, beta. algbw is size / time. busbw multiplies it by what the
collective must move over the busiest link, 2·(K-1)/K of the size for an all-reduce, so that it can
be compared with the link's own bandwidth whatever K is (nccl-tests, doc/PERFORMANCE.md).

The data of every call can be checked, and are: #wrong counts the wrong elements of all ranks. A
time is the median of repeated calls, of the slowest rank in each. In the fit every size counts
alike, as its errors are relative; what it predicts for a size comes from a line through all the
others. --link-rate and --link-delay predict from the link instead, and check the times of 1 to 16
MiB: its rate gives beta, its delay and what the hosts add to 4 bytes give alpha.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/allreduce_microbench.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/allreduce_microbench.py \
        --collective all_gather all_to_all --max-bytes 1M --dtype bfloat16

You should see: no wrong element; times that hardly change up to some kilobytes and then grow with
the size; a busbw that climbs from nothing to a plateau. Ctrl-C ends it with the sizes that it has.
"""

from argparse import Namespace
from dataclasses import replace

import torch
import torch.distributed as dist

from distlab import measure, runtime, script
from distlab.cluster.links import parse_delay, parse_rate
from distlab.errors import UsageError
from distlab.ranks import slowest
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.links import Link
from parallelism.microbench import COLLECTIVES, EXACT, Interrupt, Row, byte_size, make_case, report

PRESETS = {
    "smoke": {"max_bytes": 2**16, "factor": 8, "repeats": 5, "seconds": 0.1},
    "laptop": {"max_bytes": 2**26, "factor": 4, "repeats": 20, "seconds": 0.5, "tolerance": 0.1},
    "gpu": {"max_bytes": 2**30, "factor": 2, "repeats": 20, "seconds": 0.5, "tolerance": 0.1},
}
MIN_REPEATS = 3


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        benchmark(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--collective", nargs="+", choices=[*COLLECTIVES, "all"], default=["all_reduce"])
    add("--min-bytes", type=byte_size, default=4, metavar="SIZE", help="4, 64K, 16M, 1G")
    add("--max-bytes", type=byte_size, metavar="SIZE")
    add("--factor", type=script.positive_int, help="from one size to the next")
    add("--dtype", choices=list(EXACT), default="float32")
    add("--repeats", type=script.positive_int, help="timed calls of a size, at most")
    add("--seconds", type=script.positive_float, help="of timed calls of a size, about")
    link = parser.add_argument_group("every rank's link, where it is known")
    link.add_argument("--link-rate", metavar="RATE", help="1gbit: predict from it, and check")
    link.add_argument("--link-delay", metavar="TIME", help="one way: 2ms")
    link.add_argument(
        "--link-burst", type=byte_size, default=0, metavar="SIZE", help="tbf's bucket"
    )
    link.add_argument("--tolerance", type=script.fraction, help="of the check, relative")
    runtime.add_runtime_flags(parser)
    args = parser.parse_args(argv)
    if args.max_bytes < args.min_bytes:
        raise UsageError(
            f"--max-bytes {args.max_bytes} is less than --min-bytes {args.min_bytes}; "
            "use a larger one"
        )
    if args.factor < 2:
        raise UsageError(f"--factor {args.factor} does not grow; use 2 or more")
    script.refuse_no_median(args, "repeats", MIN_REPEATS)
    if args.link_delay and not args.link_rate:
        raise UsageError("--link-delay tells half of the link; give --link-rate too")
    if "all" in args.collective:
        args.collective = list(COLLECTIVES)
    known_link(args)  # a wrong unit is told before anything starts
    return args


def benchmark(run: Run, args: Namespace, job: Runtime) -> None:
    """Measure each collective over the sizes and report it; what there is, after a Ctrl-C."""
    say_where(run, job)
    with Interrupt() as interrupt:
        link = with_hosts(known_link(args), args, job)
        for collective in args.collective:
            rows: list[Row] = []
            for size in run.progress(sizes(args), collective):
                rows.append(measure_one(collective, size, args, job))
                if stopped := interrupt.agreed(job):
                    break
            report(run, args, job, collective, rows, link)
            if stopped:
                raise KeyboardInterrupt


def say_where(run: Run, job: Runtime) -> None:
    nodes = -(-job.world_size // job.local_world_size)
    run.print(
        f"job: {job.world_size} rank(s) on {nodes} node(s), {job.backend} on {job.device.type}, "
        f"{torch.get_num_threads()} thread(s) each"
    )


def known_link(args: Namespace) -> Link | None:
    if args.link_rate is None:
        return None
    delay = parse_delay(args.link_delay) if args.link_delay else 0.0
    rate = parse_rate(args.link_rate, f"--link-rate {args.link_rate}")
    return Link(rate, delay, burst=args.link_burst)


def with_hosts(link: Link | None, args: Namespace, job: Runtime) -> Link | None:
    """The link with the hosts' latency, from 4 bytes that each of 2·(K - 1) messages hands on.

    From the lower quartile, as all that is held against the link.
    """
    if link is None or job.world_size == 1:
        return link
    taken = measure_one("all_reduce", 4, args, job).timing.q1
    return replace(link, hosts=max(0.0, taken / (2 * (job.world_size - 1)) - link.delay))


def sizes(args: Namespace) -> list[int]:
    """Bytes from --min-bytes up to --max-bytes, each --factor times the one before."""
    found = [args.min_bytes]
    while found[-1] * args.factor <= args.max_bytes:
        found.append(found[-1] * args.factor)
    return found


def measure_one(collective: str, size: int, args: Namespace, job: Runtime) -> Row:
    """Verify one call, which is the warm-up too, then time more, one right after the other.

    No barrier stands between the calls, as in nccl-tests: waiting for the slowest rank is a part of
    a collective. Three calls tell how many of them --seconds hold.
    """
    case = make_case(collective, size, args.dtype, job)
    wrong = case.wrong()
    case.output.zero_()  # an in-place sum of sums would grow out of the dtype
    once = slowest(measure.measure(case.call, warmup=0, repeats=3, device=job.device))
    fitting = int(args.seconds / max(once.median, 1e-9))
    timing = once
    if fitting > MIN_REPEATS:
        more = measure.measure(case.call, 0, min(fitting, args.repeats), job.device)
        timing = slowest(more)
    wrongs = torch.tensor(wrong, device=job.device)
    dist.all_reduce(wrongs)
    return Row(collective, case.size, case.count, args.dtype, timing, int(wrongs))


if __name__ == "__main__":
    script.exit(main)
