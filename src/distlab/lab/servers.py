"""The servers of a lesson: its background blocks, each running while its section is."""

import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Self

from distlab.errors import RunError
from distlab.files import repo_root
from distlab.lab.blocks import block_environment, command_line
from distlab.lab.lessons import Block, read_blocks
from distlab.process import Job, job

READY_TIMEOUT_S = 120.0


class Servers:
    """The background blocks of a lesson: each is started when a later block of its section is run,
    and lives until a block of another section is."""

    def __init__(self, preset: str, records: Path) -> None:
        self.preset, self.records = preset, records
        self._stack = ExitStack()
        self._section: tuple[Path, int] | None = None
        self._started: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start_for(self, block: Block) -> None:
        """Have every server running that stands before `block` in its section, or is `block`."""
        section = (block.lesson, block.section)
        if section != self._section:
            self._stack.close()
            self._stack, self._section, self._started = ExitStack(), section, set()
        for other in read_blocks(block.lesson):
            wanted = other.section == block.section and other.line <= block.line
            if other.background and wanted and other.id not in self._started:
                self._stack.enter_context(self._serve(other))
                self._started.add(other.id)

    @contextmanager
    def _serve(self, block: Block) -> Iterator[Job]:
        if _answers(block):
            raise RunError(
                f"{block.id}: {block.ready} answers before the server is started; end it"
            )
        env = block_environment(block, self.preset, self.records, "gloo")
        with job(command_line(block), env, repo_root()) as server:
            _await_ready(block, server)
            yield server


def _await_ready(block: Block, server: Job) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            tail = "".join(server.texts["stderr"][-10:])
            raise RunError(f"{block.id}: the server ended before it was ready: {tail}")
        if _answers(block):
            return
        time.sleep(0.2)
    raise RunError(f"{block.id}: {block.ready} did not answer within {READY_TIMEOUT_S:g} s")


def _answers(block: Block) -> bool:
    """Whether the server's address answers 200; a proxy of the user's has no say in that."""
    assert block.ready is not None
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(block.ready, timeout=2) as answer:
            return answer.status == 200
    except (OSError, HTTPException):  # a URLError is an OSError
        return False
