"""`lab record [CH]`: run a chapter at laptop size; rewrite its results and its lesson from it.

It keeps the records of the blocks marked `record=NAME` as results/NAME.json, draws their figures
beside them, puts what was printed into the lesson's `output` blocks, and makes the tables, numbers
and lines of code in all lessons anew, and README's table of chapters. Without a chapter it does
only the latter.
"""

import argparse
import re
from typing import Any

from distlab import record
from distlab.errors import RunError, UsageError
from distlab.figure import draw
from distlab.files import repo_root, write_text
from distlab.lab.blocks import Outcome, gpu_count
from distlab.lab.generated import regenerate
from distlab.lab.lessons import Block, Chapter, chapter, chapters, read_blocks
from distlab.lab.playing import play
from distlab.lab.running import BLOCK_LIMIT_S, block_folder, blocks_of_script, runs_folder
from distlab.lab.shape import without_log
from distlab.script import PRESET_NAMES, OneLineParser


def main(argv: list[str]) -> int:
    args = _parse(argv)
    if args.script and not args.chapter:
        raise UsageError("name the script's chapter first")
    if args.chapter:
        record_chapter(chapter(args.chapter), args.script, args.preset)
    for lesson in [repo_root() / "README.md", *(c.lesson for c in chapters() if c.written)]:
        write_text(lesson, regenerate(lesson))
    return 0


def record_chapter(one: Chapter, script: str | None, preset: str) -> None:
    """Run the blocks of `one` whose runs are kept or shown, and keep and show them."""
    blocks = [b for b in one.blocks() if b.record or b.output is not None]
    if script:
        blocks = blocks_of_script(one, blocks, script)
    backend = "nccl" if gpu_count() else "gloo"
    runs = runs_folder(one)
    folders = [(block, runs / block_folder(block)) for block in blocks]
    for outcome in play(folders, preset, backend, BLOCK_LIMIT_S, runs / "servers"):
        if outcome.result != "ran":
            raise RunError(f"{outcome.block.id} {outcome.result}: {outcome.reason}")
        keep(one, outcome.block, outcome)


def keep(one: Chapter, block: Block, outcome: Outcome) -> None:
    """Write the run's record, its figures, and what it printed."""
    results = one.folder / "results"
    if block.record:
        if len(outcome.records) != 1:
            raise RunError(
                f"{block.id} is kept as {block.record}, but made {len(outcome.records)} records; "
                "a kept block runs one script once"
            )
        record.save(outcome.records[0], results / f"{block.record}.json")
        draw_shown(one, block.record, outcome.records[0])
    if block.output is not None:
        show(block, outcome.stdout + (outcome.stderr if block.exit else ""))


def show(block: Block, printed: str) -> None:
    """Put `printed` into the block's `output` block, wherever that stands by now.

    Of the words that its fence names as free, those stay that still begin a line.
    """
    current = next(
        other
        for other in read_blocks(block.lesson)
        if other.text == block.text and other.output is not None
    )
    assert current.output_lines is not None
    first, end = current.output_lines
    lines = block.lesson.read_text(encoding="utf-8").splitlines()
    printed = without_log(printed).replace(f"{repo_root()}/", "")
    lines[first:end] = printed.rstrip("\n").splitlines()
    if current.free:
        free = [word for word in current.free if f"\n{word}: " in f"\n{printed}"]
        fence = lines[first - 1].partition("output")[0]
        lines[first - 1] = f"{fence}output" + (f" free={','.join(free)}" if free else "")
    write_text(block.lesson, "\n".join(lines) + "\n")


def draw_shown(one: Chapter, name: str, made: dict[str, Any]) -> None:
    """Draw those figures of the record results/NAME.json that the lesson shows, and no others."""
    for shown in figures_shown(one):
        of_record, figure, _ = shown.split(".")
        if of_record == name:
            draw(made["figures"][figure], one.folder / "results" / shown)


def figures_shown(one: Chapter) -> list[str]:
    """The figures that the lesson shows: results/RECORD.FIGURE.png."""
    return re.findall(r"\]\(results/([^)]+\.png)\)", one.lesson.read_text(encoding="utf-8"))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("lab record", description=__doc__)
    parser.add_argument("chapter", nargs="?")
    parser.add_argument("script", nargs="?", help="only the blocks of this script")
    parser.add_argument("--preset", choices=PRESET_NAMES, default="laptop")
    return parser.parse_args(argv)
