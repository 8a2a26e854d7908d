"""diagnose finds every fault: its cause, its rank, its line; and says nothing of a healthy job."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

import diagnose
from ddp.diagnosis.divergence import shared_device, straggler
from ddp.diagnosis.evidence import Call, Rank
from ddp.diagnosis.standstill import first_difference
from ddp.diagnosis.watching import agent_variables, watch
from ddp.fault_cases import CASES, ForkedRanks, cannot_run, run_case
from distlab.errors import UsageError
from distlab.files import repo_root

CODE = repo_root() / "chapter03-ddp" / "code"
STALL_S = 2.0
PATIENT_S = 10.0  # a healthy job of a busy machine may pause, and takes no longer for being let
RANKS = {"rank_only_collective": 0, "collective_order": 0, "lock_deadlock": 0,
         "uneven_last_batch": 0, "dead_link": None, "forgotten_set_epoch": None}  # fmt: skip
FAST = ("rank_only_collective", "unsynced_parameters")
NAMED = [
    pytest.param(case, marks=[] if case.cause in FAST else [pytest.mark.slow], id=case.name)
    for case in CASES
]


@pytest.mark.parametrize("case", NAMED)
def test_a_fault_is_named_with_its_rank_and_its_line(case):
    if why := cannot_run(case):
        pytest.skip(why)
    outcome = run_case(case, fix=False, stall_after=STALL_S)
    assert outcome.found is not None, outcome.output
    verdict = outcome.found.verdict
    assert (verdict.cause, verdict.place and verdict.place[1]) == (case.cause, case.line())
    assert Path(verdict.place[0]).name == case.script.name
    if (rank := RANKS.get(case.cause, 1)) is not None:
        assert verdict.rank == rank
    assert verdict.what and verdict.remedy


@pytest.mark.parametrize("case", NAMED)
def test_a_cured_fault_is_healthy_and_diagnose_silent(case):
    if why := cannot_run(case):
        pytest.skip(why)
    outcome = run_case(case, fix=True, stall_after=PATIENT_S)
    assert outcome.found is None, outcome.found
    assert outcome.status == 0, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rank_only_collective", "lost the others at rank_only_collective.py"),
        ("unsynced_parameters", "all ranks hold the same weights … FAILED (2, expected 1)"),
        ("unsynced_buffers", "all ranks give the same logits … FAILED (2, expected 1)"),
        ("nan_on_one_rank", "all weights are finite … FAILED"),
        ("forgotten_set_epoch", "each epoch has an order of its own … FAILED (1, expected 4)"),
        ("same_device", "each rank has a device of its own … FAILED (1, expected 2)"),
    ],
)
def test_unwatched_a_fault_shows_its_symptom_and_ends_by_itself(name, told):
    flags = ["--device", "cpu", "--timeout", "3"]
    with ForkedRanks(CODE / "faults" / f"{name}.py", flags, 2, {"OMP_NUM_THREADS": "1"}, 90) as job:
        assert job.wait() == 1
        assert told in job.output() + job.errors()


def watched(tmp_path, script, ranks=2, stall_after=STALL_S):
    """A script of one's own under diagnose; what was found, and the status."""
    path = tmp_path / "job.py"
    path.write_text(script)
    with tempfile.TemporaryDirectory() as folder:
        env = {"OMP_NUM_THREADS": "1", **agent_variables(Path(folder), stall_after, {})}
        with ForkedRanks(path, [], ranks, env, 60) as job:
            found = watch(job, Path(folder), stall_after, set())
            return found, 1 if found else job.wait()


def test_a_job_that_fails_by_itself_keeps_its_status(tmp_path):
    found, status = watched(tmp_path, "import sys; sys.exit(3)")
    assert (found, status) == (None, 3)


def test_a_rank_that_its_launcher_ended_was_not_killed_from_outside(tmp_path):
    script = """
import os, time, torch
if os.environ["RANK"] == "0":
    raise ValueError("the batch is empty")
time.sleep(60)
"""
    assert watched(tmp_path, script) == (None, 1)


def test_a_rank_that_waits_for_a_busy_one_is_no_stall(tmp_path):
    script = """
import time, torch.distributed as dist
dist.init_process_group("gloo")
until = time.time() + 4
while dist.get_rank() == 0 and time.time() < until:
    sum(range(10_000))
dist.barrier()
"""
    assert watched(tmp_path, script) == (None, 0)


def test_a_rank_that_sleeps_while_others_wait_is_named(tmp_path):
    script = """
import time, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    time.sleep(60)
dist.barrier()
"""
    found, _ = watched(tmp_path, script)
    assert found.verdict.cause == "rank_only_collective"
    assert "rank 1 has not called it and stays at job.py:5" in found.verdict.what


@pytest.mark.slow
def test_a_rank_whose_python_is_blocked_is_asked_by_a_signal(tmp_path):
    script = """
import ctypes, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    ctypes.PyDLL(None).sleep(60)  # a C call that keeps the GIL
dist.barrier()
"""
    found, _ = watched(tmp_path, script, stall_after=1.0)
    assert (found.verdict.cause, found.verdict.rank) == ("silent_rank", 1)
    assert found.verdict.where == "job.py:6"


@pytest.mark.slow
def test_the_command_line_watches_torchrun_and_leaves_nothing_running(tmp_path):
    fault = CODE / "faults" / "unsynced_parameters.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(fault)]
    told = tmp_path / "verdict.json"
    done = subprocess.run(
        [sys.executable, str(CODE / "diagnose.py"), "--json", str(told), "--", *torchrun],
        capture_output=True, text=True, timeout=200, cwd=repo_root(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "diagnose: cause        unsynced_parameters" in done.stderr
    assert json.loads(told.read_text())["cause"] == "unsynced_parameters"
    running = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if str(fault) in line]


def test_the_agent_comes_after_torch_and_hides_no_module_of_the_job(tmp_path):
    for name in ("ddp", "hooks", "agent", "evidence"):
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    (tmp_path / "job.py").write_text("""
import sys
assert not {"torch", "diagnose_agent"} & sys.modules.keys()
import agent, ddp, evidence, hooks
assert ddp.OWN and hooks.OWN and agent.OWN and evidence.OWN
import torch
assert "diagnose_agent.hooks" in sys.modules
print(sorted(name for name, module in sys.modules.items()
             if "/ddp/diagnosis/" in str(getattr(module, "__file__", ""))))
""")
    env = {**os.environ, "RANK": "0", **agent_variables(tmp_path, STALL_S)}
    job = [sys.executable, str(tmp_path / "job.py")]
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "['diagnose_agent', 'diagnose_agent.hooks', 'sitecustomize']\n", (
        done.stderr
    )
    assert '"kind": "hello"' in (tmp_path / "attempt0-rank0.jsonl").read_text()


def test_no_command_is_one_line():
    with pytest.raises(UsageError, match="there is no command to run"):
        diagnose.main([])
    with pytest.raises(SystemExit, match="2"):
        diagnose.main(["--stall-after", "0", "--", "true"])


def rank(number, cores=(), calls=(), **events):
    made = Rank(number, {"host": "h", "world": 2, "pid": 1, "cores": list(cores), "t": 0.0}, Path())
    made.events = events
    for seq, (shape, place, created) in enumerate(calls, 1):
        call = Call("0", seq, "all_reduce", shape, "Float", created, "1", ("x.py", place, "f"))
        made.calls["0", seq] = call
    return made


def gpu(uuid, count, chosen_at=None):
    """What a rank tells of its GPU, and of the line in which it chose it."""
    parameters = [
        {"devices": {"index": 0, "uuid": uuid, "count": count}, "built": ["x.py", 9, "f"]}
    ]
    chosen = [{"what": "cuda", "cores": [], "place": ["x.py", chosen_at, "f"]}] if chosen_at else []
    return {"parameters": parameters, "chosen": chosen}


def test_two_ranks_on_one_of_two_gpus_are_told_apart_by_whether_they_chose_it():
    forgotten = shared_device([rank(0, **gpu("A", 2)), rank(1, **gpu("A", 2))])
    assert (forgotten.cause, forgotten.where) == ("forgotten_set_device", "x.py:9")
    wrong = shared_device([rank(0, **gpu("A", 2, 4)), rank(1, **gpu("A", 2, 4))])
    assert (wrong.cause, wrong.rank, wrong.where) == ("same_device", 1, "x.py:4")


def test_two_ranks_on_the_only_gpu_or_on_two_are_healthy():
    assert shared_device([rank(0, **gpu("A", 1)), rank(1, **gpu("A", 1))]) is None
    assert shared_device([rank(0, **gpu("A", 2)), rank(1, **gpu("B", 2))]) is None


def test_a_first_difference_is_judged_by_what_came_before():
    normal = [("[4]", 10, 1.0), ("[1]", 11, 2.0)]
    order = first_difference(
        [rank(0, calls=[*normal, ("[4]", 10, 3.0)]), rank(1, calls=[*normal, ("[1]", 11, 3.0)])]
    )
    assert order.cause == "collective_order"
    shape = first_difference(
        [rank(0, calls=[*normal, ("[4]", 10, 3.0)]), rank(1, calls=[*normal, ("[3]", 10, 3.0)])]
    )
    assert (shape.cause, shape.rank) == ("shape_mismatch", 1)
    extra = first_difference(
        [rank(0, calls=[*normal, ("[9]", 12, 3.0)]), rank(1, calls=[*normal, ("[4]", 10, 3.0)])]
    )
    assert (extra.cause, extra.rank, extra.where) == ("rank_only_collective", 0, "x.py:12")
    assert first_difference([rank(0, calls=normal), rank(1, calls=normal[:1])]) is None


def test_a_straggler_comes_last_again_and_again():
    steps = [0.1 * step for step in range(30)]
    slow = rank(1, calls=[("[4]", 10, t + 0.06) for t in steps])
    slow.pulses.append({"t": 3.0, "samples": [[["x.py", 7, "f"], "sleep", 12]]})
    quick = rank(0, calls=[("[4]", 10, t) for t in steps])
    verdict = straggler([quick, slow], 2.0)
    assert (verdict.rank, verdict.where) == (1, "x.py:7")
    turns = rank(0, calls=[("[4]", 10, t + 0.12 * (i % 2)) for i, t in enumerate(steps)])
    assert straggler([turns, slow], 2.0) is None
