"""A layer divided over ranks computes what the whole one does, by whoever it was divided."""

import importlib.util

import pytest
import torch

import megatron_layer
from distlab import script
from distlab.errors import Skipped
from distlab.spawning import spawn
from megatron_layer import FromScratch, Whole, part, step

LIMIT_S = 100


def divided(job):
    """On ranks that are no power of two: bytes sent, and the largest difference."""
    a, b, x, upstream = (torch.randn(shape) for shape in ((9, 5), (5, 9), (7, 5), (7, 5)))
    _, whole = step(Whole(a, b), x, upstream)
    sent, own = step(FromScratch(part(a, 0), part(b, 1)), x, upstream)
    whole["a"], whole["b"] = part(whole["a"], 0), part(whole["b"], 1)
    return sent, max(float((own[name] - whole[name]).abs().max()) for name in whole)


def test_from_scratch_on_three_ranks():
    for sent, worst in spawn(divided, 3, timeout_s=LIMIT_S):
        assert worst < 1e-5
        assert sent == pytest.approx([2 * 2 / 3 * 4 * 7 * 5] * 2)


def all_three(job):
    args = megatron_layer.parse_args(["--preset", "smoke"])
    with script.run(args) as run:
        megatron_layer.compare(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.tables["layers"]["rows"]


def test_megatrons_and_torchs_agree_with_it():
    pytest.importorskip("megatron.core", reason="megatron-core is not in this environment")
    (checks, rows), _ = spawn(all_three, 2, timeout_s=LIMIT_S)
    assert len(checks) == 6 and all(ok for _, ok in checks), checks
    assert rows[0][1:] == rows[1][1:] == rows[2][1:]  # parameters and bytes, whoever divided it


def test_without_megatron_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match="megatron-core is not installed; python3 scripts/lab.py env"):
        megatron_layer.main(["--preset", "smoke"])
