"""Chapter 1's prepare_data.py: a mistake or a failure is one line, and leaves nothing behind."""

import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

import prepare_data
from distlab import script
from distlab.files import repo_root

SCRIPT = repo_root() / "chapter01-introduction" / "code" / "prepare_data.py"
SMOKE = ["--preset", "smoke"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the script in this process; its status, and its lines on stderr."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(*flags):
        status = script.status_of(lambda: prepare_data.main([*SMOKE, *flags]))
        assert not list(tmp_path.glob("prepare_data-*"))
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "/no/such/folder"], "--corpus /no/such/folder is not a folder"),
        (["--vocab-size", "100"], "--vocab-size 100 leaves no room"),
        (["--seq-len", "1000000"], "--seq-len 1000000 needs 1000001 tokens"),
        (["--ranks", "3"], "--batch-size 8 is not divisible by --ranks 3; use --batch-size 6"),
        (["--out", __file__], f"--out {__file__} is a file"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(run, flags, message):
    status, [line] = run(*flags)
    assert status == 2
    assert line.startswith(f"error: {message}")


def test_a_disk_that_fills_up_is_one_line_with_status_1(run, tmp_path):
    run("--out", str(tmp_path / "whole"))  # so that the tokenizer is in the cache
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status, [line] = run("--out", str(tmp_path / "kept"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert line.startswith(f"error: cannot write {tmp_path}/kept/train_")
    partial = [p for p in (tmp_path / "kept").glob("*.bin") if p.stat().st_size == 20_000]
    assert partial == []


def test_out_keeps_the_shards_and_finds_them_again(run, tmp_path, capsys):
    assert run("--out", str(tmp_path / "kept")) == (0, [])
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.bin")}
    assert run("--out", str(tmp_path / "kept")) == (0, [])
    assert first == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "kept").glob("*.bin")}


def test_ctrl_c_ends_the_workers_too():
    command = [sys.executable, str(SCRIPT), *SMOKE, "--workers", "3"]
    process = subprocess.Popen(
        [*command, "--corpus-mb", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that runs in the background of a shell has it ignored, and would hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (workers := tokenizing(process)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "error: interrupted", errors
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []


def tokenizing(process):
    """The worker processes that it has started, so far."""
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        children = [c for c in children if any("distlab.data" in word for word in c.cmdline())]
    return children
