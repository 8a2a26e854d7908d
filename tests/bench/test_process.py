"""Nothing that a command started outlives it, whatever ends it."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from distlab import process
from distlab.process import marked, run_command
from processes import running_below

pytestmark = pytest.mark.slow  # most wait for a limit to pass

# Each writes the ids of what it starts into the file PIDS, so that a test can look for them.
TREE = """
import os, subprocess, sys, time
def note(pid): open(os.environ["PIDS"], "a").write(f"{pid}\\n")
note(os.getpid())
note(subprocess.Popen(["sleep", "300"]).pid)                             # a child
note(subprocess.Popen(["sleep", "301"], start_new_session=True).pid)     # in a session of its own
if os.fork() == 0:                                                       # a daemon, forked twice
    os.setsid()
    if os.fork() == 0:
        note(os.getpid())
        time.sleep(302)
    os._exit(0)
os.wait()
open(os.environ["PIDS"] + ".complete", "w").close()
"""
DEAF = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]"


@pytest.fixture
def pids(tmp_path, monkeypatch):
    path = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(path))
    return path


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(process, "GRACE_S", 0.5)


def alive(path: Path) -> list[int]:
    """The noted processes that still run; a zombie does not."""
    found = []
    for pid in map(int, path.read_text().split()):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def eventually(holds, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return bool(holds())


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_status_output_and_errors_are_kept_apart():
    done = run_command(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert done.left_running == () and 0 <= done.seconds < 10


def test_environment_directory_and_no_standard_input(tmp_path):
    command = ["sh", "-c", 'echo "$COLOUR"; pwd; cat']
    done = run_command(command, env={**os.environ, "COLOUR": "blue"}, cwd=tmp_path, timeout_s=10)
    assert (done.status, done.stdout) == (0, f"blue\n{tmp_path}\n")


def test_a_program_that_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_command(["no-such-program"])


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["polite", "deaf to signals"])
def test_past_the_limit_the_whole_tree_is_ended(deaf, pids):
    started = time.monotonic()
    done = run_command(python(f"{deaf}{TREE}time.sleep(303)"), timeout_s=1.5)
    assert done.status == 124
    assert len(pids.read_text().split()) == 4 and alive(pids) == []
    assert time.monotonic() - started < 12


def test_what_a_command_leaves_running_is_named_and_ended(pids):
    done = run_command(python(TREE), timeout_s=30)
    assert done.status == 0
    assert alive(pids) == []
    assert len(done.left_running) == 3
    assert any("sleep 301" in line for line in done.left_running)


def test_programs_that_set_their_title_keep_their_mark():
    """setproctitle's own switch, by which it leaves /proc/PID/environ as it is."""
    assert run_command(["sh", "-c", "echo $SPT_NOENV"]).stdout == "1\n"


RESTLESS = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
while True:  # each generation starts the next and ends
    open(os.environ["PIDS"], "w").write(f"{os.getpid()}\\n")
    if os.fork(): os._exit(0)
    os.setsid()
    time.sleep(0.3)
