"""The other design: one rank holds the parameters, workers pull them and push gradients.

A worker's loop is the same in both kinds of server: receive the parameters, compute a gradient,
send it. The synchronous server waits for all K gradients and applies their mean, which is
all-reduce training by another route: the same losses. The asynchronous server applies each gradient
as it comes, so nobody waits for a slow worker; but meanwhile others have changed the parameters
that the gradient was computed on. The number of their updates is its staleness: about K - 1.

n bytes of parameters, links of 1/beta bytes per second in each direction, c seconds of compute:
    all-reduce, a step                c + 2·(K - 1)/K·n·beta      every link carries its share
    synchronous server, a step        c + 2·K·n·beta              one link carries everything
    asynchronous server, K gradients  at least max(c + 2·n·beta, K·n·beta)
With a straggler, synchronous designs do K gradients in the slowest worker's time; asynchronously
the workers' own rates add up. A gradient that is s updates old needs a smaller learning rate: on a
parabola it must be below 2·sin(pi / (2·(2·s + 1))) / curvature, instead of 2 / curvature.

Run:
    python chapter03-ddp/code/parameter_server.py --figures build/figures
    torchrun --nproc_per_node=3 chapter03-ddp/code/parameter_server.py

The first makes virtual clusters of a server and 2 or 4 workers, which sleep for as long as one of
them computes alone, so that they do not compete for this machine's cores; the second is one server
and two workers that have what the machine gives them.

You should see: losses and parameters equal DDP's; the synchronous server slower than all-reduce,
the more so the more workers there are; with a straggler the asynchronous server several times
faster, and ahead in the loss at the same time; at a high learning rate its loss suffers.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor

from ddp.server_measurements import (
    compare_worlds,
    measure_links,
    measure_training,
    prove_equality,
)
from ddp.server_training import ASYNCHRONOUS, SYNCHRONOUS, Log, Replica
from distlab import data, runtime, script
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import here_or_on_nodes
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 4, "steps": 4,
              "link_steps": 3, "workers": [2], "rate": "300mbit", "pace": 0.01, "straggler": 0.03,
              "tolerance": 1.0, "gain": 0.0, "harm": -20.0},
    "laptop": {"model": "laptop", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 4, "steps": 20,
               "link_steps": 3, "workers": [2, 4], "rate": "1gbit", "pace": 0.04,
               "straggler": 0.12, "tolerance": 0.15, "gain": 1.5, "harm": 0.1},
    "gpu": {"model": "laptop", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 4, "steps": 20,
            "link_steps": 3, "workers": [2, 4], "rate": "1gbit", "pace": 0.04,
            "straggler": 0.12, "tolerance": 0.15, "gain": 1.5, "harm": 0.1},
}  # fmt: skip
SERVER = 0
GO, STOP = 1.0, 0.0  # what follows the parameters in the server's messages


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_ranks, compare_worlds)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--steps", type=script.positive_int, help="K·steps gradients are applied in each training")
    add("--link-steps", type=script.positive_int, help="the same, where the links are measured")
    add("--learning-rate", type=script.positive_float, default=0.25, metavar="LR")
    add("--high-learning-rate", type=script.positive_float, default=4.0, metavar="LR")
    add("--pace", type=script.positive_float, metavar="S", help="least seconds for a gradient")
    add(
        "--straggler", type=script.positive_float, metavar="S", help="the last worker's extra sleep"
    )
    add("--link-rate", metavar="RATE", help="with torchrun: every rank's link, 25gbit")
    add("--tolerance", type=script.fraction, help="of the checks of predictions, relative")
    add("--gain", type=float, help="least factor by which asynchrony beats a straggler")
    add("--harm", type=float, help="least loss that staleness costs at the high learning rate")
    cluster = parser.add_argument_group("the virtual clusters")
    cluster.add_argument("--rate", metavar="RATE", help="of every node's link")
    cluster.add_argument("--workers", nargs="+", type=script.positive_int, metavar="K")
    args = parser.parse_args(argv)
    if args.backend == "nccl":
        raise UsageError(
            "--backend nccl is wrong because NCCL cannot receive from whoever is first, and a "
            "server's parameters live in host memory; use --backend gloo"
        )
    args.backend = "gloo"  # with GPUs too
    script.refuse_no_median(args, "link_steps")
    if not 1 <= min(args.workers) <= max(args.workers) <= 8:
        raise UsageError(f"--workers {max(args.workers)} is too many nodes here; use 1 to 8")
    for flag in ("rate", "link_rate"):
        if rate := getattr(args, flag):
            parse_rate(rate, f"--{flag.replace('_', '-')} {rate}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def measure_ranks(run: Run, args: Namespace, job: Runtime) -> None:
    """All designs on the ranks of this job, of which rank 0 is the server."""
    if job.world_size < 2:
        raise UsageError("a server alone has no worker; use --nproc_per_node=3")
    run.print(f"job: a server and {job.world_size - 1} worker(s) on {job.device.type}")
    group = dist.new_group(range(1, job.world_size))  # the workers, for all-reduce
    for part in (prove_equality, measure_links, measure_training):
        part(run, args, job, group, take_part)


def take_part(
    design: str,
    job: Runtime,
    group: dist.ProcessGroup,
    replica: Replica,
    parameters: Tensor,
    log: Log,
) -> None:
    """This rank's part of a training of `log.steps` steps; `parameters` [n] are changed in place.

    With a server they are rank 0's, with all-reduce every worker's own.
    """
    workers = list(range(1, job.world_size))
    if design not in (SYNCHRONOUS, ASYNCHRONOUS):
        if job.rank != SERVER:
            all_reduce(replica, parameters, group, log)
    elif job.rank != SERVER:
        work(replica)
    elif design == SYNCHRONOUS:
        serve_synchronously(parameters, workers, log)
    else:
        serve_asynchronously(parameters, workers, log)


def work(replica: Replica) -> None:
    """A worker: pull, compute, push, until the server says that it is over."""
    message = torch.empty(replica.size + 1)
    while True:
        dist.recv(message, SERVER)
        if message[-1] == STOP:
            return
        replica.load(message[:-1])
        dist.send(replica.gradient(), SERVER)


def serve_synchronously(parameters: Tensor, workers: list[int], log: Log) -> None:
    """Each step waits for all workers and applies the mean of their gradients."""
    log.start()
    give(parameters, workers, GO)
    for step in range(log.steps):
        total = torch.zeros_like(parameters)
        gradient = torch.empty_like(parameters)
        for _ in workers:
            dist.recv(gradient)  # from whoever is first
            total += gradient
        parameters -= log.learning_rate / len(workers) * total
        log.applied(len(workers), parameters)
        give(parameters, workers, GO if step < log.steps - 1 else STOP)


def give(parameters: Tensor, workers: list[int], word: float) -> None:
    message = torch.cat([parameters, torch.tensor([word])])
    for sending in [dist.isend(message, worker) for worker in workers]:
        if sending is not None:  # None only on a rank outside the group
            sending.wait()


def serve_asynchronously(parameters: Tensor, workers: list[int], log: Log) -> None:
    """Each gradient is applied as it comes; its worker gets the new parameters and goes on.

    `log.learning_rate` is for a mean over the workers: a single gradient gets a K-th of it, or what
    `log.rate_of` makes of its staleness.
    """
    log.start()
    give(parameters, workers, GO)
    gradient = torch.empty_like(parameters)
    version, seen = 0, dict.fromkeys(workers, 0)
    answers: dict[int, tuple[dist.Work | None, Tensor]] = {}  # kept while they travel
    while version < log.steps * len(workers):
        worker = dist.recv(gradient)
        staleness = version - seen[worker]
        parameters -= log.rate_of(staleness, len(workers)) * gradient
        version += 1
        log.applied(1, parameters, staleness)
        # Sent beside the next gradient's arrival: a link carries both directions at once. It has
        # arrived when its worker pushes again, so the message before it need not be kept.
        message = torch.cat([parameters, torch.tensor([GO])])
        answers[worker] = dist.isend(message, worker), message
        seen[worker] = version
    for _ in workers:  # what they are still computing comes too late
        give(parameters, [dist.recv(gradient)], STOP)


def all_reduce(replica: Replica, parameters: Tensor, group: dist.ProcessGroup, log: Log) -> None:
    """What DDP does, without its overlap: every worker applies the mean of all gradients itself."""
    log.start()
    for _ in range(log.steps):
        replica.load(parameters)
        gradient = replica.gradient()
        dist.all_reduce(gradient, group=group)
        parameters -= log.learning_rate / group.size() * gradient
        log.applied(group.size(), parameters)


if __name__ == "__main__":
    script.exit(main)
