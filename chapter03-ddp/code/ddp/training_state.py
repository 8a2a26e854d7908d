"""Everything that a training run is: weights, moments, schedule, scaler, position, random states.

Leave one of them out and the run goes on, looks well, and is another run: `checkpoint_resume.py`
measures by how much. `Saver` keeps the checkpoints of a training script, and resumes from them.
"""

import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp.checkpoints import Checkpoints, Loaded
from distlab.data import Loader
from distlab.errors import RunError, UsageError
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime

# What makes it another run, if a flag changes:
OF_THE_RUN = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup", "clip", "dtype")
NONE, FAILED = -1, -2  # what rank 0 broadcasts when there is no step to resume from


def collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    scheduler: Any = None,
    scaler: Any = None,
    *,
    job: Runtime,
) -> dict[str, Any]:
    """The state of the run after a whole step. Every rank calls it; rank 0 saves what it gets.

    The tensors are the run's own: `Checkpoints.save` copies them before it returns.
    """
    return {
        "world_size": job.world_size,
        "model": unwrapped(model).state_dict(),
        "optimizer_class": type(optimizer).__name__,
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "loader": loader.state_dict(),
        "random": random_states(job),
    }


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    scheduler: Any = None,
    scaler: Any = None,
    *,
    job: Runtime,
) -> None:
    """Make the run what it was. Every rank calls it, with the same state.

    At another world size each rank keeps the random states that it has: there is no telling which
    of the old ones were its own. Raises `UsageError`, before anything is changed, when the state is
    of another model, optimizer or data.
    """
    check_same_model(state["model"], unwrapped(model).state_dict())
    check_same_optimizer(state, optimizer)
    if (scheduler is None) != (state["scheduler"] is None):
        raise UsageError("only one of the checkpoint and this run has a learning-rate schedule")
    loader.load_state_dict(state["loader"])
    unwrapped(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"]:  # empty when it was saved without float16
        scaler.load_state_dict(state["scaler"])
    if state["world_size"] == job.world_size:
        set_random_states(state["random"][job.rank], job)


def settle_buckets(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Run one backward pass on a new DDP `model`, before `restore` and for the same bits only.

    After its first backward pass DDP puts its buckets into the order in which gradients came, and a
    ring adds up K > 2 ranks in an order that depends on the place in the bucket. So a resumed run's
    first step would round otherwise than the undisturbed run, whose buckets were settled long ago.
    Every rank calls it; `loss` may be of any batch.
    """
    loss().backward()
    model.zero_grad(set_to_none=True)


def load_agreed(store: Checkpoints, job: Runtime, path: str | None = None) -> Loaded | None:
    """What every rank resumes from: the newest whole checkpoint, as rank 0 chooses, or `path`.

    Ranks that choose each for itself may choose differently: one of them may look before the last
    rename, or another node's disk be late. None when there is no checkpoint at all. Raises
    `RunError` on every rank when rank 0 has found none whole, or a rank cannot read the chosen one.
    """
    if path is not None:
        return _all_or_none(lambda: store.load(path), job)
    chosen, failure = None, None
    if job.is_main:
        try:
            chosen = store.load_newest()
        except RunError as error:
            failure = error
    step = FAILED if failure else NONE if chosen is None else chosen.step
    word = torch.tensor(step, device=job.device)
    dist.broadcast(word, 0)
    step = int(word)
    if step == FAILED:
        raise failure or RunError(f"rank 0 found no whole checkpoint in {store.folder}")
    if step == NONE:
        return None
    return _all_or_none(lambda: chosen or _load_chosen(store, step, job), job)


def random_states(job: Runtime) -> list[dict[str, Any]]:
    """The states of Python's, NumPy's and torch's generators, of every rank."""
    version, python, python_normal = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    own = {
        "python": (version, torch.tensor(python), python_normal),
        "numpy": {**numpy, "state": {"key": torch.tensor(key.tolist()), "pos": position}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(job.device) if job.device.type == "cuda" else None,
    }
    return gathered(own)


def set_random_states(state: dict[str, Any], job: Runtime) -> None:
    version, python, python_normal = state["python"]
    random.setstate((version, tuple(python.tolist()), python_normal))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"].tolist(), dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"].cpu())
    if job.device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), job.device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, `DataParallel` or `torch.compile`: its names have no prefix."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def check_same_model(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise `UsageError` naming the first parameter that is not the same in both."""
    for name in [*own, *saved]:
        there, here = (_described(tensors.get(name)) for tensors in (saved, own))
        if there != here:
            raise UsageError(
                f"the checkpoint is of another model: {name} is {there} in it and {here} here; "
                "use the model flags that it was trained with, or another folder"
            )


