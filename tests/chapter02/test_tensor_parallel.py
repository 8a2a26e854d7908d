"""Tensor parallelism by hand and by DTensor: each equals one process, and each equals the other."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import tensor_parallel
import torch_tensor_parallel
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
from parallelism.problem import gradients_of, solve
from parallelism.tensor import TensorParallel
from parallelism.traffic import Traffic

MOST_ROUNDING = most_rounding(SIZES["smoke"], tokens=3 * 18)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradients_and_bytes_are_as_promised(world_size):
    scripts = [tensor_parallel, torch_tensor_parallel]
    scripts = [script.compare_with_one_process for script in scripts]
    for by_hand, by_torch in spawn(run_scripts, world_size, scripts, timeout_s=120):
        assert [len(by_hand.checks), len(by_torch.checks)] == [4, 6]
        for run in (by_hand, by_torch):
            assert failed(run) == []
            for predicted, measured in run.comparisons.values():
                assert measured == pytest.approx(predicted)


def test_dtensor_and_the_script_agree_on_every_gradient():
    for rank in spawn(both, 2, timeout_s=60):
        for (tied, _), (by_hand, by_torch) in rank.items():
            assert ("lm_head.weight" in by_hand) is not tied
            assert_same_sums(by_hand, by_torch, MOST_ROUNDING)


def test_an_f_that_sums_nothing_backward_is_noticed():
    run = spawn(run_scripts, 2, [tensor_parallel.compare_with_one_process], no_f, timeout_s=60)[0][
        0
    ]
    assert failed(run) == ["tensor parallel: each gradient is one process's"]


@pytest.mark.slow
def test_norm_gradients_of_the_own_tokens_only_are_noticed():
    run = spawn(
        run_scripts, 2, [tensor_parallel.compare_with_one_process], no_sum_of_norms, timeout_s=60
    )[0][0]
    assert failed(run) == ["with sequence parallel: each gradient is one process's"]


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (3, [], "--nproc_per_node 3 does not divide 8 heads; use 1, 2 or 4$"),
        (8, [], "--nproc_per_node 8 does not divide 4 key-value heads; use 1, 2 or 4$"),
        (4, ["--vocab-size", "514"], "--nproc_per_node 4 does not divide 514 words; use 1 or 2$"),
        (2, ["--seq-len", "33"], "--seq-len 33 is not divisible by 2 ranks; use 32 or 34$"),
    ],
)
def test_what_the_ranks_cannot_share_is_refused(ranks, flags, said, monkeypatch):
    for variable, value in one_of(ranks).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said):
        tensor_parallel.main([*SMOKE, *flags])


def both(job):
    """This rank's parts of the gradients, by the script and by DTensor, in each form."""
    mesh = init_device_mesh("cpu", (job.world_size,))
    forms = {torch_tensor_parallel.BLOCK: False, torch_tensor_parallel.SEQUENCE: True}
    found = {}
    for tied, form in product((True, False), forms):
        torch.manual_seed(1)
        model = Llama(replace(SIZES["smoke"], tie_word_embeddings=tied))
        problem = solve(model, *torch.randint(0, 512, (2, 3, 18)))
        split = TensorParallel(problem.new_model(), Traffic(), sequence_parallel=forms[form])
        split.loss(problem.input_ids, problem.targets).backward()
        split.sum_norm_gradients()
        _, whole, _ = torch_tensor_parallel.step(problem, mesh, form)
        by_torch = {name: split.own_part(name, gradient) for name, gradient in whole.items()}
        found[tied, form] = (gradients_of(split.model), by_torch)
    return found


def no_f():
    right = TensorParallel.f
    TensorParallel.f = lambda self, x: right(self, x) if self.sequence_parallel else x


def no_sum_of_norms():
    TensorParallel.sum_norm_gradients = lambda self: None
