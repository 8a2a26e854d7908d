"""DataParallel gives torch DDP's gradients for any module, and survives what goes wrong."""

import random
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import ddp_from_scratch
from ddp.data_parallel import DataParallel, packed
from ddp.parity import prove_equal
from distlab import script
from distlab.errors import RunError, UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--steps", "4", "--repeats", "3"]
CAPS = [1, 100, 1000, 25 * 2**20]
EXACT = {"atol": 1e-6, "rtol": 1e-6}


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_random_modules_have_ddps_gradients(world_size):
    for rank in spawn(gradients_of_random_modules, world_size, 12, timeout_s=120):
        for ours, theirs in rank:
            assert {n for n, g in ours.items() if g is None} == {
                n for n, g in theirs.items() if g is None
            }
            for name, gradient in ours.items():
                if gradient is not None:
                    torch.testing.assert_close(gradient, theirs[name], **EXACT)


def gradients_of_random_modules(job, count):
    """After each of three steps, ours and DDP's; the ranks use other parts in another order."""
    torch.set_num_threads(1)
    pairs = []
    for seed in range(count):
        ours = wrap(RandomModule(seed, job.rank), CAPS[seed % len(CAPS)], seed % 3 > 0)
        theirs = DDP(RandomModule(seed, job.rank), find_unused_parameters=True)
        draw = random.Random(seed * 100 + job.rank)
        for step in range(3):
            parts = draw.sample(range(1, 6), draw.randint(0, 5))
            x = torch.randn(draw.randint(1, 4), ours.module.width)
            both = []
            for model in (ours, theirs):
                if step != 1:  # so the second accumulates upon the first
                    model.zero_grad()
                with model.no_sync() if step == 0 else nullcontext():
                    model(x, parts).square().mean().backward()
                gradients = {name: p.grad for name, p in model.module.named_parameters()}
                both.append({n: None if g is None else g.clone() for n, g in gradients.items()})
            pairs.append(both)
    return pairs


class RandomModule(nn.Module):
    """Parts of odd shapes and two types, some tied or frozen; part 0 is always used."""

    def __init__(self, seed, rank):
        super().__init__()
        draw = random.Random(seed)
        self.width = draw.choice([1, 3, 7, 16])
        torch.manual_seed(100 * seed + rank)
        self.parts = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(6))
        self.parts[draw.randint(1, 2)].weight = self.parts[draw.randint(3, 4)].weight
        self.parts[draw.randint(1, 5)].bias.requires_grad_(False)
        self.parts[5].to(torch.float64)
        self.scale = nn.Parameter(torch.rand(()))
        self.empty = nn.Parameter(torch.rand(0, 3))
        self.turned = nn.Parameter(torch.rand(2, self.width).t())
        self.register_buffer("mean", torch.rand(self.width))
        self.register_buffer("calls", torch.tensor(rank))

    def forward(self, x, parts):
        self.mean.lerp_(x.mean(0), 0.5)
        x = self.parts[0](x - self.mean) + self.empty.sum()
        for part in parts:
            x = torch.tanh(self.parts[part](x.to(self.parts[part].weight.dtype))).float()
        return x @ self.turned * self.scale if 5 not in parts else x


def test_buckets_keep_their_caps():
    def sizes(*caps):
        return [[t.nbytes for t in some] for some in packed(tensors, caps)]

    tensors = [torch.zeros(n) for n in (3, 50, 1, 2, 0)]
    assert sizes(1, 1) == [[12], [200], [4], [8], [0]]
    assert sizes(16, 100) == [[12], [200], [4, 8, 0]]
    assert sizes(1000, 1000) == [[12, 200, 4, 8, 0]]
    tensors.insert(2, torch.zeros(2, dtype=torch.float64))
    assert sizes(1000, 1000) == [[12, 200, 4, 8, 0], [16]]
    assert packed([], (1, 1)) == []


