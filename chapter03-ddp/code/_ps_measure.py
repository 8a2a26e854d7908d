"""The three parts of a job of `parameter_server.py`: equality, links, a straggler's training."""

import copy
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from _ps_report import report_links, report_rates, report_training
from _ps_rpc import train_by_rpc
from _ps_training import (
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
    train,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import vector_to_parameters

from distlab import data
from distlab.data.loader import Loader
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
    """The designs on a model whose gradient is long to send; emulated compute with --compute."""
    model = model_from_args(args, job.device)
    batches = batches_of(args, job, config_from_args(args).vocab_size)
    outcomes = {}
    for design in DESIGNS:
        pace = args.compute or 0.0
        replica = Replica(copy.deepcopy(model), batches, pace, once=bool(args.compute))
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
