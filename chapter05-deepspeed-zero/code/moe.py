"""DeepSpeed's mixture of experts in a real training run, with experts on different ranks.

Every MLP becomes E experts, of which a router gives each token one (top-1): E times the parameters
for the FLOPs of one MLP. With expert parallelism a rank holds E/K of them. An all-to-all carries
each token to its expert's rank, and a second one its result back. An expert takes
C = ceil(capacity factor · T/E) of a rank's T tokens, and further ones are dropped: their residual
goes on alone. DeepSpeed sends all C places of all experts, also the empty ones, so a layer's four
all-to-alls of a step send w·h·E·C·(K-1)/K bytes each, whatever the routing is.

It proves the experts on K ranks equal to all of them on one process, and trains three models on
the same text: dense, with experts, and with experts and the balancing loss, E·sum(f·p) over the
experts, f an expert's share of the tokens and p its mean probability.

Run:
    torchrun --nproc_per_node=2 chapter05-deepspeed-zero/code/moe.py

You should see: losses, gradients and dropped tokens of one process; the busiest expert less busy
with the balancing loss; fewer tokens dropped with it, and with more capacity, which costs bytes in
proportion; and, of three models that began with the same weights, the dense one ahead after so few
steps: each expert has learnt from its share of the tokens only.
"""

from argparse import Namespace
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distlab import data, predict, runtime, script
from distlab.display import quantity
from distlab.errors import Skipped, UsageError
from distlab.launch import detect_launch
from distlab.model import Llama, add_model_flags, config_from_args, num_parameters
from distlab.predict import Experts
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.training.held_out import HeldOut
from zero.engine import engine_of, stage_config
from zero.experts import all_to_all_bytes, balance_of, mixtures, own_part, whole_model, whole_name

PRESETS = {
    "smoke": {"model": "smoke", "experts": 4, "corpus_mb": 1.0, "seq_len": 32, "batch_size": 16,
              "steps": 60, "learning_rate": 5e-3},
    "laptop": {"model": "smoke", "vocab_size": 1024, "experts": 8, "corpus_mb": 2.0,
               "seq_len": 64, "batch_size": 16, "steps": 250, "learning_rate": 5e-3},
    "gpu": {"model": "gpu", "hidden_size": 768, "layers": 4, "experts": 16, "corpus_mb": 12.0,
            "seq_len": 512, "batch_size": 32, "steps": 300, "learning_rate": 6e-4},
}  # fmt: skip
FACTORS = (1.0, 1.25, 2.0)  # of capacity
PROOF_STEPS = 3
ALL_TO_ALLS = 4  # of a layer and a step: to the experts and back, forward and backward
POINTS = 20  # of the figure's lines, each the mean of so many steps as that takes
SAME = 1e-5


