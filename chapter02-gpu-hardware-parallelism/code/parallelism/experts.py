"""The one-process mixture of experts, and what the expert scripts share: flags, wires, the problem.

The layer here is written another way than the distributed one, so that it can prove it: tokens
queue in a Python loop, gates are a softmax of the two best scores, and all experts are at hand.
"""

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distlab import data, predict, runtime, script
from distlab.errors import UsageError
from distlab.layers import FeedForward
from distlab.model import (
    Layer,
    Llama,
    ModelConfig,
    add_model_flags,
    config_from_args,
    model_from_args,
)
from distlab.predict.params import mlp_weights
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.problem import FLOAT, TOLERANCE, Problem, check_shares, gradient_of, gradients_of
from parallelism.traffic import Traffic

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
CHOICES = 2  # experts of a token
MESSAGES = 4  # dispatch and combine, forward and backward
COUNT = 8  # bytes of a row count

Batch = tuple[Tensor, Tensor]  # input ids and targets
Step = Callable[[Llama, Batch, float], Tensor]  # of a model, with a weight of the balance loss
Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True)
class Routing:
    """The rows that are kept, in the order of their experts: of which token, with which gate."""

    token: Tensor  # [rows]
    gate: Tensor  # [rows]
    counts: Tensor  # [experts], rows of each
    wanted: Tensor  # [experts], the same before any was dropped
    balance: Tensor  # the balance loss


def capacity(factor: float, tokens: int, experts: int) -> int:
    """The rows that an expert takes of one rank's tokens: `factor` times an even share."""
    return ceil(factor * CHOICES * tokens / experts)


def route(logits: Tensor, room: int) -> Routing:
    """Send each token of `logits` [tokens, experts] to its two best, of which each takes `room`."""
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    best, chosen = probabilities.topk(CHOICES)
    gates = best / best.sum(-1, keepdim=True)
    expert = chosen.T.flatten()  # the queue: all first choices, then all second ones
    choices = F.one_hot(expert, experts)  # [2·tokens, experts]
    place = (choices.cumsum(0) * choices).sum(-1)  # 1, 2, 3 … in the queue of its expert
    kept = (place <= room).nonzero().flatten()
    kept = kept[expert[kept].argsort(stable=True)]
    return Routing(
        token=kept % tokens,
        gate=gates.T.flatten()[kept],
        counts=expert[kept].bincount(minlength=experts),
        wanted=choices.sum(0),
        balance=experts * (choices.float().mean(0) * probabilities.mean(0)).sum(),
    )


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


