"""Running a block: what it amounts to, and servers that live as long as their section."""

import json
import os
import socket
import sys
import threading
from pathlib import Path

import psutil
import pytest

from distlab import record
from distlab.errors import RunError
from distlab.lab import blocks, lessons
from distlab.lab.blocks import Servers, judge, run_block, unmet_need
from distlab.lab.lessons import Block, read_blocks
from distlab.process import Completed

SCRIPT = "chapter01-introduction/code/x.py"
CHECKED = {"checks": [{"ok": True}], "metrics": {}, "comparisons": {}}
MEASURED = {"checks": [], "metrics": {"speed": {"value": 1}}, "comparisons": {}}
EMPTY = {"checks": [], "metrics": {}, "comparisons": {}}


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, without GPUs."""
    for module in (blocks, lessons):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(blocks, "gpu_count", lambda: 0)
    monkeypatch.setattr(blocks, "READY_TIMEOUT_S", 10.0)
    monkeypatch.setattr("distlab.process.GRACE_S", 0.5)
    return tmp_path


def block(text: str = f"python {SCRIPT}", **words) -> Block:
    return Block(lessons.repo_root() / "main.md", 3, 1, text, **words)


def ended(status: int = 0, stdout: str = "", stderr: str = "", left: tuple[str, ...] = ()):
    return Completed(status, stdout, stderr, 1.0, left)


@pytest.mark.parametrize(
    ("one", "completed", "records", "result", "why"),
    [
        (block, ended(stdout="check: x … ok (1)\n"), [], "ran", ""),
        (block, ended(), [CHECKED], "ran", ""),
        (block, ended(), [EMPTY, MEASURED], "ran", ""),
        (block, ended(stdout="hello\n"), [], "failed", "printed no check and no measurement"),
        (block, ended(), [EMPTY], "failed", "printed no check and no measurement"),
        (
            block,
            ended(1, "check: x … FAILED (2)\n"),
            [],
            "failed",
            "exit status 1, expected 0\ncheck",
        ),
        (block, ended(124), [CHECKED], "failed", "exit status 124, expected 0"),
        (block, ended(77, "SKIPPED: no GPU\n"), [], "skipped", "no GPU"),
        (block, ended(77, "no word of why\n"), [], "failed", "bare 77"),
        (
            block,
            ended(0, "check: x … ok", left=("7: sleep 9",)),
            [],
            "failed",
            "running: 7: sleep 9",
        ),
        (lambda: block(exit=2), ended(2, "", "error: no\n"), [], "ran", ""),
        (lambda: block(exit=2), ended(0, "check: x … ok\n"), [], "failed", "status 0, expected 2"),
        (lambda: block("lab list"), ended(stdout="chapter 1\n"), [], "ran", ""),
        (lambda: block("lab list"), ended(stdout=" \n"), [], "failed", "printed no check"),
    ],
)
def test_judge(one, completed, records, result, why):
    judged, reason = judge(one(), completed, records)
    assert judged == result
    assert why in reason and bool(reason) == bool(why)


def test_a_failure_shows_the_end_of_what_was_printed():
    _, reason = judge(
        block(), ended(1, "".join(f"line {n}\n" for n in range(99)), "error: x\n"), []
    )
    assert reason.splitlines()[1] == "line 75" and reason.splitlines()[-1] == "error: x"


@pytest.mark.parametrize(
    ("words", "backend", "gpus", "need"),
    [
        ({}, "gloo", 0, None),
        ({"gpus": 1}, "gloo", 0, "needs 1 GPU(s), 0 here"),
        ({"gpus": 1}, "gloo", 1, None),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "gloo", 0, None),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "nccl", 2, "needs 4 GPU(s), 2 here"),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "nccl", 4, None),
        ({"text": "# eight machines\nx", "norun": True}, "gloo", 8, "norun: eight machines"),
    ],
)
def test_unmet_need(words, backend, gpus, need):
    assert unmet_need(block(**words), backend, gpus) == need


def test_a_block_runs_in_the_checkout_with_its_preset_and_folder(checkout):
    text = (
        'pwd; echo "$LAB_PRESET $LAB_RECORD_DIR [$CUDA_VISIBLE_DEVICES]"; python -V; echo err >&2'
    )
    outcome = run_block(block(text), "smoke", checkout / "records")
    assert outcome.result == "ran", outcome.reason
    version = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    expected = [str(checkout), f"smoke {checkout}/records []", version]
    assert outcome.stdout.splitlines() == expected
    assert outcome.stderr == "err\n" and outcome.seconds > 0


@pytest.mark.parametrize("text", ["false\necho on", "echo $NO_SUCH_VARIABLE", "false | cat"])
def test_the_first_failing_line_of_a_block_fails_it(text, checkout):
    outcome = run_block(block(text), "smoke", checkout / "records")
    assert outcome.result == "failed" and "exit status 1" in outcome.reason


def test_a_blocks_records_are_collected_and_old_ones_are_not(checkout):
    records = checkout / "records"
    records.mkdir()
    record.save({"schema": 1, **MEASURED, "run": "old"}, records / "old.json")
    (checkout / "new.json").write_text(json.dumps({"schema": 1, **MEASURED, "run": "new"}))
    half = 'echo "{" > "$LAB_RECORD_DIR/.x.json.tmp123.json"'  # a script was killed while writing
    text = f'cp new.json "$LAB_RECORD_DIR"\n{half}\n# {SCRIPT}'
    outcome = run_block(block(text), "smoke", records)
    assert outcome.result == "ran", outcome.reason
    assert [made["run"] for made in outcome.records] == ["new"]


def test_a_block_that_needs_what_is_not_here_is_not_started(checkout):
    outcome = run_block(block("touch started", gpus=1), "smoke", checkout / "records")
    assert (outcome.result, outcome.reason) == ("skipped", "needs 1 GPU(s), 0 here")
    assert not (checkout / "started").exists()


def test_a_block_past_its_limit_fails_and_is_ended(checkout):
    outcome = run_block(block("sleep 60 | cat"), "smoke", checkout / "records", timeout_s=0.5)
    assert outcome.result == "failed" and "exit status 124" in outcome.reason


LESSON = """# One

