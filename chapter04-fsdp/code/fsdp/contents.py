"""What a sharded checkpoint holds, and its ways in and out: any ranks, chapter 3's, Hugging Face's.

Tensors have plain names, `model.NAME` and `optimizer.NAME.KEY`, so that no rank, no number of ranks
and no index of the optimizer is in them. Whatever is read or converted goes tensor by tensor, and
of each a rank keeps its shard: nothing here needs a memory that holds the whole model.

DCP's `.metadata` is a pickle, and an unpickler calls whatever a pickle names: it is read only after
its sum was found right, and may name DCP's own types and no other.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from distlab.checkpoint_files import (
    TENSORS,
    TREE,
    decode,
    encode,
    read_manifest,
    stream_files,
)
from distlab.errors import RunError, UsageError
from distlab.files import sync_folder
from distlab.hf_format import DTYPES, SHARD_BYTES, Shapes, file_order, stream_directory
from distlab.runtime import Runtime
from distlab.training.dcp_files import Reader

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
HOW = {"foreach", "fused", "capturable", "differentiable"}  # a step is computed, not what


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was verified, and whose tensors are in the model and the optimizer.

    `fields` are what was saved beside the tensors.
    """

    step: int
    fields: dict[str, Any]
    path: Path


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The run's own tensors, by name; of a sharded one this rank's shard, which says where it lies.

    The names hold on any number of ranks: no index of a parameter in the optimizer is in them.
    """
    shards = named_shards(model)
    tensors = {f"model.{name}": p.detach() for name, p in shards.items()}
    tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in shards.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer has them. An evaluation leaves the root gathered, perhaps in
    a narrower type: it is sharded again first."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group of parameters its settings, such as the learning rate."""
    return [_settings(group) for group in optimizer.param_groups]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and key not in HOW}


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Loaded:
    """Put a verified checkpoint into both: of each tensor every rank reads the part that it has.

    Every rank calls it. Raises `UsageError`, before anything is changed, when it is of another
    model or optimizer.
    """
    manifest = read_manifest(path)
    source = Replicated(path) if TENSORS in manifest["files"] else Sharded(path)
    own: dict[str, Tensor] = {f"model.{name}": p for name, p in named_shards(model).items()}
    own |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    saved = {name: shape for name, shape in source.shapes.items() if name.startswith("model.")}
    check_same_model(saved, {name: (t.dtype, tuple(t.shape)) for name, t in own.items()})
    groups = source.fields.pop("groups")
    if [g.keys() for g in groups] != [g.keys() for g in settings_of(optimizer)]:
        raise UsageError(f"the checkpoint's optimizer is not the {type(optimizer).__name__} of this"
                         " run; use the one that it was written with")  # fmt: skip
    make_state(source.shapes, model, optimizer)
    source.fill(tensors_of(model, optimizer))
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    return Loaded(manifest["step"], source.fields, path)


def check_same_model(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `UsageError` naming the first tensor that is not the same in both."""
    for name in [*own, *saved]:
        there, here = (described(shapes.get(name)) for shapes in (saved, own))
        if there != here:
            raise UsageError(
                f"the checkpoint is of another model: {name.removeprefix('model.')} is {there} in "
                f"it and {here} here; use the model flags that it was trained with, or another "
                "folder"
            )


def described(shape: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    if shape is None:
        return "missing"
    return f"{str(shape[0]).removeprefix('torch.')} {list(shape[1])}"


def make_state(
    shapes: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give a new optimizer the state that the checkpoint has, to be filled: sharded as its
    parameter is where it has the parameter's shape, and whole where it is a number."""
    named = named_shards(model)
    grouped = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, (dtype, shape) in shapes.items():
        kind, _, rest = name.partition(".")
        of, _, key = rest.rpartition(".")
        if kind != "optimizer" or key in optimizer.state[named[of]]:
            continue
        parameter = named[of]
        if shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype)
        else:  # AdamW's step, on the device only where a fused kernel counts it
            on_device = grouped[parameter].get("fused") or grouped[parameter].get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
            value = torch.zeros(shape, dtype=dtype, device=device)
        optimizer.state[parameter][key] = value.detach()


class Sharded:
    """A verified sharded checkpoint: its shapes, its fields, and its tensors, some or all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = decode(
            json.loads((path / TREE).read_text(encoding="utf-8")), {}
        )
        try:
            metadata = Reader(path).read_metadata()
        except pickle.UnpicklingError as error:
            raise RunError(f"the checkpoint {path} is refused: {error}") from error
        stored = metadata.state_dict_metadata.items()
        self.shapes = {
            name: (entry.properties.dtype, tuple(entry.size))
            for name, entry in stored if isinstance(entry, TensorStorageMetadata)
        }  # fmt: skip

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Every rank calls it with its own shards."""
        dcp.load(tensors, storage_reader=Reader(self.path))

    def whole(self, name: str) -> Tensor:
        """One tensor, put together from all its shards, for this process alone."""
        dtype, shape = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings(action="ignore"):  # that this process is alone, as was asked
            dcp.load({name: tensor}, storage_reader=Reader(self.path), no_dist=True)
        return tensor


