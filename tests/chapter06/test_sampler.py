"""The sampler draws from the distribution that a plain reference describes, and repeats itself."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from paged_engine import sampler
from paged_engine.request import Request
from paged_engine.sampler import Filters, draw, keep, relative_weights, sample
from paged_engine.sampling_params import SamplingParams

EOS = 5
CASES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.01, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 129, 400, 5000]),
        "top_p": st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    }
)


def sequence_of(params, prompt=(1, 2), output=(), index=0, request_id="r"):
    """A sequence that has its output already."""
    request = Request(request_id, prompt, params, eos_token_ids=frozenset({EOS}))
    sequence = request.sequences[index]
    sequence.token_ids += output
    return sequence


def reference(logits, temperature, top_k, top_p, min_p):
    """Probabilities by the definitions, in float64, one filter after the other, by sorting."""
    probabilities, likelier = before_top_p(logits, temperature, top_k, min_p)
    if top_p < 1:
        probabilities[likelier >= top_p] = 0
    return probabilities / probabilities.sum()


def before_top_p(logits, temperature, top_k, min_p):
    """Each token's probability after min-p and top-k, and that of all that come before it."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    weights[weights < min_p] = 0
    if 0 < top_k < len(weights):
        weights[weights < np.sort(weights)[-top_k]] = 0
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")  # of equal ones, those with small ids first
    likelier = np.empty_like(probabilities)
    likelier[order] = probabilities[order].cumsum() - probabilities[order]
    return probabilities, likelier


def is_clear(logits, temperature, top_k, top_p, min_p):
    """Whether no token is so near to the edge of top-p that rounding decides about it."""
    _, likelier = before_top_p(logits, temperature, top_k, min_p)
    return top_p == 1 or abs(likelier - top_p).min() > 1e-5


def filtered(logits, cases):
    """The sampler's probabilities [rows, vocabulary] of `logits` [rows, vocabulary]."""
    rows, vocabulary = logits.shape

    def column(name, dtype=torch.float32):
        return torch.tensor([case[name] for case in cases], dtype=dtype)[:, None]

    weights = relative_weights(logits, column("temperature"))
    top_k = column("top_k", torch.int64)
    top_k = top_k.where((top_k > 0) & (top_k < vocabulary), vocabulary)
    keep(weights, Filters(top_k, column("top_p"), column("min_p")), vocabulary)
    kept = weights.double()
    return (kept / kept.sum(-1, keepdim=True))[:, :vocabulary].numpy()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    cases=st.lists(CASES, min_size=1, max_size=5),
    vocabulary=st.sampled_from([3, 256, 257, 3000]),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    ties=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_filters_keep_what_the_definitions_keep(cases, vocabulary, spread, ties, seed):
    logits = np.random.default_rng(seed).standard_normal((len(cases), vocabulary)) * spread
    logits = np.round(logits * 2) / 2 if ties else logits
    logits = torch.from_numpy(logits.astype(np.float32))
    assume(all(is_clear(row, **case) for row, case in zip(logits.numpy(), cases, strict=True)))
    for found, row, case in zip(filtered(logits, cases), logits.numpy(), cases, strict=True):
        expected = reference(row, **case)
        np.testing.assert_array_equal(found > 1e-30, expected > 1e-30)  # less is 0 in float32
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-9)


def test_top_p_looks_further_where_its_first_look_was_too_short(monkeypatch):
    looks, largest = [], sampler._largest

    def counted(weights, count):
        looks.append((len(weights), count))
        return largest(weights, count)

    monkeypatch.setattr(sampler, "_largest", counted)
    logits = torch.stack([torch.zeros(30_000), torch.linspace(30_000, 0, 30_000)])
    filtered(logits, [{"temperature": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0}] * 2)
    assert looks == [(2, 512), (1, 8192), (1, 30_000)]


def test_a_draw_inverts_the_cumulative_distribution():
    weights = torch.zeros(4, 512)
    weights[:, [3, 300, 511]] = torch.tensor([1.0, 2.0, 1.0])
    uniform = torch.tensor([0.0, 0.25, 0.75, 1 - 2**-53], dtype=torch.float64)[:, None]
    assert draw(weights, uniform).tolist() == [3, 300, 511, 511]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"top_k": 8},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_have_the_reference_distribution(how):
    """8,000 draws from one distribution over 300 tokens; the seed makes the outcome certain."""
    draws, params = 8_000, SamplingParams(seed=11, max_tokens=10**6, **how)
    logits = np.random.default_rng(3).standard_normal(300).astype(np.float32) * 2
    rows = [_stand_in(params, position) for position in range(draws)]
    tokens = [s.token for s in sample(torch.from_numpy(logits).expand(draws, -1), rows)]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    expected = reference(logits, **{**defaults, **how}) * draws
    counts = np.bincount(tokens, minlength=300)
    assert not counts[expected == 0].any()
    common = expected >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] == 0:
        seen, wanted = seen[:-1], wanted[:-1]
    assert chisquare(seen, wanted).pvalue > 1e-3


def _stand_in(params, position):
    request = SimpleNamespace(params=params, request_id="r", eos_token_ids=frozenset({EOS}))
    return SimpleNamespace(params=params, request=request, index=0, num_output=position)


