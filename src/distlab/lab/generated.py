"""The generated parts of the lessons: tables and numbers from records, and README's chapter table.

In a lesson, between markers that a reader of the rendered page does not see:

    <!-- table: RECORD [RECORD …] NAME -->    the table NAME of those records, one below another
    <!-- value: RECORD METRIC -->             one number of a record
    <!-- chapters -->                         README's table of chapters

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
        body = _chapters() if kind == "chapters" else _table(lesson, words[:-1], words[-1])
        return f"{opening}\n{body}\n<!-- end -->"

    return MARKED.sub(replace, lesson.read_text(encoding="utf-8"))


def load_result(lesson: Path, name: str) -> dict[str, Any]:
    """The record results/NAME.json of the lesson's chapter."""
    path = lesson.parent / "results" / f"{name}.json"
    if not path.exists():
        raise RunError(f"{lesson} names the record {name!r}, but {path} is not there; record it")
    return record.load(path)


def _table(lesson: Path, names: list[str], table: str) -> str:
    records = [load_result(lesson, name) for name in names]
    for name, made in zip(names, records, strict=True):
        if table not in made["tables"]:
            raise RunError(f"{lesson}: the record {name} has no table {table!r}")
    parts = [made["tables"][table] for made in records]
    rows = [row for part in parts for row in part["rows"]]
    commands = dict.fromkeys(f"`{made['command']}`" for made in records)
    source = f"*{_machine(records[0]['machine'])}, {records[0]['date'][:10]}:* "
    return f"{markdown_table(parts[0]['columns'], rows)}\n\n{source}{', '.join(commands)}"


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
