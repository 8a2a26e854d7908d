"""Sharded checkpoints: each rank writes its shards, any number of ranks reads them, none is half.

    step_00000120/__0_0.distcp, __1_0.distcp, …   each rank's shards, as DCP writes them
    step_00000120/.metadata       which part of which tensor lies where, DCP's
    step_00000120/state.json      the rest of the run: the loader's position, flags, settings
    step_00000120/manifest.json   bytes and SHA-256 of all of these; and its own sum

torch.distributed.checkpoint (DCP) divides the work and finds for each rank of the next run the
parts that it needs, whatever the number of ranks was. It does not notice a changed bit, and a save
that is killed lacks .metadata, or has that of an older save which the folder held. So a checkpoint
is written under a temporary name, flushed to the disk, listed with its sums, and renamed at the
end. What is in it, and how it is read and converted, is in `fsdp.contents`.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from distlab.checkpoint_files import (
    TREE,
    Damaged,
    check_file,
    encode,
    hash_file,
    read_manifest,
    write_json,
    write_manifest,
)
from distlab.errors import RunError, UsageError
from distlab.files import sync_folder
from distlab.ranks import gathered
from distlab.runtime import Runtime
from distlab.training.checkpoint_folder import PATIENCE_S, SAVE_WAITS_S, CheckpointFolder
from distlab.training.dcp_files import METADATA
from fsdp.contents import Loaded, load, settings_of, tensors_of

PROBE_BYTES = 1 << 20
DISK_WAITS_S = 1800.0


class Checkpoints(CheckpointFolder):
    """The checkpoints in one folder that all ranks share. Every rank makes every call.

    With `asynchronous`, `save` returns when this rank's shards are copied to host memory, and a
    thread writes them. `keep` is how many of the newest are kept. `report` gets a line, on rank 0,
    for each checkpoint that could not be written, or is damaged. One run at a time may write into a
    folder: what a killed one left there is removed, unless this one only `reads`.
    """

    def __init__(
        self,
        folder: str | Path,
        job: Runtime,
        keep: int = 3,
        asynchronous: bool = True,
        report: Callable[[str], object] = print,
        reads: bool = False,
    ) -> None:
        super().__init__(folder, keep, asynchronous, report)
        self.job = job
        # A group of its own: a thread's collectives must not get between those of the training.
        # It waits for the slowest rank's disk, and not for a step: longer than --timeout.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=DISK_WAITS_S))
        self._stager = DefaultStager(StagingOptions(job.device.type == "cuda", False, False, False))
        if not reads:
            self._on_main(self._prepare)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, fields: dict[str, Any]
    ) -> bool:
        """Save the shards of both, and `fields`, numbers and strings in lists and mappings.

        False when it is not saved, because a rank is still writing the one before after
        `SAVE_WAITS_S`; this too is reported. When the disk refuses, the line comes later, from the
        thread: the run goes on, and the next save tries anew.
        """
        late = torch.tensor(int(not self.wait(SAVE_WAITS_S)), device=self.job.device)
        dist.all_reduce(late)
        if late.item():
            self._tell(f"checkpoint of step {step} not saved: the one before is still being "
                       f"written by {int(late)} rank(s); is the disk slow?")  # fmt: skip
            return False
        fields = {**fields, "groups": settings_of(optimizer)}
        tensors = tensors_of(model, optimizer)
        options: Any = {
            "storage_writer": dcp.FileSystemWriter(self._temporary(step)),
            "process_group": self._group,
        }
        if not self.asynchronous:
            self._write(step, fields, lambda: dcp.save(tensors, **options))
            return True
        written: Any = dcp.async_save(tensors, async_stager=self._stager, **options)
        self._apart(lambda: self._write(step, fields, written.result))
        return True

    def close(self) -> None:
        """Wait for the last checkpoint."""
        if not self.wait(PATIENCE_S):
            self._tell(f"the last checkpoint in {self.folder} is not written; is the disk slow?")
        self._stager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()  # after an error the other ranks may not come to finish theirs

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Loaded | None:
        """The newest that is whole, put into both; None when there is none at all.

        Rank 0 chooses; each rank verifies a part of the files. Raises `RunError` when there are
        some and all are damaged, `UsageError`, before anything is changed, for another model's.
        """
        damaged: dict[int, str] = {}
        while (step := self._newest_but(damaged)) is not None:
            damage = self._verify(self.path(step))
            if damage is None:
                return load(self.path(step), model, optimizer)
            damaged[step] = damage
            self._tell(f"damaged checkpoint passed over: {self.path(step).name}: {damage}")
        if damaged:
            newest = max(damaged)
            raise RunError(f"no checkpoint in {self.folder} is whole; the newest, "
                           f"{self.path(newest).name}: {damaged[newest]}; name another "
                           "--checkpoint-dir to begin anew, or remove them")  # fmt: skip
        return None

    def load(self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Loaded:
        """This one, sharded or one of chapter 3's. Raises `UsageError` when it is none, `RunError`
        when it is damaged."""
        path = self.named(path)
        if damage := self._verify(path):
            raise RunError(f"the checkpoint {path} is damaged: {damage}")
        return load(path, model, optimizer)

    def _newest_but(self, damaged: Iterable[int]) -> int | None:
        """What rank 0 finds: another node's view of the folder may be late."""
        there = self.steps() if self.job.is_main else []
        told = [max((step for step in there if step not in damaged), default=None)]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def _verify(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; each reads a K-th of the files.

        The ranks before the first that finds something are right as far as they looked.
        """
        found = [one for one in gathered(self._verify_share(path)) if one]
        return found[0] if found else None

    def _verify_share(self, path: Path) -> str | None:
        rank, ranks = self.job.rank, self.job.world_size
        if not path.is_dir():
            return f"rank {rank} does not see it; is the folder shared?"
        try:
            manifest = read_manifest(path)
            if path.resolve().name != self.path(manifest["step"]).name:
                return f"its files are those of step {manifest['step']}"
            for name in sorted(manifest["files"])[rank::ranks]:
                check_file(path, name, manifest["files"][name])
        except Damaged as damage:
            return str(damage)
        return None

    def _write(self, step: int, fields: dict[str, Any], write: Callable[[], object]) -> None:
        """Let DCP write; then each rank sums up its files, and rank 0 makes a checkpoint of it."""
        temporary = self._temporary(step)
        own: dict[str, Any] = {}
        why = None
        try:
            write()
            names = [f.name for f in temporary.glob(f"__{self.job.rank}_*")]
            own = {n: hash_file(temporary / n) for n in [*names, *[METADATA] * self.job.is_main]}
        except OSError as error:
            why = error.strerror
        except CheckpointException as error:
            why = self._refusal(error, temporary)
        everyone = gathered((own, why), self._group)
        files = {name: entry for part, _ in everyone for name, entry in part.items()}
        why = next((one for _, one in everyone if one), None)
        if self.job.is_main:
            self._complete(step, fields, files, why)
        dist.barrier(group=self._group)

    def _complete(
        self, step: int, fields: dict[str, Any], files: dict[str, Any], why: str | None
    ) -> None:
        temporary = self._temporary(step)
        try:
            if why is None:
                files[TREE] = write_json(temporary / TREE, encode(fields)[0])
                write_manifest(temporary, step, files)
                self._rename(step)
                self._delete_old(step)
        except OSError as error:
            why = error.strerror
        if why is not None:
            self.report(f"checkpoint of step {step} not saved: {why}; the run goes on")
        shutil.rmtree(temporary, ignore_errors=True)
        self._mend(step)

    def _refusal(self, error: CheckpointException, temporary: Path) -> str:
        """The disk's word, which DCP's writer does not hand on; what is no disk's is raised."""
        failed, (first, _) = next(iter(error.failures.items()))
        if isinstance(first, OSError):
            return str(first.strerror)
        if "inline_container" not in str(first):  # torch.save's, for a file that cannot be written
            if failed == self.job.rank:
                raise first
            raise RunError(f"rank {failed} could not save its shards: {first}")
        try:
            (temporary / ".probe").write_bytes(bytes(PROBE_BYTES))
        except OSError as refused:
            return str(refused.strerror)
        return "a file was not written whole; is the disk full?"

    def _rename(self, step: int) -> None:
        final = self.path(step)
        if final.exists():  # of a run before; `_prepare` mends what ends between the two renames
            os.rename(final, self._aside(step))
        os.rename(self._temporary(step), final)
        sync_folder(self.folder)

    def _prepare(self) -> None:
        """Make the folder, and remove what a killed run left in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the folder of checkpoints {self.folder}: {error.strerror}"
            ) from error
        self._remove_left()

    def _on_main(self, do: Callable[[], object]) -> None:
        """Do it on rank 0, and have every rank wait, and fail if it failed."""
        told: list[Exception | None] = [None]
        if self.job.is_main:
            try:
                do()
            except (UsageError, OSError) as error:
                told = [error]
        dist.broadcast_object_list(told, 0)
        if told[0] is not None:
            raise told[0]

    def _tell(self, line: str) -> None:
        if self.job.is_main:
            self.report(line)
