"""Experts on several ranks equal experts in one process, which tokens they drop included."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expert_parallel as scratch
import torch_expert_parallel as library
from distlab import script
from distlab.errors import UsageError
from distlab.model import SIZES
from distlab.spawning import spawn
from parallelism import experts

SMOKE = ["--preset", "smoke", "--device", "cpu", "--steps", "8"]
UNTRAINED = [*SMOKE[:-1], "1"]
TIGHT = [*UNTRAINED, "--capacity-factor", "0.4"]


def test_first_choices_queue_before_second_ones_and_the_rest_is_dropped():
    scores = torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [3.0, 0.0, 2.0]])
    routing = experts.route(scores, 2)
    # Expert 0 is full with the first choices of tokens 0 and 2: token 1 loses its second choice.
    assert routing.token.tolist() == [0, 2, 1, 0, 2]
    assert routing.counts.tolist() == [2, 2, 1]
    assert routing.wanted.tolist() == [3, 2, 1]
    best = torch.tensor([3.0, 2.0]).softmax(0)
    torch.testing.assert_close(routing.gate, best[[0, 0, 0, 1, 1]])


def test_the_balance_loss_is_one_where_routing_is_even_and_e_where_it_collapses():
    even = torch.eye(4)[[0, 1, 2, 3]] + 0.5 * torch.eye(4)[[1, 2, 3, 0]]
    assert experts.route(even, 8).balance.item() == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(6, 1)
    assert experts.route(collapsed, 8).balance.item() == pytest.approx(4 / 2)


@given(
    tokens=st.integers(1, 20),
    num_experts=st.integers(2, 6),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 8.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_routing_drops_what_a_queue_in_plain_python_drops(tokens, num_experts, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    mixture = experts.MixtureOfExperts(SIZES["smoke"], num_experts, factor, 1)
    x = torch.randn(1, tokens, SIZES["smoke"].hidden_size, generator=generator)
    mixture(x)
    room = experts.capacity(factor, tokens, num_experts)
    found = experts.route(mixture.router(x[0]), room)
    assert found.counts.tolist() == mixture.counts[0]
    assert found.counts.max() <= room
    assert found.balance.item() == pytest.approx(mixture.balance.item(), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_from_scratch_equals_the_library_equals_one_process(ranks):
    for own, theirs, differences in spawn(run_both, ranks, SMOKE, timeout_s=120):
        for (checks, _), count in ((own, 8), (theirs, 4)):
            assert [name for name, ok in checks if not ok] == []
            assert len(checks) == count
        for name in ("token rows", "row counts", "gradients of the replicas"):
            comparison = own[1][name]
            assert comparison["predicted"] == pytest.approx(comparison["measured"], abs=0.5)
            assert (comparison["measured"] > 0) == (ranks > 1)
        assert max(differences.values()) < 2e-6


@pytest.mark.slow
def test_they_agree_where_most_rows_are_dropped_and_ranks_have_odd_numbers_of_tokens():
    odd = [*TIGHT, "--experts", "6", "--batch-size", "3", "--seq-len", "5"]
    for checks, _ in spawn(run_script, 3, scratch.compare_with_one_process, odd, timeout_s=120):
        failed = [name for name, ok in checks if not ok]
        assert [name for name in failed if "busiest" not in name] == []  # a step trains nothing


def test_dropping_by_another_rule_is_noticed():
    checks, _ = spawn(
        run_script, 2, scratch.compare_with_one_process, TIGHT, one_more_row, timeout_s=120
    )[0]
    failed = [name for name, ok in checks if not ok]
    assert "each expert keeps the rows it keeps in one process" in failed
    assert "experts: each gradient is one process's" in failed


def test_averaging_experts_like_replicas_is_noticed():
    checks, _ = spawn(
        run_script, 2, scratch.compare_with_one_process, UNTRAINED, halve_gradients, timeout_s=120
    )[0]
    assert "experts: each gradient is one process's" in [name for name, ok in checks if not ok]


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (3, [], "--experts 4 is not divisible by 3 ranks; use 3 or 6"),
        (2, ["--experts", "1"], "--experts 1 is too few; a token has 2 of them"),
        (4, ["--batch-size", "6"], "--batch-size 6 is not divisible by 4 ranks; use 4 or 8"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(ranks, flags, message):
    args = experts.parser("").parse_args([*SMOKE, *flags])
    with pytest.raises(UsageError, match=message):
        experts.check_flags(args, ranks)


def run_both(job, argv):
    own, theirs = (
        run_script(job, one.compare_with_one_process, argv) for one in (scratch, library)
    )
    return own, theirs, differences(job, argv)


def run_script(job, compare_with_one_process, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and its comparisons."""
    change()
    args = experts.parser("").parse_args(argv)
    with script.run(args) as run:
        compare_with_one_process(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.comparisons


def one_more_row():
    fewer = scratch.capacity
    scratch.capacity = lambda factor, tokens, experts: fewer(factor, tokens, experts) + 1


def halve_gradients():
    whole = scratch.gradients_of
    scratch.gradients_of = lambda model: {
        name: gradient / 2 if ".experts." in name else gradient
        for name, gradient in whole(model).items()
    }


def differences(job, argv):
    """The largest difference of each gradient of this rank, in its largest elements."""
    args = experts.parser("").parse_args(argv)
    with script.run(args) as run:
        problem = experts.one_process(run, args, job)
    batch = problem.share(job.rank, job.world_size)
    by_hand = partial(scratch.ExpertParallel, wires=experts.Wires())
    by_torch = partial(library.LibraryExpertParallel, group=torch.distributed.group.WORLD)
    own, theirs = (experts.distributed(problem, layer) for layer in (by_hand, by_torch))
    loss = scratch.step(own, batch, args.balance_weight)
    library_loss = library.step(theirs, batch, args.balance_weight)
    found = {"loss": (loss - library_loss).abs().item()}
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        times = job.world_size if library.is_expert(name) else 1
        found[name] = ((a.grad - b.grad / times).abs().max() / a.grad.abs().max()).item()
    return found