"""


def test_a_process_that_moves_while_the_list_is_read_is_found(monkeypatch):
    lists = iter([[1], [1, 2], [1, 2]])
    listed = lambda: [SimpleNamespace(pid=pid) for pid in next(lists)]  # noqa: E731
    monkeypatch.setattr(process.psutil, "process_iter", listed)
    monkeypatch.setattr(process, "_has_mark", lambda seen, mark: seen.pid == 2)
    assert [found.pid for found in marked("mark")] == [2]


def test_a_process_that_keeps_moving_is_caught(pids):
    done = run_command(python(RESTLESS), timeout_s=5)
    assert done.left_running
    assert eventually(lambda: alive(pids) == [], 2)
    first = pids.read_text()
    time.sleep(0.7)
    assert pids.read_text() == first


def test_a_straggler_that_ends_by_itself_is_not_held_against_the_command():
    assert run_command(["sh", "-c", "sleep 0.2 & exit 0"]).left_running == ()


def test_a_flood_of_output_does_not_block():
    flood = (
        "import sys; [print('x' * 99) or print('y' * 99, file=sys.stderr) for _ in range(50000)]"
    )
    done = run_command(python(flood), timeout_s=30)
    assert (done.status, len(done.stdout), len(done.stderr)) == (0, 5_000_000, 5_000_000)


def test_bytes_that_are_no_text_do_not_end_the_reading():
    code = "import os; os.write(1, b'before \\xff\\xfe after\\n'); os.write(1, b'end')"
    done = run_command(python(code))
    assert done.stdout == "before \ufffd\ufffd after\nend"


def test_echo_shows_the_lines_while_they_come(capsys):
    run_command(["sh", "-c", "echo out; echo err >&2"], echo=True)
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_job_may_run_in_a_thread(pids):
    results: list[process.Completed] = []
    thread = threading.Thread(
        target=lambda: results.append(run_command(python(TREE + "time.sleep(303)"), timeout_s=1))
    )
    thread.start()
    thread.join(20)
    assert results[0].status == 124 and alive(pids) == []


def test_a_job_ends_when_its_block_is_left_by_an_error(pids):
    command = python(TREE + "time.sleep(303)")
    with (
        pytest.raises(ZeroDivisionError),
        process.job(command, os.environ, Path.cwd()) as running,
    ):
        assert eventually(Path(f"{pids}.complete").exists)
        assert len(marked(running.mark)) == 4
        raise ZeroDivisionError
    assert alive(pids) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_whose_guardian_cannot_start_is_ended(monkeypatch):
    """As under `ulimit -u`, which lets the command begin and then no more."""
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def one_only(*args, **kwargs):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(popen(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", one_only)
    with pytest.raises(BlockingIOError):
        run_command(["sleep", "303"])
    started[0].wait(10)  # its status went to psutil


PARENT = """
import sys
from distlab import process
process.GRACE_S = 0.5
process.run_command([sys.executable, "-c", sys.argv[1]], timeout_s=60)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, -signal.SIGINT),  # as Python ends after KeyboardInterrupt
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, -signal.SIGHUP),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["Ctrl-C", "SIGTERM", "terminal closed", "SIGKILL"],
)
def test_nothing_is_left_when_the_parent_is_ended(number, status, pids):
    parent = subprocess.Popen(
        [*python(PARENT), TREE + "time.sleep(303)"], stderr=subprocess.DEVNULL
    )
    assert eventually(Path(f"{pids}.complete").exists)
    parent.send_signal(number)
    assert parent.wait(timeout=60) == status
    assert eventually(lambda: alive(pids) == [])
    assert len(pids.read_text().split()) == 4


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_job_of_a_process_that_ignores_sigint_is_ended_by_it(in_a_thread):
    code = f"""
import signal, threading, time
from distlab import process
process.GRACE_S = 60.0
def run():
    began = time.monotonic()
    assert process.run_command(["sleep", "300"], timeout_s=0.5).status == 124
    assert time.monotonic() - began < 30, "sleep was deaf to SIGINT"
thread = threading.Thread(target=run)
thread.start() if {in_a_thread} else run()
if {in_a_thread}:
    thread.join()
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
print("done")
"""
    deaf = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *python(code)]
    done = subprocess.run(deaf, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_job_within_a_job_is_ended_by_the_outer_one(pids):
    inner = [*python(PARENT), DEAF + TREE + "time.sleep(303)"]
    hang_inner_parent = (
        "import os, signal, subprocess, sys, time\n"
        "inner = subprocess.Popen(sys.argv[1:])\n"
        "while not os.path.exists(os.environ['PIDS'] + '.complete'): time.sleep(0.05)\n"
        "inner.send_signal(signal.SIGSTOP)\n"  # hung: it ends nothing itself
        "time.sleep(303)"
    )
    done = run_command([*python(hang_inner_parent), *inner], timeout_s=3)
    assert done.status == 124
    assert len(pids.read_text().split()) == 4 and alive(pids) == []


def test_guardians_end_with_their_jobs():
    before = set(running_below("distlab.guardian"))
    for _ in range(2):
        run_command(["true"])
    assert set(running_below("distlab.guardian")) <= before


def test_a_process_that_has_ended_and_is_not_yet_waited_for_runs_no_more():
    waiting = [sys.executable, "-c", "input()", "a word"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as child:
        assert running_below("a word") == [child.pid]
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert running_below("a word") == []
