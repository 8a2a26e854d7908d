"""Bucket size against step time: torch's DDP on links of three speeds, predicted and measured.

DDP all-reduces its gradients in buckets, each as soon as its last gradient is there. A small bucket
starts early, but every one pays a message's latency; a large one waits for its last gradient, and
what it then sends sticks out after backward. One bucket for all overlaps with nothing, and DDP's
first step is such a step: only after it are buckets made, in the order in which gradients arrived.

The prediction knows a step without communication (forward, backward with the moment at which each
gradient arrives, optimizer), the link's rate and the latency of a small message; never a step with
communication. On the unshaped link, which has no rate, the seconds of a byte are measured too.
gloo sends two buckets at a time, so the latency of one hides behind the bytes of the other.

The nodes are namespaces of this machine: two ranks of one thread each, at home on two cores. But
gloo's own threads, which copy and add what is sent, need a core as well. The prediction lets
backward stand still for as long as they work, where there is no core left for them; that is why
hardly anything is gained on the unshaped link, whose all-reduce is all work and no waiting.

Run:
    python chapter03-ddp/code/bucket_tuning.py --figures build/figures
    torchrun --nproc_per_node=2 chapter03-ddp/code/bucket_tuning.py

The first makes a virtual cluster for each link; the second measures the ranks that it has, such as
those of real nodes, to which --link-rate tells their link.

You should see: on the shaped links buckets much smaller than the gradient are the fastest; one
bucket for all is the slowest, and DDP's default, made for larger models, little better. The
smallest buckets cost only where no bytes hide their latency: on the faster links.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.step_times import (
    MIB,
    Alone,
    LocalStep,
    Trainee,
    Wire,
    bucket_limits,
    check_gradients,
    ddp_buckets,
    measure_wire,
    own_batch,
    predict_step,
    refuse_one_rank,
)
from distlab import host, runtime, script
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.figure import two_lines
from distlab.measure import Timing
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.ranks import in_turns
from distlab.run import Run
from distlab.runtime import Runtime

NODES = 2
UNSHAPED = "unshaped"
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 2, "seq_len": 32, "steps": 3,
              "buckets": [0.0625, 0.25, 64.0], "rates": ["300mbit"]},
    "laptop": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
               "batch_size": 4, "seq_len": 64, "steps": 4, "tolerance": 0.25,
               "buckets": [0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0],
               "rates": [UNSHAPED, "1gbit", "100mbit"]},
    "gpu": {"model": "laptop", "hidden_size": 128, "layers": 8, "vocab_size": 1024,
            "batch_size": 4, "seq_len": 64, "steps": 4, "tolerance": 0.25,
            "buckets": [0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0],
            "rates": [UNSHAPED, "1gbit", "100mbit"]},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "seed", "timeout", "buckets",
)  # fmt: skip
COLUMNS = [
    "bucket (MiB)", "buckets", "latency predicted", "sent predicted", "sticks out predicted",
    "step predicted", "step measured", "error %",
]  # fmt: skip
CAPTION = (
    "ms, medians; latency: of all buckets, a part of sent; sent: one after another; "
    "bucket —: DDP's default, 1 MiB for the first and 25 for the others"
)
BUCKET, STICKS_OUT, PREDICTED, MEASURED = 0, 4, 5, 6


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_link, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="timed steps of each bucket size")
    add("--buckets", type=script.positive_float, nargs="+", metavar="MIB", help="bucket_cap_mb")
    add("--link-rate", metavar="RATE", help="with torchrun: every rank's link, 25gbit")
    add("--cores-per-rank", type=script.positive_float, help="for computing and for sending")
    cluster = parser.add_argument_group("the virtual clusters")
    cluster.add_argument("--rates", nargs="+", metavar="RATE", help=f"or {UNSHAPED}")
    cluster.add_argument(
        "--tolerance", type=script.positive_float, help="of the check of the predictions, relative"
    )
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "steps")
    if len(set(args.buckets)) < 2:
        raise UsageError(f"--buckets {args.buckets[0]:g} compares nothing; use 2 sizes or more")
    for rate in args.rates:
        if rate != UNSHAPED:
            parse_rate(rate, f"--rates {rate}")
    if args.link_rate:
        parse_rate(args.link_rate, f"--link-rate {args.link_rate}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def measure_link(run: Run, args: Namespace, job: Runtime) -> None:
    """Every bucket size, on whatever link this job's ranks have."""
    refuse_one_rank(job)
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    caps = [*sorted(set(args.buckets)), None]  # None: DDP's default
    model = model_from_args(args, job.device)
    batch = own_batch(args, job, model.config.vocab_size, args.batch_size)
    alone = LocalStep(Trainee(model, model, batch), job)
    trainees = {str(cap): with_ddp(args, job, batch, cap) for cap in caps}
    steps: dict[str, Callable[[], object]]
    steps = {"alone": alone.run, "beside": alone.run_beside_messages}
    steps |= {name: trainee.step for name, trainee in trainees.items()}
    for step in steps.values():  # DDP makes its buckets after it, in the order of arrival
        step()
    wire = measure_wire(args, job)
    timings = in_turns(steps, 0, args.steps, job)
    unsent, beside = timings.pop("alone"), timings.pop("beside")
    wire = replace(wire, work=alone.message_work(unsent.median, beside.median, wire.latency))
    check_gradients(run, job, alone.trainee, list(trainees.values()))
    made = [buckets_made(trainee.wrapped) for trainee in trainees.values()]
    report_link(run, caps, list(timings.values()), alone.medians(), wire, made)


