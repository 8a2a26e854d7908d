"""DeepSpeed's checkpoints as files: read without DeepSpeed, and without running what is in them.

    tag/mp_rank_00_model_states.pt                    shapes, counters, the client's state
    tag/zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's partition of weights and moments
    tag_universal/zero/NAME/fp32.pt, exp_avg.pt, …    a universal checkpoint: a parameter a folder

Stages 1 and 2 lay the parameters of a group one after the other and give each rank a K-th of the
whole; a list says which part of which parameter lies where. Stage 3 gives each rank a K-th of every
parameter, rounded up. They are pickles: torch.load reads them with weights_only, and DeepSpeed's
own three classes are replaced by an empty one. DeepSpeed's loader unpickles whatever is there.

A universal checkpoint is what DeepSpeed itself reads at any stage and number of ranks. So this is
the way in: `write_universal`, then `save_zero` has an engine load it and save as it will.
"""

import errno
import math
import os
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distlab.errors import RunError, UsageError
from distlab.model import Llama
from distlab.runtime import Runtime
from zero.engine import engine_of, stage_config
from zero.state import FIELDS, MOMENTS, State, names_of_groups, one_count, settings_of

OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # of stage 3
FLAT = ("fp32", *MOMENTS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CUT_SHORT = re.compile("inline_container|iostream error")
ALIGNMENT = 2  # numbers: stages 1 and 2 pad a group to a multiple of this for each rank


class Plain:
    """Stands for DeepSpeed's classes: what was in them, and nothing that runs."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


PLAIN: list[Any] = [
    (Plain, f"deepspeed.{name}")
    for name in (
        "utils.tensor_fragment.fragment_address", "runtime.zero.config.ZeroStageEnum",
        "runtime.fp16.loss_scaler.LossScaler", "runtime.fp16.loss_scaler.DynamicLossScaler",
    )
]  # fmt: skip


def check_sums(path: Path) -> None:
    """Raise `RunError` where a byte was changed: each part has a sum, which torch.load ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} cannot be read: {error}; use another checkpoint") from error
    if wrong:
        raise RunError(f"{path} is damaged: {wrong} does not have its sum; use another checkpoint")


@contextmanager
def refusing_full_disk(folder: Path) -> Iterator[None]:
    """One line for what torch.save says where it cannot write, here or in a forked rank."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, RunError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full and not CUT_SHORT.search(str(error)):
            raise
        raise RunError(f"{folder} cannot be written; is the disk full?") from error


def load(path: Path) -> Any:
    """What is in one of DeepSpeed's files. Raises `RunError` for one that is damaged or strange."""
    check_sums(path)
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path} cannot be read: {why}") from error


def model_states(tag: Path) -> Any:
    there = [tag / name for name in MODEL if (tag / name).is_file()]
    if not there:
        raise RunError(f"{tag} has no {MODEL[0]}")
    return load(there[0])


def optim_files(tag: Path) -> list[Path]:
    """Of each rank, in the ranks' order. Raises `RunError` where one is missing."""
    found = {}
    for path in tag.iterdir():
        if named := OPTIM.fullmatch(path.name):
            if int(named[2]):
                raise RunError(f"{tag} is of a model that tensor parallelism divides; that is not "
                               "converted here")  # fmt: skip
            found[int(named[1])] = path
    if missing := set(range(max(found, default=-1) + 1)) - found.keys():
        raise RunError(f"{tag} has no partition of rank {min(missing)}")
    return [found[rank] for rank in sorted(found)]


def stage_of(tag: Path) -> int | None:
    """The stage that wrote it; None where there are no partitions."""
    files = optim_files(tag)
    return load(files[0])["optimizer_state_dict"]["zero_stage"].value if files else None


def read_zero(tag: Path) -> State:
    """The partitions of all ranks, put together."""
    states = model_states(tag)
    parts = [load(path)["optimizer_state_dict"] for path in optim_files(tag)]
    if len(parts) != states["dp_world_size"]:
        raise RunError(f"{tag} has {len(parts)} partitions of {states['dp_world_size']} ranks'")
    pieces: dict[str, dict[str, list[Tensor]]] = {k: defaultdict(list) for k in FLAT}
    counts: dict[str, float] = {}
    shapes = {n: tuple(s) for group in states["param_shapes"] for n, s in group.items()}
    is_third = parts[0]["zero_stage"].value == 3
    for rank, part in enumerate(parts):
        base = part["optimizer_state_dict" if is_third else "base_optimizer_state"]
        flats = part["fp32_flat_groups" if is_third else "single_partition_of_fp32_groups"]
        for number, flat in enumerate(flats):
            own = base["state"][number]
            if is_third:
                places = _places(states["param_shapes"][number], rank, len(parts))
            else:
                listed = part["param_slice_mappings"][number]
                places = {name: (one.start, one.numel) for name, one in listed.items()}
            counts |= {name: float(own["step"]) for name in places}
            for name, (start, numel) in places.items():
                for key, whole in {"fp32": flat, **{k: own[k] for k in MOMENTS}}.items():
                    pieces[key][name].append(whole.detach().narrow(0, start, numel))
    groups = [settings_of(group) for group in base["param_groups"]]
    _check_groups(shapes, len(groups), states["param_shapes"])
    whole = {
        key: {name: torch.cat(pieces[key][name]).view(shape) for name, shape in shapes.items()}
        for key in FLAT
    }
    return _state(states, one_count(counts), whole, groups)


