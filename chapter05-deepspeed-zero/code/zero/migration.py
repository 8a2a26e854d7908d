"""Checkpoints of other kinds, each read into a `State` and written from one.

    ddp         chapter 3's: safetensors and JSON, whole
    fsdp        chapter 4's: shards of torch.distributed.checkpoint (DCP), with a manifest
    zero1, 2, 3 DeepSpeed's own, of a fixed number of ranks
    universal   DeepSpeed's for any number of ranks
    hf          a Hugging Face folder: weights alone

Only zero1, zero2 and zero3 are bound to a number of ranks. What chapters 3 and 4 write is read here
by its files' format, without their code.
"""

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distlab import checkpoint_files as files
from distlab import hf_format
from distlab.checkpoint_files import TREE, Damaged
from distlab.errors import RunError, UsageError
from distlab.files import sync_folder
from distlab.model_config import ModelConfig, config_to_json, read_config
from distlab.spawning import spawn
from distlab.training.checkpoint_folder import NAME
from distlab.training.dcp_files import METADATA, Reader
from zero.deepspeed_files import (
    read_universal,
    read_zero,
    refuse_ranks,
    refusing_full_disk,
    save_zero,
    stage_of,
    write_universal,
)
from zero.state import (
    FIELDS,
    MOMENTS,
    State,
    Tensors,
    anew,
    names_of_groups,
    one_count,
    settings_of,
)

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
KINDS = ("ddp", "fsdp", *STAGES, "universal", "hf")


def found(folder: Path) -> dict[str, Path]:
    """The kinds of checkpoint in `folder`, and where: the newest, or the one that it is itself."""
    kinds = {}
    tags = [folder, *_tagged(folder, "latest"), *_tagged(folder, "latest_universal")]
    if (folder / "config.json").is_file():
        kinds["hf"] = folder
    steps = [p for p in [folder, *folder.glob("step_*")] if NAME.fullmatch(p.resolve().name)]
    if steps:
        newest = max(steps, key=lambda path: int(path.resolve().name.removeprefix("step_")))
        if not any(newest.glob("*_states.pt")):
            kinds["fsdp" if (newest / METADATA).is_file() else "ddp"] = newest
        elif not (folder / "latest").is_file():
            tags.append(newest)
    for tag in tags:
        if (tag / "zero" / "optimizer_state.pt").is_file():
            kinds["universal"] = tag
        elif tag.is_dir() and (stage := stage_of(tag)):
            kinds[f"zero{stage}"] = tag
    return kinds


def _tagged(folder: Path, latest: str) -> list[Path]:
    """Where DeepSpeed's file `latest` leads."""
    file = folder / latest
    return [folder / file.read_text(encoding="utf-8").strip()] if file.is_file() else []


def read(kind: str, folder: Path, config: ModelConfig, flag: str = "--input") -> State:
    """The state in `folder`, of the model `config` unless it names its own.

    Raises `UsageError` for another kind, or model, and `RunError` for a damaged checkpoint.
    """
    try:
        there = found(folder) if folder.is_dir() else {}
        if kind in there:
            return READERS[kind](there[kind]).fitted(config)
    except (Damaged, pickle.UnpicklingError) as damage:
        raise RunError(f"the checkpoint {folder} is damaged: {damage}") from damage
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"the checkpoint {folder} is not understood: {why}") from error
    if not there:
        raise UsageError(f"{flag} {folder} holds no checkpoint; name the folder of a run")
    other = next(iter(there))
    raise UsageError(f"{flag} {folder} holds {other}, not {kind}; use --from {other}")


def write(kind: str, state: State, folder: Path, ranks: int, timeout_s: float) -> None:
    """Write `folder`, which is new or empty, under a temporary name, and rename it at the end."""
    with new_folder(folder) as scratch, refusing_full_disk(folder):
        made = scratch / "new"
        if kind in STAGES:
            refuse_ranks(state, ranks, STAGES[kind])
            between = scratch / "universal"
            write_universal(state, between)
            spawn(save_zero, ranks, between, made, STAGES[kind], timeout_s=timeout_s)
        else:
            WRITERS[kind](state, made)


@contextmanager
def new_folder(target: Path, flag: str = "--output") -> Iterator[Path]:
    """A temporary folder beside `target`, which what is made in it as `new` becomes."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{flag} {target} is not empty; name a new folder, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"{flag} {target} cannot be written: {error.strerror}") from error
    try:
        yield scratch
        os.replace(scratch / "new", target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_ddp(path: Path) -> State:
    """Chapter 3's optimizer knows parameters by their numbers, group after group."""
    step, saved = files.read_files(path)
    _refuse_optimizer(saved["optimizer_class"])
    weights: Tensors = {}
    for name, tensor in saved["model"].items():  # of a tied tensor the first name
        if not any(tensor is other for other in weights.values()):
            weights[name] = tensor
    optimizer = saved["optimizer"]
    groups = [settings_of(group) for group in optimizer["param_groups"]]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    names = [name for group in names_of_groups(shapes, len(groups)) for name in group]
    own = {names[number]: values for number, values in optimizer["state"].items()}
    moments = {key: {name: values[key] for name, values in own.items()} for key in MOMENTS}
    updates = one_count({name: float(values["step"]) for name, values in own.items()})
    fields = {name: saved[name] for name in FIELDS if name in saved}
    return State(step, updates, weights, moments, groups, fields)