class OwnExperts(nn.Module):
    """A layer's router, and this rank's experts of it; `forward` leaves its `routing`."""

    routing: Routing

    def __init__(self, whole: MixtureOfExperts) -> None:
        super().__init__()
        self.router, self.capacity_factor = whole.router, whole.capacity_factor
        self.ranks = dist.get_world_size()
        size = len(whole.experts) // self.ranks
        start = dist.get_rank() * size
        self.experts = nn.ModuleDict(dict(list(whole.experts.items())[start : start + size]))

    def apply_experts(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Each own expert's output for its rows, which stand by source rank, then by expert."""
        pieces = list(rows.split(counts))
        for i, expert in enumerate(self.experts.values()):
            own = slice(i, None, len(self.experts))  # one piece from each rank
            pieces[own] = expert(torch.cat(pieces[own])).split(counts[own])
        return torch.cat(pieces)

    def by_rank(self, counts: Tensor) -> list[int]:
        """The rows of all experts of a rank together, for `counts` [ranks · own experts]."""
        return counts.view(self.ranks, -1).sum(1).tolist()


def distributed(problem: Problem, own_part: Callable[[MixtureOfExperts], OwnExperts]) -> Llama:
    """A copy of the model, of whose mixtures a rank has its own part only."""
    model = problem.new_model()
    for layer, whole in zip(model.model.layers, layers_of(model, MixtureOfExperts), strict=True):
        layer.mlp = own_part(whole)
    return model


def layers_of(model: nn.Module, kind: type[Kind]) -> list[Kind]:
    """The modules of one kind, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, kind)]


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
    layers = layers_of(alone, MixtureOfExperts)
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


def compare_layer(run: Run, job: Runtime, problem: ExpertProblem, model: Llama) -> None:
    """The first layer's output, and the gradient of its input, for the batch's embeddings."""
    whole, own = layers_of(problem.model, Layer)[0], layers_of(model, OwnExperts)[0]
    embedded = problem.model.model.embed_tokens(problem.input_ids)
    x = whole.post_attention_layernorm(embedded).detach()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    expected = output_and_gradient(copy.deepcopy(whole.mlp), x, upstream)
    part = [tensor.chunk(job.world_size)[job.rank] for tensor in (x, upstream)]
    found = output_and_gradient(own, *part)
    for what, got, want in zip(("output", "gradient of the input"), found, expected, strict=True):
        want = want.chunk(job.world_size)[job.rank]
        run.check_close(f"a layer's {what} is one process's", got, want, TOLERANCE, relative=True)


def output_and_gradient(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(upstream)
    return output.detach(), gradient_of(x)


def report_drops(run: Run, args: Namespace, model: Llama, problem: ExpertProblem) -> None:
    """Compare the rows that each expert keeps of each rank's with the one-process model's."""
    own = torch.stack([layer.routing.counts for layer in layers_of(model, OwnExperts)])
    kept = torch.stack(Traffic().all_gather(own), dim=1)  # [layers, ranks, experts]
    choices = CHOICES * args.batch_size * args.seq_len * len(own)
    note = f"of {choices:,}; capacity factor {args.capacity_factor:g}"
    run.metric("dropped_rows", choices - int(kept.sum()), "", note)
    expected = torch.tensor(problem.counts)
    run.check_equal("each expert keeps the rows it keeps in one process", kept.cpu(), expected)


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


def report_bytes(run: Run, args: Namespace, wires: Wires, problem: ExpertProblem) -> None:
    """Compare what all ranks sent in a step with the formulas.

    (K - 1)/K of the rows have their expert on another rank where routing is even. What crosses
    exactly follows from the one-process model's routing.
    """
    config, ranks = config_from_args(args), wires.ranks
    layers, away = config.num_hidden_layers, (ranks - 1) / ranks
    row = MESSAGES * FLOAT * config.hidden_size
    rows = CHOICES * args.batch_size * args.seq_len * layers
    predicted = {
        "token rows": row * crossing(problem),
        "row counts": COUNT * args.experts * layers * ranks * away,
        "gradients of the replicas": ranks
        * predict.data_parallel_bytes(FLOAT * replicated(args), ranks),
    }
    sent = torch.tensor(wires.bytes, dtype=torch.float64, device=problem.loss.device)
    dist.all_reduce(sent)
    run.compare("token rows, if routing were even", row * rows * away, float(sent[0]), "B")
    for (name, expected), measured in zip(predicted.items(), sent.tolist(), strict=True):
        run.compare(name, expected, measured, "B")
    run.check_close("bytes as predicted", sent.cpu(), torch.tensor(list(predicted.values())), 0.5)


def replicated(args: Namespace) -> float:
    """The parameters that every rank has: all but the experts."""
    config = config_from_args(args)
    a = config.architecture
    dense_mlps = config.num_hidden_layers * mlp_weights(a, 0).total
    routers = config.num_hidden_layers * config.hidden_size * args.experts
    return predict.total_parameters(a) - dense_mlps + routers


def crossing(problem: ExpertProblem) -> int:
    """The rows that one process keeps whose expert is not on the rank of their token."""
    counts = np.array(problem.counts)  # [layers, ranks, experts]
    _, ranks, experts = counts.shape
    owner = np.arange(experts) // (experts // ranks)
    return int(counts[:, owner != np.arange(ranks)[:, None]].sum())


def compare_balance(
    run: Run, args: Namespace, job: Runtime, tokens: data.Tokens,
    new_model: Callable[[], Llama], step: Step,
) -> None:  # fmt: skip
    """Train twice, without and with the balance loss; the loads of the experts of both."""
    names = ["without", "with"]
    weights = dict(zip(names, (0.0, args.balance_weight), strict=True))
    loads, dropped = {}, {}
    for name, weight in weights.items():
        loads[name], dropped[name] = train(run, args, job, tokens, new_model(), step, weight)
    late = {name: load[-len(load) // 4 :].mean(axis=0) for name, load in loads.items()}
    worst = int(late["without"].max(axis=1).argmax())
    run.print("\ntraining without and with the balance loss")
    rows = [
        [e, loads["with"][0, worst, e], *(float(late[name][worst, e]) for name in names)]
        for e in range(args.experts)
    ]
    columns = ["expert", "at first", "without", "with"]
    run.table(
        "loads", columns, rows, "choices of an expert, in even shares, in the most crowded layer"
    )
    run.figure(
        "loads", kind="bar", title="Without a balance loss the router crowds a few experts",
        x_label="expert", y_label="tokens, in even shares",
        series=[{"label": f"{name} balance loss", "x": list(range(args.experts)),
                 "y": late[name][worst].tolist()} for name in names],
        lines=[{"label": "even", "y": 1.0}],
    )  # fmt: skip
    for name in names:
        run.metric(f"dropped_{name}", 100 * dropped[name], "%", "of the rows, late in training")
    busiest = {name: float(late[name].max(axis=1).mean()) for name in names}
    run.check_below(
        "the balance loss relieves the busiest experts", busiest["with"], busiest["without"]
    )


def train(
    run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, model: Llama,
    step: Step, balance_weight: float,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Loads [steps, layers, experts], 1 is an even share; the part of the late rows dropped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    loader = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, device=job.device
    )
    history = []
    for _ in run.progress(range(args.steps), "training"):
        step(model, next(loader), balance_weight)
        optimizer.step()
        routings = [layer.routing for layer in layers_of(model, OwnExperts)]
        history.append(torch.stack([torch.stack([r.wanted, r.counts]) for r in routings]))
    counted = torch.stack(history)  # [steps, layers, 2, experts]
    dist.all_reduce(counted)
    wanted, kept = counted.cpu().numpy().astype(float).transpose(2, 0, 1, 3)
    late = slice(-len(wanted) // 4, None)
    return wanted / wanted.mean(axis=2, keepdims=True), 1 - kept[late].sum() / wanted[late].sum()
