"""`lab list`: every script, derived from the chapters' folders and the blocks of their lessons."""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from distlab import record
from distlab.display import text_table
from distlab.files import repo_root
from distlab.lab.lessons import Block, Chapter, chapter, chapters
from distlab.script import OneLineParser


def main(argv: list[str]) -> int:
    args = _parse(argv)
    wanted = [chapter(args.chapter)] if args.chapter else [c for c in chapters() if c.written]
    rows = [row for one in wanted for row in describe(one)]
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    columns = ["chapter", "script", "what it shows", "environment", "needs", "minutes"]
    cells = [
        [str(r["chapter"]), r["name"], r["shows"], r["environment"], r["needs"], r["minutes"]]
        for r in rows
    ]
    print(text_table(columns, cells))
    if not rows:
        return 0
    print("minutes: as recorded in the chapter's results, laptop size; run one by")
    print(f"  python3 scripts/lab.py run {rows[0]['chapter']} {rows[0]['name']}")
    return 0


def describe(one: Chapter) -> list[dict[str, Any]]:
    """A row for each script of a chapter; keys as in `lab list --json`."""
    blocks = one.blocks()
    minutes = recorded_minutes(one)
    rows = []
    for path in one.scripts():
        name = str(path.relative_to(repo_root()))
        using = [block for block in blocks if name in block.scripts]
        rows.append(
            {
                "chapter": one.number,
                "script": name,
                "name": path.name,
                "shows": summary(path),
                "environment": ", ".join(sorted({block.env for block in using})),
                "needs": needs(using),
                "minutes": minutes.get(name),
            }
        )
    return rows


def summary(path: Path) -> str:
    """The first sentence of a script's docstring, or of a shell script's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(text)) or ""
    else:
        comments = [line for line in text.splitlines() if line.startswith("# ")]
        doc = comments[0].removeprefix("# ") if comments else ""
    return " ".join(doc.split("\n\n")[0].split())


def needs(blocks: list[Block]) -> str:
    """What the blocks that run a script need beside Python: ranks, GPUs, nodes, Slurm, and, for a
    server, a terminal of its own."""
    ranks = sorted({block.ranks for block in blocks} - {1})
    gpus = max([0, *(block.gpus for block in blocks)])
    parts = [f"{'/'.join(map(str, ranks))} processes"] if ranks else []
    parts += [f"{gpus} GPU(s)"] if gpus else []
    nodes = max([0, *(block.nodes for block in blocks)])
    parts += [f"{nodes} nodes"] if nodes else []
    parts += ["Slurm"] if any(block.slurm for block in blocks) else []
    parts += ["its own terminal"] if any(block.background for block in blocks) else []
    return ", ".join(parts) or "—"


def recorded_minutes(one: Chapter) -> dict[str, float]:
    """Minutes that each script's recorded runs took, by the script's path."""
    minutes: dict[str, float] = {}
    for block in one.blocks():
        path = one.folder / "results" / f"{block.record}.json"
        if block.record and path.exists():
            taken = record.load(path)["seconds"] / 60
            for name in block.scripts:
                minutes[name] = round(minutes.get(name, 0.0) + taken, 2)
    return minutes


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("lab list", description=__doc__)
    parser.add_argument("chapter", nargs="?", help="only this chapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser.parse_args(argv)
