"""The process group: found, formed, bounded in time, and gone afterwards."""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from distlab import runtime, script
from distlab.errors import RunError, UsageError
from distlab.launch import Launch, detect_launch, first_host, own_rank
from distlab.spawning import fork_context, spawn

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
ALL_REDUCE = """
import sys, torch, torch.distributed as dist
from distlab import runtime
with runtime.distributed(timeout_s=60) as rt:
    total = torch.tensor([rt.rank + 1.0])
    dist.all_reduce(total)
    line = f"rank {rt.rank} of {rt.world_size}, local {rt.local_rank}: {total.item():g}\\n"
    sys.stdout.write(line)  # torchrun's ranks are unbuffered, where print writes twice
    rt.barrier()
assert not dist.is_initialized()
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def test_torchrun_is_detected():
    assert detect_launch(TORCHRUN) == Launch(5, 8, 1, 4, "10.0.0.1", 29500)
    assert detect_launch({**SLURM, **TORCHRUN}) == Launch(5, 8, 1, 4, "10.0.0.1", 29500)


def test_slurm_is_detected_inside_a_step_only():
    assert detect_launch(SLURM) == Launch(4, 6, 0, 2, "gpu07", 20000 + 1234567 % 12000)
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert detect_launch(batch) == Launch(0, 1, 0, 1)
    assert detect_launch({**SLURM, "SLURM_NTASKS": "1"}) == Launch(0, 1, 0, 1)


def test_slurm_takes_an_address_and_a_port_that_the_batch_script_chose():
    chosen = {**SLURM, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29501", "WORLD_SIZE": "6"}
    del chosen["SLURM_JOB_ID"], chosen["SLURM_STEP_NODELIST"]
    launch = detect_launch(chosen)
    assert (launch.rank, launch.master_addr, launch.master_port) == (4, "10.0.0.9", 29501)


def test_each_slurm_node_has_its_own_number_of_tasks():
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NTASKS": "5"}
    assert [detect_launch(uneven | {"SLURM_NODEID": node}).local_world_size for node in "012"] == [
        2,
        2,
        1,
    ]
    unknown = {name: value for name, value in SLURM.items() if "TASKS_PER_NODE" not in name}
    assert detect_launch(unknown).local_world_size is None


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": "4294967290"},  # salloc's own shell, where Slurm runs it as a step
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 --pty bash
    ],
)
def test_python_in_an_interactive_allocation_is_alone(shell):
    assert detect_launch(SLURM | shell) == Launch(0, 1, 0, 1)


def test_a_launcher_that_does_not_say_leaves_the_local_size_unknown():
    torch_operator = {k: v for k, v in TORCHRUN.items() if not k.startswith("LOCAL")}
    assert detect_launch(torch_operator) == Launch(5, 8, None, None, "10.0.0.1", 29500)
    deepspeed = torch_operator | {"LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert detect_launch(deepspeed) == Launch(5, 8, 1, 4, "10.0.0.1", 29500)


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-1@1",
}  # fmt: skip


def test_mpiruns_ranks_are_one_job():
    launch = detect_launch(OPEN_MPI)
    assert (launch.rank, launch.world_size, launch.local_rank) == (2, 4, 2)
    assert launch.master_addr == "127.0.0.1" and 20000 <= launch.master_port < 32000
    other = detect_launch(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-2@1"})
    assert other.master_port != launch.master_port  # two jobs do not meet
    intel = {"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    assert detect_launch(intel) == Launch(1, 2, None, None, "h", 5)
    assert detect_launch({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).world_size == 1


def test_mpirun_on_several_nodes_asks_for_rank_0s_address():
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UsageError, match="mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"):
        detect_launch(several)
    assert detect_launch(several | {"MASTER_ADDR": "h", "MASTER_PORT": "5"}).master_addr == "h"


def of_mpirun(rank):
    job = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in job.items()} | {
        "PMIX_NAMESPACE": f"test-{os.getpid()}"
    }


def of_an_operator(rank):
    """Kubernetes' for torch: no local variables; the ranks find out themselves."""
    port = 20000 + os.getpid() % 12000
    job = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in job.items()}


@pytest.mark.parametrize("variables", [of_mpirun, of_an_operator])
def test_other_launchers_variables_start_the_ranks(variables):
    processes = []
    for rank in range(2):
        env = os.environ | variables(rank) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ALL_REDUCE]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert outputs == [f"rank {r} of 2, local {r}: 3\n" for r in range(2)]


