"""Expert parallelism with torch's own parts: the same layer, the same gradients.

Torch has no expert-parallel layer (its training library torchtitan has one), but all its parts:
`all_to_all_single_autograd` is an all-to-all with uneven splits that autograd goes back through;
DDP averages the gradients of the replicated weights, and leaves out the experts, of which no two
ranks hold the same; `torch.nn.functional.grouped_mm` would apply all experts of a rank at once.

An expert's gradient has then a factor K too much. Each rank takes the gradient of its own mean
loss, and an expert sums what all ranks' rows bring back; DDP divides its own by K, nobody divides
the experts'. `expert_parallel.py` divides the loss instead.

Run:
    torchrun --nproc_per_node=2 chapter02-gpu-hardware-parallelism/code/torch_expert_parallel.py
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/torch_expert_parallel.py

You should see: loss and gradients of the one-process model; the experts' K times too large at
first.
"""

from argparse import Namespace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import runtime, script
from distlab.errors import Skipped
from distlab.model import Llama
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.experts import (
    Batch,
    MixtureOfExperts,
    OwnExperts,
    capacity,
    check_flags,
    distributed,
    layers_of,
    one_process,
    parser,
    report_drops,
    route,
)
from parallelism.problem import check_share, gradients_of


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        compare_with_one_process(run, args, job)
    return run.status


class LibraryExpertParallel(OwnExperts):
    """The layer with torch's all-to-all, in a group of its own: DDP's sums do not queue with it."""

    def __init__(self, whole: MixtureOfExperts, group: dist.ProcessGroup) -> None:
        super().__init__(whole)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] to the same."""
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        self.routing = routing = route(scores, capacity(self.capacity_factor, *scores.shape))
        dist.all_to_all_single(arriving := torch.empty_like(routing.counts), routing.counts)
        send, receive = self.by_rank(routing.counts), self.by_rank(arriving)
        rows = all_to_all_single_autograd(tokens[routing.token], receive, send, self.group)
        rows = self.apply_experts(rows, arriving.tolist())
        rows = all_to_all_single_autograd(rows, send, receive, self.group)
        weighted = routing.gate.unsqueeze(1) * rows
        return torch.zeros_like(tokens).index_add(0, routing.token, weighted).view_as(x)


def compare_with_one_process(run: Run, args: Namespace, job: Runtime) -> None:
    check_flags(args, job.world_size)
    if job.backend == "gloo" and job.device.type == "cuda":
        raise Skipped(
            "gloo has no all-to-all of a GPU's tensors, and torch does not stage them; "
            "use --device cpu, or NCCL with a GPU for each rank"
        )
    problem = one_process(run, args, job)
    group = dist.new_group(timeout=timedelta(seconds=args.timeout))
    model = distributed(problem, partial(LibraryExpertParallel, group=group))
    loss = step(model, problem.share(job.rank, job.world_size), args.balance_weight)
    found = gradients_of(model)
    experts = [name for name in found if is_expert(name)]
    length, right = (
        float(torch.cat([gradients[name].flatten() for name in experts]).norm())
        for gradients in (found, problem.gradients)
    )
    run.compare("an expert's gradient, in right ones", job.world_size, length / right)
    for name in experts:
        found[name] /= job.world_size
    check_share(run, "experts", loss, found, problem, "rank")
    report_drops(run, args, model, problem)


def step(model: Llama, batch: Batch, balance_weight: float) -> Tensor:
    """Gradients of the mean of the ranks' losses, but the experts' K times; gives that mean."""
    names = [name for name, _ in model.named_parameters() if is_expert(name)]
    DDP._set_params_and_buffers_to_ignore_for_model(model, names)
    replica = DDP(model)  # by a name: its hooks die with it, and backward would average nothing
    input_ids, targets = batch
    loss = replica(input_ids, targets=targets)
    balances = [layer.routing.balance for layer in layers_of(model, OwnExperts)]
    loss = loss + balance_weight * torch.stack(balances).sum()
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def is_expert(name: str) -> bool:
    return ".experts." in name


if __name__ == "__main__":
    script.exit(main)
