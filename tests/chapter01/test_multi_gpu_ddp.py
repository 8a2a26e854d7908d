"""The first distributed run equals one process, notices when it does not, and never hangs."""

import os
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch.distributed as dist

import multi_gpu_ddp
from distlab import script
from distlab.files import repo_root
from distlab.spawning import spawn

SCRIPT = repo_root() / "chapter01-introduction" / "code" / "multi_gpu_ddp.py"
SMOKE = ["--preset", "smoke", "--device", "cpu"]
TIMEOUT_S = 20


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_parameters_equal_one_process_at_the_same_global_batch(world_size):
    checks, tables = spawn(run_script, world_size, SMOKE, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == []
    assert len(checks) == 5
    *parts, step = tables["step"]["rows"]
    # The parts are differences of the same medians, so only rounding keeps them from the sum.
    assert sum(milliseconds for _, milliseconds, _ in parts) == pytest.approx(step[1], rel=1e-9)


@pytest.mark.slow
def test_three_sequences_a_rank_of_an_odd_length_agree_too():
    odd = [*SMOKE, "--batch-size", "6", "--seq-len", "17", "--heads", "2", "--kv-heads", "1"]
    checks, _ = spawn(run_script, 2, odd, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == []


def test_a_gradient_summed_where_a_mean_belongs_is_noticed():
    checks, _ = spawn(run_script, 2, SMOKE, summed_gradients, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == [
        "losses equal one process's",
        "final parameters equal one process's",
    ]


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_one_line_with_status_2():
    ranks = start_ranks(2, ["--batch-size", "7"])
    for process in ranks:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors == "error: --batch-size 7 is not divisible by 2 ranks; use 6 or 8\n"


def test_too_few_steps_for_a_median_are_refused():
    with pytest.raises(script.UsageError, match="--steps 3 gives no median; use 5 or more"):
        multi_gpu_ddp.parse_args(["--preset", "smoke", "--steps", "3"])


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_end_in_time_and_leave_nothing():
    ranks = start_ranks(3, ["--batch-size", "6", "--steps", "100000"])
    wait_for_line(ranks[0], "check: DDP gives all of them rank 0's")
    others = [psutil.Process(process.pid) for process in ranks]
    children = [child for process in others for child in process.children(recursive=True)]
    time.sleep(0.5)  # into the steps
    ranks[1].kill()
    started = time.monotonic()
    for process in (ranks[0], ranks[2]):
        process.communicate(timeout=TIMEOUT_S + 10)
        assert process.returncode == 1
    assert time.monotonic() - started < TIMEOUT_S + 5  # Python's own end takes a second or two
    assert not [child for child in children if child.is_running()]
    ranks[1].communicate()


def run_script(job, argv, change=lambda module: None):
    """The script's own run on this rank: its checks, and its tables."""
    change(multi_gpu_ddp)
    args = multi_gpu_ddp.parse_args(argv)
    with script.run(args) as run:
        multi_gpu_ddp.compare_with_one_process(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.tables


def summed_gradients(module):
    """Make the script's DDP add the ranks' gradients up."""

    def summed(state, bucket: dist.GradBucket):
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    class Summing(module.DDP):
        def __init__(self, model):
            super().__init__(model)
            self.register_comm_hook(None, summed)

    module.DDP = Summing


def start_ranks(world_size, flags):
    """The script as torchrun would start it, but with nobody to end the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job |= {"LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(SCRIPT), *SMOKE, "--timeout", str(TIMEOUT_S), *flags]
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        start(command, env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def wait_for_line(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the script ended before it said {beginning!r}: {process.stderr.read()}")
