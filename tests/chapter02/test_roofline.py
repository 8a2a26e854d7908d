"""Roofline: the formulas against counted bytes and FLOPs, the roof's shape, what is above it."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import roofline
from distlab.errors import UsageError
from distlab.measure import Timing
from distlab.run import Run
from parallelism import roofline as kernels

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_product_by_hand(dtype, rows):
    weights = kernels.random_weights(64, 5 * 64 * 64 * dtype.itemsize, dtype, CPU)
    kernel = kernels.product(rows, weights, most_flops=1e12)
    assert kernel.calls == len(weights) == 5 and kernel.flops == 5 * 2 * rows * 64 * 64
    assert kernel.bytes_moved == 5 * (64 * 64 + 2 * rows * 64) * dtype.itemsize
    assert kernels.counted(kernel) == (kernel.flops, kernel.bytes_moved)


def test_a_product_takes_no_more_weights_than_its_flops_allow():
    weights = kernels.random_weights(32, 10 * 32 * 32 * 4, torch.float32, CPU)
    one = 2.0 * 8 * 32 * 32
    assert kernels.product(8, weights, 3.5 * one).calls == 3
    assert kernels.product(8, weights, 0.1 * one).calls == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [7, 25, 100])
def test_element_wise_kernels_move_what_is_counted(dtype, piece):
    for name, (_, flops, moved, results) in kernels.ELEMENTWISE.items():
        arrays = [torch.ones(100, dtype=dtype) for _ in range(3)]
        kernel = kernels.elementwise(name, arrays, piece)
        assert kernel.calls == -(-100 // piece) and kernel.flops == 100 * flops
        assert kernel.bytes_moved == (100 * moved + results * kernel.calls) * dtype.itemsize
        assert kernels.counted(kernel) == (0, kernel.bytes_moved), name


def test_the_chain_is_the_same_in_one_kernel_and_in_two():
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])
    for name in (kernels.FUSED, kernels.UNFUSED):
        mine = [x.clone() for x in (a, b, c)]
        kernels.elementwise(name, mine, 2).run()
        torch.testing.assert_close(mine[0], torch.tensor([16.0, 26.0]))


@pytest.fixture
def roof():
    return kernels.Roof(torch.float32, 100e9, 20e9, None, None)


def test_the_roof_rises_to_its_ridge(roof):
    assert roof.ridge == 5.0
    assert [roof.height(x) for x in (0.5, 5.0, 50.0)] == [10e9, 100e9, 100e9]


def point(roof, seconds, intensity=1.0, is_product=True, dtype=torch.float32):
    kernel = kernels.Kernel("k", dtype, 1, intensity * 1e9, 1e9, 1, lambda: None, is_product)
    return kernels.Point(kernel, Timing((seconds,) * 9), replace(roof, dtype=dtype))


def test_what_limits_a_kernel(roof):
    assert point(roof, 0.05).limit == "memory"  # 1 GB at its 20 GB/s
    assert point(roof, 0.05).share == pytest.approx(1.0)
    assert point(roof, 0.1, intensity=10).limit == "compute"
    assert point(roof, 1.0).limit == "overhead"
    vector = point(roof, 0.05, intensity=10, is_product=False)
    assert vector.limit == "memory" and vector.ceiling == 200e9  # not the products' peak


@pytest.fixture
def run(capsys) -> Run:
    return Run(Namespace(json=None, figures=None, preset="smoke"))


def test_a_kernel_above_its_roof_fails_the_run(roof, run):
    good = point(roof, 0.05 / 1.2)
    roofline.check_points(run, [good], 1.25)
    assert run.status == 0
    noisy = replace(good, timing=Timing((0.05, 0.05 / 1.3) * 5))
    roofline.check_points(run, [good, noisy], 1.25)
    assert run.status == 0 and run.checks[-1].detail.startswith("cannot tell: ")
    roofline.check_points(run, [good, noisy, point(roof, 0.05 / 1.3)], 1.25)
    assert run.status == 1


def test_an_element_wise_kernel_right_of_the_ridge_fails_the_run(roof, run):
    roofline.check_points(run, [point(roof, 1.0, intensity=6, is_product=False)], 1.25)
    assert run.status == 1


def test_a_wrong_formula_fails_the_run(run):
    arrays = [torch.ones(10) for _ in range(3)]
    kernel = kernels.elementwise("add a += b", arrays, 10)
    roofline.check_counts(run, torch.float32, [kernel])
    assert run.status == 0
    roofline.check_counts(run, torch.float32, [replace(kernel, bytes_moved=119)])
    assert run.status == 1


def test_a_smoke_run(tmp_path):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--device", "cpu", "--width", "128", "--memory-mib", "2"]
    roofline.main([*flags, "--dtypes", "float32", "bfloat16", "--json", str(path)])
    record = json.loads(path.read_text())
    assert all(check["ok"] for check in record["checks"])
    assert set(record["metrics"]) == {"ridge_point_float32", "ridge_point_bfloat16"}
    fusion = record["comparisons"]["speed-up by fusion (bytes unfused / fused)"]
    assert fusion["predicted"] == 1.5
    assert record["tables"]["roofs"]["rows"][0][2] == "unknown"  # no data sheet of a CPU
    labels = [series["label"] for series in record["figures"]["roofline"]["series"]]
    assert labels == ["float32 roof", "bfloat16 roof", "float32 products", "bfloat16 products",
                      "float32 element-wise"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "why"),
    [(["--repeats", "2"], "--repeats 2 gives no median"), (["--device", "cuda"], "needs a GPU")],
)
def test_wrong_flags(monkeypatch, flags, why):
    monkeypatch.setattr(roofline.hardware, "has_cuda", lambda: False)
    with pytest.raises(UsageError, match=why):
        roofline.main(["--preset", "smoke", *flags])
