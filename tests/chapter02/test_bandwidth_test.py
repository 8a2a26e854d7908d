"""Bandwidth: STREAM's arithmetic, the counted traffic, the fitted line, what a wrong copy does."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch

import bandwidth_test
from distlab.errors import UsageError
from distlab.run import Run
from parallelism import bandwidth
from parallelism.machine import Cache

CPU = torch.device("cpu")


@pytest.fixture
def run(capsys) -> Run:
    return Run(Namespace(json=None, figures=None, preset="smoke"))


@pytest.mark.parametrize("threads", [1, 2])
def test_stream_computes_what_the_rounds_give_by_hand(threads):
    before = torch.get_num_threads()
    result = bandwidth.stream(8 * 1000, threads, repeats=12)
    assert torch.get_num_threads() == before
    assert result.values == result.expected and result.expected[0] == 15.0**12
    assert result.expected[0] < 2**53  # exact
    assert set(result.bandwidth) == {"copy", "scale", "add", "triad"}


def test_stream_notices_a_wrong_element():
    one_wrong = torch.tensor([1.0, 1.0, 2.0])
    assert (
        np.isnan(bandwidth._only_value(one_wrong)) and bandwidth._only_value(one_wrong[:2]) == 1.0
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_the_sweep_is_exact_and_counts_its_bytes(monkeypatch, threads):
    monkeypatch.setattr(bandwidth, "_together", lambda workers: [w.run() for w in workers] and 2.0)
    point = bandwidth.sweep(16 * 100, threads, traffic=24 * 100 * 7, repeats=3)
    assert point.exact and point.working_set == 1600
    assert point.samples == (threads * 8 * 100 * (2 + 3 * 6) / 2.0,) * 3
    assert point.bandwidth == point.samples[0]


def test_threads_run_together():
    workers = [bandwidth._Adder(1000, 50) for _ in range(3)]
    assert bandwidth._together(workers) > 0
    assert all((worker.total == 50).all() for worker in workers)


def test_the_line_is_found_again():
    sizes = [4**i for i in range(5, 14)]
    seconds = [5e-6 + size / 25e9 for size in sizes]
    alpha, beta = bandwidth.fit_line(sizes, seconds)
    assert alpha == pytest.approx(5e-6) and 1 / beta == pytest.approx(25e9)


def test_the_line_has_no_negative_part():
    alpha, beta = bandwidth.fit_line([1e3, 1e6], [0.5e-6, 1e-3])  # less than proportional
    assert alpha == 0.0 and beta > 0
    alpha, beta = bandwidth.fit_line([1e3, 1e6], [2e-3, 1e-3])  # the larger one took less
    assert alpha > 0 and beta == 0.0


def test_copies_arrive():
    [route] = bandwidth.host_routes(CPU)
    copies = bandwidth.transfer(route, [1, 1000, 4096], repeats=3)
    assert copies.sizes == [1, 1000, 4096] and copies.wrong == [] and copies.best > 0


def test_a_copy_that_does_not_arrive_fails_the_run(run, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, non_blocking=False: self)
    [route] = bandwidth.host_routes(CPU)
    copies = bandwidth.transfer(route, [1000], repeats=3)
    monkeypatch.undo()
    bandwidth_test.check_arrived(run, [copies], "every copy arrives as it was sent")
    assert copies.wrong == [1000] and run.status == 1


def test_unknown_is_shown_as_unknown_and_never_compared(run, capsys):
    bandwidth.compare_with_specification(run, [bandwidth.Result("memory", 2e10, None)])
    assert re.search(r"20\.0 GB/s +unknown +unknown", capsys.readouterr().out)
    assert run.status == 0


def test_what_is_faster_than_its_specification_is_wrong(run):
    bandwidth.compare_with_specification(run, [bandwidth.Result("memory", 1.04e9, 1e9)])
    assert run.status == 0
    bandwidth.compare_with_specification(run, [bandwidth.Result("memory", 1.06e9, 1e9)])
    assert run.status == 1


def test_sizes_and_their_caches(monkeypatch):
    caches = [Cache("L1d", 2**15, 1, 2), Cache("L3", 2**25, 2, 1)]
    monkeypatch.setattr(bandwidth, "caches", lambda: caches)
    assert bandwidth.level_of(2 * 2**15, 2**15) == "L1d"  # each core has its own
    assert bandwidth.level_of(2**25, 2**24) == "L3" and bandwidth.level_of(2**26, 2**25) == "memory"
    monkeypatch.setattr(bandwidth, "caches", list)
    assert bandwidth.level_of(1, 1) == "unknown"
    sizes = bandwidth.working_sets(4)
    assert sizes[0] == 2**14 and sizes == sorted(set(sizes)) and sizes[-1] >= 2**26


def test_a_smoke_run(tmp_path):
    flags = ["--preset", "smoke", "--device", "cpu", "--array-mib", "1", "--traffic-mib", "1"]
    path = tmp_path / "run.json"
    bandwidth_test.main([*flags, "--specified-memory", "1e6", "--json", str(path)])
    record = json.loads(path.read_text())
    assert all(check["ok"] for check in record["checks"])
    assert record["tables"]["specification"]["rows"][0][2] == "1.00 PB/s"
    assert set(record["figures"]) == {"bandwidth_sweep", "bandwidth_copies"}
    assert len(record["comparisons"]) == 1


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--repeats", "2"], "--repeats 2 is outside 3 to 12"),
        (["--repeats", "13"], "beyond what float64 holds"),
        (["--threads", "100000"], "--threads 100000 is more than"),
        (["--sweep-step", "1"], "never reaches the next size"),
    ],
)
def test_wrong_flags(flags, why):
    with pytest.raises(UsageError, match=why):
        bandwidth_test.main(["--preset", "smoke", *flags])


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(bandwidth_test.hardware, "has_cuda", lambda: False)
    with pytest.raises(UsageError, match="--device cuda needs a GPU"):
        bandwidth_test.main(["--preset", "smoke", "--device", "cuda"])


def test_routes_of_a_gpu_and_their_specification(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    routes = bandwidth.host_routes(torch.device("cuda", 0))
    assert [route.name for route in routes] == [
        "pinned host to device", "device to pinned host", "pageable host to device",
        "device to pageable host",
    ]  # fmt: skip
    assert all(route.specified == 64e9 for route in routes)  # half of both directions
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some other card")
    assert all(r.specified is None for r in bandwidth.host_routes(torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    peers = bandwidth.peer_routes()
    assert [route.name for route in peers] == ["GPU0 to GPU1", "GPU1 to GPU0"]
    assert peers[0].specified == 450e9
