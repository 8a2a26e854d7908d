"""What stands behind the training script: its flags, its mesh, its weights, its plan, its saves.

How a model is sharded, and what a step does, is in `train_fsdp.py` itself.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from distlab.data import Loader
from distlab.errors import RunError, UsageError
from distlab.hf_format import read_tensors
from distlab.measure import tensor_bytes
from distlab.model import SIZES, Llama, ModelConfig, num_parameters
from distlab.model_config import config_to_json
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.script import Parser, positive_int
from distlab.training.memory import DeviceMemory, add_memory_flag, bytes_of
from fsdp.checkpoints import Checkpoints
from fsdp.contents import Loaded, keep_own, named_shards

SHARDED = ("full", "grad", "hybrid", "none")
OF_THE_RUN = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup", "clip", "dtype")
FLOAT, MOMENTS = 4, 2  # bytes of a number in a shard; of AdamW
PRODUCTS = ("mm", "bmm", "addmm", "scaled_dot_product")  # in the names of operators worth keeping


def add_sharding_flags(parser: Parser) -> None:
    group = parser.add_argument_group("sharding")
    group.add_argument(
        "--shard", choices=SHARDED, default="full",
        help="full: gather each unit anew for backward; grad: keep it whole since forward; hybrid: "
        "shard within each of --replicas groups of ranks; none: a replica on each rank, as DDP",
    )  # fmt: skip
    group.add_argument(
        "--replicas",
        type=positive_int,
        metavar="N",
        help="of the model, for hybrid (default: the nodes)",
    )
    group.add_argument(
        "--units", default="block", metavar="block|N",
        help="what is gathered at once: each block, or the blocks put together into N units",
    )  # fmt: skip
    group.add_argument(
        "--activation-checkpointing", choices=("none", "full", "selective"), default="none",
        help="compute blocks again in backward: all, or all but products and attention",
    )  # fmt: skip
    group.add_argument(
        "--offload", choices=("none", "cpu", "disk"), default="none",
        help="where weights, gradients and moments stay between their uses",
    )  # fmt: skip
    group.add_argument("--offload-dir", metavar="DIR", default="build/offload", help="for disk")
    group.add_argument(
        "--reduce-every-micro-batch", action="store_true",
        help="of --accumulate: send more, and keep gradients sharded meanwhile",
    )  # fmt: skip
    group.add_argument(
        "--async-checkpoints", action=argparse.BooleanOptionalAction, default=True,
        help="write behind training's back a copy in memory (never with --offload disk)",
    )  # fmt: skip
    add_memory_flag(parser)


def refuse_sharding(args: Namespace, config: ModelConfig, job: Runtime) -> None:
    """Raise `UsageError` for a mesh, units or a memory that cannot be; every rank does."""
    if args.dtype == "float16":
        raise UsageError("--dtype float16 needs a loss scale, which is not here; use bfloat16")
    if args.replicas is not None and args.shard != "hybrid":
        raise UsageError(f"--replicas {args.replicas} is for --shard hybrid, not {args.shard}")
    replicas_of(args, job)
    layers = config.num_hidden_layers
    if args.units != "block" and not (args.units.isdecimal() and 1 <= int(args.units) <= layers):
        raise UsageError(f"--units {args.units} is neither block nor a number from 1 to {layers}")
    if args.prove and args.compile:
        raise UsageError("--prove compares with a model that is not compiled; leave one out")


def replicas_of(args: Namespace, job: Runtime) -> int:
    """How often the job holds the model. Raises `UsageError` where that does not fit the ranks."""
    ranks = job.world_size
    if args.shard != "hybrid":
        return ranks if args.shard == "none" else 1
    replicas = args.replicas or ranks // job.local_world_size
    some = ", ".join(str(n) for n in range(2, ranks + 1) if ranks % n == 0)
    cure = f"use --replicas {some}" if some else "use --shard full"
    if args.replicas is None and replicas == 1:
        raise UsageError(f"--shard hybrid on one node is full, without --replicas; {cure}")
    if replicas < 1 or ranks % replicas:
        raise UsageError(f"--replicas {replicas} does not divide {ranks} rank(s); {cure}")
    return replicas


def new_mesh(args: Namespace, job: Runtime) -> DeviceMesh:
    """[ranks], or [replicas, ranks of each]: neighbours, so ranks of a node, share a replica."""
    kind, replicas = job.device.type, replicas_of(args, job)
    if replicas == 1:
        return init_device_mesh(kind, (job.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, job.world_size // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def rehearse(mesh: DeviceMesh) -> None:
    """Two steps of a small model, sharded: what libraries load for them is no model's memory."""
    model = Llama(ModelConfig(64, 64, 64, 2, 2, 2)).to(mesh.device_type)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model(torch.zeros(1, 8, dtype=torch.long, device=mesh.device_type)).sum().backward()
        optimizer.step()


