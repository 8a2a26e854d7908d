"""A nested state as a JSON tree and named tensors, and back: exact, and without pickle.

JSON has lists, strings, numbers, booleans and null. What it lacks is written as an object with one
key: {"tensor": name}, {"dict": [[key, value], …]} (keys need not be strings), {"tuple": […]},
{"float": "nan"} for what is not finite, and {"int": "0x…"} for what has more than 64 bits.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {  # safetensors' names
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """`state` as a tree for JSON and the tensors that it names; no tensor is copied.

    A tensor that occurs twice, as tied weights do, is stored once and comes back as one tensor.
    Different views of one memory are stored each for itself. Raises `TypeError` for what is no
    tensor, number, string, bool, None, list, tuple or mapping, and says where it is.
    """
    encoder = _Encoder()
    return encoder.node(state, ()), encoder.tensors


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `encode` was given."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    [(kind, value)] = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in value}
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in value)
    if kind == "float":
        return float(value)
    if kind == "int":
        return int(value, 16)
    raise ValueError(f"{kind!r} is no kind of value in a checkpoint")


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}  # by the memory that a tensor shows

    def node(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._name(value, path)}
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value) if value.bit_length() <= 63 else {"int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, list):
            return self._nodes(value, path)
        if isinstance(value, tuple):
            return {"tuple": self._nodes(value, path)}
        if isinstance(value, Mapping):
            items = value.items()
            return {"dict": [[self.node(k, path), self.node(v, (*path, str(k)))] for k, v in items]}
        raise TypeError(
            f"{'.'.join(path)} is a {type(value).__name__}; a checkpoint holds tensors, numbers, "
            "strings, None, lists, tuples and mappings of them"
        )

    def _nodes(self, items: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> list[Any]:
        return [self.node(item, (*path, str(place))) for place, item in enumerate(items)]

    def _name(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        wanted = ".".join(path)
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{wanted}: a checkpoint has no place for {tensor.dtype}, "
                            f"{tensor.layout}, on {tensor.device}")  # fmt: skip
        start = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        memory = (*start, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in self._names:
            return self._names[memory]
        name, count = wanted, 1
        while name in self.tensors or name in ("", "__metadata__"):  # {1: …, "1": …}
            count += 1
            name = f"{wanted}#{count}"
        self.tensors[name] = tensor.detach()
        self._names[memory] = name
        return name
