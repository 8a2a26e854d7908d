"""`lab tour`: the book in five minutes. It types the commands of tour.md, one after another.

What is done is kept in build/tour/done.json until the tour has come to its end, so that after
Ctrl-C the next one goes on where this one was.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from distlab.display import quantity
from distlab.files import repo_root, write_text
from distlab.lab.blocks import Outcome, gpu_count
from distlab.lab.lessons import Block, chapters, read_blocks
from distlab.lab.playing import play
from distlab.lab.running import block_folder, keep_outcomes, runs_folder, summary
from distlab.script import CHECK_FAILED, PRESET_NAMES, Parser

FOLDER = repo_root() / "build" / "tour"
STEP_LIMIT_S = 3600.0


def main(argv: list[str]) -> int:
    args = _parse(argv)
    blocks = [block for block in read_blocks(repo_root() / "tour.md") if not block.background]
    done = Done(FOLDER / "done.json", args.preset)
    if args.afresh or not any(block in done for block in blocks):
        shutil.rmtree(FOLDER, ignore_errors=True)  # what an older tour trained and exported
        done.forget()
    began = time.monotonic()
    outcomes = list(_walk(blocks, done, args.preset))
    keep_outcomes(outcomes)
    print("\n" + summary(outcomes))
    if any(outcome.result == "failed" for outcome in outcomes):
        print("tour: what failed is tried again by the next: python3 scripts/lab.py tour")
        return CHECK_FAILED
    done.forget()
    print(f"tour: done in {quantity(time.monotonic() - began, 's')}")
    return 0


def _walk(blocks: list[Block], done: "Done", preset: str) -> Iterator[Outcome]:
    """Run what is not done yet; the tour ends with the first step that fails."""
    left = [block for block in blocks if block not in done]
    if len(left) < len(blocks):
        print(f"tour: {len(blocks) - len(left)} of {len(blocks)} steps were done before")
    backend = "nccl" if gpu_count() else "gloo"
    folders = [(block, _records(block)) for block in left]
    try:
        for outcome in play(folders, preset, backend, STEP_LIMIT_S, FOLDER / "servers"):
            yield outcome
            if outcome.result == "failed":
                return
            done.add(outcome.block)
            number = blocks.index(outcome.block) + 1
            print(f"tour: step {number} of {len(blocks)}, {quantity(outcome.seconds, 's')}")
    except KeyboardInterrupt:
        print("\ntour: interrupted; the next one goes on here: python3 scripts/lab.py tour")
        raise


def _records(block: Block) -> Path:
    """Beside those of `lab run` of its chapter, where `lab report` finds them."""
    for one in chapters():
        if block.scripts and block.scripts[0].startswith(one.folder.name):
            return runs_folder(one) / f"tour-{block_folder(block)}"
    return FOLDER / "records"


class Done:
    """The steps of an unfinished tour that have been done, by their text."""

    def __init__(self, path: Path, preset: str | None) -> None:
        self.path, self.preset = path, preset
        self.keys: list[str] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        )

    def __contains__(self, block: Block) -> bool:
        return self._key(block) in self.keys

    def add(self, block: Block) -> None:
        self.keys.append(self._key(block))
        write_text(self.path, json.dumps(self.keys) + "\n")

    def forget(self) -> None:
        self.keys = []
        self.path.unlink(missing_ok=True)

    def _key(self, block: Block) -> str:
        return hashlib.sha256(f"{self.preset}\n{block.text}".encode()).hexdigest()[:16]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, {name: {} for name in PRESET_NAMES})
    parser.prog = "lab tour"
    parser.add_argument("--afresh", action="store_true", help="forget an interrupted tour")
    return parser.parse_args(argv)
