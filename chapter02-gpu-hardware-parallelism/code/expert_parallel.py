"""Expert parallelism from scratch: a mixture of experts whose experts live on different ranks.

Each layer has E feed-forward networks, and a router that sends each token to the 2 it scores
highest; the token gets the sum of their outputs, weighted by gates. With K ranks, rank r holds
experts r·E/K and on, and its own share of the batch. An all-to-all carries token rows to their
experts' ranks (dispatch), a second one carries the results back (combine), and the backward pass
runs both the other way round. All other weights are replicas, as in data parallelism.

An expert takes at most C = ceil(capacity factor · 2·T/E) rows from the T tokens of one rank, first
choices before second ones, then in the tokens' order. The rest is dropped: the token has only its
other expert, or its residual alone. So K ranks drop what one process drops that counts by K groups.
A balance loss E·sum(f·P), f an expert's share of the choices and P its mean probability, is least
where all are equal. Sources: GShard (arXiv 2006.16668), section 2.2; Switch (2101.03961), 2.2.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/expert_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/expert_parallel.py

You should see: output, loss and all gradients of the one-process model, and its dropped tokens; the
bytes that its routing predicts; and how training without the balance loss crowds the experts.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlab import runtime, script
from distlab.model import Llama
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.experts import (
    Batch,
    MixtureOfExperts,
    OwnExperts,
    Wires,
    capacity,
    check_flags,
    compare_balance,
    compare_layer,
    distributed,
    layers_of,
    one_process,
    parser,
    report_bytes,
    report_drops,
    route,
)
from parallelism.problem import check_share, gradient_of, gradients_of
from parallelism.traffic import Traffic


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


class AllToAll(torch.autograd.Function):
    """Rows to other ranks; in the backward pass their gradients come back the way they went."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], wire: Traffic
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.wire = send, receive, wire
        return wire.all_to_all(rows, receive, send)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.wire.all_to_all(gradients[0], ctx.send, ctx.receive), None, None, None


class ExpertParallel(OwnExperts):
    """Its rows go to the ranks of their experts, and come back from there."""

    def __init__(self, whole: MixtureOfExperts, wires: Wires) -> None:
        super().__init__(whole)
        self.wires = wires

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] to the same."""
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        self.routing = routing = route(scores, capacity(self.capacity_factor, *scores.shape))
        arriving = self.wires.sizes.all_to_all(routing.counts)  # [ranks · own experts]
        send, receive = self.by_rank(routing.counts), self.by_rank(arriving)
        rows = self.exchange(tokens[routing.token], send, receive)
        rows = self.apply_experts(rows, arriving.tolist())
        rows = self.exchange(rows, receive, send)
        weighted = routing.gate.unsqueeze(1) * rows
        return torch.zeros_like(tokens).index_add(0, routing.token, weighted).view_as(x)

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return AllToAll.apply(rows, send, receive, self.wires.rows)


def step(model: Llama, batch: Batch, balance_weight: float) -> Tensor:
    """Gradients of the mean of the ranks' losses; gives that mean."""
    model.zero_grad()
    loss = model.loss(*batch)
    layers = layers_of(model, ExpertParallel)
    loss += balance_weight * torch.stack([layer.routing.balance for layer in layers]).sum()
    wires = layers[0].wires
    loss = loss / wires.ranks
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".experts." not in name:  # an expert's came with the rows of all ranks
            wires.dense.all_reduce(gradient_of(parameter))
    dist.all_reduce(mean := loss.detach().clone())
    return mean


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    check_flags(args, job.world_size)
    problem = one_process(run, args, job)
    wires = Wires()
    model = distributed(problem, partial(ExpertParallel, wires=wires))
    loss = step(model, problem.share(job.rank, job.world_size), args.balance_weight)
    check_share(run, "experts", loss, gradients_of(model), problem, "rank")
    report_drops(run, args, model, problem)
    report_bytes(run, args, wires, problem)
    compare_layer(run, job, problem, model)
    fresh = partial(distributed, problem, partial(ExpertParallel, wires=Wires()))
    compare_balance(run, args, job, problem.tokens, fresh, step)


if __name__ == "__main__":
    script.exit(main)
