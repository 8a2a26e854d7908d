"""A warm command is the cold one in all that a lesson's command can see, but for its start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distlab.hardware import driver_present
from distlab.lab.warm import VARIABLE, warm_commands
from distlab.process import job, run_command

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or driver_present(), reason="with a GPU, commands start cold"
)
LIMIT_S = 120


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("with space")
    with warm_commands(folder):
        yield folder


def run(folder: Path, line: str, **variables: str):
    """The line in a shell that finds the warm commands; told by `warm` whether a fork ran it."""
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return run_command(["bash", "-c", line], env, timeout_s=LIMIT_S)


IS_WARM = "import sys; warm = sys.orig_argv[2:3] == ['distlab.lab.warm']; "


@pytest.mark.parametrize(
    "line",
    [
        "python {script} a 'b c'",
        "python -u {script} a 'b c'",
        "python - a 'b c' < {script}",
        "cd $(dirname {script}) && python -m shown a 'b c'",
        "python -c \"$(cat {script})\" a 'b c'",
    ],
)
def test_what_it_runs_and_how_it_ends_are_those_of_python(warm, tmp_path, line):
    script = tmp_path / "shown.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv, sys.path[:1], __name__, os.getcwd(), os.environ.get('FOR_IT'))\n"
        "print(globals().get('__file__'), file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    line = line.format(script=script)
    forked = run(warm, line, FOR_IT="x")
    env = {**os.environ, "FOR_IT": "x"}
    cold = run_command(["bash", "-c", line], env, timeout_s=LIMIT_S)
    assert (forked.status, forked.stdout, forked.stderr) == (7, cold.stdout, cold.stderr)
    assert forked.left_running == ()


def test_a_fork_runs_it_with_torch_loaded(warm):
    done = run(warm, f"python -c \"{IS_WARM} print(warm, 'torch' in sys.modules)\"")
    assert done.stdout.split() == ["True", "True"]


def test_the_ranks_of_torchrun_are_forks_too(warm, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(IS_WARM + "import os; print(warm, 'rank', os.environ['RANK'], flush=True)")
    done = run(warm, f"torchrun --nproc_per_node=2 '{script}'")
    assert sorted(done.stdout.splitlines()) == ["True rank 0", "True rank 1"]


@pytest.mark.parametrize(
    ("before", "variables"),
    [
        ("", {"ATEN_CPU_CAPABILITY": "default"}),  # read when torch is imported
        ("", {"PYTHONPATH": "/"}),
        ("ulimit -d 4000000; ", {}),  # a limit of the caller's
        ("taskset -c 0 ", {}),
    ],
)
def test_what_a_fork_cannot_stand_for_starts_cold(warm, before, variables):
    if before.startswith("taskset") and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: no other affinity")
    done = run(warm, f'{before}python -c "{IS_WARM} print(warm)"', **variables)
    assert done.stdout.strip() == "False", done.stderr


def test_random_numbers_differ_from_fork_to_fork(warm):
    draw = "import random, numpy; print(random.random(), numpy.random.random())"
    assert run(warm, f'python -c "{draw}"').stdout != run(warm, f'python -c "{draw}"').stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_fork_and_its_caller_alike(warm, tmp_path, number):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open('{pid_file}', 'w').write(str(os.getpid())); time.sleep(100)"
    process = subprocess.Popen([warm / "python", "-c", code], stderr=subprocess.DEVNULL)
    pid = int(waited_for(pid_file))
    process.send_signal(number)
    assert process.wait(20) == -number
    wait_until_gone(pid)


def test_a_fork_carries_its_jobs_mark_and_ends_with_it(warm, tmp_path):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open('{pid_file}', 'w').write(str(os.getpid())); time.sleep(100)"
    with job([str(warm / "python"), "-c", code], os.environ, tmp_path):
        fork = psutil.Process(int(waited_for(pid_file)))
        assert code in fork.cmdline()
    wait_until_gone(fork.pid)


def test_nothing_is_left_when_the_warm_process_goes(tmp_path):
    with warm_commands(tmp_path):
        assert os.environ[VARIABLE] == str(tmp_path)
        command = [tmp_path / "python", "-c", "import time; time.sleep(100)"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
    assert process.wait(20) != 0
    assert VARIABLE not in os.environ
    done = subprocess.run([tmp_path / "python", "-c", "print(5)"], capture_output=True, text=True)
    assert done.stdout == "5\n"  # cold


def waited_for(path: Path) -> str:
    end = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text()


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < end
        time.sleep(0.02)
