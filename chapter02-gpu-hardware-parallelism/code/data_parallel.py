"""Data parallelism from scratch: the same weights everywhere, a share of the batch for each rank.

Two collectives do it all. Before the first step rank 0 broadcasts its parameters, since replicas
that begin differently stay different. In every step each rank computes the gradient of its own
b = B/K sequences, and an all-reduce makes their mean: the gradient of all B (chapter 1 has the
proof). Here the ranks begin with different weights on purpose.

The mean can be taken parameter by parameter, or at once in one flat buffer. A ring sends the same
2·(K - 1)/K·4·P bytes for both. But it passes 2·(K - 1) messages for every all-reduce, and every
message costs its latency.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/data_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/data_parallel.py

You should see: loss and gradients equal to one process's, the same bytes both ways, and as many
times the messages as the model has tensors. The tied embedding is one of them, not two.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from distlab import measure, predict, runtime, script
from distlab.launch import detect_launch
from distlab.model import Llama, num_parameters
from distlab.ranks import distinct
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import (
    FLOAT,
    Problem,
    begin_differently,
    check_equal,
    check_shares,
    mean_loss,
    one_process,
    parser,
)
from parallelism.traffic import Traffic

TENSORS_OF_A_LAYER = 9  # q, k, v and o, gate, up and down, two norms
Average = Callable[[list[Tensor], Traffic], None]


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    check_shares("--batch-size", args.batch_size, detect_launch().world_size, "ranks")
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    problem = one_process(run, args, job)
    model = problem.new_model()
    begin_differently(model, args.seed, job.rank)
    run.check_equal(
        "the ranks begin with different weights", distinct(model.parameters()), job.world_size
    )
    traffic = Traffic()
    broadcast_parameters(model, traffic)
    run.check_equal("the broadcast gives all of them rank 0's", distinct(model.parameters()), 1)
    predicted = FLOAT * num_parameters(model.config) * (job.world_size > 1)
    run.compare("broadcast: bytes", predicted, traffic.total, "B")

    ways: dict[str, Average] = {"for each tensor": average_each, "one buffer": average_flat}
    tensors = TENSORS_OF_A_LAYER * model.config.num_hidden_layers + 2  # a tied output is none
    all_reduces = {"for each tensor": tensors, "one buffer": 1}
    for name, average in ways.items():
        traffic = Traffic()
        loss, gradients = step(model, problem, traffic, average)
        check_equal(run, name, loss, gradients, problem)
        report_traffic(run, name, model, traffic, all_reduces[name])
    own = list(gradients.values())
    timings = measure.compare(
        {name: partial(way, own, traffic) for name, way in ways.items()}, device=job.device
    )
    for name, timing in timings.items():
        run.metric(f"{name}: time", timing.median, "s", "median of the all-reduces of a step")


def broadcast_parameters(model: nn.Module, traffic: Traffic) -> None:
    for parameter in model.parameters():  # gives a tied weight once
        traffic.broadcast(parameter.data)


def step(
    model: Llama, problem: Problem, traffic: Traffic, average: Average
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of the global batch, of which this rank computes its share."""
    input_ids, targets = (
        whole.chunk(traffic.world_size)[traffic.rank]
        for whole in (problem.input_ids, problem.targets)
    )
    model.zero_grad()
    loss = model.loss(input_ids, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    average(list(gradients.values()), traffic)
    return mean_loss(loss), gradients


def average_each(gradients: list[Tensor], traffic: Traffic) -> None:
    for gradient in gradients:
        traffic.all_reduce(gradient).div_(traffic.world_size)


def average_flat(gradients: list[Tensor], traffic: Traffic) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    traffic.all_reduce(flat).div_(traffic.world_size)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def report_traffic(run: Run, name: str, model: Llama, traffic: Traffic, all_reduces: int) -> None:
    workers = traffic.world_size
    gradient_bytes = FLOAT * num_parameters(model.config)  # by the formula, not from the tensors
    predicted = predict.data_parallel_bytes(gradient_bytes, workers)
    run.compare(f"{name}: bytes", predicted, traffic.total, "B")
    ring = 2 * (workers - 1)  # messages of one all-reduce
    run.compare(f"{name}: messages", ring * all_reduces, ring * traffic.total_calls)


if __name__ == "__main__":
    script.exit(main)
