"""A job under watch: its ranks carry agents, and judges compare what those tell, in order.

A job that stands still is judged first: what its ranks would say later is a consequence. Then one
whose rank no longer tells anything, then one that runs on and is wrong. Who has lost a rank, or has
ended with an error, is judged last, when the others have told what they saw.
"""

import os
import re
import tempfile
import time
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from ddp.diagnosis.divergence import judge_divergence
from ddp.diagnosis.evidence import Place, Rank, Verdict, Watch, as_place, shown, source
from ddp.diagnosis.standstill import (
    GO_WITH_THE_OTHERS,
    box_difference,
    first_difference,
    judge_stall,
    silent_rank,
    stalled_since,
)
from distlab import process

AGENT = Path(__file__).parent / "injected"  # goes into the job's PYTHONPATH
POLL_S = 0.05
LAST_WORDS_S = 1.0  # so long the ranks that lose a peer may tell what they saw
LOST_PEER = re.compile(r"[Cc]onnection|peer|[Bb]roken pipe|[Tt]imed out|NCCL")
SIZE_MISMATCH = "Received data size doesn't match expected size"  # gloo's words as it aborts


class Job(Protocol):
    """A job that runs, as `watch` sees it."""

    def poll(self) -> int | None:
        """Its status, or None while it runs."""

    def errors(self) -> str:
        """What it has written to its standard error."""


@dataclass(frozen=True)
class CommandJob:
    job: process.Job

    def poll(self) -> int | None:
        return self.job.process.poll()

    def errors(self) -> str:
        return "".join(self.job.texts["stderr"])


@dataclass(frozen=True)
class Found:
    """A verdict, and how it was come by."""

    verdict: Verdict
    state: str  # what the job did: it stands still, runs on, or ends
    seconds: float  # from when it stood still or lost a rank, else from its begin, to the verdict

    def as_json(self) -> dict[str, object]:
        return {**self.verdict.as_json(), "state": self.state, "seconds": self.seconds}


def run_watched(
    command: list[str], stall_after: float, ignored: Set[str] = frozenset(), echo: bool = False
) -> tuple[Found | None, int]:
    """Run a job to its end, or to the verdict, which ends it; its finding, and its status."""
    with tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        env = {**os.environ, **agent_variables(Path(folder), stall_after)}
        with process.job(command, env, Path.cwd(), echo) as job:
            found = watch(CommandJob(job), Path(folder), stall_after, ignored)
            if found is not None:
                kill(job)
    status = job.process.returncode
    return found, 128 - status if status < 0 else status  # as the shell tells a signal


def kill(job: process.Job) -> None:
    """End the job at once: what its ranks would still say is a consequence."""
    for one in process.marked(job.mark):
        with suppress(psutil.NoSuchProcess):
            one.kill()


