"""The files of one checkpoint: written with fsync, listed with their sha256, verified when read.

    step_00000120/tensors.safetensors   every tensor
    step_00000120/state.json            the tree that names them
    step_00000120/manifest.json         step, and bytes and sha256 of the two; and its own sha256

The manifest is written last, so a folder without one was never finished. There is no pickle: JSON
has lists, strings, numbers, booleans and null, and what it lacks is written as an object with one
key: {"tensor": name}, {"dict": [[key, value], …]} (keys need not be strings), {"tuple": […]},
{"float": "nan"} for what is not finite, and {"int": "0x…"} for what has more than 64 bits.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distlab.files import sync_folder
from distlab.hf_format import DTYPES, Shapes, safetensors_pieces

FORMAT = 1
TENSORS, TREE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PIECE = 1 << 20  # bytes of a file that are hashed at a time


class Damaged(Exception):
    """What is wrong with a checkpoint, in words that follow `step_00000120: `."""


def write_files(folder: Path, step: int, tree: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint into the empty `folder`; when this returns, the disk has it."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    stream_files(folder, step, tree, shapes, tensors.__getitem__)


def stream_files(
    folder: Path, step: int, tree: Any, shapes: Shapes, get: Callable[[str], Tensor]
) -> None:
    """As `write_files`, for tensors that are asked for by their names, one at a time."""
    files = {
        TENSORS: _write(folder / TENSORS, safetensors_pieces(shapes, get)),
        TREE: write_json(folder / TREE, tree),
    }
    write_manifest(folder, step, files)


def write_json(path: Path, tree: Any) -> dict[str, Any]:
    """Write and fsync a tree that `encode` gave; what the manifest says of the file."""
    return _write(path, [json.dumps(tree, allow_nan=False).encode()])


def write_manifest(folder: Path, step: int, files: Mapping[str, Any]) -> None:
    """The list of the files, the last that is written; then the disk has their names too."""
    manifest = {"format": FORMAT, "step": step, "files": dict(files)}
    signed = {**manifest, "sha256": _digest(manifest)}
    _write(folder / MANIFEST, [json.dumps(signed, indent=1).encode()])
    sync_folder(folder)


def read_files(folder: Path, device: torch.device | str = "cpu") -> tuple[int, Any]:
    """The step and the state in `folder`. Raises `Damaged` before anything of it is used.

    Each file is read once: the bytes whose checksum is right are the bytes that are used.
    """
    manifest = read_manifest(folder)
    contents = {name: _read_verified(folder, name, e) for name, e in manifest["files"].items()}
    try:
        tensors = safetensors.torch.load(contents.pop(TENSORS))
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        return manifest["step"], decode(json.loads(contents[TREE]), on_device)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"it cannot be understood ({error!r})") from error


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and hash in one pass. The sum is of what was meant, not of what arrived on the disk."""
    digest, count = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            count += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": count, "sha256": digest.hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its own sum verified. Raises `Damaged`."""
    try:
        manifest = json.loads(_read(folder, MANIFEST))
        claimed = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{MANIFEST} is cut short or changed") from error
    if claimed != _digest(manifest):
        raise Damaged(f"{MANIFEST} does not have its sha256: it was changed")
    if manifest["format"] != FORMAT:
        raise Damaged(f"its format {manifest['format']} is not known here, only {FORMAT}")
    return manifest


def hash_file(path: Path) -> dict[str, Any]:
    """What a manifest says of the file, which is read in pieces: it may be larger than memory."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            count += len(piece)
    return {"bytes": count, "sha256": digest.hexdigest()}


def check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise `Damaged` unless the file is what the manifest says of it; it is read in pieces."""
    try:
        found = hash_file(folder / name)
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error
    _compare(name, found["bytes"], found["sha256"], entry)


def _read_verified(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    content = _read(folder, name)
    _compare(name, len(content), hashlib.sha256(content).hexdigest(), entry)
    return content


def _compare(name: str, size: int, sha256: str, entry: Mapping[str, Any]) -> None:
    if size != entry["bytes"]:
        raise Damaged(f"{name} has {size} of {entry['bytes']} bytes")
    if sha256 != entry["sha256"]:
        raise Damaged(f"{name} does not have its sha256: bytes of it were changed")


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
