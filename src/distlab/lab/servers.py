"""The servers of a lesson: its background blocks, each running while its section is."""

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Self

from distlab.files import repo_root
from distlab.lab.blocks import block_environment, command_line
from distlab.lab.lessons import Block, read_blocks
from distlab.service import Service, service

READY_TIMEOUT_S = 300.0  # only a hang is longer: vLLM has taken 120 s where others want the cores


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

    def _serve(self, block: Block) -> AbstractContextManager[Service]:
        assert block.ready is not None  # the reader of lessons sees to it
        env = block_environment(block, self.preset, self.records, "gloo")
        return service(
            command_line(block),
            block.ready,
            env,
            repo_root(),
            name=block.id,
            start_s=READY_TIMEOUT_S,
        )
