"""Run one block of a lesson, and judge what it did: for `lab run`, `lab record` and the tests."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlab import cluster, record
from distlab.errors import RunError
from distlab.files import repo_root
from distlab.host import own_address
from distlab.lab.lessons import Block
from distlab.lab.warm import VARIABLE as WARM
from distlab.process import Completed, run_command
from distlab.script import SKIPPED

RECORDS = "[!.]*.json"  # without the temporary file of a script that was killed while writing


@dataclass
class Outcome:
    """What became of one block: ran, failed or skipped, and why."""

    block: Block
    backend: str
    result: str
    reason: str = ""
    seconds: float = 0.0
    stdout: str = ""
    stderr: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)


def gpu_count() -> int:
    """GPUs that torch can use here; torch is asked only where there is a driver."""
    from distlab.hardware import has_cuda

    if not has_cuda():
        return 0
    import torch

    return torch.cuda.device_count()


def unmet_need(block: Block, backend: str, gpus: int) -> str | None:
    """Why this machine cannot run `block` with `backend`, or None."""
    if block.norun:
        return f"norun: {block.reason}"
    ranks = block.ranks * max(1, block.nodes)
    wanted = max(block.gpus, ranks) if backend == "nccl" else block.gpus
    if wanted > gpus:
        return f"needs {wanted} GPU(s), {gpus} here"
    if block.nodes:
        return cluster.unavailable(slurm=block.slurm)
    return None


def run_block(
    block: Block,
    preset: str,
    records: Path,
    backend: str = "gloo",
    timeout_s: float = 600.0,
    echo: bool = False,
) -> Outcome:
    """Run `block`; its scripts write their records into the empty folder `records`.

    With `backend="gloo"` the GPUs are hidden from it, unless the block needs one.
    """
    if (need := unmet_need(block, backend, gpu_count())) is not None:
        return Outcome(block, backend, "skipped", need)
    records.mkdir(parents=True, exist_ok=True)
    for stale in records.glob(RECORDS):
        stale.unlink()
    completed = run_command(
        command_line(block),
        env=block_environment(block, preset, records, backend),
        cwd=repo_root(),
        timeout_s=timeout_s,
        echo=echo,
    )
    made = [record.load(path) for path in sorted(records.glob(RECORDS))]
    result, reason = judge(block, completed, made)
    return Outcome(
        block, backend, result, reason, completed.seconds, completed.stdout, completed.stderr, made
    )


def command_line(block: Block) -> list[str]:
    """What runs `block`: a shell, on each node of a virtual cluster where it asks for nodes, and
    once, with Slurm's commands at hand, where it asks for Slurm."""
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    if not block.nodes:
        return shell
    slurm = ["--slurm"] if block.slurm else []
    lab = [sys.executable, "-m", "distlab.lab"]
    return [*lab, "cluster", "--nodes", str(block.nodes), *slurm, "--", *shell]


def judge(block: Block, completed: Completed, records: list[dict[str, Any]]) -> tuple[str, str]:
    """What a finished block amounts to: (ran | failed | skipped, why)."""
    if completed.left_running:
        return "failed", f"left processes running: {'; '.join(completed.left_running)}"
    if completed.status == SKIPPED:
        lines = [line for line in completed.stdout.splitlines() if line.startswith("SKIPPED: ")]
        return ("skipped", lines[-1].removeprefix("SKIPPED: ")) if lines else ("failed", "bare 77")
    if completed.status != block.exit:
        tail = "\n".join((completed.stdout + completed.stderr).splitlines()[-25:])
        return "failed", f"exit status {completed.status}, expected {block.exit}\n{tail}"
    if block.exit == 0 and not _proves_something(block, completed, records):
        return "failed", "it ended with status 0 but printed no check and no measurement"
    return "ran", ""


def _proves_something(block: Block, completed: Completed, records: list[dict[str, Any]]) -> bool:
    """A chapter's script must check or measure something; the lab's own commands must answer."""
    if not block.scripts:
        return bool(completed.stdout.strip())
    measured = any(made["checks"] or made["metrics"] or made["comparisons"] for made in records)
    return measured or "check: " in completed.stdout


def block_environment(block: Block, preset: str, records: Path, backend: str) -> dict[str, str]:
    """The environment variables that `block` runs under."""
    programs = environment_python(block.env).parent
    warm = [os.environ[WARM]] if block.env == "core" and WARM in os.environ else []
    env = {
        **os.environ,
        "PATH": os.pathsep.join([*warm, str(programs), os.environ.get("PATH", "")]),
        "VIRTUAL_ENV": str(programs.parent),
        "PYTHONUNBUFFERED": "1",
        "LAB_PRESET": preset,
        "LAB_RECORD_DIR": str(records),
    }
    if backend == "gloo" and block.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if block.ranks > 1:
        # What torchrun sets for several ranks, for as many threads in each as there are cores would
        # wait for each other; it opens the output with five lines of warning where it has to.
        env.setdefault("OMP_NUM_THREADS", "1")
        if own_address() is None:  # torchrun would look for itself under its name, for minutes
            env.setdefault("PET_LOCAL_ADDR", "127.0.0.1")
    return env


@functools.cache
def unavailable_environments() -> set[str]:
    """Those that could not be set up by this process: they are not tried again."""
    return set()


def environment_python(env: str) -> Path:
    """The Python of environment `env`, which is set up first where it is not there.

    Raises `RunError` where it cannot be; the second time at once.
    """
    if env == "core":
        return Path(sys.executable)
    if env in unavailable_environments():
        raise RunError(f"the environment {env} could not be set up before")
    script = repo_root() / "scripts" / "lab.py"
    done = subprocess.run([sys.executable, script, "env", env], stdout=subprocess.PIPE)
    if done.returncode:
        unavailable_environments().add(env)
        raise RunError(f"the environment {env} could not be set up; see the lines above")
    return Path(os.fsdecode(done.stdout.splitlines()[-1]))
