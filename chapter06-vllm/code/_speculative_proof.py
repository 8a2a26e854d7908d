"""The output is the target's: chi-squared tests against exact probabilities, and their power."""

from argparse import Namespace
from collections.abc import Callable

import torch
from _speculative_models import Pair
from torch import Tensor

from distlab.script import Run

Accept = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
SIGNIFICANCE = 1e-4  # a correct sampler fails once in 10,000 seeds, and the seed is fixed
VOCABULARY, LENGTH, GUESSES = 5, 3, 2  # 125 sequences, of which a round gives 1 to 3 tokens
FEWEST = 5  # expected in a cell: rarer outcomes are counted together (Cochran 1954)


def prove_on_tables(run: Run, accept: Accept, trials: int, seed: int) -> None:
    """Two models that are tables, [the last token, the next one], whose sequences can be counted.

    Every sequence of LENGTH tokens has a known probability: a test of the joint distribution, over
    the rounds' borders, not of one token alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    p, q = torch.softmax(tables, dim=-1)
    exact = (p[0][:, None, None] * p[:, :, None] * p[None]).flatten()  # [VOCABULARY ** LENGTH]
    run.metric("overlap_of_the_two_tables", float(torch.minimum(p, q).sum(-1).mean()))
    places = torch.tensor([VOCABULARY**2, VOCABULARY, 1])
    for name, sampler in (("", accept), ("a sampler that redraws from p", redraw_from_p(accept))):
        sequences = sample_sequences(sampler, p, q, trials, generator)
        found = (sequences * places).sum(1).bincount(minlength=VOCABULARY**LENGTH)
        chance = p_value(found, exact)
        if not name:
            run.check_above(
                f"all {VOCABULARY**LENGTH} sequences come as often as the target's (p-value of "
                f"chi-squared, {trials:,} sequences)", chance, SIGNIFICANCE,
            )  # fmt: skip
        else:
            run.check_below(f"the same test finds {name}", chance, SIGNIFICANCE)


def sample_sequences(
    accept: Accept, p: Tensor, q: Tensor, trials: int, generator: torch.Generator
) -> Tensor:
    """[trials, LENGTH] tokens by guessing and checking; each trial begins after token 0."""
    rows = torch.arange(trials)
    made = torch.zeros(trials, 1 + LENGTH + GUESSES + 1, dtype=torch.long)
    lengths = torch.ones(trials, dtype=torch.long)
    for _ in range(LENGTH):  # a round gives at least one token
        places = lengths.clamp(max=1 + LENGTH)  # who is done goes on, and is not looked at
        last = [made[rows, places - 1]]
        for _ in range(GUESSES):
            last.append(torch.multinomial(q[last[-1]], 1, generator=generator)[:, 0])
        before = torch.stack(last, dim=1)  # [trials, GUESSES + 1]
        accepted, following = accept(before[:, 1:], q[before[:, :-1]], p[before], generator)
        for place in range(GUESSES):
            made[rows, places + place] = before[:, place + 1]
        made[rows, places + accepted] = following
        lengths = places + accepted + 1
    return made[:, 1 : LENGTH + 1]


def redraw_from_p(accept: Accept) -> Accept:
    """The classic mistake: a refused guess is replaced by a sample of p, not of max(p - q, 0)."""

    def wrong(
        drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        accepted, _ = accept(drafted, q, p, generator)
        at_place = p[torch.arange(len(p)), accepted]
        return accepted, torch.multinomial(at_place, 1, generator=generator)[:, 0]

    return wrong


def prove_on_models(run: Run, pair: Pair, accept: Accept, args: Namespace) -> None:
    """The trained models at one place, many times: the target's whole distribution is known."""
    generator = pair.generator(args.seed)
    p, q = (
        torch.softmax(model(pair.prompt)[:, -1].double() / args.temperature, dim=-1)
        for model in (pair.target, pair.draft)
    )
    guesses = torch.multinomial(q[0], args.samples, replacement=True, generator=generator)
    at_both = p.expand(args.samples, 2, -1)  # a round with k = 1; what follows it is not counted
    accepted, following = accept(
        guesses[:, None], q.expand(args.samples, 1, -1), at_both, generator
    )
    first = torch.where(accepted > 0, guesses, following)
    run.check_above(
        "the trained models' first token is the target's (p-value of chi-squared, "
        f"{args.samples:,} samples)",
        p_value(first.bincount(minlength=p.shape[1]), p[0]), SIGNIFICANCE,
    )  # fmt: skip


def p_value(found: Tensor, exact: Tensor) -> float:
    """The chance that counts as far from `exact` [cells] as `found` come from it (Pearson 1900)."""
    found, expected = found.cpu().double(), exact.cpu() * found.sum().cpu()
    rare = expected < FEWEST
    if rare.any():
        found = torch.cat([found[~rare], found[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(len(expected) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