class Replicated:
    """A verified checkpoint of chapter 3, whose tensors lie whole in one file of safetensors.

    Its optimizer knows parameters by their numbers: matrices first, then vectors, each in the
    model's order, as both chapters' training scripts have it.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / TENSORS
        with safe_open(self.file, framework="pt") as opened:
            kept: dict[str, Any] = {n: Meta(opened, n) for n in opened.keys()}  # noqa: SIM118
        state = decode(json.loads((path / TREE).read_text(encoding="utf-8")), kept)
        self.fields = {name: state[name] for name in ("loader", "flags", "world_size")}
        self.fields["groups"] = [_settings(g) for g in state["optimizer"]["param_groups"]]
        once: dict[str, str] = {}  # a tied tensor goes by the first of its names
        for name, tensor in state["model"].items():
            once.setdefault(tensor.name, name)
        self.places = {f"model.{name}": kept[place] for place, name in once.items()}
        numbered = optimizer_order({name: kept[place].shape for place, name in once.items()})
        for number, values in state["optimizer"]["state"].items():
            for key, value in values.items():
                self.places[f"optimizer.{numbered[number]}.{key}"] = value
        self.shapes = {name: (meta.dtype, meta.shape) for name, meta in self.places.items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read one tensor after the other, and keep of each what this rank has of it."""
        with safe_open(self.file, framework="pt") as opened:
            for name, tensor in tensors.items():
                keep_own(tensor, opened.get_tensor(self.places[name].name))


class Meta:
    """What is known of a tensor in a file without reading it."""

    def __init__(self, opened: Any, name: str) -> None:
        self.name = name
        found = opened.get_slice(name)
        self.shape = tuple(found.get_shape())
        self.dtype = BY_NAME[found.get_dtype()]


def optimizer_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters by their number in the optimizer of the training scripts: matrices first."""
    return sorted(shapes, key=lambda name: len(shapes[name]) != 2)


@torch.no_grad()
def keep_own(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole`, which every rank has, into `tensor`: of a sharded one this rank's shard."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device)
        part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(whole)


def to_hugging_face(
    path: Path, directory: str | Path, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the model of a verified sharded checkpoint as a Hugging Face folder; one process, which
    holds one tensor at a time. See `hf_format.stream_directory` for what it raises."""
    stored = Sharded(path)
    shapes = {
        name.removeprefix("model."): shape
        for name, shape in stored.shapes.items() if name.startswith("model.")
    }  # fmt: skip
    return stream_directory(
        directory, stored.fields["config"], shapes, lambda name: stored.whole(f"model.{name}"),
        tokenizer, shard_bytes,
    )  # fmt: skip


def stream_model(
    model: nn.Module, directory: str | Path, config: Mapping[str, Any], tokenizer: Any, job: Runtime
) -> None:
    """Write the model in training as a Hugging Face folder: rank 0 writes; every rank calls it, and
    holds one whole tensor at a time."""
    own = {name: parameter.detach() for name, parameter in named_shards(model).items()}
    shapes: Shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}

    def whole(name: str) -> Tensor:
        tensor = own[name]
        if not isinstance(tensor, DTensor):
            return tensor
        on_device: Any = tensor.to(tensor.device_mesh.device_type)  # from where it is offloaded
        return on_device.full_tensor()

    if job.is_main:
        stream_directory(directory, config, shapes, whole, tokenizer)
    else:
        for name in file_order(shapes):
            whole(name)


def to_replicated(path: Path, folder: Path) -> Path:
    """Write a verified sharded checkpoint as one of chapter 3 in `folder`; the same for memory.

    It has no random states, of which these models use none: it names 0 ranks, which no run has.
    """
    stored = Sharded(path)
    names = [n.removeprefix("model.") for n in stored.shapes if n.startswith("model.")]
    order = optimizer_order({name: stored.shapes[f"model.{name}"][1] for name in names})
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    places = {name: name for name in names}
    if stored.fields["config"]["tie_word_embeddings"]:
        places |= tied
    state = {
        number: {
            place.rpartition(".")[2]: place
            for place in stored.shapes if place.startswith(f"optimizer.{name}.")
        }
        for number, name in enumerate(order)
    }  # fmt: skip
    counted = iter(range(len(order)))
    matrices = sum(len(stored.shapes[f"model.{name}"][1]) == 2 for name in names)
    groups = [
        {**group, "params": [next(counted) for _ in range(count)]}
        for group, count in zip(
            stored.fields["groups"], (matrices, len(order) - matrices), strict=True
        )
    ]
    rest = {
        "world_size": 0, "scheduler": None, "scaler": {}, "random": [],
        "optimizer_class": stored.fields["optimizer_class"],
        "loader": stored.fields["loader"], "flags": stored.fields["flags"],
    }  # fmt: skip
    optimizer = _node({"state": _node({n: _places(s) for n, s in state.items()}),
                       "param_groups": encode(groups)[0]})  # fmt: skip
    model = _places({name: f"model.{place}" for name, place in places.items()})
    tree = _node({**{k: encode(v)[0] for k, v in rest.items()},
                  "model": model, "optimizer": optimizer})  # fmt: skip
    final = folder / path.resolve().name
    temporary = folder / f".{final.name}.tmp"
    try:
        temporary.mkdir(parents=True)
        step = read_manifest(path)["step"]
        stream_files(temporary, step, tree, stored.shapes, stored.whole)
        os.rename(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _places(names: Mapping[Any, str]) -> dict[str, Any]:
    """A node of chapter 3's tree: tensors, by where they lie."""
    return _node({key: {"tensor": place} for key, place in names.items()})


def _node(items: Mapping[Any, Any]) -> dict[str, Any]:
    return {"dict": [[key, item] for key, item in items.items()]}
