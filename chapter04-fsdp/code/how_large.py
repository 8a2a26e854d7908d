"""The largest model that a device of a given size trains: predicted, then found.

Every rank gets a memory of --memory-mb that the system enforces (distlab.training.memory). For each
way to spread the state the largest number of layers is predicted by walking through a step
(fsdp/memory_timeline.py), and then found: each probe starts ranks that train two steps, and either
they do, or one of them ends with the line that says what held the bytes.

Run:
    python chapter04-fsdp/code/how_large.py
    python chapter04-fsdp/code/how_large.py --ranks 2 --memory-mb 96

You should see: a table of the largest models, predicted and found, within 10 % of each other; what
a rank said that had a layer too many; and that sharding over K ranks trains a model up to K times
as large.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import runtime, script
from distlab.errors import RunError, UsageError
from distlab.model import Llama, ModelConfig, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.spawning import spawn
from distlab.training.memory import MB, DeviceMemory, bytes_of, device_memory
from fsdp.disk import put_on_disk
from fsdp.memory_timeline import Plan, Sharding

MODES = {  # but for their ranks
    "DDP": Sharding(1, units="none"),
    "DDP, recomputing": Sharding(1, units="none", checkpointing=True),
    "kept after forward": Sharding(1, kept=1.0),
    "fully sharded": Sharding(1),
    "fully sharded, recomputing": Sharding(1, checkpointing=True),
    "fully sharded, on disk": Sharding(1, on_disk=True),
}
ALL = list(MODES)
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"ranks": 2, "memory_mb": 48.0, "hidden_size": 128, "batch_size": 1, "seq_len": 64,
              "modes": ["DDP", "fully sharded"]},
    "laptop": {"ranks": 4, "memory_mb": 128.0, "hidden_size": 192, "batch_size": 1, "seq_len": 64,
               "modes": ALL},
    "gpu": {"ranks": 2, "memory_mb": 4000.0, "hidden_size": 1024, "batch_size": 4, "seq_len": 512,
            "modes": ALL},
}  # fmt: skip
VOCABULARY, HEAD = 512, 32
FLOAT = 4  # bytes
STEPS = 2  # the second has the optimizer's state from its beginning
PROBE_LIMIT_S = 200.0
WORST = 10.0  # per cent
TOO_SMALL = "are used up"  # what a rank says whose memory does not suffice


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        found = [Search(args, mode).run() for mode in run.progress(args.modes, "modes")]
        report(run, args, found)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    runtime.add_runtime_flags(parser)
    add = parser.add_argument
    add("--ranks", type=script.positive_int, help="processes, each with a memory of its own")
    add("--memory-mb", type=script.positive_float, metavar="MB", help="of a rank, in 10^6 bytes")
    add("--hidden-size", type=script.positive_int, help="of every model; layers are what varies")
    add("--batch-size", type=script.positive_int, help="sequences of a rank")
    add("--seq-len", type=script.positive_int)
    add("--modes", nargs="+", choices=ALL, metavar="MODE", help="; ".join(ALL))
    add("--offload-dir", metavar="DIR", default="build/offload", help="on a disk, for the last row")
    args = parser.parse_args(argv)
    if args.hidden_size % HEAD:
        raise UsageError(f"--hidden-size {args.hidden_size} is not a multiple of {HEAD}")
    smallest = plan_of(args, MODES["DDP"], layers=1).needed()
    if smallest > args.memory_mb * MB:
        raise UsageError(
            f"--memory-mb {args.memory_mb:g} is too small for a single layer under DDP; use "
            f"{smallest / MB:.1f} or more, or a smaller --hidden-size"
        )
    return args


def config_of(args: Namespace, layers: int) -> ModelConfig:
    hidden = args.hidden_size
    inner = 8 * hidden // 3 // HEAD * HEAD
    return ModelConfig(VOCABULARY, hidden, inner, layers, hidden // HEAD, hidden // HEAD)


def plan_of(args: Namespace, mode: Sharding, layers: int) -> Plan:
    """What a step holds, by the formulas."""
    config = config_of(args, layers)
    layer = num_parameters(config_of(args, layers + 1)) - num_parameters(config)
    return Plan(
        config.architecture,
        replace(mode, ranks=args.ranks),
        root=FLOAT * (num_parameters(config) - layers * layer),
        layer=FLOAT * layer,
        batch=args.batch_size,
        seq_len=args.seq_len,
    )


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number of layers that fits, 0 if none does, looked for around `guess`.

    From there in steps that double, until the answer changes; then by halves.
    """
    low, high, step = 0, None, 1
    at = max(1, guess)
    while high is None or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        elif low == 0:
            at = max(1, high - step)
        else:
            at = (low + high) // 2
        step *= 2
        if high == 1:
            return 0
    return low


