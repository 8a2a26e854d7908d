"""Commands on nodes: started, watched and ended from outside."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

import psutil

from distlab.process import (
    GRACE_S,
    IN_UTF8,
    KEEP_ENVIRON,
    MARKER,
    Completed,
    end_marked,
    hear_interrupts,
    marked,
)

SETTLE_S = 0.5
POLL_S = 0.02
# nsenter leaves the folder. It carries no mark, so that it outlives its command and tells how that
# ended; the command gets the mark here.
IN_FOLDER = f'cd "$1" && export {MARKER}="$2" && shift 2 && exec "$@"'
_printing = threading.Lock()


class NodeProcess:
    """A command on a node. It ends, with all that it started, when the cluster does."""

    def __init__(
        self,
        enter: Sequence[str],
        command: Sequence[str],
        env: Mapping[str, str],
        label: str,
        echo: bool = False,
        group: str = "",
    ) -> None:
        self.label = label
        self.mark = uuid.uuid4().hex
        marks = f"{env.get(MARKER, '')} {group} {self.mark}"
        began = time.monotonic()
        self.process = subprocess.Popen(
            [*enter, "sh", "-c", IN_FOLDER, "sh", os.getcwd(), marks, *command],
            env={**env, **KEEP_ENVIRON, **IN_UTF8},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a Ctrl-C is for the cluster's owner, which ends this
            preexec_fn=hear_interrupts(),
        )
        self.seconds: float | None = None  # it took, once it has ended
        self._texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=self._read, args=(name, echo), daemon=True)
            for name in self._texts
        ]
        self._readers.append(threading.Thread(target=self._watch, args=(began,), daemon=True))
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, echo: bool) -> None:
        for line in getattr(self.process, name):
            self._texts[name].append(line)
            if echo:
                say(f"{self.label}| {line}", getattr(sys, name))

    def _watch(self, began: float) -> None:
        self.process.wait()
        self.seconds = time.monotonic() - began

    def poll(self) -> int | None:
        """The command's status, -N when signal N ended it, or None while it runs."""
        return self.process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """The command's status; 124 when it had to be ended after `timeout_s`."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return 124
        self.join()
        return status

    def output(self) -> str:
        """What the command has written to its standard output so far."""
        return "".join(self._texts["stdout"])

    def errors(self) -> str:
        """What the command has written to its standard error so far."""
        return "".join(self._texts["stderr"])

    def end(self) -> tuple[str, ...]:
        """End the command and all that it started, politely first; the command lines of those."""
        return end_all([self], self.mark)

    def kill(self) -> None:
        """End the command and all that it started by SIGKILL, as `kill -9` does."""
        while (left := marked(self.mark)) or self.poll() is None:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(POLL_S)
        self.join()

    def join(self) -> None:
        """Wait for the last words of a command that has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        for reader in self._readers:
            reader.join(SETTLE_S)


def finish(
    processes: Sequence[NodeProcess], group: str, timeout_s: float | None
) -> list[Completed]:
    """Wait for commands that carry the mark `group`; those that run after `timeout_s` are ended.

    They are ended, too, before an exception such as a Ctrl-C is handed on.
    """
    started = time.monotonic()
    statuses: list[int] = []
    try:
        for process in processes:
            left = None if timeout_s is None else max(0.0, started + timeout_s - time.monotonic())
            with suppress(subprocess.TimeoutExpired):
                process.process.wait(left)
            status = process.poll()
            statuses.append(124 if status is None else status)
    except BaseException:
        end_all(processes, group)
        raise
    left_running = _end_rest(processes, group, 124 in statuses)
    return [
        Completed(
            status, process.output(), process.errors(), process.seconds or timeout_s or 0.0, left
        )
        for process, status, left in zip(processes, statuses, left_running, strict=True)
    ]


def _end_rest(processes: Sequence[NodeProcess], group: str, late: bool) -> list[tuple[str, ...]]:
    """End what runs on; the command lines of what the commands left, for each of them."""
    left: list[tuple[str, ...]] = [() for _ in processes]
    if late:
        end_all(processes, group)
    elif marked(group):
        time.sleep(SETTLE_S)  # what has just ended may be on its way out
        with ThreadPoolExecutor() as pool:
            left = list(pool.map(NodeProcess.end, processes))
    for process in processes:
        process.join()
    return left


def end_all(processes: Sequence[NodeProcess], mark: str) -> tuple[str, ...]:
    """End processes that carry `mark`, and what they started; the command lines of those."""
    names = end_marked(mark)
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)  # one that has just been started may get its mark only now
        names += end_marked(mark)
    for process in processes:
        process.join()
    return names


def say(text: str, stream: TextIO) -> None:
    """Write a line in one piece, whatever other threads write."""
    with _printing:
        stream.write(text if text.endswith("\n") else f"{text}\n")
        stream.flush()


def attached(enter: Sequence[str], command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command with this process's own standard streams; its status.

    On a terminal, a Ctrl-C is for the command, not for this process, which waits for its end.
    """
    marks = f"{env.get(MARKER, '')} {uuid.uuid4().hex}"
    line = [*enter, "sh", "-c", IN_FOLDER, "sh", os.getcwd(), marks, *command]
    with _terminal_lent() if sys.stdin.isatty() else nullcontext():
        return subprocess.run(line, env={**env, **KEEP_ENVIRON}).returncode


@contextmanager
def _terminal_lent() -> Iterator[None]:
    """Take the terminal back at the end: a shell in another pid namespace cannot name our group."""

    def ignore(number: int, frame: object) -> None:  # SIG_IGN would be inherited by the command
        pass

    previous = signal.signal(signal.SIGINT, ignore)
    try:
        yield
    finally:
        background = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else taking it would stop us
        os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
        signal.signal(signal.SIGTTOU, background)
        signal.signal(signal.SIGINT, previous)
