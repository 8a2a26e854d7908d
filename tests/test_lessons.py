"""The lessons, the scripts and the results hold together: what one names, the others have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from distlab import record
from distlab.files import repo_root
from distlab.lab.generated import regenerate
from distlab.lab.lessons import Chapter, all_blocks, chapters
from distlab.lab.recording import figures_shown

WRITTEN = [one for one in chapters() if one.written]
LESSONS = [repo_root() / "README.md", *(one.lesson for one in WRITTEN)]
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
    prose = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    prose = re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE)
    assert 1500 <= len(prose.split()) <= 3500
    headings = [line[3:].lower() for line in text.splitlines() if line.startswith("## ")]
    order = ["why", "concepts", "from scratch", "with the library", "what goes wrong"]
    order += ["measured results", "exercises", "what’s next"]
    found = [next((i for i, h in enumerate(headings) if word in h), -1) for word in order]
    assert -1 not in found and found == sorted(found), dict(zip(order, found, strict=True))


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_style(tool: list[str], root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *tool], cwd=root, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
