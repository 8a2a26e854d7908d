"""Type a lesson's commands one after another, as its reader would: shown, run, judged."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from distlab.lab.blocks import Outcome, run_block
from distlab.lab.lessons import Block
from distlab.lab.servers import Servers


def play(
    blocks: Iterable[tuple[Block, Path]],
    preset: str,
    backend: str,
    limit_s: float,
    servers: Path,
) -> Iterator[Outcome]:
    """Run each block at `preset` with the servers of its section; its records go to its folder.

    The command, what it prints, and why it was skipped or failed are shown as they come.
    """
    with Servers(preset, servers) as running:
        for block, folder in blocks:
            shown = "$ " + block.text.strip().replace("\n", "\n  ")
            print(f"\n\033[1m{shown}\033[0m" if sys.stdout.isatty() else f"\n{shown}", flush=True)
            running.start_for(block)
            outcome = run_block(block, preset, folder, backend, limit_s, echo=True)
            if outcome.result != "ran":
                print(f"{outcome.result}: {outcome.reason.splitlines()[0]}", flush=True)
            yield outcome
