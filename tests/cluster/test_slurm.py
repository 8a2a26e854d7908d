"""The Slurm of a virtual cluster schedules, launches, signals and requeues as a real one does."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from distlab.cluster import VirtualCluster, slurm, slurm_conf, unavailable
from distlab.cluster.slurm import Slurm
from distlab.errors import RunError, Skipped
from distlab.lab.__main__ import main
from distlab.process import run_command

LIMIT_S = 90.0  # of waits on a machine that may be busy with other things
pytestmark = pytest.mark.timeout(3 * LIMIT_S)


@dataclass(frozen=True)
class Running:
    """A cluster of four nodes: one job was requeued, another lost the power of its node, node2."""

    slurm: Slurm
    cluster: VirtualCluster
    requeued_output: Path
    lost_job: str
    lost_output: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Slurm takes half a minute for a lost node, and nearly that for a job to run again.

    It does both while the other tests run.
    """
    need_slurm()
    folder = tmp_path_factory.mktemp("running")
    lost_output, requeued_output = folder / "lost.txt", folder / "requeued.txt"
    with VirtualCluster(nodes=4, slurm=True) as cluster:
        assert cluster.slurm is not None
        told = 'echo "restart ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"; '
        requeued_job = submit(
            cluster.slurm,
            told + '[ "$SLURM_RESTART_COUNT" ] || sleep 600',
            *("--nodelist=node1", "--open-mode=append", "-o", str(requeued_output)),
        )
        lost_job = submit(
            cluster.slurm,
            told + "sleep 600",
            *("--exclude=node0,node1", "--exclusive", "--open-mode=append"),
            *("-o", str(lost_output)),
        )
        wait_for(lambda: text_of(lost_output) == "restart 0 on node2\n", "a job runs")
        cluster.power_off("node2")
        wait_for(lambda: text_of(requeued_output) == "restart 0 on node1\n", "the other job runs")
        output_of(cluster.slurm, "scontrol", "requeue", requeued_job)
        yield Running(cluster.slurm, cluster, requeued_output, lost_job, lost_output)


def need_slurm() -> None:
    """Skip without namespaces or Slurm; in CI, which installs what can be had, fail instead."""
    if why := unavailable(slurm=True):
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)


def submit(slurm: Slurm, script: str, *options: str) -> str:
    """Submit a batch script; its job's number."""
    command = ["sbatch", "--parsable", *options, f"--wrap={script}"]
    return output_of(slurm, *command).strip()


def output_of(slurm: Slurm, *command: str, timeout_s: float = LIMIT_S) -> str:
    done = slurm.run(command, timeout_s=timeout_s)
    assert done.status == 0, f"{command} ended with {done.status}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT_S:.0f} s: {what}"
        time.sleep(0.1)


def wait_until_over(slurm: Slurm, job: str) -> None:
    wait_for(lambda: not output_of(slurm, "squeue", "-h", "-j", job).strip(), f"job {job} ends")


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_a_missing_program_is_named_with_the_line_that_installs_it(monkeypatch) -> None:
    installed = {"slurmctld", "srun", "sbatch", "sinfo", "scontrol"}
    monkeypatch.setattr(slurm, "find_program", lambda name: name if name in installed else None)
    why = slurm.unavailable()
    assert why is not None
    assert why.startswith("munged, slurmd of Slurm are missing; ")
    assert why.endswith("munge slurmctld slurmd slurm-client")
    with pytest.raises(Skipped, match="slurmd of Slurm are missing"):
        slurm.start(VirtualCluster(nodes=1))


@pytest.mark.slow
def test_lab_cluster_without_slurm_is_skipped_in_one_line(monkeypatch, capsys) -> None:
    need_slurm()
    monkeypatch.setattr(slurm, "find_program", lambda name: None)
    assert main(["cluster", "--nodes", "1", "--slurm", "--", "true"]) == 77
    told = capsys.readouterr().out
    assert told.startswith("SKIPPED: munged, slurmctld, ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "plugin"),
    [((22, 5), "cgroup/v1"), ((23, 11), "cgroup/v1"), ((24, 11), "disabled")],
)
def test_the_configuration_asks_only_for_what_the_version_knows(version, plugin) -> None:
    told = slurm_conf.configuration(["node0", "node1"], 1000, version)
    assert told["LAB_CGROUP_CONF"] == f"CgroupPlugin={plugin}\n"
    assert "NodeName=node0,node1 CPUs=2 RealMemory=4000 Gres=gpu:2" in told["LAB_SLURM_CONF"]
    assert "SlurmUser=1000\n" in told["LAB_SLURM_CONF"]
    assert "Name=gpu File=/dev/shm/slurm/nvidia[0-1]\n" in told["LAB_GRES_CONF"]


