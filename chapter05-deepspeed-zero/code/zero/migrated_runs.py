"""One training run in every kind of checkpoint's own way: begun, saved, and gone on with.

The batches are the same at every number of ranks, which divide them: so the losses are the same.
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distlab import model as house
from distlab.model import Llama
from distlab.model_config import ModelConfig, config_to_json
from distlab.runtime import Runtime
from zero import deepspeed_files, migration
from zero.engine import engine_of
from zero.migration import STAGES
from zero.state import MOMENTS, State, anew, settings_of

BATCH, SEQUENCE = 12, 16  # 12 sequences are shared out to 1, 2, 3 and 4 ranks
BEFORE, AFTER = 3, 10  # steps up to the checkpoint, and compared after it
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
UNMENDED = "universal, not mended"
Losses = list[float]
Pair = tuple[str, str]  # from, to


def begin(job: Runtime, config: ModelConfig, kinds: list[str], folder: Path) -> dict[str, Losses]:
    """Runs of these kinds, saved after `BEFORE` steps: the losses of the `AFTER` that follow."""
    losses = {}
    for kind in kinds:
        torch.manual_seed(0)
        with run_of(job, begun(config), kind) as trained:
            trained.losses(0, BEFORE)
            trained.save(folder)
            losses[kind] = trained.losses(BEFORE, AFTER)
    return losses


def go_on(job: Runtime, config: ModelConfig, folder: Path, pairs: list[Pair]) -> dict[Pair, Losses]:
    """The next losses of each that was converted; DeepSpeed's own are written here."""
    losses = {}
    for source, target in pairs:
        made = converted(folder, source, target)
        if target in STAGES:
            deepspeed_files.save_zero(job, folder / "between" / source, made, STAGES[target])
        stage = STAGES.get(source, 2)  # with which a universal one is read
        ways = [target, UNMENDED] if (source, target) == ("zero3", "universal") else [target]
        for way in ways:
            with run_of(job, begun(config), way, stage) as trained:
                trained.load(made)
                losses[source, way] = trained.losses(BEFORE, AFTER)
    return losses


def converted(folder: Path, source: str, target: str) -> Path:
    return folder / "out" / f"{source}_{target}"


def begun(config: ModelConfig) -> State:
    """A new run: not yet trained."""
    weights = {name: p.detach() for name, p in Llama(config).named_parameters()}
    groups = [settings_of(SETTINGS), settings_of({**SETTINGS, "weight_decay": 0.0})]
    fields = {"config": config_to_json(config), "loader": {"samples_consumed": BATCH * BEFORE}}
    return State(0, 0, weights, anew(weights), groups, fields)


@contextlib.contextmanager
def run_of(job: Runtime, state: State, kind: str, stage: int = 0) -> Iterator[Any]:
    if kind in ("ddp", "fsdp", "hf"):
        yield _TorchRun(job, state, kind)
        return
    parts = deepspeed_files.parts_for(state, STAGES.get(kind, stage), job, kind not in STAGES)
    with engine_of(*parts) as engine:
        yield _EngineRun(job, state, kind, engine)


def to_universal(tag: Path, folder: Path) -> None:
    """By DeepSpeed's own converter, which unpickles: for what this run has just written."""
    from deepspeed.checkpoint.ds_to_universal import main

    args = Namespace(input_folder=str(tag), output_folder=str(folder / f"{tag.name}_universal"),
                     num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
                     strict=True, inject_missing_state=True)  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(args)


class _Run:
    step: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, job: Runtime, state: State, kind: str) -> None:
        self.job, self.state, self.kind = job, state, kind

    def losses(self, first: int, count: int) -> Losses:
        """Of each step the mean loss over all ranks."""
        losses = []
        for number in range(first, first + count):
            chosen = torch.Generator().manual_seed(number)
            words = self.state.config.vocab_size
            ids = torch.randint(words, (BATCH, SEQUENCE + 1), generator=chosen)
            own = ids.chunk(self.job.world_size)[self.job.rank]
            loss = self.step(own[:, :-1], own[:, 1:]).detach().clone()
            dist.all_reduce(loss)
            losses.append(loss.item() / self.job.world_size)
        return losses


class _EngineRun(_Run):
    """Under DeepSpeed's engine, which reads and writes all itself."""

    def __init__(self, job: Runtime, state: State, kind: str, engine: Any) -> None:
        super().__init__(job, state, kind)
        self.engine = engine

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.engine(inputs, targets=targets)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def save(self, folder: Path) -> None:
        """Of one of them, also the universal checkpoint that DeepSpeed makes of it."""
        tag = f"global_step{BEFORE}"
        self.engine.save_checkpoint(
            str(folder / self.kind), tag=tag, client_state=self.state.fields
        )
        if self.kind == "zero1" and self.job.is_main:
            to_universal(folder / self.kind / tag, folder / "universal")

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder))
        if self.kind == "universal":
            state = migration.read(self.kind, folder, self.state.config)
            deepspeed_files.mend(self.engine, state)


class _TorchRun(_Run):
    """Under DDP, as from `hf` too, or under `fully_shard`."""

    def __init__(self, job: Runtime, state: State, kind: str) -> None:
        super().__init__(job, state, kind)
        self.model = Llama(state.config)
        if kind == "fsdp":
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(deepspeed_files.groups_for(state, self.model))
        self.computes = DistributedDataParallel(self.model) if kind != "fsdp" else self.model

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.computes(inputs, targets=targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def save(self, folder: Path) -> None:
        """Under DDP rank 0 writes all, and the weights as `hf` too; sharded each rank its part."""
        state, tensors = self.state, self._tensors()
        state.step = state.updates = BEFORE
        if self.kind == "fsdp":
            path = folder / "fsdp" / f"step_{BEFORE:08d}"
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path))
            if self.job.is_main:
                migration.complete_fsdp(path, state, self.job.world_size)
        elif self.job.is_main:
            state.weights, state.moments = migration.by_kind(tensors)
            migration.write_ddp(state, folder / "ddp")
            house.save(self.model, folder / "hf")
        self.job.barrier()

    def load(self, folder: Path) -> None:
        """Sharded, each rank reads the part of each tensor that it has."""
        for parameter in self.model.parameters():
            values = {key: torch.zeros_like(parameter).detach() for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **values}
        own = self._tensors()
        if self.kind == "fsdp":
            reader = migration.Reader(migration.found(folder)["fsdp"])
            dcp.load(own, storage_reader=reader)
            return
        state = migration.read(self.kind, folder, self.state.config)
        for name, tensor in migration.named(state).items():
            own[name].copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        """As chapter 4 names them."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors
