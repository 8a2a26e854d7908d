"""A trouble's run: in forked ranks, with a limit on every wait, its log kept and diagnosed."""

import faulthandler
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import distributed_c10d

from distlab.errors import RunError, UsageError
from distlab.runtime import Runtime
from distlab.spawning import PRELOADED, fork_context, spawn
from zero import messages, operators
from zero.config_check import Plan, check
from zero.troubles import TROUBLES, Case, Trouble

LIMIT_S = 60.0  # of a job
BY_CHECK, BY_LOG, BY_COUNT = "check_config", "the log", "a count"


@dataclass(frozen=True)
class Outcome:
    """What was seen of a job, after how long, and how it was found; "" where nothing was wrong."""

    symptom: str
    seconds: float
    found_by: str = ""


def warm_up() -> None:
    """Let ranks be forked from a process that has imported DeepSpeed, which takes seconds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    fork_context().set_forkserver_preload([*PRELOADED, "zero.preloaded", "zero.troubles"])
    multiprocessing.forkserver.ensure_running()
    spawn(_nothing, 1, timeout_s=LIMIT_S)


def _nothing(job: Runtime) -> None:
    """What the first job waits for is then no part of its time."""


def refuse_unbuilt(names: list[str], flag: str) -> None:
    for name in names:
        for operator in TROUBLES[name].needs:
            if not operators.library(operator).exists():
                raise UsageError(f"{flag} {name} needs the operator {operator}; {operators.CURE}")


def rehearse(trouble: Trouble, cured: bool, collective_s: float) -> Outcome:
    """Run `trouble`; a collective waits `collective_s` at most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trouble.prepare(folder, cured)
        extensions = operators.folder() if trouble.needs else folder
        plan = Plan(trouble.config(cured), trouble.ranks, extensions=extensions, **trouble.plan)
        before = check(plan)
        started = time.monotonic()
        symptom = _run(trouble, cured, folder, extensions, collective_s)
        seconds = time.monotonic() - started
        logs = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("rank*.log"))]
    known = next(messages.found_in("".join(logs)), None) if symptom else None
    if before:
        found_by = f"{BY_CHECK}: {before[0].name}"
    elif known:
        found_by = f"{BY_LOG}: {known[0].name}"
    else:
        found_by = BY_COUNT if symptom else ""
    return Outcome(known[1] if known else symptom, seconds, found_by)


def _run(trouble: Trouble, cured: bool, folder: Path, extensions: Path, collective_s: float) -> str:
    """What the job showed: what a rank returned, or the last line of its error; "" if nothing."""
    arguments = (trouble.name, cured, folder, extensions, collective_s)
    try:
        told = spawn(_on_rank, trouble.ranks, *arguments, timeout_s=LIMIT_S)
    except RunError as error:
        return str(error).strip().splitlines()[-1]
    return next(filter(None, told), "")


def _on_rank(
    job: Runtime, name: str, cured: bool, folder: Path, extensions: Path, collective_s: float
) -> str:
    log = os.open(folder / f"rank{job.rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    distributed_c10d._set_pg_timeout(timedelta(seconds=collective_s))
    trouble = TROUBLES[name]
    try:
        return trouble.act(Case(job, trouble.config(cured), cured, folder, _end_waiting_after))
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_waiting_after(seconds: float) -> None:
    """Write where each thread stands and end the process, as py-spy and a person would."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
