"""Data parallelism by hand and by DDP: each equals one process, and each equals the other."""

from dataclasses import replace

import pytest
import torch

import data_parallel
import torch_data_parallel
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from distlab.spawning import spawn
from parallel_runs import (
    SMOKE,
    assert_same_sums,
    failed,
    most_rounding,
    one_of,
    run_scripts,
)
from parallelism.problem import solve
from parallelism.traffic import Traffic

MOST_ROUNDING = most_rounding(SIZES["smoke"], tokens=6 * 17)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradients_and_bytes_are_as_promised(world_size):
    scripts = [data_parallel, torch_data_parallel]
    scripts = [script.compare_with_one_process for script in scripts]
    for by_hand, by_torch in spawn(run_scripts, world_size, scripts, timeout_s=120):
        assert [len(by_hand.checks), len(by_torch.checks)] == [6, 4]
        for run in (by_hand, by_torch):
            assert failed(run) == []
            for name, (predicted, measured) in run.comparisons.items():
                assert measured == predicted or name == "broadcast: bytes"


def test_ddp_and_the_script_agree_on_every_gradient():
    for rank in spawn(both, 2, timeout_s=60):
        for tied, (by_hand, by_torch) in rank.items():
            assert ("lm_head.weight" in by_hand) is not tied
            assert_same_sums(by_hand, by_torch, MOST_ROUNDING)


@pytest.mark.slow
def test_a_sum_where_the_mean_belongs_is_noticed():
    run = spawn(run_scripts, 2, [data_parallel.compare_with_one_process], a_sum, timeout_s=60)[0][0]
    assert failed(run) == ["for each tensor: each gradient is one process's"]


def test_replicas_that_begin_differently_are_noticed():
    run = spawn(
        run_scripts, 2, [data_parallel.compare_with_one_process], no_broadcast, timeout_s=60
    )[0][0]
    assert len(failed(run)) == 5
    assert failed(run)[0] == "the broadcast gives all of them rank 0's"


@pytest.mark.parametrize("main", [data_parallel.main, torch_data_parallel.main])
@pytest.mark.parametrize(("ranks", "fitting"), [(16, "16"), (3, "6 or 9")])
def test_more_ranks_than_sequences_are_refused(main, ranks, fitting, monkeypatch):
    said = f"--batch-size 8 is not divisible by {ranks} ranks; use {fitting}$"
    for variable, value in one_of(ranks).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said):
        main(SMOKE)


def both(job):
    """The gradients by the script and by DDP, of a tied and of an untied model."""
    found = {}
    for tied in (True, False):
        torch.manual_seed(1)
        model = Llama(replace(SIZES["smoke"], tie_word_embeddings=tied))
        problem = solve(model, *torch.randint(0, 512, (2, 6, 17)))
        replica = torch_data_parallel.DDP(problem.new_model())
        _, by_hand = data_parallel.step(
            problem.new_model(), problem, Traffic(), data_parallel.average_flat
        )
        _, by_torch, _ = torch_data_parallel.step(replica, problem)
        found[tied] = (by_hand, by_torch)
    return found


def a_sum():
    def average_each(gradients, traffic):
        for gradient in gradients:
            traffic.all_reduce(gradient)

    data_parallel.average_each = average_each


def no_broadcast():
    data_parallel.broadcast_parameters = lambda model, traffic: None
