"""What communication hooks cost and what they save: replicas trained side by side, on each link.

The hooks take turns on the same batches. On a virtual cluster the job trains while the links are as
fast as this machine, and then asks for one rate after another: it writes the rate into a file of a
folder that both sides see, and whoever made the cluster gives all links that rate and takes the
file away.
"""

import copy
import os
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.compression import Feedback, Hook, most_on_the_wire, report_feedback
from ddp.step_times import Trainee
from distlab import data, predict
from distlab.cluster import VirtualCluster, flags_for_nodes, record_of
from distlab.cluster.links import burst_bytes, parse_rate
from distlab.errors import RunError, UsageError
from distlab.files import write_text
from distlab.model import config_from_args, model_from_args
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime

FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "corpus",
    "corpus_mb", "seq_len", "batch_size", "steps", "timed_steps", "learning_rate",
    "start_powersgd", "seed", "timeout",
)  # fmt: skip
# Of a job on the nodes: the folder in which it asks for a rate. Without it it asks for none.
LINKS_FOLDER = "COMM_HOOKS_LINKS_FOLDER"
REQUEST = "rate-wanted"
LOOK_EVERY_S = 0.02
LOSS, SECONDS, CPU, WIRE = range(4)
LAST = 5  # steps, over which a loss is averaged
GOOD_LOSS = 0.01  # as much worse than without a hook, relative
BAD_LOSS = 0.05


@dataclass
class Measured:
    """One hook. Seconds are medians over the steps, of the slowest rank in each."""

    name: str
    payload: float  # predicted bytes of a rank and step
    losses: list[float]  # mean over the ranks, a step each
    seconds: float  # of a step, on the link as it is
    cpu_seconds: float  # of a step, of all threads of a rank, mean over the ranks
    wire: float | None  # bytes that a rank's interface has sent in a step, at most
    on_link: dict[str, float] = field(default_factory=dict)  # seconds of a step, by rate


def trainee_with(hook: Hook, model: nn.Module, args: Namespace) -> Trainee:
    """A replica with its hook and SGD. AdamW would hide what a hook spoils: it divides the
    gradient's size out.

    All of its gradients are one bucket. gloo runs collectives on two threads, and on them torch's
    PowerSGD waits, when a bucket's first all-reduce is done, for its second and third. With more
    buckets both threads wait so, none is left to carry an all-reduce out, and the job hangs.
    """
    megabytes = sum(p.nbytes for p in model.parameters()) // 2**20 + 1
    replica = DDP(model, bucket_cap_mb=megabytes, gradient_as_bucket_view=True)
    hook.register(replica, args)
    return Trainee(model, replica, learning_rate=args.learning_rate, momentum=0.9)


def measure_hooks(
    run: Run, args: Namespace, job: Runtime, hooks: Mapping[str, Hook]
) -> list[Measured]:
    """Train with each of `args.hooks` and measure; then on each link, if this job may ask for it.

    The hooks take turns in every step, so that a change of the machine's speed meets all of them.
    """
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    batches = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device
    )
    model = model_from_args(args, job.device)
    trainees = [trainee_with(hooks[name], copy.deepcopy(model), args) for name in args.hooks]
    meter = Meter(job, trainees, args.interface)
    trained = meter.measure(next(batches) for _ in run.progress(range(args.steps), "training"))
    steady = trained[:, args.start_powersgd + 1 :]  # the first of a kind allocates
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    measured = [
        Measured(
            name=name,
            payload=hooks[name].payload(shapes, job.world_size),
            losses=trained[:, :, index, LOSS].mean(axis=0).tolist(),
            seconds=slowest_median(steady[:, :, index, SECONDS]),
            cpu_seconds=float(np.median(steady[:, :, index, CPU])),
            wire=slowest_median(steady[:, :, index, WIRE]) if args.interface else None,
        )
        for index, name in enumerate(args.hooks)
    ]
    folder = os.environ.get(LINKS_FOLDER)
    for rate in args.rates if folder else []:
        ask_for_rate(Path(str(folder)), rate, job, args.timeout)
        timed = meter.measure(next(batches) for _ in range(args.timed_steps))
        for index, one in enumerate(measured):
            one.on_link[rate] = slowest_median(timed[:, :, index, SECONDS])
    run.check_equal(
        "with every hook all ranks end with the same weights, bit for bit",
        [distinct(trainee.parameters) for trainee in trainees],
        [1] * len(trainees),
    )
    return measured


