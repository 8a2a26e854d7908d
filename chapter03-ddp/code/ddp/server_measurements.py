"""What the parameter server is measured by: equality, links, training, and worlds of many sizes."""

import copy
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import vector_to_parameters

from ddp.server_training import (
    ALL_REDUCE,
    ASYNCHRONOUS,
    DESIGNS,
    SYNCHRONOUS,
    Evaluate,
    Log,
    Outcome,
    Replica,
    TakePart,
    flat_parameters,
    median,
    train,
    train_by_rpc,
)
from distlab import data, predict
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, sleeps_s
from distlab.data.loader import Loader
from distlab.display import side_by_side
from distlab.model import SIZES, Llama, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

SMALL = replace(SIZES["smoke"], hidden_size=32, intermediate_size=96)  # trained in a few ms a step
EQUAL_STEPS = 5
TOLERANCE = 1e-5  # float32: the sums over the workers are the same, their order is not


def small_replica(args: Namespace, job: Runtime, **settings: Any) -> Replica:
    """The small model, the same on every rank, with this worker's batches of real text."""
    torch.manual_seed(args.seed)
    model = Llama(SMALL).to(job.device)
    return Replica(model, batches_of(args, job, SMALL.vocab_size), **settings)


def batches_of(args: Namespace, job: Runtime, vocab_size: int) -> Loader:
    tokens = data.prepare_from_args(args, vocab_size)
    workers, place = job.world_size - 1, max(0, job.rank - 1)
    batch_size = args.batch_size * workers
    return Loader(tokens, args.seq_len, batch_size, place, workers, args.seed, job.device)


def prove_equality(
    run: Run, args: Namespace, job: Runtime, group: dist.ProcessGroup, take_part: TakePart
) -> None:
    """All-reduce, the synchronous server and its twin by RPC against DDP, from the same start."""
    losses, parameters = train_by_ddp(args, job, group)
    for design in (ALL_REDUCE, SYNCHRONOUS):
        replica = small_replica(args, job)
        log = Log(EQUAL_STEPS, args.learning_rate)
        outcome = train(take_part, design, job, group, replica, log)
        run.check_close(f"{design}: losses equal DDP's", outcome.losses, losses, TOLERANCE)
        run.check_close(
            f"{design}: parameters equal DDP's", outcome.parameters, parameters, TOLERANCE
        )
    by_rpc = train_by_rpc(
        job, small_replica(args, job), EQUAL_STEPS, args.learning_rate, args.timeout
    )
    run.check_close("by torch.distributed.rpc: parameters equal DDP's", by_rpc, parameters,
                    TOLERANCE)  # fmt: skip


def train_by_ddp(
    args: Namespace, job: Runtime, group: dist.ProcessGroup
) -> tuple[list[list[float]], Tensor]:
    """Every worker's losses, and the parameters, by DDP over the workers; told to every rank."""
    replica = small_replica(args, job)
    if not job.is_main:
        wrapped = DDP(replica.model, process_group=group)
        optimizer = torch.optim.SGD(wrapped.parameters(), args.learning_rate)
        for _ in range(EQUAL_STEPS):
            input_ids, targets = next(replica.batches)
            optimizer.zero_grad()
            loss = wrapped(input_ids, targets=targets)
            loss.backward()
            optimizer.step()
            replica.losses.append(loss.item())
    everyone: list = [None] * job.world_size
    dist.all_gather_object(everyone, (replica.losses, flat_parameters(replica.model)))
    return [losses for losses, _ in everyone[1:]], everyone[1][1]


def measure_links(
    run: Run, args: Namespace, job: Runtime, group: dist.ProcessGroup, take_part: TakePart
) -> None:
    """The designs on a model whose gradient is long to send; the nodes of a sweep only sleep."""
    model = model_from_args(args, job.device)
    batches = batches_of(args, job, config_from_args(args).vocab_size)
    outcomes = {}
    for design in DESIGNS:
        pace = sleeps_s() or 0.0
        replica = Replica(copy.deepcopy(model), batches, pace, once=sleeps_s() is not None)
        log = Log(args.link_steps, learning_rate=0.0)
        outcomes[design] = train(take_part, design, job, group, replica, log)
    report_links(run, args, job, outcomes)