def agent_variables(
    folder: Path, stall_after: float, env: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What the job's environment needs so that its ranks are watched."""
    paths = [str(AGENT), *filter(None, [env.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "DIAGNOSE_DIR": str(folder),
        "DIAGNOSE_STALL_AFTER": str(stall_after),
        "TORCH_FR_BUFFER_SIZE": env.get("TORCH_FR_BUFFER_SIZE", "256"),
    }


def watch(job: Job, folder: Path, stall_after: float, ignored: Set[str]) -> Found | None:
    """Compare the ranks until the job has ended, or a judge has found something."""
    watched = Watch(folder)
    while True:
        status = job.poll()
        ranks = watched.update()
        found = judge(ranks, stall_after)
        if found is None and (status is not None or silent_deaths(ranks)):
            found = judge_end(job, watched, stall_after)
        if found is not None and found.verdict.cause not in ignored:
            return found
        if status is not None:
            return None
        time.sleep(POLL_S)


def judge(ranks: list[Rank], stall_after: float) -> Found | None:
    """What is wrong with a job that runs."""
    now = time.time()
    if (since := stalled_since(ranks, stall_after)) is not None:
        verdict = judge_stall(ranks)
        return Found(verdict, "stands still", now - since) if verdict else None
    if verdict := silent_rank(ranks, stall_after):
        return Found(verdict, "stands still", now - min(rank.heard for rank in ranks))
    verdict = judge_divergence(ranks, stall_after)
    if verdict is None and not any(rank.pulse.get("pending") for rank in ranks):
        verdict = mixed_up(ranks)
    return Found(verdict, "runs on", now - began(ranks)) if verdict else None


def mixed_up(ranks: list[Rank]) -> Verdict | None:
    """Collectives that differ and were answered nevertheless: their results are nonsense.

    Ranks that run on tell what they call, but not from which line: that is asked for first.
    """
    verdict = first_difference(ranks) if ranks else None
    unanswered = [rank for rank in ranks if rank.lives and not rank.told("answered")]
    if verdict and verdict.place is None and unanswered:
        for rank in unanswered:
            rank.ask()
        return None
    return verdict


def judge_end(job: Job, watched: Watch, stall_after: float) -> Found | None:
    """What was wrong with a job that has ended, or lost a rank; waits for the others' words."""
    heard = time.monotonic() + LAST_WORDS_S
    while job.poll() is None and time.monotonic() < heard:
        time.sleep(POLL_S)
    ranks = watched.update()
    died = [rank.died for rank in silent_deaths(ranks) if rank.died is not None]
    verdict = judge_divergence(ranks, stall_after)
    if verdict is None and (died or job.poll()):
        verdict = judge_death(ranks, job.errors())
    seconds = time.time() - min(died, default=began(ranks))
    return Found(verdict, "loses a rank" if died else "ends", seconds) if verdict else None


def began(ranks: list[Rank]) -> float:
    """When the job began, as the first rank told."""
    return min((rank.hello["t"] for rank in ranks), default=time.time())


def silent_deaths(ranks: list[Rank]) -> list[Rank]:
    """The ranks that ended without a word, the first first."""
    gone = [rank for rank in ranks if rank.died is not None and rank.exit is None]
    return sorted(gone, key=lambda rank: rank.died or 0.0)


def judge_death(ranks: list[Rank], errors: str) -> Verdict | None:
    """What ended a rank of a job that ended with an error; `errors` is what the job wrote."""
    difference = first_difference(ranks) or box_difference(ranks)
    if difference is not None:
        return difference
    gone = silent_deaths(ranks)
    if not gone or gone[0].died is None:
        return None
    rank = gone[0]
    if any(other.failed and not lost_a_peer(other) for other in ranks):
        return None  # that one failed by itself, and the launcher ended this one
    if rank.crash:
        return crashed(rank, errors)
    return Verdict(
        "killed_rank", rank.number, rank.place,
        f"{rank.name.capitalize()} (process {rank.hello['pid']} on {rank.host}) ended without a "
        f"last word: no exception, no crash. It was last seen at {shown(rank.place)}. The others "
        "lost their connection to it.",
        "Ask the kernel's log (`dmesg`: out of memory?), the scheduler and the host who killed it. "
        "Start from the last checkpoint: torchrun --max-restarts.",
    )  # fmt: skip


def lost_a_peer(rank: Rank) -> bool:
    """Whether a rank that failed says that it was for want of another."""
    words = [str(event["error"]) for kind in ("failed", "exit") for event in rank.told(kind)]
    return any(LOST_PEER.search(text) for text in words)


def crashed(rank: Rank, errors: str) -> Verdict:
    last = rank.box[-1] if rank.box else None
    place: Place | None = as_place(last["place"]) if last else rank.place
    if SIZE_MISMATCH in errors and last is not None:
        return Verdict(
            "rank_only_collective", rank.number, place,
            f"{rank.name.capitalize()} aborted in {last['op']} at {shown(place)}: another rank "
            "sent what does not belong to this call.",
            GO_WITH_THE_OTHERS, last["op"],
        )  # fmt: skip
    first_line = rank.crash.splitlines()[0]
    return Verdict(
        "crashed_rank", rank.number, place,
        f"{rank.name.capitalize()}: {first_line}. It was last seen at {shown(place)}, "
        f"`{source(place)}`.",
        "The fault is in compiled code: look at its own message above the verdict.",
    )  # fmt: skip
