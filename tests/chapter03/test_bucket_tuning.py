"""Bucket tuning: the model by hand, DDP's buckets as predicted, and checks that see a mistake."""

from types import SimpleNamespace

import pytest
import torch

import bucket_tuning
from ddp import step_times
from ddp.step_times import Alone, Wire, bucket_limits, ddp_buckets, predict_step, refuse_one_rank
from distlab import script
from distlab.cluster import sweep
from distlab.errors import UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo"]
MIB = 2**20


def alone(sizes=(100, 100, 200), ready=(1.0, 2.0, 4.0)):
    """Forward 2 s, backward 4 s, optimizer 0.5 s."""
    return Alone(2.0, 4.0, 0.5, tuple(range(len(sizes))), tuple(sizes), tuple(ready))


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ([1], [100, 100, 200]),
        ([150], [200, 200]),  # 100 is not enough, so it takes the next one too
        ([200], [200, 200]),  # enough is enough
        ([100, 1000], [100, 300]),  # a first bucket of its own
        ([1000], [400]),
    ],
)
def test_buckets_close_as_ddp_closes_them(limits, sizes):
    buckets = ddp_buckets(alone(), limits)
    assert [bucket.size for bucket in buckets] == sizes
    assert buckets[-1].ready == 4.0  # of its last gradient


def test_the_default_has_a_small_first_bucket_and_a_given_size_has_not():
    assert bucket_limits(None) == (MIB, 25 * MIB)
    assert bucket_limits(0.5) == (MIB // 2,)


@pytest.mark.parametrize(
    ("wire", "overlap", "sticks_out"),
    [
        ({"per_byte": 0.01}, False, 4.0),  # 400 bytes after backward
        ({"per_byte": 0.01}, True, 2.0),  # 1 to 2 and 2 to 3 are hidden, 4 to 6 is not
        ({"per_byte": 0.03}, True, 9.0),  # one after another from 1 on: 12 s, 3 of them hidden
        ({"latency": 0.5}, True, 0.5),  # three latencies, the last one seen
        ({"per_byte": 0.01, "latency": 0.5}, False, 5.5),
        ({"per_byte": 0.01, "latency": 0.5, "lanes": 2}, False, 4.5),  # only the first is seen
        ({"per_byte": 0.001, "latency": 0.5, "lanes": 2}, False, 1.3),  # 0.5 to 0.6 to 0.7; 1.1
        ({"per_byte": 0.01, "work_per_byte": 0.01}, True, 4.0),  # backward stands still: no gain
        ({"per_byte": 0.01, "work_per_byte": 0.005}, True, 3.0),  # of 2 s hidden it loses 1
        ({"per_byte": 0.01, "work": 1.5}, True, 5.0),  # work is longer than the bytes take
    ],
)
def test_a_step_by_hand(wire, overlap, sticks_out):
    wire = Wire(**{"latency": 0.0, "per_byte": 0.0, **wire})
    guess = predict_step(alone(), wire, ddp_buckets(alone(), [1]), overlap)
    assert guess.sticks_out == pytest.approx(sticks_out)
    assert guess.step == pytest.approx(6.5 + sticks_out)
    assert guess.sent == pytest.approx(400 * wire.per_byte + 3 * wire.latency)
    assert guess.latency == pytest.approx(3 * wire.latency)


def test_the_slowest_rank_of_each_number():
    one, other = alone(ready=(1.0, 3.0, 4.0)), alone(ready=(2.0, 2.0, 4.0))
    assert Alone.slowest([one, other]).ready == [2.0, 3.0, 4.0]
    assert Alone.slowest([one, other]).order == (0, 1, 2)


@pytest.mark.parametrize(("cores", "share"), [(0.5, 1.0), (1, 1.0), (1.25, 0.75), (2, 0.0), (8, 0)])
def test_sending_takes_no_core_where_there_is_one_more(cores, share, monkeypatch):
    monkeypatch.setattr(step_times.torch, "get_num_threads", lambda: 1)
    assert step_times.crowding(cores) == share


def test_a_link_is_measured_and_its_buckets_are_those_predicted():
    checks, link = spawn(run_link, 2, [*SMOKE, "--link-rate", "1gbit"], timeout_s=120)[0]
    assert checks == [(GRADIENTS, True), ("DDP's buckets are those predicted", True)]
    assert [row[0] for row in link["rows"]] == [0.0625, 0.25, 64.0, None]
    assert sum(link["alone"]["sizes"]) == 4 * 125248
    assert max(link["alone"]["ready"]) <= link["alone"]["backward"]
    assert link["wire"]["per_byte"] == pytest.approx(8e-9 * 1514 / 1448)


@pytest.mark.slow
def test_ranks_that_do_not_average_are_noticed():
    checks, _ = spawn(run_link, 2, SMOKE, keep_own_gradients, timeout_s=120)[0]
    assert checks[0] == (GRADIENTS, False)


GRADIENTS = "largest difference of a gradient to the mean of the ranks' own"


def run_link(job, argv, change=lambda: None):
    """The script's own measurement on this rank: its checks, and its link."""
    change()
    args = bucket_tuning.parse_args(argv)
    with script.run(args) as run:
        bucket_tuning.measure_link(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.extras["link"]


def keep_own_gradients():
    def hook(state, bucket):
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    class Deaf(bucket_tuning.DDP):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(None, hook)

    bucket_tuning.DDP = Deaf


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, []),
        ({64.0: (150, 180)}, ["the worst error of a predicted step"]),
        (
            {0.25: (100, 100), 64.0: (150, 100)},
            ["the worst error of a predicted step", "that slowdown"],
        ),
        (
            {0.25: (100, 115), 1.0: (101, 95), 64.0: (150, 160)},
            ["a step with the predicted best bucket, over the best measured"],
        ),
    ],
)
def test_the_checks_of_all_links(change, failed):
    # predicted and measured ms of each bucket size
    steps = {0.25: (100, 101), 1.0: (110, 108), 64.0: (150, 148), None: (140, 139), **change}
    rows = [
        [cap, 1, 0.0, 0.0, 5.0, guess, real, 100 * (guess - real) / real]
        for cap, (guess, real) in steps.items()
    ]
    link = {"rows": rows, "mbit": 100.0, "alone": vars(alone()), "wire": vars(wire_of_nothing())}
    args = bucket_tuning.parse_args(["--preset", "laptop", "--tolerance", "0.15"])
    run = script.run(args)
    bucket_tuning.report_tuning(run, args, {"100mbit": link})
    assert [check.name for check in run.checks if not check.ok] == failed


def wire_of_nothing():
    return Wire(0.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "2"], "--steps 2 gives no median; use 3 or more"),
        (["--buckets", "1"], "--buckets 1 compares nothing"),
        (["--rates", "100"], "--rates 100 is wrong because"),
        (["--link-rate", "slow"], "--link-rate slow is wrong because"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        bucket_tuning.parse_args([*SMOKE, *flags])


def test_one_rank_is_refused():
    with pytest.raises(UsageError, match="one rank sends nothing; use torchrun"):
        refuse_one_rank(SimpleNamespace(world_size=1))


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweep, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        bucket_tuning.main(["--preset", "smoke"])
