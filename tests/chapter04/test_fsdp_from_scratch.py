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


class Aside(nn.Module):
    """A unit that gives its result by a side way, which no output shows, and has whole numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.seven = nn.Parameter(torch.tensor([300_007, 14]), requires_grad=False)

    def forward(self, inputs):
        self.result = self.layers(inputs) * (self.seven % 7).sum()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.aside, self.last = Aside(), nn.Linear(4, 1)

    def forward(self, inputs):
        self.aside(inputs)
        return self.last(self.aside.result)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError


def look(model, optimizer, inputs):
    """A forward pass with gradients whose backward never comes: all is whole before the step."""
    model(inputs).sum().backward()
    model(inputs)


def break_off(model, optimizer, inputs):
    """A backward pass that raises in the middle; then the step is made anew."""
    hook = getattr(model, "module", model).aside.register_forward_pre_hook(
        lambda module, args: (Breaks.apply(args[0].clone().requires_grad_()),)
    )
    with pytest.raises(ArithmeticError):
        model(inputs).sum().backward()
    hook.remove()
    optimizer.zero_grad()
    model(inputs).sum().backward()


def weights_after(job, step, wrapped):
    torch.manual_seed(0)
    model = odd = Odd()
    if wrapped is not None:
        model = FullySharded(model, [odd.aside, odd.last], dtype=torch.float32, **wrapped)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in range(4):
        step(model, optimizer, torch.arange(8.0).view(2, 4).add(number).cos())
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(number % 2))
    return model.whole(lambda shard: shard) if wrapped is not None else odd.state_dict()


def odd_steps(job):
    ways = [{}, {"reshard_after_forward": False}, {"reshard_after_forward": 1, "prefetch": False}]
    for step in (look, break_off):
        expected = weights_after(job, step, None)
        for way in ways:
            found = weights_after(job, step, way)
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, msg=f"{step.__name__}, {way}")
    return True


def test_passes_that_end_elsewhere_leave_nothing_old_behind():
    assert all(spawn(odd_steps, 2))


def test_wrong_flags_are_refused():
    with pytest.raises(UsageError, match="--batch-size 7 is not divisible by 2 micro-batches"):
        fsdp_from_scratch.parse_args(["--batch-size", "7"])
    with pytest.raises(UsageError, match="--repeats 2 gives no median"):
        fsdp_from_scratch.parse_args(["--repeats", "2"])
