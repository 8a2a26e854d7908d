"""Checkpoints that survive a crash at any moment, a full disk, and their own corruption.

A checkpoint is a folder. It is written under a temporary name, flushed to the disk (fsync), and
only then renamed: the name `step_00000120` is either not there or complete. What a disk does to it
later is found by the checksums in its manifest, and the one before it is used.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock
from torch import Tensor

from distlab.checkpoint_files import Damaged, encode, read_files, write_files
from distlab.errors import RunError, UsageError
from distlab.files import make_synced_folder, sync_folder
from distlab.training.checkpoint_folder import PATIENCE_S, SAVE_WAITS_S, CheckpointFolder


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and verified."""

    step: int
    state: Any
    path: Path


class Checkpoints(CheckpointFolder):
    """The checkpoints in one folder. One rank, rank 0, saves; every rank may load.

    With `asynchronous`, `save` returns when the state is copied to host memory, and a thread writes
    the copy. `keep` is how many of the newest are kept; an old one goes only after the new one is
    in place. `report` gets one line for each that could not be written, or is damaged; a thread may
    call it. Raises `UsageError` when `folder` cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        asynchronous: bool = True,
        report: Callable[[str], object] = print,
    ) -> None:
        super().__init__(folder, keep, asynchronous, report)
        self._copies = HostCopies()
        try:
            make_synced_folder(self.folder)
        except OSError as error:
            raise UsageError(f"the folder of checkpoints {folder}: {error.strerror}") from error
        self._sweep()

    def save(self, step: int, state: Any) -> bool:
        """Save `state`: nested mappings, lists and tuples of tensors, numbers, strings and None.

        False when it is not saved, because the one before is still being written after
        `SAVE_WAITS_S`; this too is reported. When a write fails, as on a full disk, the line comes
        later, from the thread: the run goes on, and the next save tries anew.
        """
        tree, tensors = encode(state)
        if not self.wait(SAVE_WAITS_S):
            late = "the one before is still being written; is the disk slow?"
            self.report(f"checkpoint of step {step} not saved: {late}")
            return False
        if not self.asynchronous:
            self._write(step, tree, tensors)
            return True
        copies = self._copies.take(tensors)
        self._apart(lambda: self._write(step, tree, copies))
        return True

    def close(self) -> None:
        """Wait for the last checkpoint."""
        if not self.wait(PATIENCE_S):
            self.report(f"the last checkpoint in {self.folder} is not written; is the disk slow?")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def load_newest(self, device: torch.device | str = "cpu") -> Loaded | None:
        """The newest that is whole, or None when there is none at all.

        Raises `RunError` when there are some, and all are damaged.
        """
        damaged: dict[int, str] = {}
        while left := [step for step in self.steps() if step not in damaged]:
            step = left[-1]
            try:
                return self._read(self.path(step), device)
            except Damaged as damage:
                if not self.path(step).exists():
                    continue  # its writer deleted it meanwhile, and there is a newer one
                damaged[step] = str(damage)
                self.report(f"damaged checkpoint passed over: {self.path(step).name}: {damage}")
        if damaged:
            newest = max(damaged)
            raise RunError(
                f"no checkpoint in {self.folder} is whole; the newest, "
                f"{self.path(newest).name}: {damaged[newest]}; name another "
                "--checkpoint-dir to begin anew, or remove them"
            )
        return None

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> Loaded:
        """This one checkpoint. Raises `UsageError` when it is none, `RunError` when damaged."""
        path = self.named(path)
        try:
            return self._read(path, device)
        except Damaged as damage:
            raise RunError(f"the checkpoint {path} is damaged: {damage}") from damage

    def _read(self, path: Path, device: torch.device | str) -> Loaded:
        step, state = read_files(path, device)
        if path.resolve().name != self.path(step).name:
            raise Damaged(f"its files are those of step {step}")
        return Loaded(step, state, path)

    def _write(self, step: int, tree: Any, tensors: dict[str, Tensor]) -> None:
        try:
            with self._lock(PATIENCE_S):
                self._write_and_rename(step, tree, tensors)
                self._delete_old(step)
        except OSError as error:  # filelock's Timeout is one
            why = error.strerror or error
            self.report(f"checkpoint of step {step} not saved: {why}; the run goes on")

    def _write_and_rename(self, step: int, tree: Any, tensors: dict[str, Tensor]) -> None:
        final = self.path(step)
        temporary = self._temporary(step)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_files(temporary, step, tree, tensors)
            if final.exists():  # of a run before; `_sweep` mends what ends between the two renames
                os.rename(final, self._aside(step))
            os.rename(temporary, final)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            self._mend(step)

    def _sweep(self) -> None:
        """Remove what a killed writer left. Nobody writes while the lock is ours."""
        try:
            with self._lock(0.5):
                self._remove_left()
        except OSError:
            pass  # another process is writing, or the folder is read-only: nothing to remove for us

    def _lock(self, timeout_s: float) -> Any:
        return FileLock(self.folder / ".lock").acquire(timeout=timeout_s)


class HostCopies:
    """Copies of tensors in host memory: what a step waits for, while the rest goes on behind it.

    The memory is kept for the next time: fresh pages cost more than the copy, and page-locked ones,
    to which a GPU copies at the full speed of its link, far more.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._buffers = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return self._buffers

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        on_gpu = tensor.device.type == "cuda"
        buffer = self._buffers.get(name)
        wanted = (tensor.shape, tensor.dtype, on_gpu)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.is_pinned()) != wanted:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        return buffer.copy_(tensor, non_blocking=on_gpu)
