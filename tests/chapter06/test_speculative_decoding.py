"""Guess and check: the sampler's corner cases, the caches' way back, the formulas, bad input."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from inference import speculation
from speculative_decoding import accept, generate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_hot(*tokens, vocab=5):
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


def test_equal_distributions_accept_every_guess():
    generator = seeded()
    q = torch.softmax(torch.randn(200, 3, 5, generator=generator), dim=-1)
    drafted = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(200, 3)
    last = one_hot(*[4] * 200)[:, None]
    accepted, following = accept(drafted, q, torch.cat([q, last], dim=1), generator)
    assert (accepted == 3).all() and (following == 4).all()


def test_a_guess_that_the_target_never_makes_is_refused_and_what_follows_it_is_not_judged():
    q = one_hot(1, 2, 3)[None]
    p = one_hot(1, 4, 3, 0)[None]
    accepted, following = accept(torch.tensor([[1, 2, 3]]), q, p, seeded())
    assert (accepted.item(), following.item()) == (1, 4)


def test_a_refused_guess_is_never_drawn_again_at_its_place():
    q = torch.tensor([0.9, 0.1]).expand(1000, 1, 2)
    p = torch.tensor([0.3, 0.7]).expand(1000, 2, 2)
    accepted, following = accept(torch.zeros(1000, 1, dtype=torch.long), q, p, seeded())
    assert 0 < (accepted == 0).sum() < 1000
    assert (following[accepted == 0] == 1).all()  # the target has more of 1 than the draft


def test_distributions_that_differ_by_rounding_alone_still_give_a_token(monkeypatch):
    q = torch.tensor([[[0.5, 0.5, 0.0]]])
    p = torch.cat([q.nextafter(torch.zeros(1)), q], dim=1)
    monkeypatch.setattr(speculative_decoding.torch, "rand", lambda *size, **_: torch.ones(*size))
    accepted, following = accept(torch.tensor([[0]]), q, p, seeded())
    assert accepted.item() == 0 and following.item() in (0, 1)


@pytest.fixture
def pair():
    torch.manual_seed(1)
    target = Llama(replace(SIZES["smoke"], tie_word_embeddings=False)).eval()
    prompt = torch.randint(0, 512, (1, 6))
    return speculation.Pair(target, speculation.first_layers(target, 1), prompt, 64)


def test_the_draft_is_made_of_the_targets_own_weights(pair):
    own = {id(parameter) for parameter in pair.target.parameters()}
    assert {id(parameter) for parameter in pair.draft.parameters()} < own
    assert pair.draft.lm_head.weight is pair.target.lm_head.weight


@pytest.mark.parametrize("k", [1, 3, 7])
def test_after_a_way_back_the_caches_hold_what_was_accepted(pair, k):
    """At so low a temperature random models hardly agree; a wrong key changes a probability."""
    target, draft = (pair.decoder(model, 0.02) for model in (pair.target, pair.draft))
    tokens, rounds = generate(target, draft, pair.prompt, 20, k, seeded())
    assert tokens.shape == (1, 26) and min(rounds.accepted) < k
    for decoder in (target, draft):
        length = decoder.cache.length
        assert 24 - k <= length
        decoder.rewind(min(length, 20))
        fresh = pair.decoder(decoder.model, 0.02)
        assert fresh.cache.length == 0
        torch.testing.assert_close(
            decoder.probabilities(tokens)[:, -1], fresh.probabilities(tokens)[:, -1]
        )


def test_a_draft_that_is_the_target_is_always_right(pair):
    target, draft = (pair.decoder(pair.target, 1.0) for _ in range(2))
    _, rounds = generate(target, draft, pair.prompt, 20, 4, seeded())
    assert rounds.acceptance > 0.99 and rounds.tokens_per_pass > 4.9
    assert rounds.deviations < 4


@given(a=st.floats(0, 1), k=st.integers(1, 8), cost=st.floats(0.001, 1), check=st.floats(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_formulas_are_the_sums_that_they_stand_for(a, k, cost, check):
    tokens = speculation.expected_tokens(a, k)
    assert tokens == pytest.approx(sum(a**i for i in range(k + 1)), rel=1e-6)
    speed_up = speculation.expected_speed_up(a, k, cost, check)
    assert speed_up * (k * cost + check) == pytest.approx(tokens)
    assert speculation.expected_speed_up(a, k, cost) >= speed_up


def test_counts_that_the_overlaps_cannot_explain_are_noticed():
    rounds = speculation.Rounds()
    for _ in range(200):
        rounds.add(1, torch.tensor([0.5]))
    assert rounds.deviations > 10 and rounds.acceptance == 1.0
    assert rounds.tokens_per_pass == 2.0


def test_p_values_are_even_where_the_counts_are_the_distributions():
    exact = torch.softmax(torch.randn(20, generator=seeded(), dtype=torch.float64), dim=0)
    values = []
    for seed in range(200):
        drawn = torch.multinomial(exact, 2000, replacement=True, generator=seeded(seed))
        values.append(speculation.p_value(drawn.bincount(minlength=20), exact))
    assert 0.4 < sum(values) / len(values) < 0.6
    assert min(values) > speculation.SIGNIFICANCE
    other = torch.roll(exact, 1)
    drawn = torch.multinomial(other, 2000, replacement=True, generator=seeded())
    assert speculation.p_value(drawn.bincount(minlength=20), exact) < speculation.SIGNIFICANCE


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--hidden", "100"], "--hidden 100 is no multiple of 32"),
        (["--layers", "2", "--draft-layers", "2"], "--draft-layers 2 leaves nothing to save"),
        (["--repeats", "1"], "--repeats 1 gives no median"),
        (["--device", "cuda"], "needs a GPU"),
    ],
)
def test_wrong_flags(monkeypatch, flags, why):
    monkeypatch.setattr(speculative_decoding.hardware, "has_cuda", lambda: False)
    with pytest.raises(UsageError, match=why):
        speculative_decoding.main(["--preset", "smoke", *flags])


@pytest.mark.slow
def test_a_smoke_run_at_another_temperature(tmp_path):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--device", "cpu", "--draft-layers", "2", "--steps", "2"]
    flags += ["--temperature", "0.5", "--most", "2", "--tokens", "8", "--json", str(path)]
    assert speculative_decoding.main(flags) == 0
    record = json.loads(path.read_text())
    rows = record["tables"]["speculation"]["rows"]
    assert [row[0] for row in rows] == [1, 2]
    for name in ("tokens per target pass", "speed-up with the check's cost"):
        assert {f"{name}, k = 1", f"{name}, k = 2"} < set(record["comparisons"])
    assert set(record["figures"]) == {"speculative_tokens_per_pass", "speculative_speed_up"}
