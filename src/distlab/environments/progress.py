"""What an installer's output says: how far it is, and in one line why it failed."""

import os
import re
import shutil
import sys
import tempfile
import time

from distlab.environments import uv
from distlab.environments.recipes import FOLDER

PLAIN_LINE_SECONDS = 10
STAGE = re.compile(
    r"^ *((?:Collecting|Downloading|Building|Compiling|Preparing|Installing|Resolved|Prepared|"
    r"Installed) .*)",
    re.MULTILINE,
)
NO_SUCH_VERSION = re.compile(r"No matching distribution found|No solution found")
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|connection broken|Max retries exceeded"
    r"|Network is unreachable|name resolution|error sending request|Failed to fetch"
    r"|network was disabled|[Tt]imed out|ProxyError|SSLError|\(from versions: none\)"
)
DISK_FULL = re.compile(r"No space left on device|[Qq]uota exceeded")


def is_unavailable(output: str) -> bool:
    return bool(NO_SUCH_VERSION.search(output) or NO_NETWORK.search(output))


def explain(output: str, gigabytes: float = 0.1) -> str:
    """Say in one line why an installing command with this output failed, and the remedy.

    gigabytes: the room that the whole needs.
    """
    free = {place: shutil.disk_usage(place).free for place in (FOLDER, tempfile.gettempdir())}
    if DISK_FULL.search(output) or min(free.values()) < 16e6:  # venv does not say why it fails
        room = ", ".join(f"{size / 1e9:.1f} GB free in {place}" for place, size in free.items())
        return (
            f"the disk is full ({room}; about {gigabytes:g} GB are needed); "
            "make room and run this again"
        )
    if NO_SUCH_VERSION.search(output) and uv.forbids_indexes():
        return (
            "no index may be asked (PIP_NO_INDEX, UV_NO_INDEX, or no-index in `pip config list`), "
            "and find-links lacks a package; unset that, or add what the log names to find-links"
        )
    if NO_NETWORK.search(output) or os.environ.get("UV_OFFLINE"):
        return (
            "no package index can be reached; check the network and `pip config list`, "
            "then run this again"
        )
    if "ensurepip" in output:
        return (
            "this Python has neither pip nor venv; install one "
            "(Debian: apt install python3-venv), or uv"
        )
    if "this is a CPU build" in output:
        return (
            "the package index gave a CPU build of torch; name one that has CUDA builds in "
            "PIP_EXTRA_INDEX_URL, or run lab.py --torch cpu"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    if NO_SUCH_VERSION.search(output):
        causes = [line for line in lines if re.match(r"(?i)cause: |╰─▶ |because ", line)]
        return f"no index has what the lock names: {(causes or lines)[0][:300]}"
    errors = [line for line in lines if re.match(r"(?i)error\b", line)]
    return (errors or lines)[-1][:300]


class Progress:
    """One live line on a terminal, a plain line every ten seconds elsewhere; all on stderr."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = self.printed = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, output: str) -> None:
        """Show the last stage that an installer's output names."""
        stages = STAGE.findall(output)
        line = self.line(stages[-1] if stages else "at work")
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self.printed = time.monotonic()
            print(line[:100], file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        self.clear()
        print(self.line(message), file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self, message: str) -> str:
        return f"lab: {self.name} {time.monotonic() - self.started:3.0f} s  {message}"
