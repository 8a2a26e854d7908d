"""Ring attention, Ulysses and torch's context_parallel: each equals one process, and the others."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import context_parallel
import torch_context_parallel
from distlab import script
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from distlab.spawning import spawn
from parallel_runs import SMOKE, assert_same_sums, most_rounding, one_of
from parallelism import context
from parallelism.problem import solve

FORMS = ["ring in order", "ring in zigzag", "ulysses"]
MOST_ROUNDING = most_rounding(SIZES["smoke"], tokens=3 * 64)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradients_bytes_and_blocks_are_as_promised(world_size):
    for checks, comparisons in spawn(run_script, world_size, SMOKE, timeout_s=120):
        assert [check for check, ok in checks if not ok] == []
        assert len(checks) == 2 * len(FORMS)
        assert len(comparisons) == 3 * len(FORMS) + 2
        assert all(
            measured == pytest.approx(predicted) for predicted, measured in comparisons.values()
        )


@pytest.mark.slow
def test_three_ranks_share_keys_that_ulysses_could_not():
    odd = [*SMOKE, "--seq-len", "18", "--heads", "4", "--kv-heads", "1", "--method", "ring"]
    checks, comparisons = spawn(run_script, 3, odd, timeout_s=60)[0]
    assert [check for check, ok in checks if not ok] == []
    assert comparisons["ring in order: blocks of the busiest rank in a layer"] == (11, 11)
    assert comparisons["ring in zigzag: blocks of the busiest rank in a layer"] == (7, 7)


def test_positions_that_begin_at_zero_on_every_rank_are_noticed():
    """By the gradients: an untrained model's loss hardly knows where its tokens stand."""
    checks, _ = spawn(run_script, 2, SMOKE, wrong_positions, timeout_s=60)[0]
    wrong = [check for check, ok in checks if not ok]
    assert [w for w in wrong if "loss" not in w] == [
        f"{form}: each gradient is one process's" for form in FORMS
    ]


@pytest.mark.slow
def test_a_ring_that_sees_the_future_is_noticed():
    argv = [*SMOKE, "--method", "ring"]
    checks, _ = spawn(run_script, 2, argv, see_the_future, timeout_s=60)[0]
    assert len(checks) == 4 and not any(ok for _, ok in checks)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_and_the_script_agree_on_every_gradient(tied):
    """On a CPU torch's ring runs, with a stand-in for the CUDA kernel that it calls."""
    for by_torch, *by_hand, torch_bytes, ring_bytes in spawn(everybody, 2, tied, timeout_s=60):
        assert ("lm_head.weight" in by_torch) is not tied
        for gradients in by_hand:
            assert_same_sums(gradients, by_torch, MOST_ROUNDING)
        assert torch_bytes == ring_bytes * 2  # the keys of 4 heads, where the ring sends those of 2


def test_without_gpus_torchs_script_says_why_it_is_skipped(capsys):
    assert script.status_of(lambda: torch_context_parallel.main(SMOKE)) == script.SKIPPED
    assert capsys.readouterr().out == (
        "SKIPPED: torch's context_parallel has attention kernels for CUDA only: no GPU is used\n"
    )


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (
            3,
            [],
            "--seq-len 32 is not divisible by 6 chunks, two for each of 3 ranks; use 30 or 36$",
        ),
        (8, [], "--nproc_per_node 8 does not divide 4 key-value heads; use 1, 2 or 4, or --meth"),
    ],
)
def test_what_the_ranks_cannot_share_is_refused(ranks, flags, said, monkeypatch):
    for variable, value in one_of(ranks).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said):
        context_parallel.main([*SMOKE, *flags])


def run_script(job, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and predicted and measured numbers."""
    change()
    args = context_parallel.parse_args(argv)
    with script.run(args) as run:
        context_parallel.compare_with_one_process(run, args, job)
    comparisons = {key: (c["predicted"], c["measured"]) for key, c in run.comparisons.items()}
    return [(check.name, check.ok) for check in run.checks], comparisons


def everybody(job, tied):
    """The gradients by torch and by the script's three forms, and the bytes of torch and a ring."""
    torch.manual_seed(1)
    model = Llama(replace(SIZES["smoke"], tie_word_embeddings=tied))
    problem = solve(model, *torch.randint(0, 512, (2, 3, 64)))
    rings = [context_parallel.Ring(zigzag) for zigzag in (False, True)]
    steps = [
        context_parallel.step(problem, attend) for attend in [*rings, context_parallel.Ulysses()]
    ]
    kernel = stand_in_for_cuda()
    _, by_torch, sent = torch_context_parallel.step(
        problem, init_device_mesh("cpu", (job.world_size,))
    )
    del kernel
    ring_bytes = sum(traffic.total for traffic in steps[0][2][:2])
    return [by_torch, *(gradients for _, gradients, _ in steps), sent.total, ring_bytes]


def wrong_positions():
    right = context.loss_at

    def loss_at(model, input_ids, targets, rope):
        own = input_ids.shape[1]
        tables = context.rope_tables(model.config, 0, own, input_ids.device, torch.float32)
        return right(model, input_ids, targets, tables)

    context.loss_at = loss_at


def see_the_future():
    right = context_parallel.attention_scores
    context_parallel.attention_scores = lambda q, k, diagonal: right(q, k, False)


def stand_in_for_cuda():
    """Memory-efficient attention, of which torch has no CPU kernel, and calls of it.

    The registration holds as long as what is returned.
    """
    library = torch.library.Library("aten", "IMPL")
    name = "_scaled_dot_product_efficient_attention"
    library.impl(name, efficient_attention, "CPU")
    library.impl(f"{name}_backward", efficient_attention_backward, "CPU")
    F.scaled_dot_product_attention = scaled_dot_product_attention
    return library


def scaled_dot_product_attention(q, k, v, is_causal, enable_gqa):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, None, True, 0.0, is_causal)[0]


def efficient_attention(q, k, v, bias, compute_lse, dropout_p=0.0, is_causal=False, *, scale=None):
    scores = causal_scores(q, k, is_causal)
    unused = torch.zeros((), dtype=torch.int64)
    return scores.softmax(-1) @ v, scores.logsumexp(-1), unused, unused


def efficient_attention_backward(
    d_out, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal=False, *, scale=None
):
    weights = (causal_scores(q, k, is_causal) - lse.unsqueeze(-1)).exp()
    d_scores = weights * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return d_scores @ k, d_scores.mT @ q, weights.mT @ d_out, None


def causal_scores(q, k, is_causal):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf) if is_causal else scores
