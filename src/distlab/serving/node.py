"""One node of an engine that runs over several: start its part, and end it when the head is gone.

NODE_RANK, NNODES and HEAD say which node this is; where all ranks meet, the head listens.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from distlab.errors import RunError, UsageError
from distlab.process import Job, job
from distlab.service import answers, await_that

POLL_S, HEAD_GONE_S = 0.5, 3.0
LAST_LINES = 20
UDP_PORT = 9  # nothing is sent to it


@dataclass(frozen=True)
class Place:
    """This node among all; `own_address` is its own on the way to the head."""

    rank: int
    nodes: int
    head: str
    own_address: str


def this_node() -> Place:
    """From the environment. Raises `UsageError` where it is incomplete, or the head unreachable."""
    for name in ("NODE_RANK", "NNODES"):
        if not os.environ[name].isdecimal():
            raise UsageError(f"{name}={os.environ[name]} is no number; use 0, 1, 2, ...")
    head = os.environ["HEAD"]
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((head, UDP_PORT))  # no packet is sent for it
            own_address = probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"HEAD={head} cannot be reached from this node: {error}") from error
    return Place(int(os.environ["NODE_RANK"]), int(os.environ["NNODES"]), head, own_address)


def known_options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def split_flags(words: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The words that are known flags, each with its one value, and the others."""
    ours: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, is_whole, _ = word.partition("=")
        if flag not in known:
            others.append(word)
        else:
            ours += [word] if is_whole or flag in ("-h", "--help") else [word, *islice(rest, 1)]
    return ours, others


def ranks_here() -> int:
    """As many as this node has GPUs, or one."""
    import torch

    return max(1, torch.cuda.device_count())


@dataclass(frozen=True)
class Engine:
    """An engine's part on this node: its name, the head's ports, and how long it may start."""

    name: str
    model: str
    line: list[str]
    port: int  # of the server, on the head's 127.0.0.1
    meeting_port: int  # of the head, where its rank 0 listens
    start_s: float
    echo: bool = True  # else its output is shown where it fails

    def run(self, place: Place, command: Sequence[str]) -> int:
        """Serve; on the head run `command`, if there is one, when the server is ready."""
        with job(self.line, os.environ, Path.cwd(), echo=self.echo) as server:
            if place.rank > 0:
                return self._follow(server, place.head)
            self._await_ready(server)
            if command:
                return subprocess.run(command).returncode
            url = f"http://127.0.0.1:{self.port}/v1"
            print(f"serving {self.model} over {place.nodes} nodes at {url}")
            return server.process.wait()

    def _await_ready(self, server: Job) -> None:
        """Return when the head's server answers."""

        def runs() -> None:
            if server.process.poll() is not None:
                self._show_end(server)
                raise RunError(f"{self.name} ended before it was ready; its last lines stand above")

        url = f"http://127.0.0.1:{self.port}/health"
        late = f"{self.name} was not ready (do all nodes run, and reach each other? "
        await_that(lambda: answers(url), self.start_s, f"{late}see --start-timeout)", runs)

    def _follow(self, server: Job, head: str) -> int:
        """Wait while the head is there: by itself an engine's part may wait for it for ever."""
        deadline = time.monotonic() + self.start_s
        last_seen = None
        while server.process.poll() is None:
            now = time.monotonic()
            if listens(head, self.meeting_port):
                last_seen = now
            elif last_seen is None and now > deadline:
                raise RunError(f"HEAD={head} did not come up within {self.start_s:g} s")
            elif last_seen is not None and now - last_seen > HEAD_GONE_S:
                return 0
            time.sleep(POLL_S)
        # It ends by itself, with whatever status, when the connection to the head breaks.
        time.sleep(HEAD_GONE_S)
        if listens(head, self.meeting_port):
            self._show_end(server)
            status = server.process.returncode
            raise RunError(f"{self.name} ended on this node with status {status}")
        return 0

    def _show_end(self, server: Job) -> None:
        """The last lines of an output that was not shown."""
        if not self.echo:
            server.read_to_end()
            sys.stderr.writelines(server.texts["stderr"][-LAST_LINES:])


def listens(head: str, port: int) -> bool:
    """Whether the head's rank 0, where all ranks meet, still listens."""
    try:
        with closing(socket.create_connection((head, port), timeout=1)):
            return True
    except OSError:
        return False
