"""DeepSpeed's experts: on two ranks as on one process, and routed as chapter 2 routes them."""

from argparse import Namespace

import pytest
import torch

import moe
from distlab.errors import UsageError
from distlab.ranks import gathered
from distlab.spawning import spawn
from parallelism.experts import capacity, route
from zero.engine import begin, engine_of, load, stage_config
from zero.experts import (
    all_to_all_bytes,
    balance_of,
    mixtures,
    own_part,
    whole_model,
    whole_name,
)

TOKENS, EXPERTS = 60, 5
LIMIT_S = 200


@pytest.fixture(scope="module")
def gating():
    load()
    from deepspeed.moe import sharded_moe

    return sharded_moe


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_its_router_is_chapter_2s(gating, factor):
    """The same experts, the same tokens dropped, and the same gates where none was."""
    logits = 2 * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    _, room, _, chosen, _, gates, _ = gating.top2gating(
        logits.clone(), factor, 1, top2_2nd_expert_sampling=False, sparse_routes=True
    )
    assert room == capacity(factor, TOKENS, EXPERTS)
    theirs = {
        (token, int(chosen[choice, token])): float(gates[choice, token])
        for choice in range(2)
        for token in range(TOKENS)
        if chosen[choice, token] >= 0
    }
    routing = route(logits, room)
    experts = torch.arange(EXPERTS).repeat_interleave(routing.counts)
    keys = zip(routing.token.tolist(), experts.tolist(), strict=True)
    ours = dict(zip(keys, routing.gate.tolist(), strict=True))
    assert ours.keys() == theirs.keys()
    kept = routing.token.bincount(minlength=TOKENS)
    assert (kept.sum() < 2 * TOKENS) == (factor < 3)
    for (token, expert), gate in ours.items():
        # Whose other choice was dropped goes to this one with its whole weight, and not with us.
        wanted = gate if kept[token] == 2 else 1.0
        assert theirs[token, expert] == pytest.approx(wanted, abs=1e-6)


def test_by_default_a_full_expert_has_random_tokens(gating):
    logits = torch.zeros(TOKENS, EXPERTS)  # all want the first

    def kept(**how):
        return gating.top1gating(logits, 1.0, 1, sparse_routes=True, **how)[3]

    torch.manual_seed(0)
    assert not torch.equal(kept(), kept())
    assert torch.equal(kept(use_rts=False), kept(use_rts=False))
    assert int((kept(use_rts=False) == 0).sum()) == TOKENS // EXPERTS


def compare(job, zero, factor):
    """Experts of both ranks beside all of them here: losses, dropped tokens, gradients, bytes."""
    args = Namespace(model="smoke", seed=0, experts=6, capacity_factor=factor)
    whole = whole_model(args, job)
    model = own_part(whole, job)
    names = {name: whole_name(name, model, job) for name, _ in model.named_parameters()}
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    losses, gradients = [], [0.0]
    with engine_of(model, stage_config(zero, 2), job) as engine:
        for _ in range(2):
            shares = torch.randint(512, (4, 17)).chunk(2)
            with all_to_all_bytes() as sent:
                loss = moe.backward(engine, split(shares[job.rank]), 0.01)
            alone = 0.0
            for inputs, targets in map(
                split, shares
            ):  # each rank's tokens have places of their own
                alone += whole(inputs, targets=targets) + 0.01 * balance_of(whole)
            (alone / 2).backward()
            losses.append(abs(sum(gathered(loss.item())) - alone.item()))
            if zero == 0:
                gradients += [
                    float((p.grad - whole.get_parameter(names[n]).grad).abs().max())
                    for n, p in model.named_parameters()
                ]
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
    dropped = [sum(m.dropped for m in mixtures(one)) for one in (model, whole)]
    return max(losses), max(gradients), sent, dropped


def split(windows):
    return windows[:, :-1], windows[:, 1:]


def begun(job):
    """DeepSpeed's own experts at the start: as many different ones as there are."""
    from deepspeed.moe.layer import MoE

    layer = MoE(8, torch.nn.Linear(8, 8), 4, ep_size=2, k=1)
    begin(layer, stage_config(0, 1), job).destroy()
    own = layer.deepspeed_moe.experts.deepspeed_experts
    return len({tuple(expert.weight.flatten().tolist()) for expert in own})


def everything(job):
    return compare(job, 0, 1.0), compare(job, 2, 1.25), begun(job)


@pytest.fixture(scope="module")
def found():
    return spawn(everything, 2, timeout_s=LIMIT_S)


@pytest.mark.parametrize("case", [0, 1])
def test_experts_on_two_ranks_are_one_process(found, case):
    results = [rank[case] for rank in found]
    for losses, gradients, _, _ in results:
        assert losses < 1e-5 and gradients < 1e-6
    dropped, alone = (sum(r[3][0] for r in results), results[0][3][1])
    assert dropped == alone > 0


def test_every_place_is_sent_whatever_the_routing(found):
    """2 layers, each 4 messages: 6 experts' places for 32 tokens, in float32, half to the other."""
    for case, places in ((0, 6), (1, 7)):
        assert found[0][case][2] == [4 * 64 * 6 * places / 2] * 8


def test_its_experts_begin_as_copies(found):
    assert [rank[2] for rank in found] == [1, 1]


@pytest.mark.parametrize(
    ("ranks", "flags", "told"),
    [
        (1, [], "experts of 1 rank go nowhere; use torchrun --nproc_per_node=2"),
        (2, ["--experts", "5"], "--experts 5 is no multiple of 2 ranks; use 6"),
        (2, ["--batch-size", "7"], "--batch-size 7 is no multiple of 2 ranks; use 8"),
    ],
)
def test_what_cannot_be_shared_out(monkeypatch, ranks, flags, told):
    monkeypatch.setattr(moe, "detect_launch", lambda: Namespace(world_size=ranks))
    with pytest.raises(UsageError, match=told):
        moe.parse_args(["--preset", "smoke", *flags])
