"""A training's state on disk: weights, gradients and Adam's moments in memory-mapped files.

Each unit of `fully_shard` gets four files of this rank's shards: weights, gradients and the two
moments. (In one file, the kernel, which reads ahead, would read one part with another.) The tensors
are the files: the kernel reads a page when it is touched, and writes back what was changed. Between
two uses nothing needs to be in memory, but nothing makes the kernel forget a page either, as long
as it has room: its page cache is memory too. So each unit is flushed and dropped after use, or a
control group bounds it (`distlab.training.cgroup`).

    with put_on_disk(model, optimizer, folder) as disk:  # after fully_shard
        model(inputs, targets=targets).backward()
        disk.step()  # for optimizer.step(): unit after unit
        optimizer.zero_grad()
"""

import ctypes
import math
import mmap
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distlab import host
from distlab.display import quantity
from distlab.errors import RunError, UsageError
from distlab.ranks import gathered

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("weights", "gradients", *MOMENTS)
ALIGNED = 64  # bytes: where a tensor may begin, as in torch's own allocator
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")  # file systems without a disk
PAGE = mmap.PAGESIZE


def put_on_disk(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | Path,
    drop: bool = True,
    flag: str = "--folder",
) -> "OnDisk":
    """Move a sharded model's parameters and the state of its Adam or AdamW into files in `folder`.

    Every rank calls it, after `fully_shard` and before or between steps. The model and the
    optimizer get new parameters, so keep no references to the old ones. Those on the meta device
    become zeros on disk, to be filled in place. With `drop` a unit's pages are written and
    forgotten after each use; without, that is left to the kernel.

    Raises, on all ranks, `UsageError` that names `flag` for a folder without room, or in memory,
    and for another optimizer; `RunError` when the room is gone by the time that it is taken.
    """
    _refuse_optimizer(optimizer)
    folder = Path(folder)
    units = [own for module in _units(model) if (own := _own_parameters(module, model))]
    _refuse_folder(folder, sum(Layout(own).size for own in units), flag)
    files, failed = [], None
    try:
        files = [UnitFiles(folder, own) for own in units]
    except OSError as error:
        failed = f"{flag} {folder}: {error.strerror} while its room was taken; free some space"
    if told := next(filter(None, gathered(failed)), None):
        raise RunError(told)
    return OnDisk(model, optimizer, files, drop)