def with_ddp(
    args: Namespace, job: Runtime, batch: tuple[Tensor, Tensor], cap_mib: float | None
) -> Trainee:
    """The same weights on every rank, by the seed: DDP has nothing to broadcast."""
    runtime.seed_everything(args.seed)
    model = model_from_args(args, job.device)
    ddp = DDP(model, bucket_cap_mb=cap_mib, init_sync=False, gradient_as_bucket_view=True)
    return Trainee(model, ddp, batch)


def buckets_made(ddp: Any) -> list[int]:
    """The bytes of each bucket, as DDP itself tells."""
    return [int(size) for size in ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]


def report_link(
    run: Run,
    caps: Sequence[float | None],
    timings: Sequence[Timing],
    alone: Alone,
    wire: Wire,
    made: Sequence[Sequence[int]],
) -> None:
    """Every bucket size on one link; `made` are the buckets that DDP has made of each."""
    run.metric("gradient", alone.gradient_bytes, "B", f"{len(alone.sizes)} tensors")
    run.metric("forward", alone.forward, "s", "nothing sent, all ranks at once")
    run.metric("backward", alone.backward, "s")
    run.metric("latency", wire.latency, "s", "of an all-reduce, besides its bytes")
    all_bytes = alone.gradient_bytes * wire.per_byte
    run.metric("all_reduce", all_bytes, "s", "of all gradients' bytes")
    rows, expected = [], []
    for cap, timing in zip(caps, timings, strict=True):
        buckets = ddp_buckets(alone, bucket_limits(cap))
        expected.append([bucket.size for bucket in buckets])
        guess = predict_step(alone, wire, buckets)
        parts = [1e3 * seconds for seconds in (guess.latency, guess.sent, guess.sticks_out)]
        steps = side_by_side(guess.step, timing.median, 1e3)
        rows.append([cap, len(buckets), *parts, *steps])
    run.table("buckets", COLUMNS, rows, caption=CAPTION)
    run.check_equal("DDP's buckets are those predicted", [list(m) for m in made], expected)
    run.extra(link={"rows": rows, "alone": vars(alone), "wire": vars(wire)})


