"""DDP, torch's FSDP2 and DeepSpeed's stages side by side: memory, bytes, time on three links.

Every way trains the same model on the same batches, in the same job, in turns. The stages are the
configs of configs/, as they stand there. Run alone, the script makes four virtual nodes of a rank
each, and sets their links' rate.

Run:
    python chapter05-deepspeed-zero/code/compare_fsdp_zero.py
    torchrun --nproc_per_node=4 chapter05-deepspeed-zero/code/compare_fsdp_zero.py

You should see: one loss for all; state that falls with the stage, DeepSpeed's above the paper's by
its own float32 copy; on slow links the order of the bytes sent, on fast ones that of the Python
behind a step; and for each link what to take.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import predict, runtime, script
from distlab.cluster.links import parse_rate
from distlab.cluster.sweep import Sweep, here_or_on_nodes
from distlab.cluster.virtual import VirtualCluster
from distlab.launch import detect_launch
from distlab.measure import LiveBytes
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args, num_parameters
from distlab.ranks import gathered, in_turns
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.traffic import bytes_sent, reduction_factor
from distlab.training.memory import bytes_of
from zero import engine

NODES = 4
UNSHAPED = "unshaped"
ALL = [
    "ddp",
    "fsdp-grad",
    "fsdp-full",
    "zero-0",
    "zero-1",
    "zero-2",
    "zero-2-cpu",
    "zero-3",
    "zero-3-kept",
]
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "batch_size": 1, "seq_len": 32, "steps": 3, "repeats": 3,
              "links": [UNSHAPED], "ways": ["ddp", "fsdp-full", "zero-2-cpu", "zero-3"]},
    "laptop": {"model": "laptop", "hidden_size": 128, "layers": 4, "vocab_size": 1024,
               "batch_size": 1, "seq_len": 64, "steps": 5, "repeats": 5, "ways": ALL,
               "links": [UNSHAPED, "1gbit", "100mbit"]},
    "gpu": {"model": "gpu", "batch_size": 2, "seq_len": 512, "steps": 5, "repeats": 10,
            "links": [UNSHAPED], "ways": ALL},
}  # fmt: skip
FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "batch_size",
    "seq_len", "steps", "repeats", "ways", "seed", "timeout",
)  # fmt: skip
FLOAT = 4  # bytes
LEARNING_RATE, EPSILON = 1e-3, 1e-4  # as large as gradients: else Adam divides rounding by itself
SAME = 1e-4  # nats
SENT = 0.05  # of the bytes predicted, at most: padding, and units that stay whole
FRUGAL = (
    "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
)  # fmt: skip
Batch = tuple[Tensor, Tensor]
Found = dict[str, dict[str, float]]  # of each way


def main(argv: list[str] | None = None) -> int:
    return here_or_on_nodes(parse_args(argv), measure_here, compare_links)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--ways", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--steps", type=script.positive_int, help="whose last loss is compared")
    add("--repeats", type=script.positive_int, help="timed steps of each way")
    add("--links", nargs="+", metavar="RATE", help="of the virtual nodes: 1gbit, or unshaped")
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    for link in args.links:
        if link != UNSHAPED:
            parse_rate(link, f"--links {link}")
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


@dataclass(frozen=True)
class Way:
    """How training is divided, as ZeRO's `stage` says; `begin` gives a step, and what it keeps.

    `gathers` says how often a step puts together the layers, and what is in none.
    """

    stage: int
    begin: "Callable[[Llama, Namespace, Runtime], Training]"
    gathers: tuple[int, int]


@dataclass
class Training:
    step: Callable[[Batch], Tensor]
    kept: Callable[[], dict[str, int]]  # bytes by kind, with a gradient there
    backward: Callable[[Batch], Tensor]  # the step without the optimizer's


def by_torch(
    wrap: Callable[[Llama], nn.Module], model: Llama, args: Namespace, job: Runtime
) -> Training:
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE, eps=EPSILON, fused=True)

    def backward(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = wrapped(batch[0], targets=batch[1])
        loss.backward()
        return loss.detach()

    def step(batch: Batch) -> Tensor:
        loss = backward(batch)
        optimizer.step()
        return loss

    kinds = bytes_of(wrapped, optimizer)
    return Training(step, lambda: {name: count() for name, count in kinds.items()}, backward)


def sharded(model: Llama, reshard: bool) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=False)
    return model


def by_config(
    name: str, model: Llama, args: Namespace, job: Runtime, without: tuple[str, ...] = ()
) -> Training:
    """DeepSpeed, by a file of configs/, or `without` some of its keys: then with the defaults.

    torch's AdamW is the fused one, as the other ways have it; by itself DeepSpeed asks for a loop
    over the parameters.
    """
    settings = Namespace(
        config=name, batch_size=args.batch_size * job.world_size, accumulate=1, clip=0.0,
        learning_rate=LEARNING_RATE, weight_decay=0.01, dtype="float32",
    )  # fmt: skip
    config = engine.fill(engine.read_config(engine.CONFIGS / name), settings, job)
    optimizer = config["optimizer"]["params"]
    optimizer |= {"eps": EPSILON, "betas": [0.9, 0.999]}
    if optimizer.get("torch_adam"):
        optimizer["fused"] = True
    for key in without:
        del config["zero_optimization"][key]
    trained = engine.begin(model, config, job, flag=f"--ways: {name}")

    def backward(batch: Batch) -> Tensor:
        loss: Tensor = trained(batch[0], targets=batch[1])
        trained.backward(loss)
        return loss.detach()

    def step(batch: Batch) -> Tensor:
        loss = backward(batch)
        trained.step()
        return loss

    return Training(step, lambda: engine.held(trained), backward)


def replicated(model: Llama) -> nn.Module:
    return DDP(model, gradient_as_bucket_view=True)


WAYS: dict[str, Way] = {
    "ddp": Way(0, partial(by_torch, replicated), (0, 0)),
    "fsdp-grad": Way(3, partial(by_torch, partial(sharded, reshard=False)), (1, 1)),
    "fsdp-full": Way(3, partial(by_torch, partial(sharded, reshard=True)), (2, 1)),
    "zero-0": Way(0, partial(by_config, "deepspeed_stage0_config.json"), (0, 0)),
    "zero-1": Way(1, partial(by_config, "deepspeed_stage1_config.json"), (1, 1)),
    "zero-2": Way(2, partial(by_config, "deepspeed_stage2_config.json"), (1, 1)),
    "zero-2-cpu": Way(2, partial(by_config, "deepspeed_stage2_offload_cpu_config.json"), (1, 1)),
    # By use: a tied embedding is used twice in forward, and twice in backward.
    "zero-3": Way(3, partial(by_config, "deepspeed_stage3_config.json"), (2, 4)),
    "zero-3-kept": Way(  # DeepSpeed's defaults: what is gathered in forward stays for backward
        3, partial(by_config, "deepspeed_stage3_config.json", without=FRUGAL), (1, 1)
    ),
}


def measure_here(run: Run, args: Namespace, job: Runtime) -> None:
    """The ranks of this job: every way's loss, memory and bytes once, and its time in turns."""
    engine.load()
    batch = engine.own_batch(args, job)
    trainings: dict[str, Training] = {}
    found: Found = {}
    for name in run.progress(args.ways, "ways"):
        runtime.seed_everything(args.seed)
        trainings[name] = WAYS[name].begin(model_from_args(args, job.device), args, job)
        found[name] = costs(args, job, name, trainings[name], batch)
    steps = {name: partial(own.step, batch) for name, own in trainings.items()}
    for name, timing in in_turns(steps, 1, args.repeats, job).items():
        found[name]["step"] = timing.median
    run.extra(ways=found)
    report(run, found, {"here": {name: own["step"] for name, own in found.items()}})


