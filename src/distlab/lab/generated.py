"""The generated parts of the lessons: tables and numbers from records, and README's chapter table.

In a lesson, between markers that a reader of the rendered page does not see:

    <!-- table: RECORD NAME -->      the table NAME of results/RECORD.json
    <!-- value: RECORD METRIC -->    one number of that record
    <!-- chapters -->                README's table of chapters

each ends at `<!-- end -->`. `lab record` rewrites them; a test fails where they differ.
"""

import re
from pathlib import Path
from typing import Any

from distlab import record
from distlab.display import markdown_table, quantity
from distlab.errors import RunError
from distlab.lab.lessons import chapters
from distlab.lab.listing import describe

MARKED = re.compile(r"<!-- (table|value|chapters)(?:: ([^>]*?))? -->(.*?)<!-- end -->", re.DOTALL)


def regenerate(lesson: Path) -> str:
    """The text of `lesson` with every generated part made anew from results/ beside it."""

    def replace(match: re.Match[str]) -> str:
        kind, arguments = match[1], match[2]
        words = (arguments or "").split()
        opening = f"<!-- {kind}{': ' + arguments if arguments else ''} -->"
        if kind == "value":
            return f"{opening}{_value(lesson, words[0], ' '.join(words[1:]))}<!-- end -->"
        body = _chapters() if kind == "chapters" else _table(lesson, *words)
        return f"{opening}\n{body}\n<!-- end -->"

    return MARKED.sub(replace, lesson.read_text(encoding="utf-8"))


def load_result(lesson: Path, name: str) -> dict[str, Any]:
    """The record results/NAME.json of the lesson's chapter."""
    path = lesson.parent / "results" / f"{name}.json"
    if not path.exists():
        raise RunError(f"{lesson} names the record {name!r}, but {path} is not there; record it")
    return record.load(path)


def _table(lesson: Path, name: str, table: str) -> str:
    made = load_result(lesson, name)
    if table not in made["tables"]:
        raise RunError(f"{lesson}: the record {name} has no table {table!r}")
    body = markdown_table(made["tables"][table]["columns"], made["tables"][table]["rows"])
    machine, date = _machine(made["machine"]), made["date"][:10]
    return f"{body}\n\n*{machine}, {date}:* `{made['command']}`"


def _machine(machine: dict[str, Any]) -> str:
    names = [gpu["name"] for gpu in machine["gpus"]]
    gpus = f"{len(names)} × {names[0]}" if names else "no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {gpus}"


def _value(lesson: Path, name: str, key: str) -> str:
    made = load_result(lesson, name)
    if key in made["metrics"]:
        return quantity(made["metrics"][key]["value"], made["metrics"][key]["unit"])
    comparison, _, part = key.rpartition(".")
    if comparison in made["comparisons"] and part in ("predicted", "measured", "error"):
        entry = made["comparisons"][comparison]
        if part == "error":
            return f"{100 * entry['error']:+.1f} %"
        return quantity(entry[part], entry["unit"])
    raise RunError(f"{lesson}: the record {name} has no metric {key!r}")


def _chapters() -> str:
    rows = []
    for one in chapters():
        if one.written:
            scripts = describe(one)
            minutes = sum(row["minutes"] or 0 for row in scripts)
            title = f"[{one.title}]({one.folder.name}/main.md)"
            rows.append([str(one.number), title, str(len(scripts)), f"{minutes:.0f}", "ready"])
        else:
            rows.append([str(one.number), one.title, "—", "—", "not written yet"])
    return markdown_table(["", "Chapter", "Scripts", "Minutes on a laptop", "State"], rows)
