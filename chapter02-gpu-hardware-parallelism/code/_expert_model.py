"""The one-process mixture of experts, and what the expert scripts share: flags, wires, the problem.

The layer here is written another way than the distributed one, so that it can prove it: tokens
queue in a Python loop, gates are a softmax of the two best scores, and all experts are at hand.
"""

import copy
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from _expert_routing import CHOICES, capacity
from _parallel import Problem, check_shares, gradients_of
from _traffic import Traffic
from torch import Tensor, nn

from distlab import data, runtime, script
from distlab.errors import UsageError
from distlab.layers import FeedForward
from distlab.model import Llama, ModelConfig, add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {
        "model": "smoke", "experts": 4, "capacity_factor": 1.0, "steps": 16,
        "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8,
    },
    "laptop": {
        "model": "laptop", "hidden_size": 128, "layers": 2, "experts": 8,
        "capacity_factor": 1.25, "steps": 24,
        "corpus_mb": 2.0, "seq_len": 64, "batch_size": 8,
    },
    "gpu": {
        "model": "gpu", "hidden_size": 768, "layers": 4, "experts": 16,
        "capacity_factor": 1.25, "steps": 100,
        "corpus_mb": 12.0, "seq_len": 512, "batch_size": 32,
    },
}  # fmt: skip


def parser(doc: str | None) -> script.Parser:
    made = script.Parser(doc, PRESETS)
    add_model_flags(made)
    data.add_data_flags(made)
    runtime.add_runtime_flags(made)
    made.add_argument("--experts", type=int, metavar="E", help="in each layer")
    made.add_argument("--capacity-factor", type=script.positive_float, metavar="C")
    made.add_argument("--balance-weight", type=script.positive_float, default=0.05, metavar="W")
    made.add_argument("--learning-rate", type=script.positive_float, default=0.003, metavar="LR")
    made.add_argument("--steps", type=script.positive_int, help="of training")
    return made


def check_flags(args: Namespace, ranks: int) -> None:
    """Raise `UsageError` where experts or sequences cannot be shared out evenly."""
    if args.experts < CHOICES:
        raise UsageError(f"--experts {args.experts} is too few; a token has {CHOICES} of them")
    check_shares("--experts", args.experts, ranks, "ranks")
    check_shares("--batch-size", args.batch_size, ranks, "ranks")


@dataclass
class Wires:
    """The bytes that this rank sends, by what they are."""

    rows: Traffic = field(default_factory=Traffic)
    sizes: Traffic = field(default_factory=Traffic)
    dense: Traffic = field(default_factory=Traffic)

    @property
    def rank(self) -> int:
        return self.rows.rank

    @property
    def ranks(self) -> int:
        return self.rows.world_size

    @property
    def bytes(self) -> list[float]:
        return [self.rows.total, self.sizes.total, self.dense.total]


class MixtureOfExperts(nn.Module):
    """All experts of a layer on one device; the tokens of `groups` ranks, one after another."""

    def __init__(
        self, config: ModelConfig, experts: int, capacity_factor: float, groups: int
    ) -> None:
        super().__init__()
        self.capacity_factor, self.groups = capacity_factor, groups
        self.router = nn.Linear(config.hidden_size, experts, bias=False)
        self.experts = nn.ModuleDict({str(e): FeedForward(config) for e in range(experts)})

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] to the same; leaves the balance loss, and what each expert took."""
        groups = [self._group(tokens) for tokens in x.flatten(0, 1).chunk(self.groups)]
        outputs, balances, counts = zip(*groups, strict=True)
        self.balance = torch.stack(balances).mean()
        self.counts = list(counts)  # [groups][experts]
        return torch.cat(outputs).view_as(x)

    def _group(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        scores = self.router(tokens)
        best, chosen = scores.topk(CHOICES)
        gates = best.softmax(-1)
        rows = self._queue(chosen.tolist())
        output = torch.zeros_like(tokens)
        for expert, own in zip(self.experts.values(), rows, strict=True):
            places = torch.tensor(own, dtype=torch.long, device=tokens.device).view(-1, 2)
            token, choice = places.unbind(1)
            gate = gates[token, choice].unsqueeze(1)
            output = output.index_add(0, token, gate * expert(tokens[token]))
        share = chosen.flatten().bincount(minlength=len(rows)) / chosen.numel()
        balance = len(rows) * (share * scores.softmax(-1).mean(0)).sum()
        return output, balance, [len(own) for own in rows]

    def _queue(self, chosen: list[list[int]]) -> list[list[tuple[int, int]]]:
        """(token, choice) of the rows that each expert has room for."""
        room = capacity(self.capacity_factor, len(chosen), len(self.experts))
        rows: list[list[tuple[int, int]]] = [[] for _ in self.experts]
        for choice in range(CHOICES):
            for token, experts in enumerate(chosen):
                if len(rows[experts[choice]]) < room:
                    rows[experts[choice]].append((token, choice))
        return rows


def distributed(problem: Problem, layer_type: type[nn.Module], *arguments: Any) -> Llama:
    """A copy of the model whose mixtures are `layer_type`s with only this rank's experts."""
    model = problem.new_model()
    for layer in model.model.layers:
        layer.mlp = layer_type(layer.mlp, *arguments)
    return model


@dataclass(frozen=True)
class ExpertProblem(Problem):
    """What one process makes of a batch; `counts` [layers][groups][experts] are the rows kept."""

    tokens: data.Tokens
    counts: list[list[list[int]]]

    def share(self, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """The rank's part of the batch."""
        return self.input_ids.chunk(ranks)[rank], self.targets.chunk(ranks)[rank]


def one_process(run: Run, args: Namespace, job: Runtime) -> ExpertProblem:
    """A Llama with experts in each layer, its loss with the balance loss, and its gradients."""
    config = config_from_args(args)
    tokens = data.prepare_from_args(args, config.vocab_size)
    batch = next(data.Loader(tokens, args.seq_len, args.batch_size, device=job.device))
    model = model_from_args(args, job.device)
    for layer in model.model.layers:
        mixture = MixtureOfExperts(config, args.experts, args.capacity_factor, job.world_size)
        layer.mlp = mixture.to(job.device)
    model.reset_parameters()
    run.print(
        f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}; "
        f"{config.num_hidden_layers} layers of {args.experts} experts, "
        f"{args.batch_size} x {args.seq_len} tokens"
    )
    alone = copy.deepcopy(model)
    loss = alone.loss(*batch)
    layers = [layer.mlp for layer in alone.model.layers]
    loss = loss + args.balance_weight * torch.stack([layer.balance for layer in layers]).sum()
    loss.backward()
    return ExpertProblem(
        model,
        *batch,
        loss.detach(),
        gradients_of(alone),
        tokens,
        [layer.counts for layer in layers],
    )