def compare_links(run: Run, args: Namespace) -> None:
    """A virtual cluster for each link."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    cores = ["--cores-per-rank", str(host.usable_cores() / NODES)]
    links: dict[str, dict[str, Any]] = {}
    for name in run.progress(args.rates, "clusters"):
        rate = None if name == UNSHAPED else name
        record = sweep.on_nodes(NODES, rate, *cores)
        links[name] = {**record["link"], "mbit": parse_rate(rate) / 1e6 if rate else None}
    run.check_equal("on every link gradients and buckets are as expected", sweep.sound,
                    [True] * len(links))  # fmt: skip
    report_tuning(run, args, links)


def report_tuning(run: Run, args: Namespace, links: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables and the curves of all links, the best bucket of each, and the checks."""
    run.table(
        "links",
        ["link (Mbit/s)", "forward", "backward", "optimizer", "latency", "all-reduce", "work"],
        [[link["mbit"], *known(link)] for link in links.values()],
        caption="what the predictions know, ms: a step with nothing sent; of an all-reduce its "
        "latency; of all gradients the time on the link, and how long backward stands still for it",
    )
    rows: list[list[Any]] = [
        [link["mbit"], *row] for link in links.values() for row in link["rows"]
    ]
    run.table("tuning", ["link (Mbit/s)", *COLUMNS], rows, caption=f"{CAPTION}; link —: unshaped")
    draw(run, links)
    chosen, slowdowns = [], []
    for rate, link in links.items():
        sizes = [row for row in link["rows"] if row[BUCKET] is not None]
        best = min(sizes, key=lambda row: row[MEASURED])
        guess = min(sizes, key=lambda row: row[PREDICTED])
        largest = sizes[-1]
        chosen.append(guess[MEASURED] / best[MEASURED])
        slowdowns.append(
            (largest[PREDICTED] / guess[PREDICTED], largest[MEASURED] / guess[MEASURED])
        )
        run.print(f"verdict: {rate}: {in_words(best, guess, largest)}")
    worst = max(abs(row[-1]) for row in rows)
    predicted, measured = max(slowdowns)
    run.compare("slowdown by the largest bucket, where it is largest", predicted, measured)
    if args.tolerance is None:  # steps so small are noise: nothing to judge
        return
    most = 1 + args.tolerance
    limit = 100 * args.tolerance
    run.check_below("the worst error of a predicted step", worst, limit, "%", of_time=True)
    name = "a step with the predicted best bucket, over the best measured"
    run.check_below(name, max(chosen), most, of_time=True)
    run.check_above("that slowdown", measured, predicted / most, of_time=True)


def known(link: Mapping[str, Any]) -> list[float]:
    """Milliseconds."""
    alone, wire = Alone(**link["alone"]), Wire(**link["wire"])
    n = alone.gradient_bytes
    parts = [alone.forward, alone.backward, alone.optimizer, wire.latency, wire.seconds(n)]
    return [1e3 * seconds for seconds in [*parts, wire.working(n)]]


def in_words(best: Sequence[Any], guess: Sequence[Any], largest: Sequence[Any]) -> str:
    """The best bucket, and why the smallest and the largest are not."""
    return (
        f"{best[BUCKET]:g} MiB is the fastest with {best[MEASURED]:.1f} ms (predicted: "
        f"{guess[BUCKET]:g} MiB); of {largest[BUCKET]:g} MiB {largest[STICKS_OUT]:.1f} ms stick "
        f"out of backward, of {guess[BUCKET]:g} MiB {guess[STICKS_OUT]:.1f}"
    )


def draw(run: Run, links: Mapping[str, Mapping[str, Any]]) -> None:
    """Step time over bucket size; a limit above the whole gradient stands at the gradient's."""
    series = []
    for rate, link in links.items():
        most = sum(link["alone"]["sizes"]) / MIB
        sizes = [row for row in link["rows"] if row[BUCKET] is not None]
        x = [min(row[BUCKET], most) for row in sizes]
        measured, predicted = ([row[i] for row in sizes] for i in (MEASURED, PREDICTED))
        series += two_lines(rate, x, measured=measured, predicted=predicted)
    run.figure(
        "buckets", kind="line", title="A step of DDP, by the size of its buckets",
        x_label="bucket (MiB); the last: one bucket for all", y_label="step (ms)",
        log_x=True, series=series,
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