def test_nothing_set_is_alone():
    assert detect_launch({"PATH": "/bin", "MASTER_PORT": "29500"}) == Launch(0, 1, 0, 1)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_torchrun_environment_is_refused_by_name(missing):
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=f"^{missing} is not set"):
        detect_launch(env)


@pytest.mark.parametrize(
    "missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"]
)
def test_an_incomplete_slurm_step_is_refused_by_name(missing):
    env = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(UsageError, match=f"^{missing} is not set"):
        detect_launch(env)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"^{name}=two is no number"):
        detect_launch({**TORCHRUN, name: "two"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node5", "node5"),
        ("node5,node6", "node5"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("a-b[1-3]-x,c", "a-b1-x"),
        ("rack[1-2]node[03-04],c", "rack1node03"),
        ("ip-10-0-0-1", "ip-10-0-0-1"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ","])
def test_a_list_without_a_host_is_refused(nodelist):
    with pytest.raises(UsageError, match="names no host; set MASTER_ADDR"):
        first_host(nodelist)


def test_alone_there_is_a_group_of_one_():
    with runtime.distributed(seed=3) as rt:
        assert (rt.rank, rt.world_size, rt.local_rank, rt.is_main) == (0, 1, 0, True)
        assert dist.is_initialized() and dist.get_world_size() == 1
        first = torch.rand(1)
        total = torch.ones(1, device=rt.device)
        dist.all_reduce(total)
        assert total.item() == 1
        rt.barrier()
        rt.synchronize()
    assert not dist.is_initialized()
    with runtime.distributed(seed=3):
        assert torch.rand(1) == first


def test_an_interface_that_is_not_there_is_told_with_those_that_are(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    refused = r"GLOO_SOCKET_IFNAME=ib9: ib9 is no .*; use one of .*\blo.*, or unset it"
    with pytest.raises(UsageError, match=refused), runtime.distributed(device="cpu"):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_the_group_is_gone_after_an_exception(error):
    with pytest.raises(type(error)), runtime.distributed():
        raise error
    assert not dist.is_initialized()


NODE = ("a", "b")  # the ids of its GPUs


def places(gpus_of_ranks, backend="auto", hosts=None):
    """The device of each rank and the job's GPUs, where the ranks see these GPUs on their hosts."""
    hosts = hosts or ["node0"] * len(gpus_of_ranks)
    everyone = [runtime._Rank(h, tuple(g)) for h, g in zip(hosts, gpus_of_ranks, strict=True)]
    chosen = [
        runtime._choose_device(Launch(rank, len(everyone), None, None), everyone, "cuda", backend)
        for rank in range(len(everyone))
    ]
    assert len({gpus for _, gpus in chosen}) == 1
    return [device.index for device, _ in chosen], chosen[0][1]


def test_more_ranks_than_gpus_is_refused_with_the_three_ways_out():
    with pytest.raises(
        UsageError, match="4 ranks on 2 GPU.*--nproc_per_node=2.*gloo.*--device cpu"
    ):
        places([NODE] * 4)
    with pytest.raises(UsageError, match="3 ranks on 2 GPU"):  # on the second of two nodes
        places([NODE] * 5, hosts=["n0"] * 2 + ["n1"] * 3)


@pytest.mark.parametrize(
    ("seen", "hosts", "backend", "expected"),
    [
        ([NODE] * 2, None, "auto", ([0, 1], 2)),
        ([NODE] * 4, None, "gloo", ([0, 1, 0, 1], 2)),
        ([["a"], ["b"], ["c"], ["d"]], None, "auto", ([0, 0, 0, 0], 4)),  # --gpus-per-task=1
        ([["a", "b"], ["c", "d"]], None, "nccl", ([0, 0], 4 - 2)),
        ([["b", "a"], ["a", "b"]], None, "nccl", ([0, 0], 2)),
        ([NODE] * 4, ["n0", "n1", "n0", "n1"], "nccl", ([0, 0, 1, 1], 4)),
        ([["a"]] * 2, ["n0", "n1"], "nccl", ([0, 0], 2)),  # ids of two nodes may be equal
    ],
)
def test_each_rank_takes_the_first_gpu_that_it_sees_and_nobody_has(seen, hosts, backend, expected):
    assert places(seen, backend, hosts) == expected


def test_the_ranks_themselves_say_who_is_on_their_host():
    """Where the launcher does not: DeepSpeed's and others set no LOCAL_WORLD_SIZE."""
    everyone = [runtime._Rank(host, ()) for host in ("n0", "n1", "n0", "n1", "n1")]
    among = runtime._among_neighbours
    assert among(Launch(3, 5, None, None), everyone) == (1, 3)
    assert among(Launch(2, 5, None, None), everyone) == (1, 2)
    assert among(Launch(2, 5, 7, None), everyone) == (7, 2)
    assert among(Launch(2, 5, 0, 1), everyone) == (0, 1)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("nccl", "auto", "--backend nccl needs GPUs.*use --backend gloo"),
        ("nccl", "cpu", "--backend nccl needs GPUs"),
        ("gloo", "cuda", "--device cuda: there is no CUDA device here; use --device cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(backend, device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(UsageError, match=message),
        runtime.distributed(backend=backend, device=device),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_spawn_returns_the_results_by_rank(world_size):
    results = spawn(all_reduce, world_size, 10)
    total = sum(10 + rank for rank in range(world_size))
    assert [(rank, world) for rank, world, *_ in results] == [
        (rank, world_size) for rank in range(world_size)
    ]
    assert all(reduced == total for _, _, reduced, _ in results)
    assert len({seeded for *_, seeded in results}) == 1  # all ranks have the same seed


def all_reduce(rt, start):
    value = torch.tensor([float(start + rt.rank)])
    dist.all_reduce(value)
    return rt.rank, rt.world_size, value.item(), torch.rand(1).item()


def test_tensors_come_back_from_ranks_whole():
    big, small = spawn(make_tensor, 2, [1_000_000, 3])
    assert big.sum() == 0 and big.numel() == 1_000_000  # 4 MB: more than a pipe holds
    assert torch.equal(small, torch.ones(3))


def test_no_rank_goes_on_before_all_have_met():
    """A rank that leaves a short job at once would close its connections to a slower one."""
    store, gone_on = dist.HashStore(), []

    def wait(rank):
        runtime._wait_for_all(store, Launch(rank, 3, rank, 3))
        gone_on.append(rank)

    ranks = [threading.Thread(target=wait, args=(rank,)) for rank in range(3)]
    for thread in ranks[:2]:
        thread.start()
    time.sleep(0.1)
    assert gone_on == []
    ranks[2].start()
    for thread in ranks:
        thread.join(timeout=60)
    assert sorted(gone_on) == [0, 1, 2]


def make_tensor(rt, sizes):
    return torch.full((sizes[rt.rank],), float(rt.rank))


def test_an_error_in_a_rank_is_told_with_its_traceback_and_ends_the_others():
    with pytest.raises(
        RunError, match=r"rank 1 failed:(?s:.*)fail_on_rank_1(?s:.*)planted"
    ) as error:
        spawn(fail_on_rank_1, 3, timeout_s=60)
    assert "rank 0 failed" not in str(error.value)
    assert ranks_running() == []


def fail_on_rank_1(rt):
    if rt.rank == 1:
        raise ValueError("planted")
    dist.barrier()


def test_a_collective_that_one_rank_skips_ends_in_time_and_names_who_waited():
    started = time.monotonic()
    with pytest.raises(RunError, match=r"ranks \[0, 1, 2\] did not finish in time and were killed"):
        spawn(skip_on_rank_1, 3, 60, timeout_s=1.5)
    assert time.monotonic() - started < 10
    assert ranks_running() == []


def test_a_rank_that_leaves_before_a_collective_fails_the_others_at_once():
    started = time.monotonic()
    with pytest.raises(RunError, match="rank [02] failed:(?s:.*)skip_on_rank_1(?s:.*)RuntimeError"):
        spawn(skip_on_rank_1, 3, 0, timeout_s=60)
    assert time.monotonic() - started < 10
    assert ranks_running() == []


def skip_on_rank_1(rt, seconds):
    if rt.rank == 1:
        time.sleep(seconds)
    else:
        dist.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_others_do_not_outlive_it():
    with pytest.raises(RunError, match="rank 1 died without a result"):
        spawn(kill_rank_1, 3, timeout_s=60)
    assert ranks_running() == []


def kill_rank_1(rt):
    if rt.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_result_that_cannot_be_sent_says_so():
    with pytest.raises(RunError, match="rank 0 failed:(?s:.*)pickle"):
        spawn(return_a_lock, 1, timeout_s=60)
    assert ranks_running() == []


def return_a_lock(rt):
    return threading.Lock()


def ranks_running() -> list[multiprocessing.Process]:
    return multiprocessing.active_children()


def launched(function, *variables: dict[str, str]) -> list[tuple[int, str, str]]:
    """Status, output and errors of `function` in a process for each set of variables, at once."""
    with fork_context().Pool(len(variables)) as pool:
        started = [pool.apply_async(as_a_script, (function, one)) for one in variables]
        return [one.get(timeout=120) for one in started]


def as_a_script(function, variables: dict[str, str]) -> tuple[int, str, str]:
    os.environ.update(variables)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = script.status_of(function)
    return status, output.getvalue(), errors.getvalue()


def free_port() -> str:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return str(chosen.getsockname()[1])


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path):
    path = tmp_path / "sum.py"
    path.write_text(ALL_REDUCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = ["rank 0 of 2, local 0: 3", "rank 1 of 2, local 1: 3"]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.slow
def test_slurms_variables_start_the_ranks_on_two_nodes():
    common = {**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    common |= {"SLURM_STEP_NODELIST": "localhost,elsewhere", "MASTER_PORT": free_port()}
    done = launched(sum_of_ranks, *({**common, "SLURM_PROCID": str(rank)} for rank in range(2)))
    assert done == [(0, "rank 0 of 2, local 0: 3\n", ""), (0, "rank 1 of 2, local 0: 3\n", "")]


def sum_of_ranks() -> int:
    exec(ALL_REDUCE)
    return 0


def meet() -> int:
    with runtime.distributed(timeout_s=2):
        return 0


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "3"}, 3),
        ({"RANK": "3", "SLURM_PROCID": "1"}, 3),
        ({"SLURM_PROCID": "1"}, 1),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, 2),
        ({"PMI_RANK": "2"}, 2),
    ],
)
def test_one_rank_of_any_launcher_speaks_for_all(variables, rank):
    assert own_rank(variables) == rank


