"""What the expert scripts say of gradients, dropped tokens, bytes, and of the experts' loads."""

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from _expert_model import ExpertProblem, Wires
from _expert_routing import CHOICES
from _parallel import FLOAT, TOLERANCE, check_equal
from _traffic import Traffic
from torch import Tensor, nn

from distlab import data, predict
from distlab.model import Llama, config_from_args
from distlab.predict.params import mlp_weights
from distlab.run import Run
from distlab.runtime import Runtime

MESSAGES = 4  # dispatch and combine, forward and backward
Batch = tuple[Tensor, Tensor]
COUNT = 8  # bytes of a row count


def report_gradients(
    run: Run, who: str, loss: Tensor, found: dict[str, Tensor], problem: ExpertProblem
) -> None:
    """Compare the gradients of this rank's weights with the one-process model's."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, list(found))
    held = {name for names in everywhere for name in names}
    run.check_equal(f"{who}: every gradient is on a rank", len(held), len(problem.gradients))
    own = {name: problem.gradients[name] for name in found}
    check_equal(run, who, loss, found, replace(problem, gradients=own))


def compare_layer(run: Run, job: Runtime, problem: ExpertProblem, model: Llama) -> None:
    """The first layer's output, and the gradient of its input, for the batch's embeddings."""
    whole, own = problem.model.model, model.model
    x = whole.layers[0].post_attention_layernorm(whole.embed_tokens(problem.input_ids)).detach()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    expected = output_and_gradient(copy.deepcopy(whole.layers[0].mlp), x, upstream)
    part = [tensor.chunk(job.world_size)[job.rank] for tensor in (x, upstream)]
    found = output_and_gradient(own.layers[0].mlp, *part)
    for what, got, want in zip(("output", "gradient of the input"), found, expected, strict=True):
        want = want.chunk(job.world_size)[job.rank]
        run.check_close(f"a layer's {what} is one process's", got, want, TOLERANCE, relative=True)


def output_and_gradient(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(upstream)
    return output.detach(), x.grad


def report_drops(run: Run, args: Namespace, model: Llama, problem: ExpertProblem) -> None:
    """Compare the rows that each expert keeps of each rank's with the one-process model's."""
    own = torch.stack([layer.mlp.routing.counts for layer in model.model.layers])
    kept = torch.stack(Traffic().all_gather(own), dim=1)  # [layers, ranks, experts]
    choices = CHOICES * args.batch_size * args.seq_len * len(own)
    note = f"of {choices:,}; capacity factor {args.capacity_factor:g}"
    run.metric("dropped_rows", choices - int(kept.sum()), "", note)
    expected = torch.tensor(problem.counts)
    run.check_equal("each expert keeps the rows it keeps in one process", kept.cpu(), expected)


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
    new_model: Callable[[], Llama], step: Callable[[Llama, Batch, float], Tensor],
) -> None:  # fmt: skip
    """Train twice, without and with the balance loss; the loads of the experts of both."""
    names = ["without", "with"]
    weights = dict(zip(names, (0.0, args.balance_weight), strict=True))
    loads, dropped = {}, {}
    for name, weight in weights.items():
        one_step = partial(step, balance_weight=weight)
        loads[name], dropped[name] = train(run, args, job, tokens, new_model(), one_step)
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
    step: Callable[[Llama, Batch], Tensor],
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Loads [steps, layers, experts], 1 is an even share; the part of the late rows dropped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    loader = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, device=job.device
    )
    history = []
    for _ in run.progress(range(args.steps), "training"):
        step(model, next(loader))
        optimizer.step()
        routings = [layer.mlp.routing for layer in model.model.layers]
        history.append(torch.stack([torch.stack([r.wanted, r.counts]) for r in routings]))
    counted = torch.stack(history)  # [steps, layers, 2, experts]
    dist.all_reduce(counted)
    wanted, kept = counted.cpu().numpy().astype(float).transpose(2, 0, 1, 3)
    late = slice(-len(wanted) // 4, None)
    return wanted / wanted.mean(axis=2, keepdims=True), 1 - kept[late].sum() / wanted[late].sum()
