"""Hugging Face model directories: config.json, safetensors and tokenizer files, read and written.

No model is known here: tensors go in and come out by name. Nothing is unpickled.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
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
    wrapped = _as_transformers_tokenizer(tokenizer)
    end = None if wrapped is None else wrapped.eos_token_id
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with _atomic_directory(Path(directory), overwrite) as folder:
        _write_json(folder / "config.json", {**config, **special, "dtype": dtype})
        _write_json(folder / "generation_config.json", special)
        _save_tensors(folder / WEIGHTS, tensors)
        if wrapped is not None:
            wrapped.save_pretrained(folder)
    return Path(directory)


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


def _as_transformers_tokenizer(tokenizer: Any) -> Any:
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
