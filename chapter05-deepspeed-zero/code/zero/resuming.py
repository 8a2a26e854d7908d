"""A training's checkpoints in DeepSpeed's form: written, kept few, found, compared, and taken up.

    DIR/latest           the name of the newest that is whole, written last
    DIR/step_00000100/   its files: see `zero.deepspeed_files`

DeepSpeed takes `latest` at its word, begins anew where there is none, and loads whatever is there.
So the folder is read here first, and what does not fit this run is told in one line.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from distlab.errors import RunError, UsageError
from distlab.ranks import gathered
from distlab.runtime import LOST_PEER, Runtime
from distlab.training.checkpoint_folder import NAME
from zero.deepspeed_files import MODEL, check_sums, model_states, optim_files, refusing_full_disk

SCRIPT = "zero_to_fp32.py"  # DeepSpeed leaves it beside the checkpoints
UNFIT = (
    AssertionError, RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError,
    AttributeError,
)  # fmt: skip


def checkpoint_in(folder: Path, report: Callable[[str], object] = print) -> Path | None:
    """The checkpoint that `latest` names; None where a run begins, as in an empty folder.

    Raises `UsageError` where the folder holds anything else: a run that began there would hide it.
    """
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if not there:
        return None
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
        if name and is_checkpoint(folder / name):
            return folder / name
    except (OSError, ValueError):  # none, or no text, or a name that no folder can have
        name = ""
    begun = [path for path in there if is_checkpoint(path)]
    anew = "or name a new --checkpoint-dir"
    if whole := [path.name for path in begun if is_whole(path)]:
        raise UsageError(
            f"--checkpoint-dir {folder}: its file latest names no checkpoint that is there; "
            f"write {whole[-1]} into it, {anew}"
        )
    if not name and begun and {path.name for path in there} <= {SCRIPT, *(p.name for p in begun)}:
        report(f"job: {begun[-1]} was never finished, and is the first; begins at step 0")
        return None
    raise UsageError(
        f"--checkpoint-dir {folder} holds files, and no whole checkpoint of DeepSpeed's; "
        f"convert one of another kind by migrate.py, {anew}"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether DeepSpeed has written there, for a fixed number of ranks; perhaps not to its end."""
    return path.is_dir() and not (path / "zero").exists() and any(path.glob("*_states.pt"))


def is_whole(path: Path) -> bool:
    """A file's list of contents stands at its end, so that one cut short has none."""
    has_model = any((path / name).is_file() for name in MODEL)
    return has_model and all(is_zipfile(file) for file in path.glob("*_states.pt"))


def take_up(
    engine: Any, tag: Path, flag: str, settings: Mapping[str, Any], model: Mapping[str, Any],
    job: Runtime,
) -> dict[str, Any]:  # fmt: skip
    """Load the checkpoint `tag` into the engine; what the script had saved with it.

    Every rank calls it. Raises `UsageError` for one of another model, stage or optimizer, and
    `RunError` for one of another number of ranks, or damaged: on every rank, for all that can be
    known before DeepSpeed loads.
    """
    try:
        wrong: Exception | None = None
        refuse_other(tag, flag, settings, model, job)
    except (UsageError, RunError) as error:
        wrong = error
    if wrong := next(filter(None, gathered(wrong)), None):
        raise wrong
    try:
        _, state = engine.load_checkpoint(str(tag.parent), tag=tag.name)
        return dict(state)
    except UNFIT as error:
        if LOST_PEER.search(str(error)):  # the rank that is the cause says more
            raise
        why = (str(error).strip().splitlines() or [""])[0]
        raise RunError(
            f"{flag} {tag}: DeepSpeed cannot load it ({type(error).__name__}: {why}); "
            "use another checkpoint of this run"
        ) from error


def refuse_other(
    tag: Path, flag: str, settings: Mapping[str, Any], model: Mapping[str, Any], job: Runtime
) -> None:
    """Compare what the checkpoint says of itself with this run, and this rank's files with their
    sums."""
    if not is_checkpoint(tag):
        raise UsageError(
            f"{flag} {tag} is no checkpoint of DeepSpeed's; name a folder such as DIR/step_00000100"
        )
    states = model_states(tag)
    try:
        saved, ranks = states["ds_config"], states["dp_world_size"]
        theirs, step = states.get("config", model), states["global_steps"]
        stages = [one.get("zero_optimization", {}).get("stage", 0) for one in (saved, settings)]
        adams = [adam(one) for one in (saved, settings)]
        other = [name for name, size in model.items() if theirs.get(name) != size]
    except UNFIT as error:
        raise RunError(f"{flag} {tag} is not understood: {error!r}") from error
    if other:
        name = other[0]
        raise UsageError(
            f"{flag} {tag} is of another model: its {name} is {theirs.get(name)}, and this "
            f"run's {model[name]}; give the flags of the run that saved it"
        )
    if stages[0] != stages[1] or adams[0] != adams[1]:
        raise UsageError(
            f"{flag} {tag} is of stage {stages[0]} with {adams[0]}, and --config of stage "
            f"{stages[1]} with {adams[1]}; use the config that saved it, or migrate.py"
        )
    if stages[0] and ranks != job.world_size:
        raise RunError(
            f"{flag} {tag} was written by another number of ranks, {ranks}, and DeepSpeed takes it "
            "up by as many only; migrate.py makes it one for this number"
        )
    if "loader" not in states and step:
        raise RunError(
            f"{flag} {tag} does not say where in the data its run was; train_deepspeed.py goes on "
            "from what it saved itself"
        )
    files = optim_files(tag)
    if stages[0] and len(files) != ranks:
        raise RunError(f"{flag} {tag} has {len(files)} partitions of {ranks} ranks'")
    for path in files[job.rank : job.rank + 1]:
        check_sums(path)


def adam(config: Mapping[str, Any]) -> str:
    """Who computes the step: the two keep different settings, and fail on each other's."""
    where = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device")
    own = config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    return "DeepSpeed's CPUAdam" if where in ("cpu", "nvme") and not own else "torch's AdamW"


def save(engine: Any, folder: Path, step: int, keep: int, state: dict[str, Any]) -> None:
    """Every rank writes its part, and calls it. Then the oldest go; those of later steps are
    another run's. Raises `RunError` where the disk is full."""
    with refusing_full_disk(folder):
        engine.save_checkpoint(str(folder), f"step_{step:08d}", state)
    if engine.global_rank != 0:
        return
    steps = {int(named[1]): path for path in folder.iterdir()
             if (named := NAME.fullmatch(path.name)) and is_checkpoint(path)}  # fmt: skip
    for old in sorted(one for one in steps if one <= step)[:-keep]:
        shutil.rmtree(steps[old])