def check_same_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    saved, own = state["optimizer_class"], type(optimizer).__name__
    if saved != own:
        raise UsageError(f"the checkpoint's optimizer is {saved}, not {own}; use {saved}")
    groups = [[len(g["params"]) for g in o["param_groups"]]
              for o in (state["optimizer"], optimizer.state_dict())]  # fmt: skip
    if groups[0] != groups[1]:
        raise UsageError(
            f"the checkpoint's optimizer has groups of {groups[0]} parameters, not {groups[1]}"
        )


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _load_chosen(store: Checkpoints, step: int, job: Runtime) -> Loaded:
    path = store.path(step)
    if not path.exists():
        raise RunError(f"rank {job.rank} does not see {path}, which rank 0 chose; share the folder")
    return store.load(path)


def _all_or_none(load: Callable[[], Loaded], job: Runtime) -> Loaded:
    """Load on every rank; when one fails, all do, each with its own line."""
    loaded, failure = None, None
    try:
        loaded = load()
    except (RunError, UsageError) as error:
        failure = error
    failed = torch.tensor(int(failure is not None), device=job.device)
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed or loaded is None:
        raise RunError(f"{int(failed)} rank(s) cannot read the checkpoint; is the folder shared?")
    return loaded


class Trainer(Protocol):
    """What `Saver` saves of a trainer."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def batches(self) -> Loader: ...
    @property
    def scaler(self) -> torch.amp.GradScaler: ...


class Saver:
    """Saves the trainer's state into --checkpoint-dir; without that flag it saves nothing."""

    def __init__(self, run: Run, args: Namespace, job: Runtime) -> None:
        self.run, self.args, self.job = run, args, job
        self.store = (
            Checkpoints(args.checkpoint_dir, args.keep, report=run.print)
            if args.checkpoint_dir
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.store is not None:
            self.store.close()

    def resume(self, trainer: Trainer) -> int:
        """Restore what --resume asks for; the step to go on from, 0 where there is nothing."""
        loaded = self._load()
        if loaded is None:
            return 0
        if loaded.step > self.args.steps:
            raise UsageError(
                f"--steps {self.args.steps} is less than the {loaded.step} of the checkpoint; "
                f"use --steps {loaded.step} or more, or --resume none with another folder"
            )
        restore(
            loaded.state, trainer.model, trainer.optimizer, trainer.batches,
            scaler=trainer.scaler, job=self.job,
        )  # fmt: skip
        matrices, _ = trainer.optimizer.param_groups  # which have the checkpoint's settings now
        matrices["weight_decay"] = self.args.weight_decay
        self._tell(loaded)
        return loaded.step

    def save(self, step: int, trainer: Trainer) -> None:
        """Begin to write a checkpoint of the run after `step` steps; training need not wait."""
        if self.store is None:
            return
        state = collect(
            trainer.model, trainer.optimizer, trainer.batches, scaler=trainer.scaler, job=self.job
        )
        if self.job.is_main:
            flags = {name: getattr(self.args, name) for name in OF_THE_RUN}
            self.store.save(step, {**state, "flags": flags})

    def save_and_stop(self, step: int, trainer: Trainer) -> None:
        """Save because somebody asked the run to stop; what cannot be saved is lost, and told."""
        if self.store is None:
            raise RunError(f"stopped at step {step}, and nothing is saved without --checkpoint-dir")
        self.save(step, trainer)
        if not self.job.is_main:
            return
        self.store.close()
        if step not in self.store.steps():
            raise RunError(f"stopped at step {step}, and its checkpoint could not be written")
        self.run.print(f"preempted: checkpoint at step {step}")

    def _load(self) -> Loaded | None:
        if self.args.resume not in ("auto", "none"):
            beside = Path(self.args.resume).resolve().parent
            return load_agreed(self.store or Checkpoints(beside), self.job, self.args.resume)
        if self.store is None or self.args.resume == "none":
            return None
        return load_agreed(self.store, self.job)

    def _tell(self, loaded: Loaded) -> None:
        """From where the run goes on, and which flags make it another run than it was."""
        ranks = loaded.state["world_size"]
        self.run.print(f"job: resumed from {loaded.path}, written by {ranks} rank(s)")
        for name, before in loaded.state["flags"].items():
            now = getattr(self.args, name)
            if now != before:
                flag = "--" + name.replace("_", "-")
                self.run.print(f"job: {flag} is {now} from here on, and was {before}")
