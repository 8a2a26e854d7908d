"""The chapter's sbatch files on a real Slurm: a job ends, is preempted, loses a node; a sweep.

All jobs are submitted at once, and each test waits for its own: Slurm takes half a minute to give a
node up, and nearly that to run a requeued job again.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distlab.cluster import VirtualCluster, unavailable
from distlab.files import repo_root

CONFIGS = repo_root() / "chapter03-ddp" / "configs"
LIMIT_S = 150.0  # of waits on a machine that may be busy with other things
STEPS = 900
TRAINING = [
    *("--preset", "smoke", "--device", "cpu"),
    *("--steps", str(STEPS), "--eval-every", "300"),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]


@dataclass(frozen=True)
class Job:
    number: str
    output: Path
    checkpoints: Path

    def told(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


class Jobs:
    """Slurm on four nodes, with the jobs that the tests look at; node3 loses its power."""

    def __init__(self, cluster: VirtualCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.undisturbed = self.submit("undisturbed", "--nodelist=node0,node1")
        self.preempted = self.submit("preempted", "--nodelist=node0,node1")
        self.bereft = self.submit("bereft", "--nodelist=node2,node3")
        self.wait_for(lambda: has_saved(self.bereft), "a checkpoint of the job on node2 and node3")
        cluster.power_off("node3")
        self.wait_for(lambda: has_saved(self.preempted), "a checkpoint of the job to preempt")
        self.run("scancel", "--signal=USR1", "--batch", self.preempted.number)
        self.sweep = self.submit_sweep()

    def submit(self, name: str, *options: str) -> Job:
        output, checkpoints = self.folder / f"{name}.out", self.folder / name
        file = str(CONFIGS / "train_ddp.sbatch")
        flags = [*TRAINING, "--checkpoint-dir", str(checkpoints)]
        command = ["sbatch", "--parsable", *options, "-o", str(output), file, *flags]
        return Job(self.run(*command).strip(), output, checkpoints)

    def submit_sweep(self) -> list[Path]:
        """Two of the sweep's four tasks; their outputs."""
        output = self.folder / "sweep_%a.out"
        file = str(CONFIGS / "train_ddp_array.sbatch")
        flags = [*TRAINING, "--steps", "60", "--checkpoint-dir", str(self.folder / "sweep")]
        self.run("sbatch", "--array=1-2", "-w", "node1", "-o", str(output), file, *flags)
        return [self.folder / f"sweep_{task}.out" for task in (1, 2)]

    def run(self, *command: str) -> str:
        assert self.cluster.slurm is not None
        done = self.cluster.slurm.run(command, env={"OMP_NUM_THREADS": "1"}, timeout_s=LIMIT_S)
        assert done.status == 0, f"{command} ended with {done.status}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_until_done(self, job: Job) -> dict[str, str]:
        """What Slurm says of `job` after its end."""
        self.wait_for(lambda: self.shown(job)["JobState"] in ENDED, f"job {job.number} ends", job)
        return self.shown(job)

    def shown(self, job: Job) -> dict[str, str]:
        told = self.run("scontrol", "show", "job", job.number)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait_for(self, condition: Callable[[], bool], what: str, job: Job | None = None) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            said = f": {job.told()[-2000:]}" if job else ""
            assert time.monotonic() < deadline, f"not within {LIMIT_S:.0f} s: {what}{said}"
            time.sleep(0.5)  # each look at Slurm is a process or two


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    if why := unavailable(slurm=True):
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    with VirtualCluster(nodes=4, slurm=True) as cluster:
        yield Jobs(cluster, tmp_path_factory.mktemp("jobs"))


def has_saved(job: Job) -> bool:
    return job.checkpoints.is_dir() and any(job.checkpoints.glob("step_*"))


def outcome(job: Job) -> str:
    """The last losses that the job printed."""
    return re.findall(rf"^step {STEPS}: .*$", job.told(), re.M)[-1]


def test_a_job_on_two_nodes_trains_to_its_end(jobs: Jobs) -> None:
    shown = jobs.wait_until_done(jobs.undisturbed)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0"), jobs.undisturbed.told()
    assert "job: 2 rank(s), gloo on cpu" in jobs.undisturbed.told()
    assert "verdict: held-out loss" in jobs.undisturbed.told()


def test_two_tasks_of_the_sweep_have_two_learning_rates(jobs: Jobs) -> None:
    def ended() -> list[str]:
        texts = [path.read_text() if path.exists() else "" for path in jobs.sweep]
        return [text for text in texts if "verdict: " in text]

    jobs.wait_for(lambda: len(ended()) == 2, "two tasks end")
    rates = [re.findall(r"^sweep: task \d has --learning-rate (\S+)$", t, re.M) for t in ended()]
    assert rates == [["3e-3"], ["6e-3"]]


def test_a_preempted_job_saves_goes_back_into_the_queue_and_ends_as_if_undisturbed(
    jobs: Jobs,
) -> None:
    shown = jobs.wait_until_done(jobs.preempted)
    told = jobs.preempted.told()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), told
    saved = re.findall(r"^preempted: checkpoint at step (\d+)$", told, re.M)
    assert len(saved) == 1
    assert f"job: resumed from {jobs.preempted.checkpoints}/step_{int(saved[0]):08d}," in told
    assert outcome(jobs.preempted) == outcome(jobs.undisturbed)


def test_a_job_that_lost_a_node_goes_on_from_its_checkpoint_when_the_node_is_back(
    jobs: Jobs,
) -> None:
    lost = jobs.bereft
    jobs.wait_for(lambda: jobs.shown(lost)["Restarts"] == "1", "the job is put back", lost)
    jobs.cluster.power_on("node3")
    shown = jobs.wait_until_done(lost)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), lost.told()
    assert "preempted: " not in lost.told()
    assert f"job: resumed from {lost.checkpoints}/step_0000" in lost.told()
    assert outcome(lost) == outcome(jobs.undisturbed)


@pytest.mark.parametrize(
    ("status", "restarts", "goes_back"),
    [(0, "", False), (1, "", True), (1, "2", True), (1, "3", False), (2, "", False)],
)
def test_a_failed_training_goes_back_into_the_queue_three_times(
    tmp_path: Path, status: int, restarts: str, goes_back: bool
) -> None:
    """The file's own shell, with stand-ins for Slurm's commands: a real requeue takes a minute."""
    asked = tmp_path / "asked"
    for name, does in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" >>{asked}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_RESTART_COUNT": restarts}  # fmt: skip
    done = subprocess.run(["bash", str(CONFIGS / "train_ddp.sbatch")], env=env, timeout=60)
    assert done.returncode == status
    assert ("requeue 7" in asked.read_text()) == goes_back
