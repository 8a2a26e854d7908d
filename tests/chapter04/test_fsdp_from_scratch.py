"""The sharded wrapper from scratch equals fully_shard and one process, whatever the shapes."""

import pytest
import torch
from torch import nn

import fsdp_from_scratch
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn
from fsdp.parity import prove_equal
from fsdp.sharded import FullySharded


def proved(job, argv):
    args = fsdp_from_scratch.parse_args(argv)
    with script.run(args) as run:
        prove_equal(run, args, job)
        fsdp_from_scratch.report_states(run, args, job)
    return [row[0] for row in run.tables["parity"]["rows"]], [check.ok for check in run.checks]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_case_trains_as_torchs_and_as_one_process(ranks):
    argv = ["--preset", "smoke", "--steps", "6"]
    for names, checks in spawn(proved, ranks, argv, timeout_s=250):
        assert all(checks)
        assert ("kept by pairs" in names) == (ranks == 4)


def odd_sizes(job):
    """A scalar, fewer numbers than ranks, a unit in a unit, a half-precision table."""
    torch.manual_seed(job.rank)
    inner = nn.Linear(1, 1, bias=False)
    outer = nn.Sequential(inner, nn.Linear(1, 5))
    model = nn.Sequential(outer, nn.Linear(5, 1).double())
    model.scale = nn.Parameter(torch.tensor(2.0))
    names = dict(model.named_parameters())
    first = {name: tensor.detach().clone() for name, tensor in names.items()}
    sharded = FullySharded(model, [outer, inner])
    whole = sharded.whole(lambda shard: shard)
    sizes = [shard.numel() for shard in sharded.shards]
    same = job.rank != 0 or all(torch.equal(whole[name], first[name]) for name in names)
    return same, whole.keys() == names.keys(), sizes


def test_units_that_nothing_divides():
    for same, complete, sizes in spawn(odd_sizes, 3):
        assert same and complete
        assert sizes == [1, 2, 4, 1]  # the scalar; 6 doubles; the outer's 10 numbers; the inner's


def test_wrong_flags_are_refused():
    with pytest.raises(UsageError, match="--batch-size 7 is not divisible by 2 micro-batches"):
        fsdp_from_scratch.parse_args(["--batch-size", "7"])
    with pytest.raises(UsageError, match="--repeats 2 gives no median"):
        fsdp_from_scratch.parse_args(["--repeats", "2"])
