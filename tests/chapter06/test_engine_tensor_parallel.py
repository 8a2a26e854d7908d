"""Two processes give what one gives; a lost one is noticed; none outlives its driver."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from distlab.errors import RunError
from paged_engine import parallel
from paged_engine.batch import Batch, Chunk
from paged_engine.config import EngineConfig
from paged_engine.request import Request
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams
from small_models import Greedy, random_prompts, runner_of, save_random_model

LIMIT_S = 30.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, which only one process may add."""
    target = tmp_path_factory.mktemp("model") / "llama"
    return save_random_model(target, attention_bias=True, mlp_bias=True)


def one_token(runner: ModelRunner) -> torch.Tensor:
    sequence = Request("a", [1, 2, 3], SamplingParams()).sequences[0]
    sequence.block_table = [0]
    return runner.execute(Batch([Chunk.of(sequence, 0, 3)]))


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of the processes {pids} some still run"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_two_processes_equal_one_and_a_lost_one_is_noticed(directory: Path) -> None:
    prompts = random_prompts(12, shared=30)
    alone = runner_of(directory, num_blocks=60, block_size=8)
    expected, logits = Greedy(alone, 60, True, 50).generate(prompts, 8), one_token(alone)
    both = runner_of(directory, num_blocks=60, tensor_parallel=2, block_size=8)
    try:
        assert both.block_bytes == alone.block_bytes
        assert both.shard.cache.data.nbytes * 2 == alone.shard.cache.data.nbytes
        assert Greedy(both, 60, True, 50).generate(prompts, 8) == expected
        torch.testing.assert_close(one_token(both), logits, rtol=1e-4, atol=1e-4)

        (worker,) = [worker.process for worker in both.group.workers]
        os.kill(worker.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RunError, match="process 1 ended with status -9"):
            one_token(both)
        assert time.monotonic() - started < LIMIT_S
        with pytest.raises(RunError, match="has failed"):
            one_token(both)
    finally:
        both.close()
    assert not torch.distributed.is_initialized()
    assert not _lives(worker.pid)


def test_a_worker_that_does_not_answer(directory: Path) -> None:
    config = EngineConfig(
        directory, "float32", "cpu", block_size=8, max_model_len=64, tensor_parallel=2
    )
    group = parallel.TensorParallel(config, limit_s=5.0)
    try:
        group.allocate(4)
        group.workers[0].process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError, match="step of the tensor-parallel model failed"):
            group.run(Batch([Chunk(0, [1], [0], True)]))
    finally:
        group.close()
    assert not _lives(group.workers[0].process.pid)


def test_a_worker_that_cannot_load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="could not start: process 1 ended with status 1"):
        runner_of(directory, num_blocks=4, tensor_parallel=2)


DRIVER = """
import sys, time
from paged_engine.config import EngineConfig
from paged_engine.runner import ModelRunner
runner = ModelRunner(EngineConfig(sys.argv[1], num_blocks=4, tensor_parallel=2))
print(*[worker.process.pid for worker in runner.group.workers], flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_killed_driver(directory: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory)], stdout=subprocess.PIPE, text=True
    )
    with driver:
        workers = [int(pid) for pid in driver.stdout.readline().split()]
        driver.kill()
    assert len(workers) == 1
    wait_until_gone(workers)
