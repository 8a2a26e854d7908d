"""The lab's commands: what they answer, and what they say of a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distlab import record
from distlab.errors import RunError
from distlab.files import repo_root
from distlab.lab import __main__ as lab
from distlab.lab import generated, listing, recording, testing
from distlab.lab.lessons import TITLES, chapter, chapters, read_blocks


def command(*words: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    try:
        status = lab.main(list(words))
    except SystemExit as left:  # argparse
        status = int(left.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_list_has_every_script_with_what_it_shows_and_needs(capsys):
    status, out, _ = command("list", "--json", capsys=capsys)
    rows = json.loads(out)
    assert status == 0
    assert {row["script"] for row in rows} == {
        str(path.relative_to(repo_root()))
        for one in chapters()
        if one.written
        for path in one.scripts()
    }
    for row in rows:
        assert row["shows"].endswith(".") and row["environment"]
        # Recorded without a GPU; and a server runs until it is ended.
        elsewhere = "GPU" in row["needs"] or "its own terminal" in row["needs"]
        assert row["minutes"] is not None or elsewhere
    ddp = next(row for row in rows if row["name"] == "multi_gpu_ddp.py")
    assert ddp["needs"] == "2/3/4 processes"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nope"], "there is no command 'nope'; use one of tour, list,"),
        (["run", "12"], "there is no chapter '12'; use a number from 1 to 11"),
        (["run", "11"], "chapter 11 is not written yet; ready: 1"),
        (["run", "1", "nope.py"], "chapter 1 has no script 'nope.py'; it has check_cuda.py,"),
        (["run", "1", "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["list", "--bogus"], "unrecognized arguments: --bogus"),
        (["test", "99"], "there is no chapter '99'"),
        (["record", "--preset", "huge"], "argument --preset: invalid choice"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(words, told, capsys):
    status, out, err = command(*words, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {told}") and err.count("\n") == 1


def test_without_a_command_it_shows_them_all(capsys):
    status, out, _ = command(capsys=capsys)
    assert status == 0 and all(f"  {name}" in out for name in lab.COMMANDS)


def test_a_chapter_by_its_number_its_folder_and_its_name():
    names = ("1", "01", "chapter01-introduction", "chapter01-introduction/", "introduction")
    assert {chapter(name).number for name in names} == {1}
    assert len(TITLES) == 11


def test_run_types_the_blocks_of_one_script_and_keeps_their_records(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("distlab.lab.running.runs_folder", lambda one: tmp_path)
    status, out, _ = command("run", "1", "exact_gradient", "--preset", "smoke", capsys=capsys)
    assert status == 0
    assert "$ python chapter01-introduction/code/exact_gradient.py" in out
    assert "11 ok" in out.splitlines()[-2]
    made = record.load(tmp_path / "exact_gradient" / "exact_gradient.json")
    assert made["preset"] == "smoke" and made["checks"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process(number):
    lab_run = subprocess.Popen(
        [sys.executable, "-m", "distlab.lab", "run", "1", "profiling", "--preset", "laptop"],
        cwd=repo_root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    assert lab_run.stdout is not None
    while "machine:" not in lab_run.stdout.readline():
        assert lab_run.poll() is None
    children = psutil.Process(lab_run.pid).children(recursive=True)
    os.kill(lab_run.pid, number)
    assert lab_run.wait(30) == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 20
    while alive := [child for child in children if is_alive(child)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


LESSON = """# A lesson

```bash record=one
python chapter01-introduction/code/exact_gradient.py
```
```output
old
```

<!-- table: one workers -->
old
<!-- end -->

It was <!-- value: one speed -->old<!-- end -->
in <!-- value: one time.measured -->old<!-- end -->,
with <!-- cell: one runs s "way=by hand" K=2|4 -->old<!-- end --> s by hand.

<!-- table: one runs K=2|4 "way=by hand|alone" -->
<!-- end -->

<!-- code: ring.py Ring.send -->
<!-- end -->

<!-- code: ring.py add lines=2-3 -->
<!-- end -->

