"""Training on a slow link: the ranks stay equal, and the curve is computed as it says."""

import os

import pytest
import torch.distributed as dist

import slow_link_scaling
from distlab import script
from distlab.cluster import sweep
from distlab.errors import UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_point_is_measured_and_its_ranks_stay_equal(world_size):
    flags = [*SMOKE, "--link-rate", "1gbit"]
    checks, point = spawn(run_point, world_size, flags, timeout_s=120)[0]
    assert checks == [("all ranks hold the same weights, bit for bit", True)]
    assert point["nodes"] == world_size
    assert point["gradient_bytes"] == 4 * 125248
    assert point["compute"] > 0 and point["step"] > 0
    assert (point["predicted_all_reduce"] > 0) == (world_size > 1)


def test_a_node_sleeps_as_long_as_it_is_told_and_trains_nevertheless():
    checks, point = spawn(run_point, 2, SMOKE, sleep_instead, timeout_s=120)[0]
    assert checks == [("all ranks hold the same weights, bit for bit", True)]
    assert point["compute"] == 0.2 and point["step"] >= 0.2 + point["all_reduce"] * 0.99


def test_ranks_that_do_not_average_are_noticed():
    checks, _ = spawn(run_point, 2, SMOKE, without_all_reduce, timeout_s=120)[0]
    assert checks == [("all ranks hold the same weights, bit for bit", False)]


def run_point(job, argv, change=lambda: None):
    """The script's own measurement on this rank: its checks, and its point."""
    change()
    args = slow_link_scaling.parse_args(argv)
    with script.run(args) as run:
        slow_link_scaling.measure_point(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.extras["point"]


def sleep_instead():
    os.environ[sweep.SLEEPS] = "0.2"


def without_all_reduce():
    dist.all_reduce = lambda tensor, *args: tensor


def test_the_curve_by_hand():
    row_of = slow_link_scaling.row_of
    one = {"rate": None, "nodes": 1, "compute": 0.1, "predicted_all_reduce": None, "step": 0.1}
    two = {"rate": "1gbit", "nodes": 2, "compute": 0.1, "predicted_all_reduce": 0.15, "step": 0.2}
    assert row_of(one)[0] == "none"
    assert row_of(one)[2:] == pytest.approx([100, 0, 100, 100, 0, 100, 100, 100])
    # a step of 250 ms predicted, 200 measured: 25 % too much; half the batch takes 50 ms of 200
    assert row_of(two)[2:] == pytest.approx([100, 150, 250, 200, 25, 40, 50, 25])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "2"], "--steps 2 gives no median; use 3 or more"),
        (["--nodes", "1"], "--nodes 1 is no curve"),
        (["--rates", "100"], "--rates 100 is wrong because"),
        (["--link-rate", "slow"], "--link-rate slow is wrong because"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        slow_link_scaling.parse_args([*SMOKE, *flags])


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweep, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        slow_link_scaling.main(["--preset", "smoke"])