def measure_training(
    run: Run, args: Namespace, job: Runtime, group: dist.ProcessGroup, take_part: TakePart
) -> None:
    """The small model by each design without and with a straggler, then at a high learning rate."""
    loss_of = validation_loss(args, job)

    def trained(design: str, straggler: bool, learning_rate: float, share: str) -> Outcome:
        slow = args.straggler if straggler and job.rank == job.world_size - 1 else 0.0
        replica = small_replica(args, job, pace=args.pace, straggle=slow, most_norm=1.0)
        log = Log(args.steps, learning_rate, share, keep_every=job.world_size - 1)
        return train(take_part, design, job, group, replica, log, loss_of)

    report_training(run, args, job, {
        (straggler, design): trained(design, straggler, args.learning_rate, "K-th")
        for straggler in (False, True)
        for design in DESIGNS
    })  # fmt: skip
    report_rates(run, args, job, {
        (design, share): trained(design, False, args.high_learning_rate, share)
        for design, share in (
            (SYNCHRONOUS, "mean"),
            (ASYNCHRONOUS, "full"),
            (ASYNCHRONOUS, "1 / (1 + s)"),
            (ASYNCHRONOUS, "K-th"),
        )
    })  # fmt: skip


def validation_loss(args: Namespace, job: Runtime) -> Evaluate:
    """The mean loss of the small model on fixed sequences that it is not trained on."""
    model = Llama(SMALL).to(job.device)
    tokens = data.prepare_from_args(args, SMALL.vocab_size).validation
    input_ids, targets = next(Loader(tokens, args.seq_len, 32, device=job.device))

    @torch.no_grad()
    def loss_of(flat: Tensor) -> float:
        vector_to_parameters(flat.to(job.device), model.parameters())
        return float(model(input_ids, targets=targets))

    return loss_of


FLOAT = 4  # bytes
LINK_COLUMNS = [
    "K", "design", "step predicted (ms)", "step measured (ms)", "error %", "sequences/s",
    "busiest link predicted (MB)",
    "busiest link measured (MB)",
]  # fmt: skip
TRAINING_COLUMNS = [
    "K", "straggler", "design", "sequences/s predicted", "sequences/s measured", "error %",
    "staleness mean",
    "staleness max", "loss, same samples", "loss, same time",
]  # fmt: skip
RATE_COLUMNS = ["K", "design", "a gradient's share", "staleness mean", "staleness max", "loss"]


def seconds_per_byte(args: Namespace) -> float | None:
    """Beta of the ranks' link, where it is known."""
    if args.link_rate is None:
        return None
    return predict.tcp_link(parse_rate(args.link_rate, f"--link-rate {args.link_rate}"))[1]


def seconds_per_step(outcome: Outcome, workers: int) -> float:
    """Of K gradients: a step, or at an asynchronous server K updates once all workers have begun.

    Medians of the steps; of an asynchronous server's uneven updates the mean.
    """
    log = outcome.log
    if len(log.times) == log.steps:
        return median([b - a for a, b in zip(log.times, log.times[1:], strict=False)])
    begun = log.times[workers - 1]
    return (log.times[-1] - begun) / (len(log.times) - workers) * workers


def predicted_step(design: str, n: float, compute: list[float], beta: float) -> float:
    """Seconds of K gradients of n bytes, from each worker's seconds of compute: the docstring's."""
    workers = len(compute)
    if design == ALL_REDUCE:
        return max(compute) + predict.ring_all_reduce(n, workers, 0.0, beta)
    if design == SYNCHRONOUS:
        return max(compute) + 2 * workers * n * beta
    together = sum(1 / (alone + 2 * n * beta) for alone in compute)
    return max(workers / together, workers * n * beta)


def report_links(run: Run, args: Namespace, job: Runtime, outcomes: dict[str, Outcome]) -> None:
    """A step of each design, and the bytes over the link that carries most of them."""
    beta, workers = seconds_per_byte(args), job.world_size - 1
    rows = []
    for design, outcome in outcomes.items():
        n = FLOAT * len(outcome.parameters)
        step = seconds_per_step(outcome, workers)
        predicted = None if beta is None else predicted_step(design, n, outcome.compute, beta)
        several_nodes = job.world_size > job.local_world_size
        moved = max(sum(pair) for pair in outcome.wire) if several_nodes else None
        rows.append([
            workers, design, *side_by_side(predicted, step, 1e3),
            workers * args.batch_size / step, payload(design, n, args.link_steps, workers) / 1e6,
            None if moved is None else moved / 1e6,
        ])  # fmt: skip
    run.table(
        "links", LINK_COLUMNS, rows,
        caption=f"K gradients of {FLOAT * len(outcomes[ALL_REDUCE].parameters):,} bytes; "
        "bytes of all steps, both directions: the server's link, or a worker's",
    )  # fmt: skip