def costs(
    args: Namespace, job: Runtime, name: str, training: Training, batch: Batch
) -> dict[str, float]:
    """What a way comes to and needs: the mean of the ranks, of the peak the largest."""
    losses = [training.step(batch).item() for _ in range(args.steps)]
    with LiveBytes() as live:
        training.backward(batch)
    kept = training.kept()
    training.step(batch)
    known = {
        **{f"kept {kind}": mean(gathered(size)) for kind, size in kept.items()},
        "peak": float(max(gathered(live.peak))), "loss": mean(gathered(losses[-1])),
        # Only stage 3 reduces and scatters; DeepSpeed's other stages, and DDP, reduce to all.
        "reduced": reduction_factor(job.backend) if WAYS[name].stage == 3 else 2,
    }  # fmt: skip
    if job.local_world_size == 1:  # else the loopback has what ranks of a node send
        known["sent"] = mean(gathered(bytes_sent(lambda: training.step(batch), job)))
    return known


def compare_links(run: Run, args: Namespace) -> None:
    """Virtual nodes, a rank on each; all is measured on every link, and shown of the first."""
    sweep = Sweep(Path(__file__), args, FOR_THE_NODES)
    found: Found = {}
    times: dict[str, dict[str, float]] = {}
    with VirtualCluster(NODES) as cluster:
        for link in run.progress(args.links, "links"):
            cluster.rates(None if link == UNSHAPED else link)
            now: Found = sweep.on(cluster, None)["ways"]
            found = found or now
            times[link] = {name: own["step"] for name, own in now.items()}
    report(run, found, times)