def units_of(model: Llama, units: str) -> list[list[nn.Module]]:
    """The blocks that are gathered together; what is in none is gathered with the root."""
    layers = list(model.model.layers)
    count = len(layers) if units == "block" else int(units)
    cuts = [len(layers) * i // count for i in range(count + 1)]
    return [layers[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def recompute(model: Llama, which: str) -> None:
    """Have each block compute its activations again in backward: all of them, or the cheap ones."""
    if which == "none":
        return
    selection: dict[str, Any] = {}
    if which == "selective":
        selection = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **selection)


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what a product of matrices or attention gave; what is cheap is computed again."""
    name = operator.__name__.partition(".")[0].lstrip("_")
    kept = name in PRODUCTS or name.startswith(PRODUCTS[-1])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def materialise(model: Llama, source: str, seed: int, device: torch.device) -> None:
    """Fill a sharded model with the weights that a whole one would have, one tensor at a time.

    `source` is a saved model's folder, or a size: then the weights are those of `Llama(config)`
    after `torch.manual_seed(seed)`, bit for bit. The generator is taken through the same numbers:
    those that torch draws when it makes a module, thrown away here and there, and the model's own.
    """
    own = dict(model.named_parameters())
    if source not in SIZES:
        fill_from(own, source)
        return
    torch.manual_seed(seed)
    with device:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, bias=False)
            elif isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim)
        for name, parameter in own.items():
            whole = torch.empty(parameter.shape)
            model.initialise(name, whole)
            keep_own(parameter, whole)


def fill_from(own: dict[str, nn.Parameter], folder: str) -> None:
    """Raises `RunError` when the saved model lacks one of the parameters."""
    left = dict(own)
    for name, tensor in read_tensors(folder):
        if name in left and left[name].shape == tensor.shape:
            keep_own(left.pop(name), tensor)
    if left:
        name, parameter = next(iter(left.items()))
        raise RunError(f"{folder}: there is no {name} of {list(parameter.shape)}, which its "
                       "config.json asks for")  # fmt: skip


def kinds_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], int]]:
    """This rank's bytes by kind.

    While a unit is gathered, its modules have whole parameters, which are no DTensors.
    """
    shards = nn.ParameterList(named_shards(model).values())

    def whole_now() -> int:
        there = [p.detach() for p in model.parameters() if not isinstance(p, DTensor)]
        return tensor_bytes(there)

    return {**bytes_of(shards, optimizer), "gathered units": whole_now}


def new_optimizer(args: Namespace, model: Llama) -> torch.optim.AdamW:
    """AdamW with the usual settings of language models; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def say_what_runs(run: Run, args: Namespace, job: Runtime, config: ModelConfig) -> None:
    sequences = args.batch_size // (job.world_size * args.accumulate)
    parameters = num_parameters(config)
    bound = "" if args.memory_mb is None else f", each with {args.memory_mb:g} MB"
    run.print(
        f"job: {job.world_size} rank(s){bound}, {job.backend} on {job.device.type}, {args.dtype}; "
        f"{parameters:,} parameters, {FLOAT * parameters / 1e6:.1f} MB"
    )
    run.print(
        f"job: shard {args.shard}, {replicas_of(args, job)} replica(s), units by {args.units}, "
        f"checkpointing {args.activation_checkpointing}, offload {args.offload}; a batch of "
        f"{args.batch_size} is {job.world_size} x {args.accumulate} x {sequences} sequence(s)"
    )


def report_shards(
    run: Run, args: Namespace, job: Runtime, model: Llama, memory: DeviceMemory
) -> None:
    """What each rank holds of weights and moments, against the formula; every rank calls it.

    A shard is padded to the rows of the first rank's, so a rank may hold a little more than its
    part; without padding the shards of all ranks are the model, as often as there are replicas.
    """
    shards = named_shards(model).values()
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in shards)
    everyone = gathered((own, memory.by_kind()))
    held = everyone[0][1]
    parameters = num_parameters(model.config) * replicas_of(args, job)
    part = FLOAT * parameters / job.world_size
    run.compare("weights on rank 0", part, held["weights"], "B")
    run.compare("moments on rank 0", part * MOMENTS, held["optimizer"], "B")
    together = sum(numbers for numbers, _ in everyone)
    run.check_equal("numbers in the shards of all ranks together", together, parameters)


class Trainer(Protocol):
    """What `Saver` saves of a trainer."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def batches(self) -> Loader: ...


class Saver:
    """Saves the trainer's state into --checkpoint-dir; without that flag it saves nothing."""

    def __init__(self, run: Run, args: Namespace, job: Runtime, config: ModelConfig) -> None:
        self.run, self.args, self.job, self.config = run, args, job, config
        apart = args.async_checkpoints and args.offload != "disk"
        folder = args.checkpoint_dir
        if folder is None and args.resume not in ("auto", "none"):
            folder = Path(args.resume).resolve().parent
        self.saves = args.checkpoint_dir is not None
        self.store = None
        if folder is not None:
            self.store = Checkpoints(folder, job, args.keep, apart, run.print, not self.saves)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.store is not None:
            self.store.__exit__(*exception)

    def resume(self, trainer: Trainer) -> int:
        """Restore what --resume asks for; the step to go on from, 0 where there is nothing."""
        loaded = self._load(trainer)
        if loaded is None:
            return 0
        if loaded.step > self.args.steps:
            raise UsageError(
                f"--steps {self.args.steps} is less than the {loaded.step} of the checkpoint; "
                f"use --steps {loaded.step} or more, or --resume none with another folder"
            )
        trainer.batches.load_state_dict(loaded.fields["loader"])
        matrices, _ = trainer.optimizer.param_groups  # which have the checkpoint's settings now
        matrices["weight_decay"] = self.args.weight_decay
        self._tell(loaded)
        return loaded.step

    def save(self, step: int, trainer: Trainer) -> None:
        """Begin to write a checkpoint of the run after `step` steps; training need not wait."""
        if self.store is None or not self.saves:
            return
        fields = {
            "world_size": self.job.world_size,
            "loader": trainer.batches.state_dict(),
            "flags": {name: getattr(self.args, name) for name in OF_THE_RUN},
            "config": config_to_json(self.config),
            "optimizer_class": type(trainer.optimizer).__name__,
        }
        self.store.save(step, trainer.model, trainer.optimizer, fields)

    def save_and_stop(self, step: int, trainer: Trainer) -> None:
        """Save because somebody asked the run to stop; what cannot be saved is lost, and told."""
        if self.store is None or not self.saves:
            raise RunError(f"stopped at step {step}, and nothing is saved without --checkpoint-dir")
        self.save(step, trainer)
        self.store.wait()
        if self.job.is_main and step not in self.store.steps():
            raise RunError(f"stopped at step {step}, and its checkpoint could not be written")
        self.run.print(f"preempted: checkpoint at step {step}")

    def _load(self, trainer: Trainer) -> Loaded | None:
        if self.store is None or self.args.resume == "none":
            return None
        parts = trainer.model, trainer.optimizer
        if self.args.resume == "auto":
            return self.store.load_newest(*parts)
        return self.store.load(self.args.resume, *parts)

    def _tell(self, loaded: Loaded) -> None:
        """From where the run goes on, and which flags make it another run than it was."""
        ranks = loaded.fields["world_size"]
        self.run.print(f"job: resumed from {loaded.path}, written by {ranks} rank(s)")
        for name, before in loaded.fields["flags"].items():
            now = getattr(self.args, name)
            if now != before:
                flag = "--" + name.replace("_", "-")
                self.run.print(f"job: {flag} is {now} from here on, and was {before}")
