"""Overlap on and off: the balanced link by hand, and timelines as the profiler's trace has them."""

import json

import pytest
import torch.distributed as dist

import overlap_profile
from ddp import overlap
from ddp.overlap import Span, rows_of
from ddp.step_times import balancing_rate, seconds_per_byte
from distlab import script
from distlab.cluster import sweep
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo"]


def test_the_balanced_link_by_hand():
    # each of two ranks sends all its 4 MB once, 1448 of 1514 bytes of a packet being its own
    assert balancing_rate(4_000_000, 4.0, 2) == pytest.approx(8_000_000 * 1514 / 1448)
    rate = balancing_rate(4_000_000, 4.0, 8)
    assert 4_000_000 * seconds_per_byte(rate, 8) == pytest.approx(4.0)


def span(name, begin, end, kind="user_annotation"):
    return Span(name, kind, 1000.0 * begin, 1000.0 * end)


def a_step():
    return [
        span("with overlap", 10, 30),
        span("forward", 10, 12),
        span("backward", 12, 28),
        span("launch bucket 0", 14, 14.1),
        span("gloo:all_reduce", 15, 19),
        span("the last gradient", 20, 20),
        span("launch bucket 1", 20, 20.1),
        span("gloo:all_reduce", 21, 27),
        span("optimizer", 28, 30),
        span("gloo:all_reduce", 31, 32),  # after the step
    ]


def test_a_timeline_from_gloo_s_spans():
    assert rows_of(a_step(), "with overlap") == [
        {
            "label": "with overlap: compute",
            "x": [[0, 2], [2, 10], [18, 20]],  # backward without its wait
            "y": ["forward", "backward", "optimizer"],
        },
        {"label": "bucket 0", "x": [[4, 5], [5, 9]], "y": ["waits its turn", "all-reduce"]},
        {"label": "bucket 1", "x": [[10, 11], [11, 17]], "y": ["waits its turn", "all-reduce"]},
    ]


def test_a_timeline_from_a_gpu_s_kernels():
    gpu = [
        span("with overlap", 10, 30, "gpu_user_annotation"),
        span("forward", 11, 13, "gpu_user_annotation"),
        span("backward", 13, 21, "gpu_user_annotation"),
        span("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 16, 18, "kernel"),
        span("ncclDevKernel_Broadcast_RING_LL(...)", 18, 19, "kernel"),
        span("optimizer", 25, 26, "gpu_user_annotation"),
    ]
    cpu = [one for one in a_step() if "gloo" not in one.name and not one.name.endswith("1")]
    rows = rows_of(sorted([*cpu, *gpu], key=lambda one: one.begin), "with overlap")
    assert rows[0]["x"] == [[0, 2], [2, 10], [14, 15]]
    assert rows[1]["x"] == [[3, 5], [5, 7]] and len(rows) == 2


def test_a_trace_that_lacks_an_all_reduce_or_a_mark_draws_nothing():
    without = [one for one in a_step() if one.begin != 21_000]
    with pytest.raises(RunError, match="has 1 all-reduces of 2 buckets"):
        rows_of(without, "with overlap")
    with pytest.raises(RunError, match="no 'without overlap'"):
        rows_of(a_step(), "without overlap")


def test_two_ranks_overlap_and_their_timeline_shows_it(tmp_path):
    trace = tmp_path / "new" / "trace.json"
    checks, extras = spawn(run_ranks, 2, [*SMOKE, "--trace", str(trace)], timeout_s=120)[0]
    assert [ok for _, ok in checks] == [True]
    own = extras["plan"]["own"]
    assert sum(bucket["size"] for bucket in own) > 4 * 125248  # the buckets carry counts besides
    assert own[-1]["ready"] == extras["plan"]["alone"]["backward"]
    assert len(extras["measured"]) == 3

    rows = extras["timeline"]
    assert len(rows) == 2 * (1 + len(own))
    overlap, separate = rows[: 1 + len(own)], rows[1 + len(own) :]
    for name, (compute, *buckets) in (("with", overlap), ("without", separate)):
        assert compute["label"] == f"{name} overlap: compute"
        assert compute["y"] == ["forward", "backward", "optimizer"]
        last_gradient, optimizer = compute["x"][1][1], compute["x"][2][0]
        launches = [bucket["x"][0][0] for bucket in buckets]
        assert launches == sorted(launches)
        early = [launch < last_gradient for launch in launches]
        assert early == [name == "with"] * (len(own) - 1) + [False]
        assert all(bucket["x"][1][0] < optimizer for bucket in buckets)

    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"with overlap", "without overlap", "gloo:all_reduce", "launch bucket 0"} <= names


@pytest.mark.slow
def test_ranks_that_do_not_average_are_noticed():
    checks, _ = spawn(run_ranks, 2, SMOKE, keep_own_gradients, timeout_s=120)[0]
    assert [ok for _, ok in checks] == [False]


def run_ranks(job, argv, change=lambda: None):
    """The script's own measurement on this rank: its checks, and what it records."""
    change()
    args = overlap_profile.parse_args(argv)
    with script.run(args) as run:
        overlap_profile.measure_ranks(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.extras


def keep_own_gradients():
    def all_reduce(self, bucket):
        sent = bucket.flat.clone()
        return dist.all_reduce(sent, async_op=True)

    overlap.DataParallel.all_reduce = all_reduce


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "2"], "--steps 2 gives no median; use 3 or more"),
        (["--rate", "100"], "--rate 100 is wrong because"),
        (["--link-rate", "slow"], "--link-rate slow is wrong because"),
        (["--trace", "/"], "--trace / is a folder; name a file"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        overlap_profile.parse_args([*SMOKE, *flags])


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweep, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        overlap_profile.main(["--preset", "smoke"])
