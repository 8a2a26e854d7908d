"""Start a command so that it always ends: with a limit, and with everything that it started."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

MARKER = "LAB_RUN_ID"
GRACE_S = 5.0
SCANS = 4  # of the list of processes: on a busy machine there is always a new one
# Else setproctitle, which vLLM and SGLang call, writes its title over the environment and its mark.
KEEP_ENVIRON = {"SPT_NOENV": "1"}
# What is read from a pipe is UTF-8, in whatever language this machine speaks.
IN_UTF8 = {"PYTHONIOENCODING": "utf-8"}
# A process may start another between being seen and being killed, so kill more than once.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *[signal.SIGKILL] * 5)


@dataclass(frozen=True)
class Completed:
    """How a command ended."""

    status: int  # 124 when it ran past its limit, as timeout(1) has it
    stdout: str
    stderr: str
    seconds: float
    left_running: tuple[str, ...]  # what it started and did not end; it is ended by now


class Job:
    """A running command, marked by an environment variable that all its descendants inherit.

    A process that changed its session or lost its parent is still found by the mark, so none
    outlives the job. A job within a job carries both marks: the outer one ends it too.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path, echo: bool = False
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            env={
                **env,
                **KEEP_ENVIRON,
                **IN_UTF8,
                MARKER: f"{os.environ.get(MARKER, '')} {self.mark}",
            },
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=hear_interrupts(),
        )
        self.texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=self._read, args=(name, echo), daemon=True)
            for name in self.texts
        ]
        try:
            for reader in self._readers:
                reader.start()
            self._guardian = subprocess.Popen(
                [sys.executable, "-m", "distlab.guardian", self.mark],
                stdin=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the job, not for its guardian
            )
        except BaseException:  # this machine lets no more processes or threads begin
            end_marked(self.mark)
            raise

    def _read(self, name: str, echo: bool) -> None:
        for line in getattr(self.process, name):
            self.texts[name].append(line)
            if echo:
                target = getattr(sys, name)
                target.write(line)
                target.flush()

    def wait(self, timeout_s: float) -> int:
        """The command's status; 124 when it had to be ended after `timeout_s`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return 124

    def read_to_end(self) -> None:
        """Have all in `texts` that a command which has ended wrote; a child may still hold them."""
        for reader in self._readers:
            reader.join(GRACE_S)

    def end(self) -> tuple[str, ...]:
        """End whatever is left of the job, politely first; the command lines of what there was."""
        names = end_marked(self.mark)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        self.read_to_end()
        with suppress(subprocess.TimeoutExpired):  # it has its word: it ends by itself
            self._guardian.communicate(timeout=GRACE_S)
        return names


def hear_interrupts() -> Callable[[], object] | None:
    """For `Popen(preexec_fn=...)`: have a command end by SIGINT, though this process ignores it.

    A script's background (`&`, nohup, many CI runners) ignores SIGINT, and all that is started
    there inherits that. None where there is nothing to do: Popen is quicker without.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        return None
    return partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def end_marked(mark: str) -> tuple[str, ...]:
    """End every process that carries `mark`: by SIGINT, after 5 s SIGTERM, after 5 more SIGKILL."""
    left = marked(mark)
    names = tuple(_describe(process) for process in left)
    for number in SIGNALS:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(left, timeout=GRACE_S)
        left = marked(mark)
        if not left:
            break
    return names


def marked(mark: str) -> list[psutil.Process]:
    """The processes that carry the job's mark.

    One may start another and end while we look through a list that has only itself, so what is new
    by then is looked at too.
    """
    seen: set[int] = set()
    found: list[psutil.Process] = []
    for _ in range(SCANS):
        new = [process for process in psutil.process_iter() if process.pid not in seen]
        seen.update(process.pid for process in new)
        found += [process for process in new if _has_mark(process, mark)]
        if not new:
            break
    return found


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        carried = mark in process.environ().get(MARKER, "").split()
        return carried and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)


def run_command(
    command: Sequence[str],
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
    timeout_s: float = 600.0,
    echo: bool = False,
) -> Completed:
    """Run `command` to its end, or end it after `timeout_s`; nothing that it started is left.

    Ctrl-C ends the command and everything it started before it is raised again.
    """
    started = time.monotonic()
    with job(command, env, cwd or Path.cwd(), echo) as running:
        status = running.wait(timeout_s)
        seconds = time.monotonic() - started
        # Stragglers of a job that has just ended are on their way out: a fork server that has
        # imported torch takes a second, more where others want the cores.
        patience = time.monotonic() + GRACE_S
        while (alive := marked(running.mark)) and time.monotonic() < patience:
            time.sleep(0.1)
        left = running.end() if alive else ()
    texts = running.texts
    return Completed(status, "".join(texts["stdout"]), "".join(texts["stderr"]), seconds, left)


@contextmanager
def job(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, echo: bool = False
) -> Iterator[Job]:
    """A job that is ended, with all it started, when the block is left in whatever way."""
    running = Job(command, env, cwd, echo)
    try:
        with _termination_as_exit():
            yield running
    finally:
        running.end()


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what must be cleaned up is; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