```bash background ready=http://127.0.0.1:{port}/page.txt
echo x >> starts
python -m http.server {port} --bind 127.0.0.1
```

```bash
python -c "from urllib.request import urlopen as get; \\
    print(get('http://127.0.0.1:{port}/page.txt').read().decode())"
```

# Two

```bash
echo alone
```
"""


@pytest.fixture
def lesson(checkout):
    (checkout / "page.txt").write_text("hello\n")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    path = checkout / "main.md"
    path.write_text(LESSON.format(port=port))
    return read_blocks(path)


def servers_running() -> list[int]:
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "http.server" in process.cmdline()
    ]


def test_a_server_lives_from_its_block_to_the_end_of_its_section(lesson, checkout, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a user's proxy has no say in it
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server, asks, alone = lesson
    with Servers("smoke", checkout / "records") as servers:
        servers.start_for(asks)  # it starts what its section needs
        assert run_block(asks, "smoke", checkout / "records").stdout.strip() == "hello"
        servers.start_for(server)
        servers.start_for(asks)
        assert len(servers_running()) == 1
        assert (checkout / "starts").read_text() == "x\n"
        servers.start_for(alone)
        assert servers_running() == []


def test_a_server_ends_with_the_lesson_and_after_an_error(lesson, checkout):
    with pytest.raises(ZeroDivisionError), Servers("smoke", checkout / "records") as servers:
        servers.start_for(lesson[0])
        assert len(servers_running()) == 1
        raise ZeroDivisionError
    assert servers_running() == []


def test_a_server_that_ends_before_it_is_ready_says_why(checkout):
    broken = 'echo "no such model" >&2; exit 3'
    path = checkout / "main.md"
    path.write_text(f"```bash background ready=http://127.0.0.1:9/\n{broken}\n```\n")
    with (
        Servers("smoke", checkout / "records") as servers,
        pytest.raises(RunError, match="main.md:1: the server ended before.*no such model"),
    ):
        servers.start_for(read_blocks(path)[0])


def test_a_server_that_never_answers_is_ended(checkout, monkeypatch):
    monkeypatch.setattr(blocks, "READY_TIMEOUT_S", 0.5)
    path = checkout / "main.md"
    path.write_text("```bash background ready=http://127.0.0.1:9/\nexec sleep 321\n```\n")
    with Servers("smoke", checkout / "records") as servers:
        with pytest.raises(RunError, match="http://127.0.0.1:9/ did not answer within 0.5 s"):
            servers.start_for(read_blocks(path)[0])
        assert not any("321" in p.cmdline() for p in psutil.Process().children(recursive=True))


def test_a_stranger_at_the_servers_address_is_not_taken_for_it(lesson, checkout):
    with Servers("smoke", checkout / "records") as first:
        first.start_for(lesson[0])
        with (
            Servers("smoke", checkout / "records") as second,
            pytest.raises(RunError, match="answers before the server is started; end it"),
        ):
            second.start_for(lesson[0])
        assert len(servers_running()) == 1


def test_an_answer_that_is_no_http_is_no_answer(checkout):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        one = block(ready=f"http://127.0.0.1:{stranger.getsockname()[1]}/", background=True)

        def babble() -> None:
            connection, _ = stranger.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail ready\r\n")
            connection.close()

        thread = threading.Thread(target=babble)
        thread.start()
        assert not blocks._answers(one)
        thread.join(5)


def test_core_is_the_python_that_runs_the_lab():
    assert blocks.environment_python("core") == Path(sys.executable)
    assert os.access(blocks.environment_python("core"), os.X_OK)