class Search:
    """For one mode: the largest number of layers predicted, and the one found."""

    def __init__(self, args: Namespace, name: str) -> None:
        self.args, self.name, self.mode = args, name, MODES[name]
        self.failures: dict[int, str] = {}  # by layers: what a rank said that had too little
        self.probes = 0

    def run(self) -> "Search":
        self.predicted = largest(self.should_fit, 8)
        self.found = largest(self.fits, self.predicted)
        return self

    def should_fit(self, layers: int) -> bool:
        return plan_of(self.args, self.mode, layers).needed() <= self.args.memory_mb * MB

    def fits(self, layers: int) -> bool:
        """Whether ranks with this memory train so many layers; raises for any other failure."""
        self.probes += 1
        device = "cuda" if self.args.device == "cuda" else "cpu"
        try:
            spawn(
                train, self.args.ranks, self.args, self.mode, layers,
                timeout_s=PROBE_LIMIT_S, device=device,
            )  # fmt: skip
        except RunError as error:
            said = next((line for line in str(error).splitlines() if TOO_SMALL in line), None)
            if said is None:
                raise
            self.failures[layers] = said.partition("RunError: ")[2] or said
            return False
        return True

    def parameters(self, layers: int) -> int:
        return num_parameters(config_of(self.args, layers)) if layers else 0


def train(job: Runtime, args: Namespace, mode: Sharding, layers: int) -> None:
    """Two steps on random tokens, in a memory of --memory-mb."""
    with device_memory(job, args.memory_mb, lambda: rehearse(args, mode, job)) as memory:
        memory.phase = "building the model"
        plan = plan_of(args, mode, layers)
        said = f"predicted were {plan.needed() / MB:.1f} MB in {plan.peak().name}"
        with build(args, mode, layers, job) as (model, optimizer, update):
            memory.watch(said, **bytes_of(model, optimizer))
            for _ in range(STEPS):
                step(memory, model, update, batch_of(args, job))
                optimizer.zero_grad()


def rehearse(args: Namespace, mode: Sharding, job: Runtime) -> None:
    """A step of a small model: what the libraries load for it is theirs, not the model's."""
    with build(args, mode, 2, job) as (model, optimizer, update):
        for _ in range(STEPS):
            step(DeviceMemory(job, None), model, update, batch_of(args, job))
            optimizer.zero_grad()


@contextmanager
def build(
    args: Namespace, mode: Sharding, layers: int, job: Runtime
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]]:
    """The model in its wrapper, its optimizer, and what makes the optimizer's step.

    A sharded model is never whole: it begins without memory.
    """
    with torch.device(job.device if mode.units == "none" else "meta"):
        model = Llama(config_of(args, layers))
    model.gradient_checkpointing = mode.checkpointing
    if mode.units == "none":
        wrapped = DDP(model, gradient_as_bucket_view=True)
        optimizer = adam(model)
        yield wrapped, optimizer, optimizer.step
        return
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=mode.kept == 0)
    fully_shard(model)
    with ExitStack() as files:
        if mode.on_disk:
            optimizer = adam(model)
            disk = put_on_disk(model, optimizer, args.offload_dir, flag="--offload-dir")
            update = files.enter_context(disk).step
        else:
            model.to_empty(device=job.device)
            model.tie_weights()
            optimizer = adam(model)
            update = optimizer.step
        with torch.no_grad():
            for parameter in model.parameters():  # any values will do: nothing is learnt here
                parameter.to_local().normal_(std=0.02)  # type: ignore[attr-defined]
        yield model, optimizer, update


def adam(model: Llama) -> torch.optim.AdamW:
    """A group for each layer: how to step DTensors is worked out for each list of shapes, which
    for one list of all takes longer than the training here."""
    groups = [list(layer.parameters()) for layer in model.model.layers]
    inner = {id(parameter) for group in groups for parameter in group}
    groups.append([parameter for parameter in model.parameters() if id(parameter) not in inner])
    return torch.optim.AdamW([{"params": group} for group in groups], fused=True)


def batch_of(args: Namespace, job: Runtime) -> torch.Tensor:
    shape = (args.batch_size, args.seq_len + 1)
    return torch.randint(VOCABULARY, shape, device=job.device)


def step(
    memory: DeviceMemory, model: nn.Module, update: Callable[[], object], tokens: torch.Tensor
) -> None:
    memory.phase = "forward"
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    memory.phase = "backward"
    loss.backward()
    memory.phase = "the optimizer's step"
    update()


def report(run: Run, args: Namespace, searches: list[Search]) -> None:
    first = searches[0]
    rows: list[list[Any]] = []
    for one in searches:
        predicted, found = one.parameters(one.predicted), one.parameters(one.found)
        error = 100 * (predicted - found) / found if found else float("inf")
        cause = plan_of(args, one.mode, one.predicted + 1).peak().name
        times = found / first.parameters(first.found)
        rows.append([one.name, predicted / 1e6, found / 1e6, error, times, cause])
    run.table(
        "largest",
        ["mode", "predicted (M)", "found (M)", "error (%)", "times DDP's", "what ends it"], rows,
        caption=f"parameters of the largest model on {args.ranks} ranks of {args.memory_mb:g} MB",
    )  # fmt: skip
    names = [one.name for one in searches]
    run.figure(
        "largest", kind="bar", title="What a device of this size can train",
        x_label="", y_label="million parameters",
        series=[
            {"label": "predicted", "x": names, "y": [row[1] for row in rows]},
            {"label": "found", "x": names, "y": [row[2] for row in rows]},
        ],
    )  # fmt: skip
    for one in (searches[0], searches[-1]):
        layers = one.found + 1
        if layers in one.failures:
            run.print(f"with a layer more: {one.failures[layers]}")
    run.metric("probes", sum(one.probes for one in searches), "", "each a job of its own")
    worst = max(abs(row[3]) for row in rows)
    run.check_below("the largest error of a prediction", worst, WORST, "%")


if __name__ == "__main__":
    script.exit(main)
