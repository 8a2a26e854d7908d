"""The files of one checkpoint: written with fsync, listed with their sha256, verified when read.

    step_00000120/tensors.safetensors   every tensor
    step_00000120/state.json            the tree that names them
    step_00000120/manifest.json         step, and bytes and sha256 of the two; and its own sha256

The manifest is written last, so a folder without one was never finished.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from _checkpoint_encoding import DTYPES, decode
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 1
TENSORS, TREE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Damaged(Exception):
    """What is wrong with a checkpoint, in words that follow `step_00000120: `."""


def write_files(folder: Path, step: int, tree: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint into the empty `folder`; when this returns, the disk has it."""
    files = {
        TENSORS: _write(folder / TENSORS, _safetensors(tensors)),
        TREE: _write(folder / TREE, [json.dumps(tree, allow_nan=False).encode()]),
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    signed = {**manifest, "sha256": _digest(manifest)}
    _write(folder / MANIFEST, [json.dumps(signed, indent=1).encode()])
    sync_folder(folder)


def read_files(folder: Path, device: torch.device | str = "cpu") -> tuple[int, Any]:
    """The step and the state in `folder`. Raises `Damaged` before anything of it is used.

    Each file is read once: the bytes whose checksum is right are the bytes that are used.
    """
    manifest = _read_manifest(folder)
    contents = {name: _read_verified(folder, name, entry) for name, entry in manifest["files"]}
    try:
        tensors = safetensors.torch.load(contents.pop(TENSORS))
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        return manifest["step"], decode(json.loads(contents[TREE]), on_device)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"it cannot be understood ({error!r})") from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a new file's name is lost in a power cut without it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterable[bytes | memoryview]:
    """A safetensors file, in pieces: the header's length, the header, every tensor's bytes.

    The library's own writer would make a full disk an error without a number, and leave the hash to
    a second reading. Wide types come first, so that each tensor begins at a multiple of its size.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded))
    yield encoded
    for _, tensor in ordered:
        flat = tensor.cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its own sum verified; `files` as pairs of name and entry."""
    try:
        manifest = json.loads(_read(folder, MANIFEST))
        claimed = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{MANIFEST} is cut short or changed") from error
    if claimed != _digest(manifest):
        raise Damaged(f"{MANIFEST} does not have its sha256: it was changed")
    if manifest["format"] != FORMAT:
        raise Damaged(f"its format {manifest['format']} is not known here, only {FORMAT}")
    return {**manifest, "files": list(manifest["files"].items())}


def _read_verified(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    content = _read(folder, name)
    if len(content) != entry["bytes"]:
        raise Damaged(f"{name} has {len(content)} of {entry['bytes']} bytes")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise Damaged(f"{name} does not have its sha256: bytes of it were changed")
    return content


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