def test_a_variable_that_an_earlier_job_left_is_told_with_the_remedy():
    with pytest.raises(UsageError, match="RANK=x is no number; start by torchrun, or unset it"):
        own_rank({"RANK": "x"})
    with pytest.raises(UsageError, match="RANK is not set, .*unset RANK and WORLD_SIZE to run alo"):
        detect_launch({"WORLD_SIZE": "8"})


@pytest.mark.slow
def test_ranks_that_do_not_meet_say_so_in_one_line_within_the_timeout():
    common = {**TORCHRUN, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    first = {**common, "RANK": "0", "MASTER_PORT": free_port()}  # its peers never come
    lonely = {**common, "RANK": "1", "MASTER_PORT": free_port()}  # nobody listens there
    astray = {**lonely, "MASTER_ADDR": "nowhere.invalid"}
    variables = [first, lonely, astray]
    started = time.monotonic()
    for (status, _, told), where in zip(launched(meet, *variables), variables, strict=True):
        assert status == 1
        assert told.startswith(
            f"error: rank {where['RANK']} of 3 could not meet the others at "
            f"{where['MASTER_ADDR']}:{where['MASTER_PORT']} in "
        )
        assert " s (timeout 2 s): " in told
        assert told.endswith(
            "; if nobody started the others, unset RANK and WORLD_SIZE to run alone\n"
        )
        assert told.count("\n") == 1
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_collective_has_the_timeout_of_its_group():
    common = {**TORCHRUN, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    variables = [{**common, "RANK": "0", "MASTER_PORT": (port := free_port())}]
    variables.append({**common, "RANK": "1", "MASTER_PORT": port})
    (status, waited, told), _ = launched(wait_in_vain, *variables)
    assert status == 1
    assert float(waited) >= GROUP_TIMEOUT_S - 0.1
    assert f"did not come within {GROUP_TIMEOUT_S:g} s" in told and told.count("\n") == 1


GROUP_TIMEOUT_S = 6.0  # joining has the same limit, and a busy machine needs seconds for it


def wait_in_vain() -> int:
    """Rank 0 waits in a collective for rank 1, which lives but never comes; it prints how long."""
    with runtime.distributed(timeout_s=GROUP_TIMEOUT_S) as rt:
        started = time.monotonic()
        if rt.rank == 1:
            time.sleep(GROUP_TIMEOUT_S + 2)
            return 0
        try:
            dist.all_reduce(torch.ones(1))
        finally:
            print(time.monotonic() - started)
    return 0


def test_a_port_that_is_taken_is_named_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ((status, _, told),) = launched(meet, {**TORCHRUN, **place})
    assert status == 1
    assert f"127.0.0.1:{port}" in told and told.count("\n") == 1


def test_a_rank_ends_with_its_status_and_all_that_it_printed():
    code = (
        "from distlab import runtime, script\n"
        "def main():\n"
        "    with runtime.distributed(backend='gloo', device='cpu'):\n"
        "        print('said')\n"
        "    return 1\n"
        "script.exit(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "said\n", "")
