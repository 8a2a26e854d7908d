"""`lab run CH [SCRIPT]`: type a chapter's commands for the reader, and say what came out.

With $LAB_OUTCOMES set to a folder, what became of each command is left there as JSON, for whoever
would otherwise run them again.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from distlab.display import quantity, text_table
from distlab.errors import UsageError
from distlab.files import repo_root, write_text
from distlab.lab.blocks import Outcome, gpu_count
from distlab.lab.lessons import Block, Chapter, chapter
from distlab.lab.playing import play
from distlab.script import CHECK_FAILED, PRESET_NAMES, Parser

BLOCK_LIMIT_S = 3600.0


def main(argv: list[str]) -> int:
    args = _parse(argv)
    one = chapter(args.chapter)
    blocks = [b for b in one.blocks() if not b.background]
    if args.script:
        blocks = blocks_of_script(one, blocks, args.script)
    records = runs_folder(one)
    backend = "nccl" if gpu_count() else "gloo"
    folders = [(block, records / block_folder(block)) for block in blocks]
    outcomes = list(play(folders, args.preset, backend, BLOCK_LIMIT_S, records / "servers"))
    keep_outcomes(outcomes)
    print("\n" + summary(outcomes))
    print("a page of these results: python3 scripts/lab.py report")
    return CHECK_FAILED if any(outcome.result == "failed" for outcome in outcomes) else 0


def blocks_of_script(one: Chapter, blocks: list[Block], wanted: str) -> list[Block]:
    """The blocks that run the script `wanted`: its path, its name, or its name without suffix."""
    names = {path.name: path for path in one.scripts()}
    name = Path(wanted).name
    name = name if name in names else next((n for n in names if Path(n).stem == name), name)
    if name not in names:
        raise UsageError(
            f"chapter {one.number} has no script {wanted!r}; it has {', '.join(sorted(names))}"
        )
    path = str(names[name].relative_to(repo_root()))
    return [block for block in blocks if path in block.scripts]


def runs_folder(one: Chapter) -> Path:
    """Where the records of what ran here are kept, for `lab report`."""
    return repo_root() / "build" / "runs" / one.folder.name


def block_folder(block: Block) -> str:
    """A folder name for a block's records that stays the same while its lesson is edited."""
    return block.record or "-".join([*(Path(s).stem for s in block.scripts), f"line{block.line}"])


def keep_outcomes(outcomes: list[Outcome]) -> None:
    """Leave a file for each block and back end in $LAB_OUTCOMES, if it is set."""
    if not (folder := os.environ.get("LAB_OUTCOMES")):
        return
    for outcome in outcomes:
        text = json.dumps({**asdict(outcome), "block": outcome.block.id}, indent=1)
        write_text(outcome_file(Path(folder), outcome.block, outcome.backend), text + "\n")


def kept_outcome(folder: Path, block: Block, backend: str) -> Outcome | None:
    """What `keep_outcomes` left of `block`, if it did."""
    path = outcome_file(folder, block, backend)
    return (
        Outcome(**{**json.loads(path.read_text(encoding="utf-8")), "block": block})
        if path.exists()
        else None
    )


def outcome_file(folder: Path, block: Block, backend: str) -> Path:
    return folder / f"{block.id.replace('/', '-')}-{backend}.json"


def summary(outcomes: list[Outcome]) -> str:
    """A line for each block: what it ran, what came of it, how long it took."""
    rows = [
        [_first_command(o.block)[:90], o.result, _checks(o), quantity(o.seconds, "s")]
        for o in outcomes
    ]
    return text_table(["command", "result", "checks", "time"], rows)


def _checks(outcome: Outcome) -> str:
    checks = [item for made in outcome.records for item in made["checks"]]
    failed = sum(not item["ok"] for item in checks)
    return f"{failed} of {len(checks)} failed" if failed else f"{len(checks)} ok"


def _first_command(block: Block) -> str:
    lines = [line for line in block.text.splitlines() if line and not line.startswith("#")]
    return lines[0] if lines else block.text.strip()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, {name: {} for name in PRESET_NAMES})
    parser.prog = "lab run"
    parser.add_argument("chapter", help="a chapter's number or folder")
    parser.add_argument("script", nargs="?", help="only the commands of this script")
    return parser.parse_args(argv)