<!-- code: ring.py add Ring.send lines=3-8 -->
<!-- end -->
"""
CODE = '''class Ring:
    """A ring."""

    @property
    def send(self) -> int:
        """Send it.

        And more.
        """

        return 1  # byte


def add(a, b):
    if a:
        return b
    return a
'''
RECORD = {
    "schema": record.SCHEMA,
    "command": "python x.py",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "a CPU", "cores": 2, "gpus": []},
    "metrics": {"speed": {"value": 4312.0, "unit": "tok/s"}},
    "comparisons": {"time": {"predicted": 0.1, "measured": 0.2, "unit": "s", "error": -0.5}},
    "tables": {
        "workers": {"columns": ["K", "name"], "rows": [[2, "a|b"]], "caption": ""},
        "runs": {
            "columns": ["K", "way", "s"],
            "rows": [[2, "by hand", 1.5], [3, "by hand", 2.5], [4, "alone", 3.5]],
            "caption": "* of all runs",
        },
    },
    "figures": {},
}


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    record.save(RECORD, tmp_path / "results" / "one.json")
    path = tmp_path / "main.md"
    path.write_text(LESSON)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ring.py").write_text(CODE)
    return path


def test_generated_parts_come_from_the_record(lesson):
    text = generated.regenerate(lesson)
    assert "| K | name |\n| --: | --- |\n| 2 | a\\|b |" in text
    assert "*a CPU, 2 cores, no GPU, 2026-01-02:* `python x.py`\n<!-- end -->" in text
    assert "<!-- value: one speed -->4,312 tok/s<!-- end -->" in text
    assert "<!-- value: one time.measured -->200 ms<!-- end -->" in text
    assert '<!-- cell: one runs s "way=by hand" K=2|4 -->1.50<!-- end --> s by hand' in text
    assert "| 2 | by hand | 1.50 |\n| 4 | alone | 3.50 |\n\n\\* of all runs; the rows with" in text
    assert "rows with K 2 or 4 and way by hand or alone, 2 of 3. *a CPU, 2 cores" in text
    lesson.write_text(text)
    assert generated.regenerate(lesson) == text


def test_code_is_shown_without_its_docstring_and_its_place(lesson):
    """A method with its decorators, and some lines of a function, both from the margin on."""
    text = generated.regenerate(lesson)
    method = "@property\ndef send(self) -> int:\n    return 1  # byte"
    assert f"```python\n{method}\n```\n\n*`Ring.send` in [ring.py](code/ring.py)*" in text
    assert "```python\nif a:\n    return b\n```" in text
    assert "\n*`add`, `Ring.send` in [ring.py](code/ring.py)*" in text


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("<!-- table: two workers -->", "names the record 'two'"),
        ("<!-- table: one nope -->", "has no table 'nope'"),
        ("<!-- value: one nope -->", "has no metric 'nope'"),
        ("<!-- table: one runs L=2 -->", "one has no column 'L'; it has K, way, s"),
        ("<!-- table: one runs K=9 -->", "runs of one has no row with"),
        ("<!-- cell: one runs s K=2|3 -->", "2 rows of one runs have"),
        ("<!-- code: nope.py add -->", "shows code of nope.py, but"),
        ("<!-- code: ring.py Ring.nope -->", "ring.py defines no Ring.nope"),
        ("<!-- code: ring.py add lines=3-9 -->", "add of ring.py has 4 lines, not 3-9"),
    ],
)
def test_a_marker_without_its_record_is_told(lesson, marker, told):
    lesson.write_text(f"{marker}<!-- end -->\n")
    with pytest.raises(RunError, match=told):
        generated.regenerate(lesson)


def test_what_was_printed_replaces_the_output_block_and_nothing_else(lesson, monkeypatch):
    monkeypatch.setattr("distlab.lab.lessons.repo_root", lambda: lesson.parent)
    (block,) = read_blocks(lesson)
    recording.show(block, f"new\n{repo_root()}/build/x\n")
    assert lesson.read_text() == LESSON.replace("```output\nold\n", "```output\nnew\nbuild/x\n")


def test_an_output_keeps_the_free_words_that_it_still_needs(lesson, monkeypatch):
    monkeypatch.setattr("distlab.lab.lessons.repo_root", lambda: lesson.parent)
    lesson.write_text(LESSON.replace("```output\n", "```output free=sample,verdict\n"))
    (block,) = read_blocks(lesson)
    recording.show(block, "a sample: x\nverdict: good\n")
    (block,) = read_blocks(lesson)
    assert block.free == ("verdict",) and "```output free=verdict\na sample" in lesson.read_text()
    recording.show(block, "nothing\n")
    assert "```output\nnothing\n" in lesson.read_text()


def test_minutes_are_those_of_the_records():
    one = chapter("1")
    total = sum(record.load(path)["seconds"] for path in one.records())
    assert sum(listing.recorded_minutes(one).values()) == pytest.approx(total / 60, abs=0.2)


def test_ci_installs_missing_packages_as_root_on_debian_only(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(testing, "missing_system_packages", lambda: ["chromium"])
    monkeypatch.setattr(testing, "install_line", lambda names: f"apt-get install -y {names[0]}")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda step, **_: ran.append(step) or subprocess.CompletedProcess(step, 0),
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    testing.install_system_packages()
    assert ran == [] and "Install: apt-get install -y chromium" in capsys.readouterr().out
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    testing.install_system_packages()
    assert ran[-1] == ["apt-get", "install", "-y", "chromium"] and ran[0][:2] == [
        "apt-get",
        "update",
    ]


def test_environments_are_set_up_while_the_tests_run(monkeypatch):
    """Of chapter 6: the commands' own, and in CI the tests'; chapter 1 needs none."""
    assert testing.environments([chapter("1")], in_ci=True) == []
    assert testing.environments([chapter("6")], in_ci=False) == ["vllm"]
    wanted = testing.environments([chapter("1"), chapter("6")], in_ci=True)
    assert wanted == ["bench", "triton", "vllm"]
    monkeypatch.delenv("LAB_TEST_ENVIRONMENTS", raising=False)  # of the suite that this is part of
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    testing.set_up_meanwhile([])
    assert not started and "LAB_TEST_ENVIRONMENTS" not in os.environ
    testing.set_up_meanwhile(wanted)
    assert [command[-4:] for command in started] == [["env", *wanted]]
    assert os.environ["LAB_TEST_ENVIRONMENTS"].split() == wanted


@pytest.mark.parametrize(
    ("words", "builds"),
    [(["-x"], True), (["tests/lab/test_shape.py::x"], False), (["-k", "no/such.py"], True)],
)
def test_a_few_chosen_tests_build_what_they_need_themselves(words, builds, monkeypatch):
    """The folder of one chapter's environment has gigabytes."""
    told, ran = [], []
    monkeypatch.setattr(testing, "set_up_meanwhile", lambda names, start: told.append(start))
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(command))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(Path.cwd())
    testing.main(["--", *words])
    assert told == [builds] and ran[0][-len(words) :] == words


def test_a_file_of_tests_comes_after_two_hyphens(capsys):
    status, _, err = command("test", "tests/lab/test_shape.py", capsys=capsys)
    assert status == 2 and err.count("\n") == 1
    assert err.endswith("scripts/lab.py test -- tests/lab/test_shape.py\n")
