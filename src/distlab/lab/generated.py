"""The generated parts of the lessons: tables, numbers and code, and README's chapter table.

In a lesson, between markers that a reader of the rendered page does not see:

    <!-- table: RECORD NAME -->               the table NAME of results/RECORD.json; its caption
    <!-- table: RECORD NAME K=4 -->           those of its rows whose column K shows 4
    <!-- cell: RECORD NAME COLUMN K=4 -->     one number of a table, of the one row that is meant
    <!-- value: RECORD METRIC -->             one number of that record
    <!-- code: FILE NAME -->                  a function, class or method (`Class.method`) of the
                                              chapter's code/FILE, or several, without docstrings
    <!-- code: FILE NAME lines=3-12 -->       some lines of it, counted in what is shown without
    <!-- chapters -->                         README's table of chapters

each ends at `<!-- end -->`. A word with spaces stands in quotes, and `|` between two values means
either: `"link=none|1 Gbit/s"`. `lab record` rewrites them; a test fails where they differ.
"""

import ast
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlab import record
from distlab.display import markdown_table, number, quantity
from distlab.errors import RunError
from distlab.lab.lessons import chapters
from distlab.lab.listing import describe

MARKED = re.compile(
    r"<!-- (table|cell|value|code|chapters)(?:: ([^>]*?))? -->(.*?)<!-- end -->", re.DOTALL
)
INLINE = ("value", "cell")


def regenerate(lesson: Path) -> str:
    """The text of `lesson`, its generated parts made anew from results/ and code/ beside it."""

    def replace(match: re.Match[str]) -> str:
        kind, arguments = match[1], match[2] or ""
        opening = f"<!-- {kind}{': ' + arguments if arguments else ''} -->"
        body = _body(lesson, kind, arguments)
        return (
            f"{opening}{body}<!-- end -->" if kind in INLINE else f"{opening}\n{body}\n<!-- end -->"
        )

    return MARKED.sub(replace, lesson.read_text(encoding="utf-8"))


def _body(lesson: Path, kind: str, arguments: str) -> str:
    if kind == "value":  # a metric's name may have quotes in it
        name, _, key = arguments.partition(" ")
        return _value(lesson, name, key)
    words = shlex.split(arguments)
    if kind == "table":
        return _table(lesson, words[0], words[1], words[2:])
    if kind == "cell":
        return _cell(lesson, words[0], words[1], words[2], words[3:])
    return _code(lesson, *words) if kind == "code" else _chapters()


def load_result(lesson: Path, name: str) -> dict[str, Any]:
    """The record results/NAME.json of the lesson's chapter."""
    path = lesson.parent / "results" / f"{name}.json"
    if not path.exists():
        raise RunError(f"{lesson} names the record {name!r}, but {path} is not there; record it")
    return record.load(path)


def _table(lesson: Path, name: str, table: str, conditions: Sequence[str]) -> str:
    made = load_result(lesson, name)
    columns, rows, caption = _rows(lesson, made, name, table, conditions)
    body = markdown_table(columns, rows)
    if conditions:
        whole = len(made["tables"][table]["rows"])
        kept = " and ".join(
            condition.replace("=", " ").replace("|", " or ") for condition in conditions
        )
        caption = f"{caption}; the rows with {kept}, {len(rows)} of {whole}".removeprefix("; ")
    machine, date = _machine(made["machine"]), made["date"][:10]
    source = f"*{machine}, {date}:* `{made['command']}`"
    words = re.sub(r"([*`<])", r"\\\1", caption)
    return f"{body}\n\n{words}. {source}" if words else f"{body}\n\n{source}"


def _rows(
    lesson: Path, made: dict[str, Any], name: str, table: str, conditions: Sequence[str]
) -> tuple[list[str], list[list[Any]], str]:
    """The columns of a record's table, its rows for which each COLUMN=VALUE holds, its caption."""
    if table not in made["tables"]:
        raise RunError(f"{lesson}: the record {name} has no table {table!r}")
    columns, rows, caption = (made["tables"][table][key] for key in ("columns", "rows", "caption"))
    for condition in conditions:
        column, _, values = condition.partition("=")
        place = _place(lesson, name, columns, column)
        rows = [row for row in rows if number(row[place]) in values.split("|")]
    if not rows:
        raise RunError(f"{lesson}: the table {table} of {name} has no row with {conditions}")
    return columns, rows, caption


def _place(lesson: Path, name: str, columns: list[str], column: str) -> int:
    if column not in columns:
        raise RunError(f"{lesson}: {name} has no column {column!r}; it has {', '.join(columns)}")
    return columns.index(column)


def _cell(lesson: Path, name: str, table: str, column: str, conditions: Sequence[str]) -> str:
    columns, rows, _ = _rows(lesson, load_result(lesson, name), name, table, conditions)
    if len(rows) != 1:
        raise RunError(f"{lesson}: {len(rows)} rows of {name} {table} have {conditions}; name one")
    return number(rows[0][_place(lesson, name, columns, column)])


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


def _code(lesson: Path, file: str, *words: str) -> str:
    """Definitions of the chapter's code as a block, and below it where they stand."""
    path = lesson.parent / "code" / file
    if not path.is_file():
        raise RunError(f"{lesson} shows code of {file}, but {path} is not there")
    names = [word for word in words if not word.startswith("lines=")]
    lines = [word.removeprefix("lines=") for word in words if word not in names]
    parts = [textwrap.dedent("\n".join(source_of(path, name))) for name in names]
    shown = "\n\n".join(parts).splitlines()
    if lines:
        first, _, last = lines[0].partition("-")
        if not (
            first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) <= len(shown)
        ):
            told = f"{', '.join(names)} of {file} has {len(shown)} lines"
            raise RunError(f"{lesson}: {told}, not {lines[0]}")
        shown = textwrap.dedent("\n".join(shown[int(first) - 1 : int(last)])).splitlines()
    where = f"*{', '.join(f'`{name}`' for name in names)} in [{file}](code/{file})*"
    return "\n".join(["```python", *shown, "```", "", where])


def source_of(path: Path, name: str) -> list[str]:
    """The lines of the function, class or method `name` of a file, without its docstring."""
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        inner = [
            child for child in ast.iter_child_nodes(node) if getattr(child, "name", "") == part
        ]
        if not inner:
            raise RunError(f"{path} defines no {name}")
        node = inner[-1]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()
    kept = lines[first - 1 : node.end_lineno]
    if ast.get_docstring(node, clean=False) is not None:
        doc = node.body[0]
        assert doc.end_lineno is not None
        del kept[doc.lineno - first : doc.end_lineno - first + 1]
        while kept[doc.lineno - first : doc.lineno - first + 1] == [""]:
            del kept[doc.lineno - first]
    return kept


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