def payload(design: str, n: float, steps: int, workers: int) -> float:
    """Bytes of parameters and gradients that the busiest link carries, both directions together."""
    if design == ALL_REDUCE:
        return 2 * predict.data_parallel_bytes(n, workers) * steps
    rounds = 2 * steps + 1  # the first parameters are no answer to a gradient
    if design == ASYNCHRONOUS:
        rounds += 2  # the gradients that come too late, and the word that it is over
    return rounds * workers * n


def report_training(
    run: Run, args: Namespace, job: Runtime, outcomes: dict[tuple[bool, str], Outcome]
) -> None:
    """Throughput and loss of each design, without and with a straggler."""
    beta, workers = seconds_per_byte(args) or 0.0, job.world_size - 1
    rows: list[list[Any]] = []
    for (straggler, design), outcome in outcomes.items():
        n = FLOAT * len(outcome.parameters)
        sequences = workers * args.batch_size
        measured = sequences / seconds_per_step(outcome, workers)
        predicted = sequences / predicted_step(design, n, outcome.compute, beta)
        # the same time: until the first of the three designs is ready
        until = min(outcomes[straggler, other].log.times[-1] for other in DESIGNS)
        rows.append([
            workers, "yes" if straggler else "no", design, *side_by_side(predicted, measured),
            *staleness(outcome),
            outcome.log.curve[-1][2], loss_at(outcome, until),
        ])  # fmt: skip
    run.table(
        "training", TRAINING_COLUMNS, rows,
        caption=f"a gradient takes {1e3 * args.pace:g} ms, the straggler's "
        f"{1e3 * args.straggler:g} ms more; {args.steps} steps of {args.batch_size} sequences each",
    )  # fmt: skip
    run.extra(curves=[
        {"design": design, "straggler": straggler, "curve": outcome.log.curve}
        for (straggler, design), outcome in outcomes.items()
    ])  # fmt: skip


def loss_at(outcome: Outcome, until: float) -> float | None:
    """The loss of the last parameters not later than `until` seconds; None before the first."""
    losses = [loss for _, seconds, loss in outcome.log.curve if seconds <= until]
    return losses[-1] if losses else None


def staleness(outcome: Outcome) -> tuple[float, int]:
    values = outcome.log.staleness
    return sum(values) / len(values), max(values)


def report_rates(
    run: Run, args: Namespace, job: Runtime, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    """What staleness costs at a high learning rate; and where the theory has its limit."""
    rows = [
        [job.world_size - 1, design, share, *staleness(outcome), outcome.log.curve[-1][2]]
        for (design, share), outcome in outcomes.items()
    ]
    run.table(
        "rates", RATE_COLUMNS, rows,
        caption=f"Learning rate {args.high_learning_rate:g}, {args.steps} steps of K gradients",
    )  # fmt: skip
    delay = job.world_size - 2
    run.compare(
        f"on a parabola, the largest stable rate times curvature at staleness {delay}",
        stable_rate(delay), largest_stable_rate(delay),
    )  # fmt: skip


def stable_rate(delay: int) -> float:
    """x <- x - rate·(x of `delay` steps ago) dies out below this rate; 2 without delay.

    Source: Levin and May, "A note on difference-delay equations", Theor. Popul. Biol. 9, 1976.
    """
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def largest_stable_rate(delay: int) -> float:
    """The same by trial: bisection over rates, each tried for 2,000 steps."""
    low, high = 0.0, 3.0
    while high - low > 1e-3:
        rate = (low + high) / 2
        values = [1.0] * (delay + 1)
        for _ in range(2000):
            values = [*values[1:], values[-1] - rate * values[0]]
            if abs(values[-1]) > 1e6:
                break
        low, high = (rate, high) if abs(values[-1]) < 1 else (low, rate)
    return low


SCRIPT = Path(__file__).parents[1] / "parameter_server.py"
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "corpus",
    "corpus_mb", "seq_len", "batch_size", "steps", "link_steps", "learning_rate",
    "high_learning_rate", "pace", "straggler", "seed", "timeout",
)  # fmt: skip
HEADERS = 0.1  # the most by which a link's bytes may exceed what they carry


