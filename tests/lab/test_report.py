"""`lab report`: the page says what the records say, and a browser shows it as meant."""

import argparse
import json
import re
from html import unescape
from pathlib import Path

import pytest

from browser import open_page
from distlab import record
from distlab.lab import lessons, report, running
from distlab.run import Run
from distlab.script import RunError, UsageError, status_of

CHAPTER = "chapter01-introduction"
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"
WIDTHS = (390, 1200)  # a telephone and a laptop


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one chapter and one script, in which nothing has run yet."""
    code = tmp_path / CHAPTER / "code"
    code.mkdir(parents=True)
    (code / "tiny.py").write_text('"""Shows a <b>tiny</b> thing.\n\nMore.\n"""\n')
    (code / "tiny.sh").write_text("#!/bin/sh\n# Starts the tiny thing.\n")
    lesson = f"```bash\npython {CHAPTER}/code/tiny.py\n```\n"
    (tmp_path / CHAPTER / "main.md").write_text(lesson)
    for module in (lessons, record, report, running):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    return tmp_path


def ran(tree: Path, monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> Run:
    """A run of the script `name` that writes its record where `lab run` would."""
    monkeypatch.setattr("sys.argv", [str(tree / CHAPTER / "code" / name), *arguments])
    folder = tree / "build" / "runs" / CHAPTER / "-".join([Path(name).stem, *arguments])
    return Run(argparse.Namespace(preset="smoke", json=str(folder / "made.json"), figures=None))


def full_run(tree: Path, monkeypatch: pytest.MonkeyPatch, text: str = "plain") -> None:
    """A run that records one of everything, with `text` in every place that holds a text."""
    with ran(tree, monkeypatch, "tiny.py", "--label", text) as run:
        run.metric(f"tokens_per_second {text}", 4312.0, "tok/s")
        run.metric("nothing known", None)
        run.compare(f"state {text}", predicted=1.2e6, measured=1.25e6, unit="B")
        run.compare("of nothing", predicted=1.0, measured=0.0)
        run.check_below(f"loss {text}", 2.5, 3.0, "nats")
        run.check_true("a claim that fails", False, text)
        run.table("workers", ["K", f"diff {text}"], [[1, 0.0], [2, 3e-17]], caption=text)
        run.table("wide", [f"column {i}" for i in range(30)], [list(range(30))])
        for kind in ("line", "scatter", "bar", "area"):
            run.figure(
                kind,
                kind=kind,
                title=f"A {kind} {text}",
                x_label=text,
                y_label=text,
                series=[
                    {"label": text, "x": [1, 2, 4], "y": [1.0, 2.0, 3.0]},
                    {"label": "other", "x": [1, 2, 4], "y": [2.0, 1.0, 4.0]},
                ],
                lines=[{"label": text, "y": 1.5}],
            )


def test_page_in_a_browser(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No error, nothing fetched, no overflow, every figure decoded, legible in light and dark."""
    full_run(tree, monkeypatch, HOSTILE)
    with ran(tree, monkeypatch, "tiny.sh") as run:
        run.metric("seconds", 0.0123, "s")
    assert report.report([]) == 0
    with open_page(tree / "build" / "report.html") as page:
        for width in WIDTHS:
            for dark in (False, True):
                page.resize(width, dark=dark)
                scheme = "dark" if dark else "light"
                page.screenshot(tmp_path / f"{width}-{scheme}.png")
                assert page.evaluate(OVERFLOW) <= 0, f"scrolls sideways at {width} px"
                assert page.evaluate(FAINT) == [], f"contrast below 4.5:1 in {scheme}"
            figures = page.evaluate(FIGURES)
            assert [figure["alt"] for figure in figures] == [
                f"A {kind} {HOSTILE}" for kind in ("line", "scatter", "bar", "area")
            ]
            # at 390 px a figure takes the window's width, less its frame
            assert all(figure["natural"] > 0 and figure["width"] > 350 for figure in figures)
        text = page.evaluate("document.body.innerText")
        for expected in (
            HOSTILE,
            "4,312 tok/s",
            "1.20 MB",
            "-4.0 %",
            "3.00e-17",
            "Shows a <b>tiny</b> thing.",
            "Starts the tiny thing.",
            "1 check failed",
            "12.3 ms",
        ):
            assert expected in text
        assert page.evaluate("document.scripts.length + document.images.length") == 4
        levels = page.evaluate(HEADINGS)
        assert levels.count(1) == 1 and levels[0] == 1
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
        assert page.evaluate(LANDMARKS) == ["FOOTER", "HEADER", "MAIN", "NAV"]
        assert page.evaluate(BROKEN_LINKS) == []
        assert page.requests() == [(tree / "build" / "report.html").as_uri()]
        assert page.errors() == []


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
FIGURES = """Promise.all([...document.images].map(image => image.decode().then(() => ({
    alt: image.alt, natural: image.naturalWidth, width: image.getBoundingClientRect().width}))))"""
