"""What a step sends along each axis of a mesh, counted call by call."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlab.measure import tensors_in
from distlab.traffic import reduction_factor


class AxisTraffic(TorchDispatchMode):
    """Within it, the bytes that this rank sends along each axis of `mesh`, by what it calls.

    It sees the collectives of DTensor and of `fully_shard`, and counts each as the back end's ring
    sends it: of n bytes over K ranks (K-1)/K n for a gather, 2(K-1)/K n for an all-reduce.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        names = mesh.mesh_dim_names or ()
        self.axes = {str(mesh.get_group(name).group_name): name for name in names}
        self.bytes = dict.fromkeys(names, 0.0)
        self.calls: dict[str, Counter[str]] = {name: Counter() for name in names}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn itself into collectives first
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.name().partition("::")[2].replace("_", ""), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        """`allgather`, `reducescatter` and `allreduce` stand at the beginning of all their names.

        The largest tensor is the whole buffer, but of a functional gather, which has only a part.
        """
        kind = next((k for k in ("allgather", "reducescatter", "allreduce") if k in name), None)
        if kind is None:
            return
        axis = self.axes[next(filter(None, map(_group_name, args)))]
        size = self.mesh.size((self.mesh.mesh_dim_names or ()).index(axis))
        tensors: list[Tensor] = tensors_in(args)
        whole = max(tensor.nbytes for tensor in tensors)
        if kind == "allgather" and len(tensors) == 1:
            whole *= size
        backend = dist.get_backend(self.mesh.get_group(axis))
        factor = {"allgather": 1, "reducescatter": reduction_factor(backend), "allreduce": 2}[kind]
        self.calls[axis][kind] += 1
        self.bytes[axis] += factor * (size - 1) / size * whole


def _group_name(argument: Any) -> str | None:
    """The name of a process group that is passed as itself, or by its name."""
    if type(argument).__name__ == "ScriptObject":
        is_group = argument._type().name() == "ProcessGroup"
        return dist.ProcessGroup.unbox(argument).group_name if is_group else None
    return argument if isinstance(argument, str) and argument.isdecimal() else None