class OnDisk:
    """The files behind a model and its optimizer.

    They have no names: the kernel frees them when this process ends, in whatever way.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        files: "list[UnitFiles]",
        drop: bool,
    ) -> None:
        self.optimizer, self.files, self.drops = optimizer, files, drop
        self._assign(model)
        for file in files:
            self._fill_moments(file)
            for name, parameter in file.trained().items():
                parameter.register_post_accumulate_grad_hook(self._on_gradient(file, name))
        if drop:
            for module in _units(model):
                module.register_forward_hook(self._after_forward(_own_parameters(module, model)))
            self._drop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.close()

    @property
    def bytes(self) -> int:
        """Of this rank's files."""
        return sum(file.layout.size for file in self.files)

    def cached(self) -> int:
        """Bytes of this rank's files that are in the page cache now."""
        return sum(file.cached() for file in self.files)

    def traffic(self) -> tuple[int, int]:
        """Bytes that a step reads and writes if nothing stays in memory between two uses.

        Weights are read for forward and for backward (the root's stay gathered), then all parts
        for the optimizer. Gradients are written in backward, the other parts by the optimizer.
        """
        first, *others = (file.layout.parts["weights"] for file in self.files)
        return first + 2 * sum(others) + self.bytes, self.bytes

    def step(self) -> None:
        """The optimizer's step, unit after unit: only one unit's state is touched at a time."""
        groups = self.optimizer.param_groups
        try:
            for file in self.files:
                own = set(map(id, file.parameters.values()))
                parts = [{**g, "params": [p for p in g["params"] if id(p) in own]} for g in groups]
                self.optimizer.param_groups = [part for part in parts if part["params"]]
                self.optimizer.step()
                file.arrived = 0
                if self.drops:
                    file.drop(PARTS)
        finally:
            self.optimizer.param_groups = groups

    def _assign(self, model: nn.Module) -> None:
        """Replace the parameters, in the model and in the optimizer, by those in the files."""
        before = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in before.items()}
        tied = {
            place: names[id(parameter)]
            for place, parameter in model.named_parameters(remove_duplicate=False)
            if place not in before
        }
        mapped = {
            name: file.mapped("weights", name, filled_from=parameter.detach())
            for file in self.files
            for name, parameter in file.parameters.items()
        }
        model.load_state_dict(mapped, strict=False, assign=True)
        for place, name in tied.items():
            path, _, last = place.rpartition(".")
            setattr(model.get_submodule(path), last, model.get_parameter(name))
        after = dict(model.named_parameters())
        for file in self.files:
            file.parameters = {name: after[name] for name in file.parameters}
        for group in self.optimizer.param_groups:
            group["params"] = [after[names[id(p)]] for p in group["params"]]
        for old, state in list(self.optimizer.state.items()):
            self.optimizer.state[after[names[id(old)]]] = state
            del self.optimizer.state[old]

    def _fill_moments(self, file: "UnitFiles") -> None:
        """Give the optimizer its state before it makes one of its own in memory."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in file.trained().items():
            state = self.optimizer.state[parameter]
            if "step" not in state:
                on_device = groups[id(parameter)]["fused"] or groups[id(parameter)]["capturable"]
                state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
            for moment in MOMENTS:
                state[moment] = file.mapped(moment, name, filled_from=state.get(moment))

    def _on_gradient(self, file: "UnitFiles", name: str):  # type: ignore[no-untyped-def]
        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = file.take_gradient(name, parameter.grad)
            file.arrived += 1
            if self.drops and file.arrived == len(file.trained()):
                file.arrived = 0
                file.drop(("weights", "gradients"))

        return move

    def _after_forward(self, own: Mapping[str, Tensor]):  # type: ignore[no-untyped-def]
        files = [file for file in self.files if file.parameters.keys() & own.keys()]

        def drop(module: nn.Module, args: object, output: object) -> None:
            for file in files:
                file.drop(("weights",))

        return drop

    def _drop_all(self) -> None:
        for file in self.files:
            file.drop(PARTS)


class Layout:
    """Where in its part's file each shard begins: `places[part, name]`, bytes; and each file's
    size, `parts[part]`, in whole pages. A frozen parameter has weights only."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.places: dict[tuple[str, str], int] = {}
        self.parts: dict[str, int] = {}
        for part in PARTS:
            end = 0
            for name, parameter in parameters.items():
                if part == "weights" or parameter.requires_grad:
                    self.places[part, name] = end
                    end += _up(_local(parameter).nbytes, ALIGNED)
            self.parts[part] = _up(end, PAGE)

    @property
    def size(self) -> int:
        return sum(self.parts.values())


