"""The lessons, the scripts and the results hold together: what one names, the others have."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from distlab import record
from distlab.files import repo_root
from distlab.lab.generated import regenerate
from distlab.lab.lessons import Chapter, all_blocks, chapters
from distlab.lab.recording import figures_shown

MOST_TABLES, MOST_ROWS = 6, 15  # of a lesson
IDEA_LINES = range(10, 26)  # of code that a section of "from scratch" shows
WRITTEN = [one for one in chapters() if one.written]
NOTATION = repo_root() / "notation.md"
COMMANDS = {rf"\{word}" for word in ["frac", "tfrac", "sum", "max", "min", "nabla", "cdot", "lceil",
            "rceil", "lfloor", "rfloor", "log", "exp", "Big", "in", "approx", "bar", "underbrace",
            "quad", "qquad", "Psi"]}  # fmt: skip
LESSONS = [repo_root() / "README.md", NOTATION, *(one.lesson for one in WRITTEN)]
BY_NAME = pytest.mark.parametrize("one", WRITTEN, ids=lambda one: one.folder.name)


@BY_NAME
def test_every_script_is_run_by_a_block(one: Chapter) -> None:
    run = {name for block in all_blocks() if not block.norun for name in block.scripts}
    scripts = {str(path.relative_to(repo_root())) for path in one.scripts()}
    assert scripts <= run, f"no block runs {sorted(scripts - run)}"


@BY_NAME
def test_every_kept_record_is_there_and_is_used(one: Chapter) -> None:
    kept = {block.record for block in one.blocks() if block.record}
    there = {path.stem for path in one.records()}
    assert kept == there, "run `python3 scripts/lab.py record` for the chapter"


@BY_NAME
def test_recorded_commands_are_those_of_the_lesson(one: Chapter) -> None:
    for block in one.blocks():
        if block.record:
            made = record.load(one.folder / "results" / f"{block.record}.json")
            assert in_order(typed_words(made["command"]), typed_words(block.text)), made["command"]
            assert made["preset"] in ("laptop", "gpu")
            assert all(item["ok"] for item in made["checks"])


def typed_words(line: str) -> list[str]:
    """The words of what was typed on a node, without the cluster that it was rehearsed on."""
    return line.rpartition("cluster --nodes")[2].rpartition(" -- ")[2].replace("\\\n", " ").split()


def in_order(few: list[str], many: list[str]) -> bool:
    """Whether all of `few` come in `many`, in this order: a launcher's own flags may be between."""
    rest = iter(many)
    return all(word in rest for word in few)


@BY_NAME
def test_figures_are_drawn_from_records_and_shown(one: Chapter) -> None:
    results = one.folder / "results"
    assert {path.name for path in results.glob("*.png")} == set(figures_shown(one))
    for shown in figures_shown(one):
        name, figure, _ = shown.split(".")
        assert figure in record.load(results / f"{name}.json")["figures"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.parent.name + "/" + path.name)
def test_generated_parts_equal_their_records(lesson: Path) -> None:
    assert lesson.read_text() == regenerate(lesson), "run `python3 scripts/lab.py record`"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.parent.name + "/" + path.name)
def test_links_lead_somewhere(lesson: Path) -> None:
    inline = [token.children or [] for token in MarkdownIt().parse(lesson.read_text())]
    for part in (part for children in inline for part in children):
        target = str(part.attrs.get("href") or part.attrs.get("src") or "").split("#")[0]
        if target and not target.startswith(("http://", "https://")):
            assert (lesson.parent / target).exists(), f"{target} is not there"


@BY_NAME
def test_a_lesson_has_its_length_and_its_order(one: Chapter) -> None:
    text = one.lesson.read_text()
    generated = r"<!-- (?:table|code): .*?<!-- end -->"
    prose = re.sub(rf"{generated}|```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    prose = re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE)
    assert 1500 <= len(prose.split()) <= 3500
    headings = [line[3:].lower() for line in text.splitlines() if line.startswith("## ")]
    order = ["why", "concepts", "from scratch", "with the library", "what goes wrong"]
    order += ["measured results", "exercises", "what’s next"]
    found = [next((i for i, h in enumerate(headings) if word in h), -1) for word in order]
    assert -1 not in found and found == sorted(found), dict(zip(order, found, strict=True))


@BY_NAME
def test_each_section_from_scratch_shows_the_lines_that_are_its_idea(one: Chapter) -> None:
    text = one.lesson.read_text()
    scratch = re.search(r"^## From scratch.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert scratch is not None
    sections = re.split(r"^### ", scratch[0], flags=re.MULTILINE)
    if len(sections[0].split("\n", 1)[1].strip()) == 0:  # nothing but the heading
        del sections[0]
    for section in sections:
        shown = re.findall(r"<!-- code: .*? -->\n```python\n(.*?)```", section, flags=re.DOTALL)
        lines = [len(code.splitlines()) for code in shown]
        assert lines, f"no code in {section.splitlines()[0]!r}"
        assert all(count in IDEA_LINES for count in lines), (section.splitlines()[0], lines)


@BY_NAME
def test_a_lesson_has_few_tables_and_short_ones(one: Chapter) -> None:
    kinds = [token.type for token in MarkdownIt().enable("table").parse(one.lesson.read_text())]
    tables = [at for at, kind in enumerate(kinds) if kind == "table_open"]
    assert len(tables) <= MOST_TABLES
    for at in tables:
        rows = kinds[at : kinds.index("table_close", at)].count("tr_open") - 1  # its header
        assert rows <= MOST_ROWS


@BY_NAME
def test_no_column_has_a_sign_that_its_name_does_not_explain(one: Chapter) -> None:
    """A star for what is predicted, such as `step*`, is read past; a word is not."""
    for path in one.records():
        for name, table in record.load(path)["tables"].items():
            starred = [column for column in table["columns"] if "*" in column]
            assert not starred, f"{path.name}, {name}: {starred}"


@BY_NAME
def test_free_words_are_those_of_the_outputs(one: Chapter) -> None:
    for block in one.blocks():
        for word in block.free:
            assert re.search(rf"^(?:node\d+\| )?{word}: ", block.output or "", re.MULTILINE), word


def test_every_symbol_of_a_formula_is_in_the_notation_and_used_where_that_says() -> None:
    rows = re.findall(r"^\| \$([^$]+)\$ \|.*\| (\d+|—) \|$", NOTATION.read_text(), re.MULTILINE)
    listed = [symbol for symbol, _ in rows]
    assert len(listed) == len(set(listed)) > 30, "a symbol is listed twice"
    first: dict[str, str] = {}
    for one in WRITTEN:
        for symbol in symbols(one.lesson.read_text()):
            assert symbol in listed, f"{one.folder.name}: {symbol} is not in {NOTATION.name}"
            first.setdefault(symbol, str(one.number))
    told = {symbol: chapter for symbol, chapter in rows if chapter != "—"}
    assert first == told


def symbols(lesson: str) -> Iterator[str]:
    """The letters of a lesson's formulas: Latin, Greek, and those of another alphabet."""
    prose = re.sub(r"```.*?```|<!--.*?-->|`[^`]*`", "", lesson, flags=re.DOTALL)
    for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", prose, flags=re.DOTALL):
        formula = re.sub(r"\\(?:text|mathrm|operatorname)\{[^}]*\}", "", display or inline)
        for word in re.findall(r"\\math(?:cal|bb)\{\w\}|\\[A-Za-z]+|[A-Za-z]", formula):
            if word not in COMMANDS:
                yield word


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_style(tool: list[str], root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *tool], cwd=root, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