HEADINGS = "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))"
LANDMARKS = """[...new Set([...document.querySelectorAll('body > header, nav, main, body > footer')]
    .map(element => element.tagName))].sort()"""
BROKEN_LINKS = """[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))
    .filter(href => !document.getElementById(href.slice(1)))"""

# The contrast of every text with the ground that it stands on: WCAG 2.2, 1.4.3.
FAINT = """(() => {
    const parse = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => parse(color).slice(0, 3).map(value => value / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = element => {
        const color = getComputedStyle(element).backgroundColor;
        return parse(color)[3] === 0 ? ground(element.parentElement) : color;
    };
    const faint = new Set();
    for (const element of document.body.querySelectorAll('*')) {
        const texts = [...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE);
        if (!texts.some(text => text.data.trim())) continue;
        const [low, high] = [getComputedStyle(element).color, ground(element)]
            .map(luminance).sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) faint.add(element.outerHTML.slice(0, 80));
    }
    return [...faint];
})()"""


def page_text(tree: Path, *arguments: str) -> str:
    """The page's text without its tags, for what needs no browser."""
    out = tree / "page.html"
    assert report.report([*arguments, "--out", str(out)]) == 0
    body = out.read_text(encoding="utf-8").partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_later_run_of_one_command_replaces_the_earlier(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, folder, date in ((1.25, "old", "2025-01-01"), (7.5, "new", "2025-02-01")):
        with ran(tree, monkeypatch, "tiny.py") as run:
            run.metric("value", value)
        made = {**run.as_record(), "date": f"{date}T10:00:00+00:00"}
        path = tree / "build" / "runs" / CHAPTER / folder / "made.json"
        record.save(made, path)
        Path(run.args.json).unlink()
    text = page_text(tree)
    assert "value 7.50" in text and "1.25" not in text


def test_several_machines_are_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in ("Fast CPU", "Slow CPU"):
        with ran(tree, monkeypatch, "tiny.py", "--on", cpu) as run:
            run.check_equal("one", 1, 1)
        made = json.loads(Path(run.args.json).read_text())
        made["machine"]["cpu"] = cpu
        if cpu == "Fast CPU":
            made["machine"]["gpus"] = 2 * [{"name": "NVIDIA H200", "memory_bytes": 140 * 2**30}]
            made["machine"]["driver"] = "580.1"
        record.save(made, run.args.json)
    text = page_text(tree)
    assert "These records come from 2 different machines" in text
    assert "2 × NVIDIA H200, 140 GiB" in text and "none used" in text and "580.1" in text
    assert "machine 1" in text and "machine 2" in text and "2 checks" not in text


def test_recorded_reads_the_chapters_results(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_run(tree, monkeypatch)
    made = next((tree / "build").rglob("*.json"))
    results = tree / CHAPTER / "results"
    results.mkdir()
    made.rename(results / "kept.json")
    assert "What the chapters recorded" in page_text(tree, "--recorded")
    with pytest.raises(RunError, match="nothing has run here yet"):
        report.report([])


def test_page_holds_nothing_of_a_hostile_text(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_run(tree, monkeypatch, HOSTILE)
    assert report.report([]) == 0
    html = (tree / "build" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<img src=x" not in html
    assert "http:" not in html and "https:" not in html


@pytest.mark.parametrize("flag", [[], ["--recorded"]])
def test_nothing_to_show_is_one_line_with_the_command(
    tree: Path, capsys: pytest.CaptureFixture, flag: list[str]
) -> None:
    assert status_of(lambda: report.report(flag)) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"python3 scripts/lab.py {'record' if flag else 'run'} 1" in line
    assert not (tree / "build" / "report.html").exists()


def test_out_that_cannot_be_written_is_a_usage_error(tree: Path) -> None:
    (tree / "file").write_text("")
    for wrong in (tree, tree / "file" / "page.html"):
        with pytest.raises(UsageError, match="--out"):
            report.report(["--out", str(wrong)])


def test_open_hands_the_page_to_the_browser(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_run(tree, monkeypatch)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or len(opened) == 1)
    assert report.report(["--open"]) == 0
    assert opened == [(tree / "build" / "report.html").as_uri()]
    with pytest.raises(RunError, match="open .*report.html yourself"):
        report.report(["--open"])


def test_a_corrupt_record_is_one_line(tree: Path, capsys: pytest.CaptureFixture) -> None:
    path = tree / "build" / "runs" / CHAPTER / "x" / "made.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1,')
    assert status_of(lambda: report.report([])) == 1
    assert "made.json cannot be read" in capsys.readouterr().err
