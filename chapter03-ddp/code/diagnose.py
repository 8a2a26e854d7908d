"""Run a job, and when it hangs, crashes or goes wrong say which rank, which line, and why.

    diagnose.py [--stall-after S] [--json FILE] [--ignore CAUSE] -- CMD...

CMD is any command that starts ranks: torchrun, srun, a script that makes its own nodes. Its scripts
need no change: an agent in each rank, brought by PYTHONPATH, tells diagnose what the flight
recorder has, where each thread is, and fingerprints of parameters and buffers. diagnose compares
the ranks.

A healthy job shows its own output and its own status, and nothing else. When something is wrong,
diagnose names the cause, the rank, the collective and the line, ends the job with all that it
started, and ends with status 1. A job that fails by itself, and of whose failure diagnose can say
no more than the job has, keeps its status.

A stall is judged when every rank has waited for --stall-after seconds. Give more than the longest
wait that your job has by right, such as for rank 0's checkpoint, and less than the timeout of its
process group, after which the ranks that could be asked are gone. Fingerprints are for replicas:
where ranks hold different parts of one model, --ignore unsynced_parameters.

Run:
    python chapter03-ddp/code/diagnose.py -- \\
        torchrun --nproc_per_node=2 chapter03-ddp/code/faults/rank_only_collective.py

You should see: the job's own output, then, about 5 s after it has come to stand, the verdict.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from _diagnose_death import judge_death, silent_deaths
from _diagnose_difference import first_difference
from _diagnose_divergence import judge_divergence
from _diagnose_silence import silent_rank
from _diagnose_stall import judge_stall, stalled_since
from _diagnose_verdict import CAUSES, Verdict
from _diagnose_watch import Rank, Watch

from distlab import files, process, script
from distlab.errors import UsageError

AGENT = Path(__file__).parent / "_diagnose"
POLL_S = 0.05
LAST_WORDS_S = 1.0  # so long the ranks that lose a peer may tell what they saw


def main(argv: list[str] | None = None) -> int:
    args, command = parse_args(sys.argv[1:] if argv is None else argv)
    found, status = run_watched(command, args.stall_after, set(args.ignore), echo=True)
    if found is not None:
        print(found.verdict.text(found.seconds), file=sys.stderr, flush=True)
    if args.json:
        files.write_text(Path(args.json), json.dumps(found.as_json() if found else None, indent=1))
    return status if found is None else 1


def run_watched(
    command: list[str], stall_after: float, ignored: Set[str] = frozenset(), echo: bool = False
) -> tuple["Found | None", int]:
    """Run a job to its end, or to the verdict, which ends it; its finding, and its status."""
    with tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        env = {**os.environ, **agent_variables(Path(folder), stall_after)}
        with process.job(command, env, Path.cwd(), echo) as job:
            found = watch(CommandJob(job), Path(folder), stall_after, ignored)
            if found is not None:
                kill(job)
    status = job.process.returncode
    return found, 128 - status if status < 0 else status  # as the shell tells a signal


def parse_args(argv: list[str]) -> tuple[Namespace, list[str]]:
    parser = script.OneLineParser(
        usage="diagnose.py [--stall-after S] [--json FILE] [--ignore CAUSE] -- CMD ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stall-after", type=script.positive_float, default=5.0, metavar="S",
        help="seconds that all ranks must have waited (default: %(default)s)")  # fmt: skip
    add("--json", metavar="FILE", help="write the verdict there, or null")
    add("--ignore", action="append", default=[], choices=sorted(CAUSES), metavar="CAUSE",
        help=f"do not look for it: {', '.join(sorted(CAUSES))}")  # fmt: skip
    end = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not command:
        raise UsageError("there is no command to run; write it after --, such as -- torchrun X.py")
    if args.json:
        files.refuse_unwritable_file("--json", args.json)
    return args, command


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


if __name__ == "__main__":
    script.exit(main)