def test_what_may_happen_between_two_steps():
    for rank in spawn(run_all, 2, timeout_s=120):
        for name, (actual, expected) in rank.items():
            torch.testing.assert_close(actual, expected, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def run_all(job):
    return {scenario.__name__: scenario(job) for scenario in SCENARIOS}


def accumulated_without_sync(job):
    """Two micro-batches in no_sync, then one with it: the gradient of the whole batch."""
    model, whole = small(), torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    shares = whole.chunk(2)[job.rank].chunk(3)
    for index, part in enumerate(shares):
        with model.no_sync() if index < 2 else nullcontext():
            (model(part).square().mean() / 3).backward()
    return grads(model), alone(whole)


def averaged_on_request(job):
    """All micro-batches in no_sync, then finish_gradient_sync, which a second time does nothing."""
    model, whole = small(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    with model.no_sync():
        for part in whole.chunk(2)[job.rank].chunk(2):
            (model(part).square().mean() / 2).backward()
    model.finish_gradient_sync()
    if job.rank == 0:
        model.finish_gradient_sync()
    return grads(model), alone(whole)


def no_parameter_used_on_one_rank(job):
    model, whole = small(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    out = model(whole)
    if job.rank == 0:
        out.square().mean().backward()
    else:
        model.finish_gradient_sync()
    return [2 * gradient for gradient in grads(model)], alone(whole)


def twice_through_one_graph(job):
    model, x = small(), torch.ones(2, 4)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    return grads(model), [2 * gradient for gradient in alone(x)]


def frozen_and_trained_again(job):
    """Frozen after the beginning: no gradient. Frozen before and trained now: a gradient's mean."""
    model, x = small(frozen=0), torch.full((2, 4), float(job.rank))
    first, second = model.module[0].weight, model.module[2].weight
    second.requires_grad_(False)
    model(x).square().mean().backward()
    given = [first.grad is None, second.grad is None]
    first.requires_grad_(True)
    second.requires_grad_(True)
    model.zero_grad()
    model(x).square().mean().backward()
    return [torch.tensor(given), *grads(model)], [torch.tensor([True, True]), *alone(both_ranks(2))]


def everything_frozen(job):
    model = small(frozen=0)
    model.requires_grad_(False)
    out = model(torch.ones(2, 4))
    return out, small().module(torch.ones(2, 4))


def failed_everywhere(job):
    return after_a_failure(job, on_ranks=[0, 1])


def failed_on_one_rank(job):
    """The other rank is told, in its own backward, so that neither makes the step."""
    return after_a_failure(job, on_ranks=[1])


def failed_on_one_rank_and_told_at_once(job):
    return after_a_failure(job, on_ranks=[1], then=lambda model: model.finish_gradient_sync())


def failed_after_the_last_gradient(job):
    """All gradients are there when it fails; still no rank is to use them."""
    return after_a_failure(job, on_ranks=[1], layer=0)


def after_a_failure(job, on_ranks, then=lambda model: None, layer=1):
    """One backward raises below `layer`; the next one is right."""
    model, x = small(), torch.full((2, 4), float(job.rank), requires_grad=True)
    failing = model.module[layer].register_forward_pre_hook(
        lambda module, inputs: FailingBackward.apply(*inputs)
    )
    if job.rank not in on_ranks:
        failing.remove()
    with pytest.raises(ZeroDivisionError if job.rank in on_ranks else RunError):
        model(x).square().mean().backward()
    failing.remove()
    if job.rank in on_ranks:
        then(model)
    model(x).square().mean().backward()
    return grads(model), alone(both_ranks(2))


def reentrant_checkpoints(job):
    """Their backward passes are nested in the outer one; each is averaged, so nothing is lost."""
    model, x = small(checkpointed=True), torch.full((2, 4), float(job.rank))
    model(x.requires_grad_()).square().mean().backward()
    return grads(model), alone(both_ranks(2))


def a_gradient_in_two_parts(job):
    """Nested backward passes give one parameter's in two: an error, and no wrong mean."""
    model, x = wrap(Twice()), torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RunError, match="the gradient of shared.bias came twice .*use_reentrant=Fa"):
        model(x, nested=True).sum().backward()
    model(x, nested=False).sum().backward()
    shared = model.module.shared.weight
    expected = torch.autograd.grad(model.module(x, nested=False).sum(), shared)
    return shared.grad, expected[0]


def replaced_or_zeroed_gradients(job):
    """What is in p.grad when backward begins is added to, whoever put it there."""
    model, x = small(), torch.full((2, 4), float(job.rank))
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model(x).square().mean().backward()
    return grads(model), [gradient + 1 for gradient in alone(both_ranks(2))]


def buffers_follow_rank_0(job):
    model = wrap(nn.BatchNorm1d(3, momentum=1.0))
    for value in (1.0, 2.0):
        model(torch.tensor([[value], [value + 2]]) * (job.rank + 1) * torch.ones(3))
        model.module.running_mean += 0  # rank 1's own until the next forward
    model.eval()
    model(torch.ones(2, 3))
    return model.module.running_mean, torch.full((3,), 3.0)


SCENARIOS = [
    accumulated_without_sync, averaged_on_request, no_parameter_used_on_one_rank,
    twice_through_one_graph, frozen_and_trained_again, everything_frozen, failed_everywhere,
    failed_on_one_rank, failed_on_one_rank_and_told_at_once, failed_after_the_last_gradient,
    reentrant_checkpoints,
    a_gradient_in_two_parts, replaced_or_zeroed_gradients, buffers_follow_rank_0,
]  # fmt: skip


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, nested):
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=True) if nested else self.shared(x)
        return self.last(x)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for part in self:
            x = checkpoint(part, x, use_reentrant=True)
        return x


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 2))


def small(frozen=None, checkpointed=False):
    """A wrapped network with a bucket for each parameter."""
    module = Checkpointed(*net()) if checkpointed else net()
    if frozen is not None:
        module[frozen].weight.requires_grad_(False)
    return wrap(module, 1)


