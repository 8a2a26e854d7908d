"""The microbenchmark counts wrong elements, fits and predicts as it says, and ends on Ctrl-C."""

import argparse
import heapq
import itertools
import os
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import allreduce_links
import allreduce_microbench
from distlab import predict, script
from distlab.errors import UsageError
from distlab.measure import Timing
from distlab.spawning import spawn
from parallelism import microbench
from parallelism.links import Link, fit_line, gloo_all_reduce, left_out, student_t
from parallelism.microbench import Pattern, Row, byte_size, check_link

SMOKE = ["--preset", "smoke", "--device", "cpu"]
COLUMNS = ["size (B)", "count", "type", "time (us)", "algbw (GB/s)", "busbw (GB/s)", "#wrong"]


def test_every_collective_gives_the_right_elements_in_every_dtype():
    for world_size in (1, 3):
        counted = spawn(count_wrong, world_size, timeout_s=60)
        assert all(wrong == 0 for ranks in counted for wrong in ranks.values())


def count_wrong(job):
    """The wrong elements of this rank, by collective, dtype and size; 4 bytes and odd sizes too."""
    return {
        (collective, dtype, size): microbench.make_case(collective, size, dtype, job).wrong()
        for collective in microbench.COLLECTIVES
        for dtype in ("float32", "bfloat16", "int64")
        for size in (4, 1000)
    }


def test_elements_that_arrive_wrong_are_counted():
    checks, tables = spawn(run_script, 2, [*SMOKE, "--max-bytes", "32"], broken, timeout_s=60)[0]
    assert checks == [("all_reduce: no wrong element", False)]
    wrong = [dict(zip(tables[0], row, strict=True))["#wrong"] for row in tables[1]]
    assert wrong == [2, 2]  # one element on each rank, at each of two sizes


def test_the_columns_are_those_of_nccl_tests_and_sizes_are_those_asked_for():
    flags = [*SMOKE, "--collective", "all", "--max-bytes", "2K", "--dtype", "float16"]
    checks, tables = spawn(run_script, 2, flags, timeout_s=120)[0]
    assert len(checks) == 7 and all(ok for _, ok in checks)
    columns, rows = tables
    assert columns[: len(COLUMNS)] == COLUMNS
    assert [row[0] for row in rows] == [4, 32, 256, 2048]
    for row in rows:
        size, count, dtype, microseconds, algbw, busbw = row[:6]
        assert (size, dtype) == (2 * count, "float16")
        assert algbw == pytest.approx(size / microseconds / 1e3)
        assert busbw == algbw  # sendrecv, the last collective: each rank sends its whole buffer


