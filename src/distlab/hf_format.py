"""Hugging Face model directories: config.json, safetensors and tokenizer files, read and written.

No model is known here: tensors go in and come out by name. Nothing is unpickled.
"""

import errno
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distlab.errors import RunError, UsageError
from distlab.files import make_synced_folder, sync_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "</s>")
SHARD_BYTES = 5 * 10**9  # of one file of a large model
DTYPES = {  # safetensors' names
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # of tensors, by name


def write_directory(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read.

    `config` are config.json's fields, without dtype and special tokens, which are added here.
    `tokenizer` is a `tokenizers.Tokenizer` or a transformers tokenizer; without one, none is
    written. Everything is written beside `directory` and renamed, so that no partial model is
    seen. Raises `UsageError` when `directory` holds something and `overwrite` is not set.
    """
    with _atomic_directory(Path(directory), overwrite) as folder:
        _write_texts(folder, config, next(iter(tensors.values())).dtype, tokenizer)
        _save_tensors(folder / WEIGHTS, tensors)
    return Path(directory)


def stream_directory(
    directory: str | Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    get: Callable[[str], torch.Tensor],
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """As `write_directory`, for a model that need not fit into memory: one tensor at a time.

    `get(name)` is called once for each of `shapes`, in the order of `file_order`, and its tensor is
    written before the next is asked for. Several files, with their index, hold `shard_bytes` each,
    or one tensor that is larger.
    """
    with _atomic_directory(Path(directory), overwrite=False) as folder:
        _write_texts(folder, config, next(iter(shapes.values()))[0], tokenizer)
        files = _shards(shapes, shard_bytes)
        for name, part in files.items():
            with (folder / name).open("xb") as file:
                file.writelines(safetensors_pieces(part, get))
        if len(files) > 1:
            total = sum(_nbytes(*shape) for shape in shapes.values())
            where = {tensor: name for name, part in files.items() for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            _write_json(folder / INDEX, index)
    return Path(directory)


def file_order(shapes: Shapes) -> list[str]:
    """Wide types come first, so that in a file each tensor begins at a multiple of its size."""
    return sorted(shapes, key=lambda name: -shapes[name][0].itemsize)


def safetensors_pieces(
    shapes: Shapes, get: Callable[[str], torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, in pieces: the header's length, the header, every tensor's bytes.

    The library's own writer wants all tensors at once, and makes a full disk an error without a
    number.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file_order(shapes):
        dtype, shape = shapes[name]
        begin, end = end, end + _nbytes(dtype, shape)
        place = [begin, end]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": place}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded))
    yield encoded
    for name in file_order(shapes):
        flat = get(name).detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _shards(shapes: Shapes, shard_bytes: int) -> dict[str, dict[str, Any]]:
    """The files of a model, by their usual names, with the tensors that go into each."""
    parts: list[dict[str, Any]] = [{}]
    filled = 0
    for name in file_order(shapes):
        size = _nbytes(*shapes[name])
        if parts[-1] and filled + size > shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = shapes[name]
        filled += size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def read_tensors(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of `directory`'s safetensors, whole or in indexed shards, one at a time.

    Raises `RunError` with one line when a file is missing, cut short or otherwise unreadable.
    """
    for path in _weight_files(Path(directory)):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{path} cannot be read ({error}); it is missing, cut short or no safetensors file"
            ) from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        return [directory / WEIGHTS]
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({directory / Path(shard).name for shard in shards})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index} is no readable index of shards: {error!r}") from error


def as_transformers_tokenizer(tokenizer: Any) -> Any:
    """`tokenizer` in transformers' form, its end-of-text token found by its usual names."""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    known = [token for token in END_OF_TEXT if tokenizer.token_to_id(token) is not None]
    special = {"eos_token": known[0]} if known else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library reports a full disk as its own error
        raise RunError(f"{path.name} cannot be written: {error}") from error


def _write_texts(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype, tokenizer: Any
) -> None:
    wrapped = as_transformers_tokenizer(tokenizer)
    end = None if wrapped is None else wrapped.eos_token_id
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    told = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**config, **special, "dtype": told})
    _write_json(folder / "generation_config.json", special)
    if wrapped is not None:
        wrapped.save_pretrained(folder)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(fields), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _atomic_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target`, renamed to `target` when the block succeeds."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; name a folder for the model")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} is not empty; name a new folder, or remove it first")
    make_synced_folder(target.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        _sync(new)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        sync_folder(target.parent)  # before the old one goes
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full while writing {target}; free some space and run again"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    readable = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(readable)  # safetensors makes its file private; a model is for everybody
        with path.open("rb") as written:
            os.fsync(written.fileno())
    sync_folder(folder)