def wrap(module, cap=1, overlap=True, group=None):
    return DataParallel(module, cap, overlap, group, first_bucket_bytes=cap)


def alone(batch):
    """One process's gradients of the same network and the whole batch."""
    module = net()
    module(batch).square().mean().backward()
    return grads(module)


def both_ranks(size):
    return torch.cat([torch.full((size, 4), float(rank)) for rank in range(2)])


def grads(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_group_of_some_ranks_begins_with_its_own_first():
    ranks = spawn(in_a_group, 3, timeout_s=60)
    torch.testing.assert_close(ranks[2], ranks[1], atol=0, rtol=0)
    assert not torch.equal(ranks[0], ranks[1])


def in_a_group(job):
    group = dist.new_group([1, 2])
    torch.manual_seed(job.rank)
    module = nn.Linear(3, 1, bias=False)
    if job.rank > 0:
        wrap(module, group=group)(torch.full((1, 3), float(job.rank))).sum().backward()
        torch.testing.assert_close(module.weight.grad, torch.full((1, 3), 1.5))
    return module.weight.detach().clone()


def test_modules_of_another_form_are_refused():
    said = spawn(wrap_different_modules, 2, timeout_s=60)
    assert said[0] == said[1]
    assert [one.removeprefix("the ranks' modules differ: ") for one in said[0]] == [
        "0.weight [3, 4] torch.float32, trained on rank 0, "
        "0.weight [5, 4] torch.float32, trained on rank 1",
        "0.weight [4, 4] torch.float32, trained on rank 0, 0.weight [4, 4] torch.float32 on rank 1",
        "buckets of (1, 1) bytes on rank 0, 1.weight [4, 4] torch.float32, trained on rank 1",
        "buckets of (7, 7) bytes on rank 0, buckets of (8, 8) bytes on rank 1",
    ]


def wrap_different_modules(job):
    def linear(out=4):
        return nn.Linear(4, out, bias=False)

    def refused(module, cap=1):
        with pytest.raises(RunError) as error:
            wrap(module, cap)
        return str(error.value)

    return [
        refused(nn.Sequential(linear(3 + 2 * job.rank))),
        refused(nn.Sequential(linear().requires_grad_(job.rank == 0))),
        refused(nn.Sequential(*[linear() for _ in range(1 + job.rank)])),
        refused(linear(), cap=7 + job.rank),
    ]


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_training_equals_ddps_and_one_processs(world_size):
    """The lesson runs it with two ranks."""
    ranks = spawn(prove, world_size, timeout_s=120)
    assert [failed for _, failed in ranks] == [[]] * world_size
    assert [count for count, _ in ranks] == [18] + [12] * (world_size - 1)


def prove(job):
    """How many checks there were, and the names of those that failed."""
    torch.set_num_threads(1)
    args = ddp_from_scratch.parse_args(
        [*SMOKE, "--batch-size", str(4 * job.world_size), "--steps", "20"]
    )
    with script.run(args) as run:
        prove_equal(run, args, job, DataParallel)
        ddp_from_scratch.report_buckets(run, args, job)
    comparison = run.comparisons["bytes that a rank sends in a step"]
    assert comparison["predicted"] == comparison["measured"]
    return len(run.checks) - 2, [check.name for check in run.checks if not check.ok]


def test_a_sum_where_the_mean_belongs_is_noticed_and_so_are_lost_flags():
    failed = spawn(prove_with_mistakes, 2, timeout_s=120)[0]
    assert all("equal" in name for name in failed[0] + failed[1])
    assert {name.split(":")[0] for name in failed[0]} == {
        "tied Llama", "untied Llama, no_sync", "odd module, no_sync",
    }  # fmt: skip
    assert {name.split(":")[0] for name in failed[1]} == {"odd module, no_sync"}


def prove_with_mistakes(job):
    """The names of the checks that fail, with a sum for a mean, and with zeros for no gradient."""

    class Summing(DataParallel):
        def all_reduce(self, bucket):
            bucket.flat *= job.world_size
            return super().all_reduce(bucket)

    class WithoutFlags(DataParallel):
        def all_reduce(self, bucket):
            bucket.counts.fill_(1)
            return super().all_reduce(bucket)

    failed = []
    for mistaken in (Summing, WithoutFlags):
        args = ddp_from_scratch.parse_args(SMOKE)
        with script.run(args) as run:
            prove_equal(run, args, job, mistaken)
        failed.append([check.name for check in run.checks if not check.ok])
    return failed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "8"], "8 is not divisible by 2 micro-batches on 3 ranks; use 6 or 12"),
        (["--batch-size", "6", "--repeats", "2"], "--repeats 2 gives no median; use 3 or more"),
        (["--batch-size", "6", "--bucket-mb", "1e-7"], "--bucket-mb 1e-07 is less than a byte"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, said, monkeypatch):
    job = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        ddp_from_scratch.main([*SMOKE, *flags])
