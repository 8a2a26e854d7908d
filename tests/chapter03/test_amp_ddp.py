"""Mixed precision: the scaler's rule, the overflow that all ranks share, the order of clipping."""

from argparse import Namespace

import pytest
import torch
from torch import nn

import amp_ddp
from ddp import amp
from ddp.amp import GROWTH_INTERVAL, report_overflow, scales_by_rule
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo"]


def test_the_scale_by_hand():
    overflows = [True, False, False, False, False, False, True, False]
    assert scales_by_rule(64.0, overflows) == [64, 32, 32, 32, 32, 64, 64, 32]


def test_the_rule_is_torch_s_own_scaler_s():
    overflows = [n in (1, 2, 9) for n in range(20)]
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=GROWTH_INTERVAL)
    scales = []
    for overflow in overflows:
        scales.append(scaler.get_scale())
        scaler.scale(weight.sum()).backward()
        if overflow:
            weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scales == scales_by_rule(1024.0, overflows)


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_rank_s_overflow_makes_all_ranks_skip(world_size):
    for checks, rows in spawn(overflow, world_size, timeout_s=120):
        assert [name for name, ok in checks if not ok] == []
        _, first_scale, own, averaged, skipped, _ = rows[0]
        assert (own, averaged, skipped) == (1, world_size, world_size)
        assert rows[1][1] == pytest.approx(first_scale / 2)


def test_ranks_that_skip_alone_are_noticed():
    """As where gradients are sharded, and nobody tells the others of an infinity."""
    checks, _ = spawn(overflow, 2, scaler_of_its_own, timeout_s=120)[0]
    failed = [name for name, ok in checks if not ok]
    assert "in every step all ranks agree: scale, skip, weights" in failed


def overflow(job, change=lambda: None):
    """The script's own experiment on this rank: its checks, and its table's rows."""
    lab, args = new_lab(job)
    change()
    with script.run(args) as run:
        report_overflow(run, lab)
    return [(check.name, check.ok) for check in run.checks], run.tables["overflow"]["rows"]


def new_lab(job):
    args = amp_ddp.parse_args(SMOKE)
    args.batch_size = 2 * job.world_size
    return amp_ddp.new_lab(args, job), args


def scaler_of_its_own():
    """Each rank keeps its own gradient: the hook averages nothing."""

    def alone(group, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    amp.allreduce_hook = alone


@pytest.mark.parametrize("clip_first", [False, True])
def test_the_norm_that_the_optimizer_gets(clip_first):
    (norm,) = spawn(one_norm, 1, clip_first, timeout_s=60)
    assert norm == pytest.approx(0.01 / (2.0**10 if clip_first else 1), rel=1e-3)


def one_norm(job, clip_first):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, inputs, targets):
            return (inputs @ self.weight - targets).square().mean()

    args = Namespace(clip=0.01, learning_rate=1e-3, scale=2.0**10)
    trainee = amp_ddp.Trainee(
        Mean(), amp_ddp.Precision(torch.float16, scaled=True), args, job.device
    )
    trainee.clip_first = clip_first
    trainee.step(torch.ones(2, 4), torch.zeros(2, 4))
    return trainee.norm


def test_a_processor_without_16_bits_skips(monkeypatch):
    def refuse(self, other):
        raise RuntimeError('"addmm" not implemented for Half')

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    with pytest.raises(script.Skipped, match="no matrix product in torch.bfloat16 on cpu"):
        amp_ddp.refuse_without_16_bits(torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "4"], "--steps 4 gives no median; use 5 or more"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        amp_ddp.parse_args([*SMOKE, *flags])