@pytest.mark.slow
def test_every_node_runs_tasks_and_has_gpus(running: Running) -> None:
    tasks = output_of(running.slurm, "srun", "-w", "node0,node1", "-n4", "hostname").split()
    assert sorted(tasks) == ["node0", "node0", "node1", "node1"]
    told = output_of(running.slurm, "scontrol", "show", "node", "node1")
    assert "Gres=gpu:2" in told and "CPUTot=2" in told
    script = 'echo "$SLURM_PROCID: $CUDA_VISIBLE_DEVICES ${LAB_RUN_ID-unmarked} ${HEAD-no head}"'
    lines = output_of(running.slurm, "srun", "-N2", "--gres=gpu:1", "sh", "-c", script)
    assert sorted(lines.splitlines()) == [f"{rank}: 0 unmarked no head" for rank in (0, 1)]


@pytest.mark.slow
def test_an_array_shares_a_nodes_gpus_and_outlives_its_submitter(running, tmp_path) -> None:
    until_two_have_written = f"until [ $(cat {tmp_path}/*.txt | wc -l) -ge 2 ]; do sleep 0.1; done"
    job = submit(
        running.slurm,
        f"echo $CUDA_VISIBLE_DEVICES; {until_two_have_written}",
        *("--array=0-2", "-w", "node1", "--gres=gpu:1", "-o", f"{tmp_path}/%a.txt"),
    )
    wait_until_over(running.slurm, job)
    given = [text_of(tmp_path / f"{task}.txt").strip() for task in range(3)]
    assert sorted(given[:2]) == ["0", "1"]  # at once; the third had to wait for one of them
    assert given[2] in ("0", "1")


@pytest.mark.slow
def test_a_signal_reaches_the_batch_script_and_scancel_ends_it(running, tmp_path) -> None:
    output = tmp_path / "output.txt"
    job = submit(
        running.slurm,
        'trap "echo saved" USR1; echo ready; while :; do sleep 0.1; done',
        *("-o", str(output)),
    )
    wait_for(lambda: text_of(output) == "ready\n", "the job runs")
    output_of(running.slurm, "scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: text_of(output) == "ready\nsaved\n", "the signal arrives")
    output_of(running.slurm, "scancel", job)
    wait_until_over(running.slurm, job)


@pytest.mark.slow
def test_torchrun_meets_at_the_jobs_first_node(running, tmp_path) -> None:
    """The lines that a reader's sbatch file has."""
    script = tmp_path / "sum_of_ranks.py"
    script.write_text(SUM_OF_RANKS)
    line = (
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1); '
        "srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=1 --rdzv_id=$SLURM_JOB_ID "
        f"--rdzv_backend=c10d --rdzv_endpoint=$head:29500 {script}"
    )
    output = tmp_path / "output.txt"
    job = submit(running.slurm, line, "--nodelist=node0,node1", "--nodes=2", "-o", str(output))
    wait_until_over(running.slurm, job)
    told = sorted(line for line in text_of(output).splitlines() if "of 2" in line)
    assert told == ["rank 0 of 2 on node0: 3.0", "rank 1 of 2 on node1: 3.0"], text_of(output)


@pytest.mark.slow
def test_srun_alone_launches_ranks(running, tmp_path) -> None:
    script = tmp_path / "sum_of_ranks.py"
    script.write_text(SUM_OF_RANKS)
    told = output_of(running.slurm, "srun", "--nodelist=node0,node1", sys.executable, str(script))
    assert sorted(told.splitlines()) == [
        "rank 0 of 2 on node0: 3.0",
        "rank 1 of 2 on node1: 3.0",
    ]


SUM_OF_RANKS = """\
import platform
import torch
import torch.distributed as dist
from distlab.runtime import distributed

with distributed("gloo", timeout_s=60.0, seed=0, device="cpu") as job:
    total = torch.tensor([job.rank + 1.0])
    dist.all_reduce(total)
    print(f"rank {job.rank} of {job.world_size} on {platform.node()}: {total.item()}\\n", end="")
"""