def slowest_median(samples: np.ndarray) -> float:
    """The median over the steps of the largest of all ranks; of [ranks, steps]."""
    return float(np.median(samples.max(axis=0)))


class Meter:
    """Steps of all trainees in turns, each with its loss, its times and its bytes."""

    def __init__(self, job: Runtime, trainees: Sequence[Trainee], interface: str | None) -> None:
        self.job, self.trainees, self.interface = job, trainees, interface
        idle = [self._around(no_step)[WIRE] for _ in range(9)]
        self.barriers = float(np.median(idle))  # bytes of those around a step

    def measure(self, batches: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Samples [ranks, steps, trainees, 4], the same on every rank."""
        steps = [
            [self._around(partial(trainee.step, batch)) for trainee in self.trainees]
            for batch in batches
        ]
        own = torch.tensor(steps, dtype=torch.float64, device=self.job.device)
        gathered = [torch.empty_like(own) for _ in range(self.job.world_size)]
        dist.all_gather(gathered, own)
        samples = torch.stack(gathered).cpu().numpy()
        samples[..., WIRE] -= self.barriers
        return samples

    def _around(self, step: Callable[[], Tensor | float]) -> tuple[float, float, float, float]:
        self.job.barrier()
        sent, cpu, started = self._sent(), time.process_time(), time.perf_counter()
        loss = step()
        self.job.synchronize()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.job.barrier()  # what has not left yet leaves before it
        return float(loss), seconds, cpu, self._sent() - sent

    def _sent(self) -> float:
        return bytes_sent(self.interface) if self.interface else 0.0


def no_step() -> float:
    return 0.0


def bytes_sent(interface: str) -> float:
    """Bytes that `interface` has sent, headers included; see proc_pid_net(5)."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return float(counts.split()[8])
    raise UsageError(f"--interface {interface} is none of this machine's; see `ip link`")


def measure_on_links(args: Namespace, script: Path) -> dict[str, Any]:
    """Run `script` on `args.nodes` nodes, a rank on each; rank 0's record.

    The job trains while the links are as fast as this machine, and is timed on each of the rates.
    """
    with (
        VirtualCluster(args.nodes) as cluster,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as pool,
    ):
        ended = threading.Event()
        served = pool.submit(change_links, cluster, Path(folder), ended)
        try:
            record = record_of(
                cluster, script, node_flags(args), 4 * args.timeout, env={LINKS_FOLDER: folder}
            )
        finally:
            ended.set()
        served.result()
    return record


def node_flags(args: Namespace) -> list[str]:
    """The script's flags on a node: those given here, its interface, and gloo on its CPU."""
    return [*flags_for_nodes(args, ["hooks", "rates", *FOR_THE_NODES]), "--interface", "eth0"]


def change_links(cluster: VirtualCluster, folder: Path, ended: threading.Event) -> None:
    """Give every link the rate that a file in `folder` names, and take the file away."""
    request = folder / REQUEST
    while not ended.wait(LOOK_EVERY_S):
        if request.exists():
            cluster.rates(request.read_text(encoding="utf-8"))
            request.unlink()


def ask_for_rate(folder: Path, rate: str, job: Runtime, timeout_s: float) -> None:
    """Have the links changed to `rate`; every rank returns when they are."""
    if job.is_main:
        write_text(folder / REQUEST, rate)
        deadline = time.monotonic() + timeout_s
        while (folder / REQUEST).exists():
            if time.monotonic() > deadline:
                raise RunError(f"the links did not change to {rate} within {timeout_s:g} s")
            time.sleep(LOOK_EVERY_S)
    job.barrier()


def report_nodes(run: Run, args: Namespace, record: Mapping[str, Any]) -> None:
    """What a job on the nodes has measured, as its record has it, and its steps on each link."""
    measured = [Measured(**one) for one in record["measured"]]
    report(run, args, measured, Feedback(**record["feedback"]))
    report_links(run, args, measured)
    held = [check["ok"] for check in record["checks"]]
    run.check_equal("every check of the nodes holds", held, [True] * len(held))


def report(run: Run, args: Namespace, measured: Sequence[Measured], feedback: Feedback) -> None:
    """Bytes, cost and loss of each hook, and what feedback is worth."""
    report_hooks(run, args, measured)
    report_feedback(run, feedback)


def report_hooks(run: Run, args: Namespace, measured: Sequence[Measured]) -> None:
    """Bytes, cost on this machine and loss of each hook; its time on each link, where measured."""
    plain = measured[0]
    run.table(
        "hooks",
        ["hook", "kB predicted", "kB measured", "measured more by %", "step ms", "CPU ms", "loss",
         "worse by %"],
        [
            [
                one.name, one.payload / 1e3, kilo(one.wire), added(one), 1e3 * one.seconds,
                1e3 * one.cpu_seconds, final(one), 100 * worse(one, plain),
            ]
            for one in measured
        ],
        caption="What a rank sends in a step (predicted without headers), how long the step and "
        "its computing take without a limit on the link, and the loss: mean of the last "
        f"{min(LAST, args.steps)} of {args.steps} steps",
    )  # fmt: skip
    run.figure(
        "losses", kind="line", title="What the hooks spoil: the same batches, loss by loss",
        x_label="step", y_label="loss above that without a hook (nats)",
        series=[
            {
                "label": one.name,
                "x": list(range(len(one.losses))),
                "y": (np.array(one.losses) - plain.losses).tolist(),
            }
            for one in measured[1:]
        ],
    )  # fmt: skip
    run.check_below(
        "the worst hook's loss, relative to that without",
        float(np.max([worse(one, plain) for one in measured])),
        BAD_LOSS,
    )
    sent = [(one.payload, one.wire) for one in measured if one.wire is not None and one.payload]
    if sent:
        more = [100 * (wire / payload - 1) for payload, wire in sent]
        run.check_true(
            "on the wire is each hook's payload, and no more than TCP adds to it",
            all(payload <= wire <= most_on_the_wire(payload) for payload, wire in sent),
            f"{min(more):.2g} to {max(more):.2g} % more",
        )


def report_links(run: Run, args: Namespace, measured: Sequence[Measured]) -> None:
    """A step on each link: what it takes without a limit, and its bytes at the link's rate."""
    plain = measured[0]
    rows, least = [], []
    errors: dict[float, list[float]] = {}
    for rate in args.rates:
        bits_per_s = parse_rate(rate)
        errors[bits_per_s] = []
        for one in measured:
            seconds = one.on_link[rate]
            predicted = one.seconds + one.payload / predict.tcp_goodput(bits_per_s)
            error = (predicted - seconds) / seconds
            errors[bits_per_s].append(abs(error))
            least.append(seconds - (one.payload - burst_bytes(bits_per_s)) / (bits_per_s / 8))
            times = plain.on_link[rate] / seconds
            rows.append([rate, one.name, 1e3 * predicted, 1e3 * seconds, 100 * error, times])
        run.print(verdict(rate, measured))
    run.table(
        "links",
        ["link", "hook", "step predicted ms", "step measured ms", "error %", "times as fast"],
        rows,
        caption="A step on each link; predicted: as without a limit, and its bytes at the rate",
    )
    run.figure(
        "links", kind="bar", title="A training step by hook and link", x_label="",
        y_label="step (ms)",
        series=[
            {
                "label": rate,
                "x": [one.name for one in measured],
                "y": [1e3 * one.on_link[rate] for one in measured],
            }
            for rate in args.rates
        ],
    )  # fmt: skip
    run.check_true(
        "no step is faster than its bytes can pass", min(least) > 0, f"{1e3 * min(least):.3g} ms"
    )
    typical = float(np.median(errors[min(errors)]))
    name = "on the slowest link a predicted step errs by"
    if args.tolerance is None:  # steps so small are noise: nothing to judge
        run.metric(name, typical)
    else:
        run.check_below(name, typical, args.tolerance, of_time=True)


def verdict(rate: str, measured: Sequence[Measured]) -> str:
    """The fastest hook on a link among those that train as well as none."""
    plain = measured[0]
    good = [one for one in measured if worse(one, plain) <= GOOD_LOSS]
    best = min(good, key=lambda one: one.on_link[rate])
    times = plain.on_link[rate] / best.on_link[rate]
    return (
        f"verdict: on {rate} {best.name} is the fastest of those whose loss is at most "
        f"{100 * GOOD_LOSS:g} % worse than without a hook, {times:.2f} times as fast"
    )


def worse(one: Measured, plain: Measured) -> float:
    return final(one) / final(plain) - 1


def final(one: Measured) -> float:
    return float(np.mean(one.losses[-LAST:]))


def added(one: Measured) -> float | None:
    """What the wire carries more than the payload, in %."""
    return None if not one.wire or not one.payload else 100 * (one.wire / one.payload - 1)


def kilo(value: float | None) -> float | None:
    return None if value is None else value / 1e3