def test_greedy_is_the_argmax_and_ties_go_to_the_first():
    logits = torch.randn(40, 257, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    greedy = SamplingParams(temperature=0)
    tokens = [s.token for s in sample(logits, [sequence_of(greedy)] * 40)]
    assert tokens == logits.argmax(-1).tolist()
    one = SamplingParams(temperature=5.0, top_k=1)
    assert [s.token for s in sample(logits, [sequence_of(one)] * 40)] == tokens
    cold = SamplingParams(temperature=1e-30)
    assert sample(torch.arange(9.0)[None], [sequence_of(cold)])[0].token == 8


def test_the_same_seed_gives_the_same_token_whatever_else_is_in_the_batch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 1000, generator=generator)
    own = SamplingParams(seed=5, top_p=0.95, max_tokens=99)
    others = [
        SamplingParams(top_k=400), SamplingParams(temperature=0), SamplingParams(min_p=0.5),
        SamplingParams(logprobs=3), SamplingParams(repetition_penalty=2.0), SamplingParams(seed=5),
        SamplingParams(presence_penalty=1.0),
    ]  # fmt: skip
    for position in range(20):
        ours = sequence_of(own, output=[3] * position)
        alone = sample(logits[:1], [ours])[0]
        rest = [sequence_of(params, output=[4, 4, 9]) for params in others]
        assert sample(logits, [ours, *rest])[0] == alone
        backwards = sample(logits.flip(0), [*rest, ours])
        assert backwards[-1] == alone


def test_samples_of_one_request_differ_and_so_do_positions_and_seeds():
    logits = torch.zeros(1, 10_000)
    params = SamplingParams(n=4, seed=1, max_tokens=99)
    first = [sample(logits, [sequence_of(params, index=i)])[0].token for i in range(4)]
    later = sample(logits, [sequence_of(params, output=[1])])[0].token
    other = sample(logits, [sequence_of(SamplingParams(n=4, seed=2))])[0].token
    unseeded = [
        sample(logits, [sequence_of(SamplingParams(), request_id=name)])[0].token for name in "ab"
    ]
    assert len({*first, later, other, *unseeded}) == 8


def test_penalties_follow_their_formulas():
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5, 0.0]])
    prompt, output = [0, 1], [2, 2, 3]
    repetition = [0.5, -2.0, 1.0, -4.0, 0.5, 0.0]
    counted = [1.0, -1.0, 2.0 - 2 * 0.3 - 0.1, -2.0 - 0.3 - 0.1, 0.5, 0.0]
    both = [0.5, -2.0, 1.0 - 0.7, -4.0 - 0.4, 0.5, 0.0]
    for how, expected in (
        ({"repetition_penalty": 2.0}, repetition),
        ({"frequency_penalty": 0.3, "presence_penalty": 0.1}, counted),
        (
            {"repetition_penalty": 2.0, "frequency_penalty": 0.3, "presence_penalty": 0.1},
            both,
        ),
    ):
        wanted = reference(np.array(expected), 1.0, 0, 1.0, 0.0)
        rows = [sequence_of(SamplingParams(seed=i, **how), prompt, output) for i in range(4000)]
        tokens = [s.token for s in sample(logits.expand(4000, -1), rows)]
        assert chisquare(np.bincount(tokens, minlength=6), wanted * 4000).pvalue > 1e-3
    assert logits.tolist() == [[1.0, -1.0, 2.0, -2.0, 0.5, 0.0]]


def test_penalties_touch_their_own_rows_only():
    logits = torch.tensor([[1.0, 0.9, 0.0]]).repeat(3, 1)
    rows = [
        sequence_of(SamplingParams(temperature=0), [2], [0]),
        sequence_of(SamplingParams(temperature=0, presence_penalty=0.5), [2], [0]),
        sequence_of(SamplingParams(temperature=0, repetition_penalty=2.0), [0], []),
    ]
    assert [s.token for s in sample(logits, rows)] == [0, 1, 1]


def test_min_tokens_forbids_what_would_end_the_text():
    logits = torch.zeros(1, 8)
    logits[0, EOS], logits[0, 6], logits[0, 7] = 9, 8, 7
    wanted = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (6, 4000)}
    params = SamplingParams(**wanted)
    tokens = [
        sample(logits, [sequence_of(params, output=[0] * done)])[0].token for done in range(3)
    ]
    assert tokens == [7, 7, EOS]
    assert sample(logits, [sequence_of(SamplingParams(**wanted, ignore_eos=True))])[0].token == EOS


def test_logprobs_are_the_models_own():
    logits = torch.tensor([[0.0, math.log(2), math.log(5), -torch.inf]] * 3)
    rows = [
        sequence_of(SamplingParams(temperature=0, logprobs=2, presence_penalty=2.0), output=[2]),
        sequence_of(SamplingParams(temperature=0)),
        sequence_of(SamplingParams(temperature=0, logprobs=0)),
    ]
    penalised, unasked, own = sample(logits, rows)
    assert penalised.token == 1 and penalised.logprob == pytest.approx(math.log(2 / 8))
    assert list(penalised.top) == [2, 1]
    assert penalised.top[2] == pytest.approx(math.log(5 / 8))
    assert (unasked.logprob, unasked.top) == (None, None)
    assert own.logprob == pytest.approx(math.log(5 / 8)) and own.top == {}


@pytest.mark.parametrize(("top_p", "fewest"), [(0.45, 4), (0.5, 4), (0.51, 5), (1e-9, 1), (1.0, 8)])
@pytest.mark.parametrize("top_k", [0, 6])
def test_of_equal_tokens_top_p_keeps_the_fewest(top_p, fewest, top_k):
    """Eight equal tokens: with top-p 0.45 four of them, not all, and always the same four."""
    case = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "min_p": 0.0}
    (found,) = filtered(torch.zeros(1, 8), [case])
    assert np.flatnonzero(found).tolist() == list(range(fewest))