@pytest.mark.slow
def test_nothing_is_left_after_sigkill_of_the_parent() -> None:
    need_slurm()
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "sleeps\n"
        started = psutil.Process(parent.pid).children(recursive=True)
        names = {process.name() for process in started}
        assert names.issuperset({"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"})
        parent.kill()
    wait_for(lambda: not psutil.wait_procs(started, timeout=0)[1], "all of them are gone")
    assert not Path(slurm_conf.FOLDER).exists()


HELD = """\
import time
from distlab.cluster import VirtualCluster

with VirtualCluster(nodes=1, slurm=True) as cluster:
    cluster.slurm.run(["sbatch", "-o", "/dev/null", "--wrap=exec sleep 86421.5"])
    while cluster.slurm.run(["pgrep", "-f", "^sleep 86421.5"]).status:
        time.sleep(0.1)
    print("sleeps", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user: the other tests are this one")
def test_root_in_a_user_namespace_runs_jobs_as_somebody_whom_slurm_accepts() -> None:
    """As root of a container that may not make namespaces but for those of a user."""
    need_slurm()
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("util-linux without setpriv")
    done = subprocess.run(
        [setpriv, "--bounding-set=-sys_admin", sys.executable, "-c", UNPRIVILEGED],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.strip()
    if told.startswith("unavailable"):
        pytest.skip(told)
    assert told == "node0 65534 0"


UNPRIVILEGED = """\
from distlab.cluster import VirtualCluster, unavailable

if why := unavailable():
    raise SystemExit(print("unavailable:", why))
with VirtualCluster(nodes=1, slurm=True) as cluster:
    line = "echo $(hostname) $(id -u) $CUDA_VISIBLE_DEVICES"
    print(cluster.slurm.run(["srun", "--gres=gpu:1", "sh", "-c", line]).stdout)
"""


@pytest.mark.slow
def test_daemons_that_fail_are_told_of_at_once(monkeypatch) -> None:
    need_slurm()
    broken = slurm_conf.SLURM_CONF.replace("cons_tres", "cons_nothing")
    monkeypatch.setattr(slurm_conf, "SLURM_CONF", broken)
    with pytest.raises(RunError, match=r"daemons on node0 do not run: .*cons_nothing"):
        VirtualCluster(nodes=1, slurm=True).__enter__()


@pytest.mark.slow
def test_lab_cluster_runs_a_command_on_the_head_with_slurm() -> None:
    need_slurm()
    line = 'sinfo -h -o "%D %t"; srun -N2 hostname | sort; exit 3'
    command = ["cluster", "--nodes", "2", "--slurm", "--", "bash", "-c", line]
    lab = [sys.executable, "-m", "distlab.lab", *command]
    outer = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}  # itself a job of another Slurm
    done = run_command(lab, {**os.environ, **outer}, timeout_s=LIMIT_S)
    assert (done.status, done.stdout) == (3, "2 idle\nnode0\nnode1\n"), done.stderr
    assert done.left_running == ()


@pytest.mark.slow
def test_a_requeued_job_runs_again(running: Running) -> None:
    """Not before its old credential has expired, lest it be taken for the one that was ended."""
    wait_for(lambda: "restart 1 on node1\n" in text_of(running.requeued_output), "it runs again")


@pytest.mark.slow
def test_a_job_survives_the_power_cut_of_its_node(running: Running) -> None:
    """The last of this file, so that Slurm has had its half minute."""
    slurm, job = running.slurm, running.lost_job
    wait_for(lambda: state_of_node(slurm, "node2") == "down*", "node2 is given up")
    slurm.run(
        ["scontrol", "update", f"jobid={job}", "StartTime=now"]
    )  # it need not wait: elsewhere
    told = ["restart 0 on node2", "restart 1 on node3"]
    wait_for(lambda: text_of(running.lost_output).splitlines() == told, "it runs elsewhere")
    running.cluster.power_on("node2")
    wait_for(lambda: state_of_node(slurm, "node2") == "idle", "node2 is back")
    assert output_of(slurm, "srun", "-w", "node2", "hostname") == "node2\n"


def state_of_node(slurm: Slurm, node: str) -> str:
    return output_of(slurm, "sinfo", "-h", "-n", node, "-o", "%t").strip()