def write_ddp(state: State, folder: Path) -> None:
    """It has no random states, of which these models use none: it names 0 ranks, as no run has."""
    named = state.named_groups()
    numbered = [name for _, names in named for name in names]
    count = torch.tensor(float(state.updates))
    of_each = {
        number: {"step": count.clone(), **{key: state.moments[key][name] for key in MOMENTS}}
        for number, name in enumerate(numbered)
    }
    groups = [
        {**settings, "params": [numbered.index(name) for name in names]}
        for settings, names in named
    ]
    model = dict(state.weights)
    if state.config.tie_word_embeddings:
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    whole = {
        "world_size": 0, "model": model, "optimizer_class": "AdamW",
        "optimizer": {"state": of_each, "param_groups": groups}, "scheduler": None, "scaler": {},
        "random": [], "loader": None, "flags": {}, **state.fields,
    }  # fmt: skip
    path = _step_folder(state, folder)
    files.write_files(path, state.step, *files.encode(whole))


def read_fsdp(path: Path) -> State:
    """All shards, put together by DCP, after the manifest's sums were verified."""
    manifest = files.read_manifest(path)
    for name, entry in manifest["files"].items():
        files.check_file(path, name, entry)
    fields = files.decode(json.loads((path / TREE).read_text(encoding="utf-8")), {})
    _refuse_optimizer(fields["optimizer_class"])
    reader = Reader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors: Tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # that this process is alone, as it is
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    weights, moments = by_kind(tensors)
    counts = {name: float(step) for name, step in _below(tensors, "optimizer.", ".step").items()}
    groups = [settings_of(group) for group in fields["groups"]]
    kept = {name: fields[name] for name in FIELDS if name in fields}
    return State(manifest["step"], one_count(counts), weights, moments, groups, kept)


def write_fsdp(state: State, folder: Path) -> None:
    """In one file: DCP finds for each rank its parts, whoever wrote them."""
    path = _step_folder(state, folder)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(named(state), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    complete_fsdp(path, state, ranks=1)


def complete_fsdp(path: Path, state: State, ranks: int) -> None:
    """What stands beside DCP's files: the fields, and the manifest with everything's sums."""
    listed = {file.name: files.hash_file(file) for file in path.iterdir()}
    fields = {"world_size": ranks, "optimizer_class": "AdamW", "loader": None, "flags": {},
              **state.fields, "groups": state.groups}  # fmt: skip
    listed[TREE] = files.write_json(path / TREE, files.encode(fields)[0])
    files.write_manifest(path, state.step, listed)


def read_hf(path: Path) -> State:
    """Weights, and AdamW as it begins: zero moments, and its own settings but for the decay."""
    weights = {name: tensor.float() for name, tensor in hf_format.read_tensors(path)}
    config = config_to_json(read_config(path))
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    groups = [settings_of({}), settings_of({"weight_decay": 0.0})]
    return State(0, 0, weights, anew(weights), groups, {"config": config})


def write_hf(state: State, folder: Path) -> None:
    hf_format.write_directory(folder, config_to_json(state.config), state.weights)


READERS: dict[str, Callable[[Path], State]] = {
    "ddp": read_ddp, "fsdp": read_fsdp, "hf": read_hf, **dict.fromkeys(STAGES, read_zero),
    "universal": read_universal,
}  # fmt: skip
WRITERS = {
    "ddp": write_ddp, "fsdp": write_fsdp, "hf": write_hf,
    "universal": write_universal,
}  # fmt: skip


def _step_folder(state: State, folder: Path) -> Path:
    path = folder / f"step_{state.step:08d}"
    path.mkdir(parents=True)
    return path


def named(state: State) -> Tensors:
    """The tensors as chapter 4 names them."""
    count = torch.tensor(float(state.updates))
    tensors = {f"model.{name}": weight for name, weight in state.weights.items()}
    for name in state.weights:
        tensors |= {f"optimizer.{name}.{key}": state.moments[key][name] for key in MOMENTS}
        tensors[f"optimizer.{name}.step"] = count.clone()
    return tensors


def by_kind(tensors: Tensors) -> tuple[Tensors, dict[str, Tensors]]:
    """Of tensors so named the weights and the moments."""
    moments = {key: _below(tensors, "optimizer.", f".{key}") for key in MOMENTS}
    return _below(tensors, "model.", ""), moments


def _below(tensors: Tensors, prefix: str, suffix: str) -> Tensors:
    return {
        name.removeprefix(prefix).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _refuse_optimizer(name: str) -> None:
    if name != "AdamW":
        raise RunError(f"its optimizer is {name}; only AdamW's moments are converted")