def run_script(job, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and its last table."""
    change()
    args = allreduce_microbench.parse_args(argv)
    with script.run(args) as run:
        allreduce_microbench.benchmark(run, args, job)
    last = list(run.tables.values())[-1]
    return [(check.name, check.ok) for check in run.checks], (last["columns"], last["rows"])


def broken():
    """An all-reduce that spoils one element."""
    honest = dist.all_reduce

    def spoiling(tensor, *args):
        honest(tensor, *args)
        if tensor.dtype == torch.float32:
            tensor[0] += 1

    dist.all_reduce = spoiling


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("mebibytes", [1, 4, 16, 100])
def test_without_latency_gloos_ring_is_the_ring(workers, mebibytes):
    n = mebibytes * 2**20
    ring = predict.ring_all_reduce(n, workers, 0.0, 1e-9)
    assert gloo_all_reduce(n, workers, 0.0, 1e-9) == pytest.approx(ring)


@pytest.mark.parametrize("workers", [2, 3, 4, 6])
@pytest.mark.parametrize("mebibytes", [0.1, 1, 5, 16])  # 5 and 16 make odd numbers of segments
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 2e-3, 0.05])
@pytest.mark.parametrize("bucket", [0.0, 1e-3])
def test_the_formula_is_what_the_ring_does_event_by_event(workers, mebibytes, alpha, bucket):
    n, beta = mebibytes * 2**20, 8e-9
    segments = max(-(-int(n) // 2**20), 2 * workers)
    each = -(-segments // workers)
    segment = n / (each * workers) * beta
    phases = [simulate(workers, each * (workers - 1), segment, alpha, bucket) for _ in range(2)]
    assert gloo_all_reduce(n, workers, alpha, beta, bucket) == pytest.approx(sum(phases), rel=1e-9)


def simulate(workers, count, segment, alpha, bucket):
    """A phase of gloo's loop: two segments on their way, each asked for by its receiver's word.

    Words and segments of a rank leave by one link, in the order in which they are put there.
    """
    WORD, SEGMENT = 0, 1  # of two that come at the same time, the word is looked at first
    free = [-alpha] * workers  # when each rank's link has sent all that it was given
    arrivals, ended = [], 0.0

    def put(now, rank, kind, index):
        start = max(now, free[rank])
        saved = min(bucket, start - free[rank], segment) if kind == SEGMENT else 0.0
        if kind == SEGMENT:
            free[rank] = start + segment - saved
        came = (start if kind == WORD else free[rank]) + alpha
        to = (rank + (1 if kind == WORD else -1)) % workers
        heapq.heappush(arrivals, (came, kind, index, to))

    for rank in range(workers):
        for index in range(min(2, count)):
            put(0.0, rank, WORD, index)
    while arrivals:
        now, kind, index, rank = heapq.heappop(arrivals)
        if kind == WORD:
            put(now, rank, SEGMENT, index)
        else:
            ended = now
            if index + 2 < count:
                put(now, rank, WORD, index + 2)
    return ended


def test_where_a_segment_is_longer_than_the_latency_each_costs_it_once():
    """1 Gbit/s, 2 ms and 16 MiB: the word for a segment waits behind the segment before it."""
    segment, alpha = 2**20 * 8e-9, 2e-3
    assert gloo_all_reduce(2**24, 2, alpha, 8e-9) == pytest.approx(2 * 8 * (segment + alpha))


def test_a_bucket_pays_for_what_follows_a_pause():
    def seconds(burst, delay):
        return Link(8e9 * 1514 / 1448, delay, burst=burst).seconds("all_reduce", 1e6, 2, "gloo")

    assert seconds(1e5, 0.0) == pytest.approx(1e-3)  # without delay there is no pause
    assert seconds(0, 2e-3) - seconds(1e5, 2e-3) == pytest.approx(2 * 1e-4)  # 100 kB, two phases
    # Never more than a segment: the second of a phase follows at once.
    assert seconds(0, 2e-3) - seconds(1e9, 2e-3) == pytest.approx(2 * 2.5e-4)


def test_a_single_number_is_handed_on_without_asking():
    assert gloo_all_reduce(4, 4, 2e-3, 1e-9) == pytest.approx(6 * 2e-3, rel=1e-4)
    assert gloo_all_reduce(1e6, 1, 2e-3, 1e-9) == 0


def test_a_straight_line_is_fitted_exactly_and_noise_widens_the_interval():
    sizes = [4.0**power for power in range(1, 13)]
    exact = [1e-4 + 2e-9 * n for n in sizes]
    line = fit_line(sizes, exact)
    assert (line.fixed, line.slope) == (pytest.approx(1e-4), pytest.approx(2e-9))
    assert line.fixed_range == pytest.approx(0, abs=1e-9)
    assert left_out(sizes, exact) == pytest.approx(exact)
    noisy = [t * (1 + 0.1 * (-1) ** i) for i, t in enumerate(exact)]
    line = fit_line(sizes, noisy)
    assert abs(line.fixed - 1e-4) < line.fixed_range < 5e-5
    assert abs(line.slope - 2e-9) < line.slope_range < 1e-9
    assert fit_line(sizes[:3], exact[:3]) is None


def test_students_t_is_that_of_the_tables():
    for freedom, quantile in {2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042}.items():
        assert student_t(freedom) == pytest.approx(quantile, rel=0.04)


def test_each_collective_is_predicted_by_its_back_ends_own_algorithm():
    link = Link(8e9 * 1514 / 1448, 0.0)  # 1 GB/s of payload
    n = 1e9
    assert link.seconds("reduce_scatter", n, 4, "gloo") == pytest.approx(1.5)
    assert link.seconds("reduce_scatter", n, 4, "nccl") == pytest.approx(0.75)
    assert link.seconds("reduce", n, 4, "gloo") == pytest.approx(1)
    assert link.seconds("broadcast", n, 4, "gloo") == pytest.approx(2)
    assert link.seconds("broadcast", n, 4, "nccl") == pytest.approx(1)
    assert link.seconds("sendrecv", n, 4, "gloo") == pytest.approx(1)


def test_sizes_are_read_as_nccl_tests_reads_them():
    assert [byte_size(text) for text in ("4", "64K", "16m", "1GiB")] == [4, 2**16, 2**24, 2**30]
    for wrong in ("", "0", "M", "4T", "-4", "1.5M"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size in bytes; use 4, 64K"):
            byte_size(wrong)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min-bytes", "1M", "--max-bytes", "1K"], "--max-bytes 1024 is less than --min-bytes"),
        (["--factor", "1"], "--factor 1 does not grow"),
        (["--repeats", "2"], "--repeats 2 gives no median; use 3 or more"),
        (["--link-delay", "2ms"], "give --link-rate too"),
        (["--link-rate", "fast"], "--link-rate fast is wrong because"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        allreduce_microbench.parse_args([*SMOKE, *flags])


def test_more_ranks_than_a_dtype_can_add_up_are_refused():
    many = SimpleNamespace(world_size=200, device="cpu")
    with pytest.raises(UsageError, match="--dtype bfloat16 does not add 200 ranks' numbers"):
        Pattern(torch.bfloat16, many)


def test_the_links_check_looks_at_1_to_16_mib_only():
    args = argparse.Namespace(preset="smoke", json=None, figures=None)
    run = script.Run(args)
    sizes = [2**18, 2**20, 2**24, 2**26]
    second = Timing((1.0,) * 20)
    rows = [Row("all_reduce", size, size // 4, "float32", second, 0) for size in sizes]
    check_link(run, rows, [9.0, 1.05, 0.92, 9.0], 0.1)
    check_link(run, rows, [1.0, 1.0, 1.2, 1.0], 0.1)
    check_link(run, rows[:1], [9.0], 0.1)
    assert [check.ok for check in run.checks] == [True, False]
    rows[2] = replace(rows[2], timing=Timing((1.0,) * 3))  # a slow link's: three calls tell nothing
    check_link(run, rows, [9.0, 1.05, 0.92, 9.0], 0.1)
    assert run.checks[-1].ok and "too few samples" in run.checks[-1].detail


def test_ctrl_c_prints_the_sizes_that_are_measured(monkeypatch, capsys):
    def measured(collective, size, args, job):
        if size == 32:
            os.kill(os.getpid(), signal.SIGINT)
        return Row(collective, size, size // 4, "float32", Timing((1e-3,)), 0)

    monkeypatch.setattr(allreduce_microbench, "measure_one", measured)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        allreduce_microbench.main(SMOKE)
    assert signal.getsignal(signal.SIGINT) is before
    printed = capsys.readouterr().out
    assert "     32       8   float32" in printed and "256" not in printed


def test_a_later_ctrl_c_ends_at_once(monkeypatch):
    times = iter([0.0, 0.1, 5.0])
    monkeypatch.setattr(microbench.time, "monotonic", lambda: next(times))
    with microbench.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's own, for the same press
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sizes_grow_by_the_factor():
    args = allreduce_microbench.parse_args([*SMOKE, "--max-bytes", "64M", "--factor", "4"])
    found = allreduce_microbench.sizes(args)
    assert found[0] == 4 and found[-1] == 2**26
    assert all(after == 4 * before for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "1"], "--nodes 1 is wrong because a ring needs 2; use 2 to 8"),
        (["--links", "1gbit", "quick"], "--links quick is wrong because"),
        (["--links", "1gbit,soon"], "soon is wrong because"),
    ],
)
def test_a_wrong_link_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        allreduce_links.parse_args(["--preset", "smoke", *flags])


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.setattr(allreduce_links, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        allreduce_links.main(["--preset", "smoke"])


def test_a_cluster_is_made_again_while_the_host_takes_cores_away(monkeypatch):
    args = argparse.Namespace(rounds=3)
    monkeypatch.setattr(allreduce_links, "measured", lambda *_: [["row"]])
    stolen = iter([0.0, 60.0, 60.0, 60.0])  # a minute in the first round, nothing in the second
    monkeypatch.setattr(allreduce_links, "steal_s", lambda: next(stolen))
    assert len(allreduce_links.undisturbed("1gbit", 2, args)) == 2
    always = itertools.count(0.0, 60.0)
    monkeypatch.setattr(allreduce_links, "steal_s", lambda: next(always))
    assert len(allreduce_links.undisturbed("1gbit", 2, args)) == 3
    monkeypatch.undo()
    assert allreduce_links.steal_s() >= 0.0
