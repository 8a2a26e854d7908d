"""DeepSpeed's mixture of experts in the place of a Llama's MLP, on one process and over ranks."""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab.layers import FeedForward
from distlab.model import Llama, config_from_args
from distlab.runtime import Runtime
from zero.engine import join

OF_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


class Mixture(nn.Module):
    """DeepSpeed's MoE of copies of `expert`, which returns its output only, as an MLP does.

    Forward leaves `balance`, the balancing loss, and `wanted`, how many tokens chose each expert,
    and adds up in `seen` and `dropped` the tokens, and those that found their expert full. Routing
    is the same in every run: without `use_rts` a full expert keeps torch.topk's choice of tokens,
    which is not the first ones, but no random ones either.
    """

    balance: Tensor
    wanted: Tensor
    moe: Any

    def __init__(
        self, hidden_size: int, expert: nn.Module, experts: int, factor: float, ranks: int = 1
    ) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            hidden_size, expert, experts, ep_size=ranks, k=1, capacity_factor=factor,
            min_capacity=1, use_rts=False,
        )  # fmt: skip
        inside = self.moe.deepspeed_moe
        self.gate, self.experts = inside.gate, inside.experts
        self.gate.register_forward_hook(self._note)
        self.seen = self.dropped = 0

    def forward(self, x: Tensor) -> Tensor:
        output, self.balance, self.wanted = self.moe(x)
        return output

    def _note(self, gate: nn.Module, inputs: Any, output: Any) -> None:
        chosen = output[3]  # [1, tokens]: each one's expert, -1 where that is full
        self.seen += chosen.numel()
        self.dropped += int((chosen < 0).sum())


def mixtures(model: nn.Module) -> list[Mixture]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


def balance_of(model: nn.Module) -> Tensor:
    """The sum over the layers."""
    return torch.stack([mixture.balance for mixture in mixtures(model)]).sum()


def whole_model(args: Namespace, job: Runtime) -> Llama:
    """With all experts in one process, each drawn for itself: DeepSpeed's begin as copies."""
    join(job)
    torch.manual_seed(args.seed)
    config = config_from_args(args)
    with torch.device(job.device):
        model = Llama(config)
        for layer in model.model.layers:
            expert = FeedForward(config)
            layer.mlp = Mixture(config.hidden_size, expert, args.experts, args.capacity_factor)
        model.reset_parameters()
    return model


def own_part(whole: Llama, job: Runtime) -> Llama:
    """A copy of which this rank has its part of the experts, and all else."""
    model = deepcopy(whole)
    for layer, all_here in zip(model.model.layers, mixtures(model), strict=True):
        expert, size = all_here.experts.deepspeed_experts[0], whole.config.hidden_size
        count, factor = all_here.moe.num_experts, all_here.gate.capacity_factor
        layer.mlp = Mixture(size, expert, count, factor, job.world_size).to(job.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole.get_parameter(whole_name(name, model, job)))
    return model


def whole_name(name: str, model: nn.Module, job: Runtime) -> str:
    """Rank r's expert i of E/K is the whole model's r·E/K + i."""
    if (found := OF_EXPERT.fullmatch(name)) is None:
        return name
    own = mixtures(model)[0].moe.num_local_experts
    return f"{found[1]}{job.rank * own + int(found[2])}{found[3]}"


@contextmanager
def all_to_all_bytes() -> Iterator[list[float]]:
    """Within it, the bytes that each of this rank's all-to-alls sends to other ranks."""
    sent: list[float] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, **how: Any) -> Any:
        ranks = dist.get_world_size(how.get("group"))
        sent.append(input.nbytes * (ranks - 1) / ranks)
        return original(output, input, **how)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        yield sent
    finally:
        dist.all_to_all_single = original
