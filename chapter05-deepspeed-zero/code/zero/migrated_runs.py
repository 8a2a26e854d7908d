"""One training run in every kind of checkpoint's own way: begun, saved, and gone on with.

The batches are the same at every number of ranks, which divide them: so the losses are the same.
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Task(NamedTuple):
    """Go on from the checkpoint `folder`; one that DeepSpeed is to write it makes of `universal`.

    `stage` is with what a universal checkpoint is read.
    """

    name: tuple[str, str]
    kind: str
    folder: Path
    universal: Path
    stage: int


def begin(job: Runtime, config: ModelConfig, kinds: list[str], folder: Path) -> Any:
    """Runs of these kinds, saved after `BEFORE` steps: the losses of the `AFTER` that follow."""
    losses = {}
    for kind in kinds:
        torch.manual_seed(0)
        state = begun(config)
        if kind in STAGES:
            losses[kind] = _begin_engine(job, state, STAGES[kind], folder / kind)
            if kind == "zero1" and job.is_main:
                to_universal(migration.found(folder / kind)[kind], folder / "universal")
            continue
        trained = _Torch(job, state, kind)
        trained.losses(0, BEFORE)
        trained.save(folder)
        losses[kind] = trained.losses(BEFORE, AFTER)
    return losses


def begun(config: ModelConfig) -> State:
    """A new run: not yet trained."""
    weights = {name: p.detach() for name, p in Llama(config).named_parameters()}
    groups = [settings_of(SETTINGS), settings_of({**SETTINGS, "weight_decay": 0.0})]
    fields = {"config": config_to_json(config), "loader": {"samples_consumed": BATCH * BEFORE}}
    return State(0, 0, weights, anew(weights), groups, fields)


def _begin_engine(job: Runtime, state: State, stage: int, folder: Path) -> list[float]:
    with engine_of(*deepspeed_files.parts_for(state, stage, job)) as engine:
        _engine_losses(job, engine, 0, BEFORE)
        tag = f"global_step{BEFORE}"
        engine.save_checkpoint(str(folder), tag=tag, client_state=state.fields)
        losses = _engine_losses(job, engine, BEFORE, AFTER)
    return losses


def to_universal(tag: Path, folder: Path) -> None:
    """By DeepSpeed's own converter, which unpickles: for what this run has just written."""
    from deepspeed.checkpoint.ds_to_universal import main

    args = Namespace(input_folder=str(tag), output_folder=str(folder / f"{tag.name}_universal"),
                     num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
                     strict=True, inject_missing_state=True)  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(args)


def go_on(job: Runtime, config: ModelConfig, tasks: list[Task]) -> dict[Any, list[float]]:
    """The next losses of each; from weights alone the first is what can be compared."""
    losses = {}
    for task in tasks:
        if task.kind in STAGES:
            deepspeed_files.save_zero(job, task.universal, task.folder, STAGES[task.kind])
        if task.kind in (*STAGES, "universal"):
            losses[task.name] = _go_on_engine(job, config, task)
        else:
            state = begun(config)
            trained = _Torch(job, state, task.kind)
            trained.load(task.folder)
            losses[task.name] = trained.losses(BEFORE, AFTER)
    return losses


def _go_on_engine(job: Runtime, config: ModelConfig, task: Task) -> list[float]:
    is_universal = task.kind == "universal"
    state = begun(config)
    stage = STAGES.get(task.kind, task.stage)
    with engine_of(*deepspeed_files.parts_for(state, stage, job, is_universal)) as engine:
        engine.load_checkpoint(str(task.folder))
        if is_universal:
            there = migration.read("universal", task.folder, config)
            deepspeed_files.mend(engine, there)
        losses = _engine_losses(job, engine, BEFORE, AFTER)
    return losses


def _engine_losses(job: Runtime, engine: Any, first: int, count: int) -> list[float]:
    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = engine(inputs, targets=targets)
        engine.backward(loss)
        engine.step()
        return loss

    return _losses(job, step, engine.module.config.vocab_size, first, count)


def _losses(job: Runtime, step: Callable[..., Tensor], words: int, first: int, count: int) -> Any:
    """Of each step the mean loss over all ranks."""
    losses = []
    for number in range(first, first + count):
        chosen = torch.Generator().manual_seed(number)
        ids = torch.randint(words, (BATCH, SEQUENCE + 1), generator=chosen)
        own = ids.chunk(job.world_size)[job.rank].to(job.device)
        loss = step(own[:, :-1].contiguous(), own[:, 1:].contiguous()).detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / job.world_size)
    return losses


class _Torch:
    """A run under DDP, which `hf` is too, or under `fully_shard`."""

    def __init__(self, job: Runtime, state: State, kind: str) -> None:
        self.job, self.state, self.kind = job, state, kind
        self.model = Llama(state.config)
        if kind == "fsdp":
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        own = dict(self.model.named_parameters())
        groups = [
            {**settings, "params": [own[name] for name in names]}
            for settings, names in state.named_groups()
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.computes = DistributedDataParallel(self.model) if kind != "fsdp" else self.model

    def losses(self, first: int, count: int) -> list[float]:
        return _losses(self.job, self._step, self.state.config.vocab_size, first, count)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.computes(inputs, targets=targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def save(self, folder: Path) -> None:
        """Under DDP rank 0 writes all, and the weights as `hf` too; sharded each rank its part."""
        self.state.step = self.state.updates = BEFORE
        if self.kind == "fsdp":
            path = folder / "fsdp" / f"step_{BEFORE:08d}"
            dcp.save(self._tensors(), storage_writer=dcp.FileSystemWriter(path))
            if self.job.is_main:
                migration.complete_fsdp(path, self.state, self.job.world_size)
        elif self.job.is_main:
            named = dict(self.model.named_parameters())
            self.state.weights = {name: p.detach() for name, p in named.items()}
            values = {name: self.optimizer.state[p] for name, p in named.items()}
            self.state.moments = {key: {n: v[key] for n, v in values.items()} for key in MOMENTS}
            migration.write_ddp(self.state, folder / "ddp")
            house.save(self.model, folder / "hf")
        self.job.barrier()

    def load(self, folder: Path) -> None:
        """Sharded, each rank reads the part of each tensor that it has."""
        for parameter in self.model.parameters():
            values = {key: torch.zeros_like(parameter).detach() for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **values}
        if self.kind == "fsdp":
            path = migration.found(folder)["fsdp"]
            dcp.load(self._tensors(), storage_reader=migration.Reader(path))
            return
        state = migration.read(self.kind, folder, self.state.config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.weights[name])
                values = self.optimizer.state[parameter]
                values["step"].fill_(state.updates)
                for key in MOMENTS:
                    values[key].copy_(state.moments[key][name])

    def _tensors(self) -> dict[str, Tensor]:
        """As chapter 4 names them."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors
