"""Elastic training: the log proves what was trained, and notices what was not; nothing is left."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

import elastic_train
from ddp.elastic_log import FILE, StepLog, history, read_log
from distlab import script
from distlab.cluster import unavailable
from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.spawning import spawn

CODE = repo_root() / "chapter03-ddp" / "code"
SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo", "--step-seconds", "0"]


def begin(generation, resumed_at, ranks=2):
    return [
        {"kind": "begin", "generation": generation, "rank": rank, "world_size": ranks,
         "resumed_at": resumed_at}
        for rank in range(ranks)
    ]  # fmt: skip


def trained(generation, steps, ranks=2):
    """The lines of steps whose batches are the windows 4 * step to 4 * step + 3."""
    lines = []
    for step in steps:
        share = 4 // ranks
        lines += [
            {"kind": "take", "generation": generation, "step": step, "rank": rank,
             "world_size": ranks, "windows": batch(step)[rank * share :][:share]}
            for rank in range(ranks)
        ]  # fmt: skip
        lines.append({"kind": "trained", "generation": generation, "step": step, "rank": 0,
                      "world_size": ranks, "loss": 10.0 * generation + step})  # fmt: skip
    return lines


def batch(step):
    return [4 * step + place for place in range(4)]


def test_a_restart_repeats_what_was_lost_and_the_final_path_has_each_step_once():
    lines = [*begin(1, 0), *trained(1, range(6)), *begin(2, 4), *trained(2, [4]),
             *begin(3, 4, ranks=1), *trained(3, range(4, 8), ranks=1)]  # fmt: skip
    past = history(lines, 8, batch)
    assert past.wrong == []
    assert past.repeated == {1: 0, 2: 2, 3: 1}
    assert past.losses == [10, 11, 12, 13, 34, 35, 36, 37]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda lines: lines + begin(2, 4) + trained(2, range(5, 8)), [4]),  # skipped by the loader
        (lambda lines: lines + begin(2, 3) + trained(2, range(3, 7)), [7]),  # never trained
        (lambda lines: [x for x in lines if (x["kind"], x.get("step"), x["rank"])
                        != ("take", 2, 1)] + begin(2, 4) + trained(2, range(4, 8)), [2]),
        (lambda lines: lines + trained(1, [1]) + begin(2, 4) + trained(2, range(4, 8)), [1]),
    ],
    ids=["skipped", "missing", "a rank's part", "twice in one generation"],
)  # fmt: skip
def test_what_is_skipped_or_kept_twice_is_named(change, wrong):
    lines = change([*begin(1, 0), *trained(1, range(6))])
    assert history(lines, 8, batch).wrong == wrong


def test_a_line_on_its_way_is_left_for_later_and_a_torn_one_is_an_error(tmp_path):
    log = StepLog(tmp_path, rank=0, world_size=1)
    log.write("take", step=0)
    (tmp_path / FILE).open("a").write('{"kind": "ta')
    assert [line["step"] for line in read_log(tmp_path)] == [0]
    log.write("take", step=1)
    with pytest.raises(RunError, match="jsonl:2 is torn"):
        read_log(tmp_path)


def test_a_job_goes_on_with_another_number_of_ranks_and_ends_with_the_same_losses(tmp_path):
    undisturbed = losses_of(tmp_path / "one", [(2, 12)])
    same = losses_of(tmp_path / "two", [(2, 8), (2, 12)])
    fewer = losses_of(tmp_path / "three", [(2, 8), (1, 12)])
    assert len(undisturbed) == 12
    assert same == undisturbed
    assert fewer == pytest.approx(undisturbed, abs=1e-5)


def losses_of(folder, parts):
    """Train in several generations, each with (ranks, until step); the final path's losses."""
    for ranks, steps in parts:
        checks = spawn(train_part, ranks, str(folder), steps, timeout_s=120)[0]
        assert checks == [("steps whose global batch was not trained exactly once", True)]
    path = {}
    for text in (folder / "steps.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "trained":
            path[line["step"]] = line["loss"]
    return list(path.values())


def train_part(job, folder, steps):
    args = elastic_train.parse_args([*SMOKE, "--folder", folder, "--steps", str(steps)])
    with script.run(args) as run:
        elastic_train.work(run, args, job)
    return [(check.name, check.ok) for check in run.checks]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "7"], "--batch-size 7 is not divisible by 2 ranks"),
        (["--batch-size", "8", "--nodes", "3"], "--batch-size 8 is not divisible by 3 ranks"),
        (["--steps", "8"], "--steps 8"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=words):
        elastic_train.parse_args([*SMOKE, *flags])


def test_a_job_without_a_folder_is_refused():
    with pytest.raises(UsageError, match="--folder is missing"):
        elastic_train.work(None, elastic_train.parse_args(SMOKE), None)


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(elastic_train, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        elastic_train.main(["--preset", "smoke"])


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    if (why := unavailable()) is not None:
        pytest.skip(why)
    mark = uuid.uuid4().hex
    env = {**os.environ, "ELASTIC_TEST": mark, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CODE / "elastic_train.py"), "--preset", "smoke"]
    pipe = subprocess.PIPE
    driver = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/steps.jsonl")):  # workers are training
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130 and errors.endswith("error: interrupted\n")
    assert [process for process in psutil.process_iter() if carries(process, mark)] == []
    assert list(Path(tmp_path).glob("*/steps.jsonl")) == []


def carries(process, mark):
    try:
        return process.environ().get("ELASTIC_TEST") == mark
    except psutil.Error:
        return False
