"""The checkpoints of a training run: when there are any, and what --resume goes on from."""

from argparse import Namespace
from pathlib import Path
from typing import Any, Self

from ddp.checkpoints import Checkpoints, Loaded
from ddp.training_state import collect, load_agreed, restore

from distlab.errors import RunError, UsageError
from distlab.run import Run
from distlab.runtime import Runtime

OF_THE_RUN = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup", "clip", "dtype")


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

    def resume(self, trainer: Any) -> int:
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

    def save(self, step: int, trainer: Any) -> None:
        """Begin to write a checkpoint of the run after `step` steps; training need not wait."""
        if self.store is None:
            return
        state = collect(
            trainer.model, trainer.optimizer, trainer.batches, scaler=trainer.scaler, job=self.job
        )
        if self.job.is_main:
            flags = {name: getattr(self.args, name) for name in OF_THE_RUN}
            self.store.save(step, {**state, "flags": flags})

    def save_and_stop(self, step: int, trainer: Any) -> None:
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