def compare_worlds(run: Run, args: Namespace) -> None:
    """One job for each number of workers; what they measured in one table each."""
    compute = one_node_computes(args)
    run.metric("compute", compute, "s", "of a gradient, on one node alone: the nodes sleep so long")
    sweep = Sweep(SCRIPT, args, FOR_THE_NODES, compute)
    clusters = run.progress(args.workers, "clusters")
    records = [sweep.on_nodes(workers + 1, args.rate) for workers in clusters]
    for name, columns in (
        ("links", LINK_COLUMNS), ("training", TRAINING_COLUMNS), ("rates", RATE_COLUMNS)
    ):  # fmt: skip
        jobs = [record["tables"][name]["rows"] for record in records]
        rows = [row for same in zip(*jobs, strict=True) for row in same]  # of one design together
        run.table(name, columns, rows, caption=records[0]["tables"][name]["caption"])
    for name, pair in records[-1]["comparisons"].items():
        run.compare(name, pair["predicted"], pair["measured"], pair["unit"])
    draw(run, args, records)
    check(run, args, sweep.sound, records)


def one_node_computes(args: Namespace) -> float:
    """Median seconds of one gradient in this process, on one thread, as on a node."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    replica = Replica(model_from_args(args, "cpu"), Loader(tokens, args.seq_len, args.batch_size))
    for _ in range(6):
        replica.gradient()
    torch.set_num_threads(threads)
    return median(replica.seconds[1:])


def draw(run: Run, args: Namespace, records: Sequence[dict[str, Any]]) -> None:
    """The loss over time with a straggler, for the most workers."""
    series = [
        {
            "label": curve["design"],
            "x": [seconds for _, seconds, _ in curve["curve"]],
            "y": [loss for _, _, loss in curve["curve"]],
        }
        for curve in records[-1]["curves"]
        if curve["straggler"]
    ]
    run.figure(
        "straggler", kind="line", title=f"{args.workers[-1]} workers, one of them slow",
        x_label="time (s)", y_label="validation loss (nats per token)", series=series,
    )  # fmt: skip


def check(run: Run, args: Namespace, sound: list[bool], records: Sequence[dict[str, Any]]) -> None:
    run.check_equal("in every job losses and parameters equal DDP's", sound, [True] * len(sound))
    links, training, rates = (
        [row for record in records for row in as_dicts(record["tables"][name])]
        for name in ("links", "training", "rates")
    )
    excess = [row[LINK_COLUMNS[-1]] / row[LINK_COLUMNS[-2]] - 1 for row in links]
    run.check_below("the busiest link carries what was predicted: headers", max(excess), HEADERS)
    run.check_above("and nothing less", min(excess), -0.01)
    limit = 100 * args.tolerance
    worst = max(abs(row["error %"]) for row in links if row["design"] != ASYNCHRONOUS)
    run.check_below("the worst error of a predicted step", worst, limit, "%", of_time=True)
    worst = max(abs(row["error %"]) for row in training if row["straggler"] == "yes")
    throughput = "the worst error of a straggler's predicted throughput"
    run.check_below(throughput, worst, limit, "%", of_time=True)

    most = args.workers[-1]
    speed = {
        row["design"]: row["sequences/s measured"]
        for row in training
        if row["K"] == most and row["straggler"] == "yes"
    }
    gain = speed[ASYNCHRONOUS] / max(speed[design] for design in DESIGNS[:2])
    run.check_above("with a straggler, asynchrony's factor", gain, args.gain, of_time=True)
    loss = {(row["design"], row["a gradient's share"]): row["loss"] for row in rates[-4:]}
    harm = loss[ASYNCHRONOUS, "full"] - loss[SYNCHRONOUS, "mean"]
    run.check_above("what staleness costs at the high rate, in loss", harm, args.harm)


def as_dicts(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