def _places(shapes: dict[str, Any], rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    """Stage 3: where this rank's part of each parameter lies, and how much of it is no padding."""
    places, start = {}, 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // ranks)
        places[name] = (start, max(0, min(part, numel - rank * part)))
        start += part
    return places


def _check_groups(shapes: dict[str, Any], count: int, given: list[Any]) -> None:
    """Raise `RunError` unless these parts of groups are those of the training scripts, in order;
    stage 3 divides a large group."""
    groups = names_of_groups(shapes, count)
    order = [next((n for n, g in enumerate(groups) if set(part) <= set(g)), -1) for part in given]
    if order[0] != 0 or order != sorted(order):
        raise RunError("its groups of parameters are not matrices and the rest, nor all in one")


def _state(states: Any, updates: int, whole: dict[str, Any], groups: list[Any]) -> State:
    fields = {name: states[name] for name in FIELDS if name in states}
    moments = {key: whole[key] for key in MOMENTS}
    return State(states["global_steps"], updates, whole["fp32"], moments, groups, fields)


def read_universal(tag: Path) -> State:
    """Also what DeepSpeed made of stage 3: there tensors are flat, and one file has the steps."""
    states, rest = model_states(tag), load(tag / "zero" / "optimizer_state.pt")
    shapes = {n: tuple(s) for group in states["param_shapes"] for n, s in group.items()}
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in FLAT}
    counts = {}
    for name, shape in shapes.items():
        folder = tag / "zero" / name
        for key in FLAT:
            found = load(folder / f"{key}.pt")
            tensor = found["param"] if isinstance(found, dict) else found
            whole[key][name] = tensor.view(shape)
        step = folder / "step.pt"
        if step.is_file():
            counts[name] = float(load(step))
        else:
            inner = rest["optimizer_state_dict"]["state"]
            counts |= {n: float(own["step"]) for n, own in inner.items()}
    groups = [settings_of(group) for group in rest["param_groups"]]
    return _state(states, one_count(counts), whole, groups)


def write_universal(state: State, folder: Path) -> None:
    """What DeepSpeed reads with "load_universal" at stages 1, 2 and 3.

    Its own converter gives a folder for either stages 1 and 2 or stage 3: they look for other files
    and other forms. Here are both.
    """
    tag = folder / f"global_step{state.step}_universal"
    step = torch.tensor(float(state.updates))
    for name, weight in state.weights.items():
        own = tag / "zero" / name
        own.mkdir(parents=True)
        for key in FLAT:
            tensor = weight if key == "fp32" else state.moments[key][name]
            torch.save({"param": tensor.contiguous(), "cat_dim": 0}, own / f"{key}.pt")
        torch.save(step, own / "step.pt")
    groups = [{**settings, "params": [n]} for n, settings in enumerate(state.groups)]
    common = {"ds_version": version("deepspeed"), "param_groups": groups}
    third = {"state": {n: {"step": step} for n in range(len(groups))}, "param_groups": groups}
    torch.save({**common, "optimizer_state_dict": third}, tag / "zero" / "optimizer_state.pt")
    shapes = [{n: state.weights[n].shape for n in names} for _, names in state.named_groups()]
    states = {
        "module": {}, "param_shapes": shapes, "buffer_names": [], "lr_scheduler": None,
        "global_steps": state.step, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1,
        "ds_version": common["ds_version"], **state.fields,
    }  # fmt: skip
    for name in MODEL:
        torch.save(states, tag / name)
    (folder / "latest_universal").write_text(tag.name, encoding="utf-8")


def refuse_ranks(state: State, ranks: int, stage: int, flag: str = "--ranks") -> None:
    """Stages 1 and 2 cannot load where a rank would have nothing of a group but padding."""
    for _, names in state.named_groups():
        numel = sum(state.weights[name].numel() for name in names)
        part = ALIGNMENT * -(-numel // (ALIGNMENT * ranks))
        if stage < 3 and (ranks - 1) * part >= numel:
            raise UsageError(
                f"{flag} {ranks}: a group of {numel} numbers leaves nothing for the last rank, "
                "which DeepSpeed cannot load; use fewer, or stage 3"
            )


def save_zero(job: Runtime, universal: Path, folder: Path, stage: int) -> None:
    """Have an engine of `stage` load a universal checkpoint that we wrote, and save it as its own.

    Every rank calls it.
    """
    tag = universal / (universal / "latest_universal").read_text(encoding="utf-8")
    state = read_universal(tag)
    with engine_of(*parts_for(state, stage, job, universal=True)) as engine:
        engine.load_checkpoint(str(universal))
        mend(engine, state)
        name = f"global_step{state.step}"
        engine.save_checkpoint(str(folder), tag=name, client_state=state.fields)


def parts_for(
    state: State, stage: int, job: Runtime, universal: bool = False
) -> tuple[Llama, dict[str, Any], Runtime, list[dict[str, Any]]]:
    """What `engine_of` needs to have the engine of this state's run."""
    if job.device.type == "cpu":  # as where ranks are forked, which leave a GPU alone
        os.environ["DS_ACCELERATOR"] = "cpu"
    model = Llama(state.config)
    config = {**stage_config(stage, 1), "checkpoint": {"load_universal": universal}}
    return model, config, job, groups_for(state, model)


def groups_for(state: State, model: Llama) -> list[dict[str, Any]]:
    """What an optimizer of `model` is given, with the state's settings."""
    own = dict(model.named_parameters())
    return [
        {**settings, "params": [own[n] for n in names]} for settings, names in state.named_groups()
    ]


def mend(engine: Any, state: State) -> None:
    """What DeepSpeed's stage 3 gets wrong of a universal checkpoint, where there are two groups:
    both have the first one's settings then, and one counter, which each step adds to twice."""
    for group, settings in zip(engine.optimizer.param_groups, state.groups, strict=True):
        group.update(settings)
    for values in engine.optimizer.optimizer.state.values():
        values["step"] = torch.tensor(float(state.updates))
