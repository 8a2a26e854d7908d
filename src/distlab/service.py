"""Servers that a script or a test starts: wait until one is ready, watch it, read its log, stop it.

    with service([sys.executable, "-m", "paged_engine", "--port", "0"], ready=READY_LINE) as server:
        httpx.get(f"{server.url}/health")

A service is a `distlab.process.Job`: nothing that it started outlives the block.
"""

import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Self

from distlab.errors import RunError
from distlab.process import Job, job

START_S = 240.0
STOP_S = 20.0
POLL_S = 0.05
LOG_LINES = 10  # of the log, in the message of a service that ended


class Ended(RunError):
    """A server has ended that should run."""


class Service:
    """A running server: its address, its log, and whether it still runs."""

    def __init__(self, name: str, running: Job, url: str) -> None:
        self.name, self.job, self.url = name, running, url

    @property
    def pid(self) -> int:
        return self.job.process.pid

    @property
    def log(self) -> str:
        """What it has written so far: its output, then its errors."""
        return "".join(self.job.texts["stdout"]) + "".join(self.job.texts["stderr"])

    def check(self) -> None:
        """Raise `Ended` with the last lines of its log where it has ended by itself."""
        if (status := self.job.process.poll()) is not None:
            self.job.read_to_end()
            raise Ended(f"{self.name} ended with status {status}: {last_lines(self.job)}")

    def wait_for_log(self, pattern: str, limit_s: float = START_S) -> re.Match[str]:
        """The first match of `pattern` in its log, waited for."""
        await_that(
            lambda: re.search(pattern, self.log, re.MULTILINE),
            limit_s,
            f"{self.name} did not write {pattern!r}",
            self.check,
        )
        found = re.search(pattern, self.log, re.MULTILINE)
        assert found is not None
        return found

    def stop(self, limit_s: float = STOP_S) -> int:
        """SIGTERM, as an operator would; its exit status. What is left after `limit_s` is ended.

        Raises `RunError` where it did not go in time, or left a process behind.
        """
        with suppress(ProcessLookupError):
            self.job.process.send_signal(signal.SIGTERM)
        status = self.job.wait(limit_s)
        if status == 124:
            raise RunError(f"{self.name} did not end within {limit_s:g} s of SIGTERM")
        if left := self.job.end():
            raise RunError(f"{self.name} left running: {'; '.join(left)}")
        return status


@contextmanager
def service(
    command: Sequence[str],
    ready: str | re.Pattern[str],
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
    *,
    name: str = "",
    start_s: float = START_S,
    echo: bool = False,
) -> Iterator[Service]:
    """Start `command`, yield it when it is ready, end it with all it started when the block ends.

    `ready` is an address that answers 200, or the pattern of a line of its output whose first
    group is its address; with a pattern the server may choose its own port (`--port 0`).

    Raises `RunError`, in one line with the end of its log, when it ends before it is ready or is
    not ready within `start_s`; and when somebody else already answers at the address.
    """
    name = name or " ".join(command[:3])
    if isinstance(ready, str) and answers(ready):
        raise RunError(f"{name}: {ready} answers before the server is started; end it")
    with job(command, env, cwd or Path.cwd(), echo) as running:
        started = Service(name, running, ready if isinstance(ready, str) else "")
        try:
            if isinstance(ready, str):
                late = f"{name}: {ready} did not answer"
                await_that(lambda: answers(ready), start_s, late, started.check)
            else:
                started.url = started.wait_for_log(ready.pattern, start_s)[1]
        except Ended as error:
            said = last_lines(running)
            raise RunError(f"{name}: the server ended before it was ready: {said}") from error
        yield started


class Services(ExitStack):
    """Several services that stand and fall together, started in order, ended in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[str, Service] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def start(
        self,
        name: str,
        command: Sequence[str],
        ready: str | re.Pattern[str],
        env: Mapping[str, str] = os.environ,
        start_s: float = START_S,
    ) -> Service:
        """See `service`."""
        started = self.enter_context(service(command, ready, env, name=name, start_s=start_s))
        self.running[name] = started
        return started

    def check(self) -> None:
        """Raise `Ended` naming the first that has ended by itself."""
        for started in self.running.values():
            started.check()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now. Where a server can choose its own (port 0), let it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether the address answers 200; a proxy of the user's has no say in that."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=timeout_s) as answer:
            return answer.status == 200
    except (OSError, HTTPException):  # a URLError is an OSError
        return False


def await_that(
    holds: Callable[[], object],
    limit_s: float,
    otherwise: str,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Return when `holds()` is true. Raises `RunError(otherwise)` after `limit_s`, and whatever
    `check`, called between two looks, raises."""
    deadline = time.monotonic() + limit_s
    while not holds():
        check()
        if time.monotonic() > deadline:
            raise RunError(f"{otherwise} within {limit_s:g} s")
        time.sleep(POLL_S)


def last_lines(running: Job, count: int = LOG_LINES) -> str:
    """The end of its errors, or of its output where it wrote none."""
    lines = running.texts["stderr"] or running.texts["stdout"] or ["it wrote nothing"]
    return "".join(lines[-count:]).strip()