def report(run: Run, found: Found, times: dict[str, dict[str, float]]) -> None:
    """The table of all ways, its checks, and for each link what to take."""
    ranks = NODES if "here" not in times else detect_launch().world_size
    with torch.device("meta"):
        model = Llama(config_from_args(run.args))
    whole = FLOAT * num_parameters(model)
    layers = FLOAT * sum(map(num_parameters, model.model.layers))
    tied = model.config.tie_word_embeddings
    rows: list[list[Any]] = []
    for name, own in found.items():
        way = WAYS[name]
        state = predict.model_state(whole / FLOAT, "fp32", "adamw", way.stage, ranks).total
        kept = sum(value for key, value in own.items() if key.startswith("kept"))
        of_layers, of_rest = way.gathers if tied else map(min, way.gathers, (2, 2))
        put_together = of_layers * layers + of_rest * (whole - layers)
        own["sent predicted"] = (ranks - 1) / ranks * (put_together + own["reduced"] * whole)
        own["state"], own["state predicted"] = kept, state
        mb = ("state predicted", "state", "kept master", "peak", "sent predicted", "sent")
        rows.append([name, *(own[key] / 1e6 if key in own else None for key in mb), own["loss"],
                     *(1e3 * of_link[name] for of_link in times.values())])  # fmt: skip
    run.table(
        "ways",
        ["way", "state predicted (MB)", "state (MB)", "of it a float32 copy (MB)",
         "made in backward (MB)", "sent predicted (MB)", "sent (MB)", "loss",
         *(f"step, {link} (ms)" for link in times)], rows,
        caption=f"of one of {ranks} ranks; state: weights, gradients, optimizer, predicted "
        "by the paper; made in backward: at its peak, beside what was there; sent in a step, "
        "predicted for gloo and DeepSpeed's defaults; steps in turns, medians",
    )  # fmt: skip
    losses = [own["loss"] for own in found.values()]
    run.check_below("losses differ at most by", max(losses) - min(losses), SAME)
    both = [(own["sent predicted"], own["sent"]) for own in found.values() if "sent" in own]
    if both:
        worst = max(abs(formula / counted - 1) for formula, counted in both)
        run.check_below("error of the bytes sent, the largest", worst, SENT)
    for link, seconds in times.items():
        run.print(f"verdict: {link}: {recommended(found, seconds)}")
    draw(run, found, times)


def recommended(found: Found, seconds: dict[str, float]) -> str:
    """The fastest, and what to take where its state does not fit, and so on."""
    first, *slower = sorted(seconds, key=seconds.__getitem__)
    told = [f"{first} is the fastest ({1e3 * seconds[first]:.0f} ms)"]
    last = first
    for name in slower:
        if found[name]["state"] < 0.95 * found[last]["state"]:
            less, more = 1e-6 * found[name]["state"], 1e-6 * found[last]["state"]
            told.append(f"{name} keeps {less:.1f} MB instead of {more:.1f}, in "
                        f"{seconds[name] / seconds[first]:.2f} x the time")  # fmt: skip
            last = name
    return "; ".join(told)


def draw(run: Run, found: Found, times: dict[str, dict[str, float]]) -> None:
    """Time over memory: each way on every link, one above the other."""
    series = [
        {"label": name, "x": [own["state"] / 1e6] * len(times),
         "y": [1e3 * of_link[name] for of_link in times.values()]}
        for name, own in found.items()
    ]  # fmt: skip
    run.figure(
        "ways", kind="scatter", title="Links, from the bottom up: " + ", ".join(times),
        x_label="state of a rank (MB)", y_label="step (ms)", log_y=True, series=series,
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