@dataclass(frozen=True)
class Trained:
    """What a run leaves; loads [steps, layers, experts] are in even shares, 1 is T/E."""

    loss: float
    loads: np.ndarray | None = None
    held_out: Sequence[float] = ()  # with each of FACTORS
    dropped: Sequence[float] = ()  # shares of the held-out tokens
    sent: Sequence[float] = ()  # bytes of a rank's all-to-alls in a step


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        show(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--experts", type=script.positive_int, metavar="E", help="of each layer")
    parser.add_argument("--capacity-factor", type=script.positive_float, default=1.25, metavar="C")
    parser.add_argument("--balance-weight", type=script.positive_float, default=0.01, metavar="W")
    parser.add_argument("--learning-rate", type=script.positive_float, metavar="LR")
    parser.add_argument("--steps", type=script.positive_int, help="of training")
    args = parser.parse_args(argv)
    ranks = detect_launch().world_size
    if ranks == 1:
        raise UsageError("experts of 1 rank go nowhere; use torchrun --nproc_per_node=2")
    for flag, value in (("--experts", args.experts), ("--batch-size", args.batch_size)):
        if value % ranks:
            fits = ranks * ceil(value / ranks)
            raise UsageError(f"{flag} {value} is no multiple of {ranks} ranks; use {fits}")
    return args


def show(run: Run, args: Namespace, job: Runtime) -> None:
    if job.backend == "gloo" and job.device.type == "cuda":
        raise Skipped("gloo has no all-to-all of a GPU's tensors; use --device cpu, or NCCL")
    config = config_from_args(args)
    tokens = data.prepare_from_args(args, config.vocab_size)
    whole = whole_model(args, job)
    shape = f"{config.num_hidden_layers} layers of {args.experts} experts"
    run.print(f"job: {job.world_size} ranks, {shape}, {args.batch_size} x {args.seq_len} tokens")
    for zero in (0, 2):
        prove(run, args, job, tokens, deepcopy(whole), zero)
    dense = deepcopy(whole)  # with one expert a token meets as many weights, but for the router
    for layer, mixture in zip(dense.model.layers, mixtures(dense), strict=True):
        layer.mlp = mixture.experts.deepspeed_experts[0]
    trained = {
        "dense": train(run, args, job, tokens, dense),
        "experts": train(run, args, job, tokens, own_part(whole, job)),
        "and balance": train(run, args, job, tokens, own_part(whole, job), args.balance_weight),
    }
    report_models(run, args, whole, trained)
    report_loads(run, args, trained)
    report_capacity(run, args, job, trained["experts"], trained["and balance"])


def prove(
    run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, whole: Llama, zero: int
) -> None:
    """Steps of the experts on K ranks, and of all in this process, which takes the ranks' shares
    of the batch one after another: capacity and balance are of a share, not of the batch."""
    model = own_part(whole, job)
    own = dict(model.named_parameters())
    alone = {name: whole.get_parameter(whole_name(name, model, job)) for name in own}
    loader = data.Loader(tokens, args.seq_len, args.batch_size, device=job.device)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    found, expected = [], []
    with engine_of(model, stage_config(zero, args.batch_size // job.world_size), job) as engine:
        for step in range(PROOF_STEPS):
            shares = [*zip(*(part.chunk(job.world_size) for part in next(loader)), strict=True)]
            loss = backward(engine, shares[job.rank], args.balance_weight)
            found.append(float(np.mean(gathered(loss.item()))))
            losses = []
            for inputs, targets in shares:
                one = whole(inputs, targets=targets) + args.balance_weight * balance_of(whole)
                (one / job.world_size).backward()
                losses.append(one.item())
            expected.append(float(np.mean(losses)))
            if step == zero == 0:  # AdamW would hide a factor of the experts' gradients
                got, want = ({n: p.grad for n, p in part.items()} for part in (own, alone))
                run.check_close("gradients are one process's", got, want, SAME, relative=True)
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
    run.check_close(f"ZeRO {zero}: losses are one process's", found, expected, SAME)
    dropped = sum(gathered(sum(mixture.dropped for mixture in mixtures(model))))
    expected_drops = sum(mixture.dropped for mixture in mixtures(whole))
    run.check_equal(f"ZeRO {zero}: tokens dropped are one process's", dropped, expected_drops)


def backward(engine: Any, batch: Sequence[Tensor], balance_weight: float) -> Tensor:
    """Of the mean loss and, where there are experts, the balancing loss; gives their sum."""
    loss = engine(batch[0], targets=batch[1])
    if mixtures(engine.module):
        loss = loss + balance_weight * balance_of(engine.module)
    engine.backward(loss)
    return loss.detach()


def train(
    run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, model: Llama,
    balance_weight: float = 0.0,
) -> Trained:  # fmt: skip
    sizes = {"seq_len": args.seq_len, "batch_size": args.batch_size}
    loader = data.Loader(
        tokens, **sizes, rank=job.rank, world_size=job.world_size, device=job.device
    )
    held_out = HeldOut(tokens.validation, job, windows=4 * args.batch_size, **sizes)
    history = []
    config = stage_config(0, args.batch_size // job.world_size, learning_rate=args.learning_rate)
    with engine_of(model, config, job) as engine:
        for _ in run.progress(range(args.steps), "training"):
            backward(engine, next(loader), balance_weight)
            engine.step()
            history.append([mixture.wanted for mixture in mixtures(model)])
        loss = held_out.loss(engine)
        if not mixtures(model):
            return Trained(loss)
        losses, dropped, sent = [], [], []
        for factor in FACTORS:
            set_capacity(model, factor)
            losses.append(held_out.loss(engine))
            counts = gathered([(m.dropped, m.seen) for m in mixtures(model)])
            lost, seen = np.array(counts).sum(axis=(0, 1))
            dropped.append(float(lost / seen))
            with all_to_all_bytes() as messages:
                backward(engine, next(loader), balance_weight)
            engine.zero_grad()
            sent.append(sum(messages))
    dist.all_reduce(wanted := torch.stack([torch.stack(step) for step in history]).double())
    loads = wanted / wanted.mean(dim=2, keepdim=True)
    return Trained(loss, loads.cpu().numpy(), losses, dropped, sent)


def set_capacity(model: Llama, factor: float) -> None:
    for mixture in mixtures(model):
        mixture.gate.capacity_factor = factor
        mixture.seen = mixture.dropped = 0


def report_models(run: Run, args: Namespace, whole: Llama, trained: dict[str, Trained]) -> None:
    dense = config_from_args(args).architecture
    sparse = replace(dense, experts=Experts(args.experts, 1, dense.intermediate_size))
    rows = []
    for name, one in trained.items():
        a = dense if one.loads is None else sparse
        flops = predict.training_flops_per_token(a, args.seq_len)
        rows.append([name, predict.total_parameters(a), predict.active_parameters(a),
                     quantity(flops, "FLOP"), f"{one.loss:.3f}"])  # fmt: skip
    run.table("models", ["model", "parameters", "met by a token", "training, a token",
                         "held-out loss, nats"], rows, f"after {args.steps} steps")  # fmt: skip
    run.check_equal("parameters as predicted", num_parameters(whole), rows[1][1])


def report_loads(run: Run, args: Namespace, trained: dict[str, Trained]) -> None:
    """The busiest expert's load in even shares, in the mean over the layers."""
    series, late = [], []
    for one, weight in ((trained["experts"], 0.0), (trained["and balance"], args.balance_weight)):
        assert one.loads is not None
        busiest = one.loads.max(axis=2).mean(axis=1)
        pieces = np.array_split(busiest, min(POINTS, args.steps))
        ends = np.cumsum([len(piece) for piece in pieces])
        series.append({"label": f"balancing loss times {weight:g}", "x": ends.tolist(),
                       "y": [float(piece.mean()) for piece in pieces]})  # fmt: skip
        late.append(float(busiest[len(busiest) // 2 :].mean()))
    run.figure("loads", kind="line", title="The balancing loss relieves the busiest expert",
               x_label="step", y_label="its tokens, in even shares", series=series,
               lines=[{"label": "even", "y": 1.0}])  # fmt: skip
    what = "with the balancing loss, the busiest expert late in training"
    run.check_below(what, late[1], late[0], "even shares")


def report_capacity(
    run: Run, args: Namespace, job: Runtime, without: Trained, balanced: Trained
) -> None:
    """What more places cost, and what they save."""
    config, ranks = config_from_args(args), job.world_size
    rows = []
    for i, factor in enumerate(FACTORS):
        capacity = ceil(factor * (args.batch_size // ranks * args.seq_len) / args.experts)
        message = 4 * config.hidden_size * args.experts * capacity * (ranks - 1) / ranks
        predicted = config.num_hidden_layers * ALL_TO_ALLS * message
        rows.append([factor, capacity, 100 * without.dropped[i], 100 * balanced.dropped[i],
                     f"{balanced.held_out[i]:.3f}", predicted, balanced.sent[i]])  # fmt: skip
    run.table("capacity", ["capacity factor", "places", "dropped, %", "with balance, %",
                           "held-out loss", "all-to-all predicted, B", "measured, B"], rows,
              "dropped: of the held-out tokens; all-to-all: sent by a rank in a step")  # fmt: skip
    run.check_equal("bytes as predicted", [row[-1] for row in rows], [row[-2] for row in rows])
    run.check_below("more capacity drops less", balanced.dropped[-1], balanced.dropped[0])


if __name__ == "__main__":
    script.exit(main)