class UnitFiles:
    """One unit's shards on this rank, in files without a name whose room is taken at once.

    Raises `OSError` where there is no room: a file that grew as it was written would end the
    process by a signal when the disk is full.
    """

    def __init__(self, folder: Path, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.layout = Layout(parameters)
        self.arrived = 0  # gradients in this backward
        self.fds: dict[str, int] = {}
        self.maps: dict[str, mmap.mmap] = {}
        try:
            for part, size in self.layout.parts.items():
                if size:
                    self.fds[part], path = tempfile.mkstemp(dir=folder)
                    os.unlink(path)
                    os.posix_fallocate(self.fds[part], 0, size)
                    self.maps[part] = mmap.mmap(self.fds[part], size)
        except OSError:
            self.close()
            raise

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    def mapped(self, part: str, name: str, filled_from: Tensor | None = None) -> Tensor:
        """The part's tensor of a parameter, which lives in the file; a DTensor if that is one."""
        parameter = self.parameters[name].detach()
        local = _local(parameter)
        offset = self.layout.places[part, name]
        tensor = torch.empty(0, dtype=local.dtype)
        if size := local.numel():
            tensor = torch.frombuffer(self.maps[part], dtype=local.dtype, count=size, offset=offset)
        tensor = tensor.view(local.shape)
        if filled_from is not None and not filled_from.is_meta:
            tensor.copy_(_local(filled_from))
        return _like(tensor, parameter)

    def take_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """`gradient`, in the file. It is written as a file is: storing it through the mapping would
        first read the pages that it overwrites."""
        target, local = self.mapped("gradients", name), _local(gradient)
        if local.data_ptr() != _local(target).data_ptr():  # else it was added up in place
            content = local.contiguous().view(-1).view(torch.uint8).numpy().data
            written = 0
            while written < len(content):
                place = self.layout.places["gradients", name] + written
                written += os.pwrite(self.fds["gradients"], content[written:], place)
        return target

    def drop(self, parts: Iterable[str]) -> None:
        """Write what was changed, wait until it is on the disk, and let the kernel forget it."""
        for part in self.maps.keys() & set(parts):
            self.maps[part].flush()
            self.maps[part].madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(self.fds[part], 0, 0, os.POSIX_FADV_DONTNEED)

    def cached(self) -> int:
        """Bytes of the files in the page cache, by mincore(2)."""
        libc = ctypes.CDLL(None, use_errno=True)
        found = 0
        for part, mapped in self.maps.items():
            size = self.layout.parts[part]
            pages = (ctypes.c_ubyte * (size // PAGE))()
            first = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
            if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), "mincore")
            found += PAGE * sum(page & 1 for page in pages)
        return found

    def close(self) -> None:
        """Give up the files; their room is free when the last tensor in them is gone."""
        for fd in self.fds.values():
            os.close(fd)


def disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second that this rank reads and writes as training does, by a mapped file of `size`
    bytes, while all ranks do. Every rank calls it."""
    probe = UnitFiles(folder, {"probe": torch.empty(size // 4)})
    mapped, seconds = probe.mapped("weights", "probe"), []
    for use in (lambda: mapped.fill_(1.0), mapped.sum):
        dist.barrier()
        started = time.perf_counter()
        use()
        probe.drop(("weights",))
        seconds.append(time.perf_counter() - started)
    probe.close()
    return size / seconds[1], size / seconds[0]


def _units(model: nn.Module) -> list[nn.Module]:
    """The model, and the modules in it that `fully_shard` wrapped."""
    inner = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    return [model, *inner]


def _own_parameters(unit: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are in `unit` and in no unit within it, by their names in the model."""
    inner = {id(p) for module in _units(unit)[1:] for p in module.parameters()}
    own = {id(p) for p in unit.parameters()} - inner
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def _refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        raise UsageError(f"{type(optimizer).__name__} cannot be kept on disk; use AdamW")
    for group in optimizer.param_groups:
        if group["amsgrad"]:
            raise UsageError("amsgrad's third moment cannot be kept on disk; use amsgrad=False")
        if not group["fused"]:
            group["foreach"] = False  # it would copy a whole unit's state in memory


def _refuse_folder(folder: Path, needed: int, flag: str) -> None:
    """Raise on all ranks where the folder of one cannot hold what its node's ranks put there."""
    if told := next(filter(None, gathered(_unfit(folder))), None):
        raise UsageError(f"{flag} {folder} {told}")
    own = socket.gethostname(), os.stat(folder).st_dev
    together = sum(size for place, size in gathered((own, needed)) if place == own)
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    short = max(gathered((together - free, together, free)))
    if short[0] > 0:
        raise UsageError(
            f"{flag} {folder} has {quantity(short[2], 'B')} free and its ranks' state takes "
            f"{quantity(short[1], 'B')}; free some space, name another disk, or use more ranks"
        )


def _unfit(folder: Path) -> str | None:
    if sys.platform != "linux":
        return "cannot be used: state on disk needs Linux; leave it in memory"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"cannot be written: {error.strerror}; name another folder"
    if (kind := file_system(folder)) in IN_MEMORY:
        return f"is in memory ({kind}), so nothing would be saved; name a folder on a disk"
    return None


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, such as ext4; empty if it is not told."""
    path, best = os.path.realpath(folder), ("", "")
    for line in host.read("/proc/self/mounts").splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = point, kind
    return best[1]


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _up(size: int, to: int) -> int:
    return math.ceil(size / to) * to
