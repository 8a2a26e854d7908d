"""Speculative decoding's two models, the proof that nothing changes, and the formulas' report.

The draft is the target's first layers, and both are trained as one, so they partly agree: it shares
the embedding, its layers, the last norm and the output matrix with the target, and the sum of both
losses is trained: early exit, as in LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710).

The proof: chi-squared tests against exact probabilities, and a mistake that they must find.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distlab import data
from distlab.measure import Timing
from distlab.model import KVCache, Llama, ModelConfig
from distlab.script import Run

VOCABULARY, SEQUENCE, PROMPT = 512, 64, 32  # tokens
CORPUS_BYTES = 2_000_000
STEPS = 8
LEARNING_RATE = 3e-3
SIGNIFICANCE = 1e-4  # a correct sampler fails once in 10,000 seeds, and the seed is fixed
TABLE_TOKENS, LENGTH, GUESSES = 5, 3, 2  # 125 sequences, of which a round gives 1 to 3 tokens
FEWEST = 5  # expected in a cell: rarer outcomes are counted together (Cochran 1954)
DEVIATIONS = 4.5  # of a normal variable: once in 150,000
Accept = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Decoder:
    """A model with its cache: probabilities of what follows, and a way back."""

    def __init__(self, model: Llama, rows: int, room: int, temperature: float) -> None:
        weight = model.lm_head.weight
        self.model, self.temperature = model, temperature
        self.cache = KVCache(model.config, rows, room, weight.device, weight.dtype)

    @torch.inference_mode()
    def probabilities(self, tokens: Tensor) -> Tensor:
        """[rows, new, vocab] after each of those of `tokens` [rows, seq] not yet in the cache."""
        logits = self.model(tokens[:, self.cache.length :], self.cache)
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(logits / self.temperature, dim=-1)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.cache.length = min(self.cache.length, length)


@dataclass(frozen=True)
class Pair:
    """The two models, and the prompt [1, PROMPT] from text that neither was trained on."""

    target: Llama
    draft: Llama
    prompt: Tensor
    room: int  # tokens of a cache

    def decoder(self, model: Llama, temperature: float, rows: int = 1) -> Decoder:
        return Decoder(model, rows, self.room, temperature)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.prompt.device).manual_seed(seed)

    @torch.inference_mode()
    def mean_overlap(self, args: Namespace, generator: torch.Generator) -> float:
        """The mean of sum min(p, q) along texts that the target wrote: two passes, no guessing.

        Chen et al. call it 1 - the total variation distance; it is the chance that a guess holds.
        """
        rows = self.prompt.expand(8, -1)
        texts = self.target.generate(rows, args.tokens, args.temperature, generator)
        p, q = (
            torch.softmax(model(texts)[:, PROMPT - 1 :] / args.temperature, dim=-1)
            for model in (self.target, self.draft)
        )
        return float(torch.minimum(p, q).sum(-1).mean())

    def steps(self, args: Namespace) -> dict[str, Callable[[], object]]:
        """A draft step, a target step, and passes that check k guesses, in the middle of a text.

        Each call does it STEPS times, so that it is long enough to be timed.
        """
        middle = PROMPT + args.tokens // 2
        tokens = torch.ones(1, middle + args.most + 1, dtype=torch.long, device=self.prompt.device)
        target, draft = (self.decoder(model, 1.0) for model in (self.target, self.draft))

        def step(decoder: Decoder, new: int) -> Callable[[], object]:
            def steps() -> None:
                for _ in range(STEPS):
                    decoder.rewind(middle)
                    decoder.probabilities(tokens[:, : middle + new])

            return steps

        for decoder in (target, draft):
            decoder.probabilities(tokens[:, :middle])

        checks = {f"check {k}": step(target, k + 1) for k in range(1, args.most + 1)}
        return {"draft": step(draft, 1), "target": step(target, 1), **checks}


def train_pair(run: Run, args: Namespace) -> Pair:
    """Train both on `--corpus`; the same seed gives the same pair."""
    torch.manual_seed(args.seed)
    tokens = data.prepare(args.corpus, VOCABULARY, CORPUS_BYTES)
    config = ModelConfig(
        VOCABULARY, args.hidden, 8 * args.hidden // 3, args.layers, args.hidden // 32,
        args.hidden // 32,
    )  # fmt: skip
    with torch.device(args.device):
        target = Llama(config)
    draft = first_layers(target, args.draft_layers)
    optimizer = torch.optim.AdamW(target.parameters(), LEARNING_RATE)
    order = torch.randperm(tokens.num_windows(SEQUENCE)).tolist()
    losses = []
    for step in run.progress(range(args.steps), "training"):
        first = step * args.batch_size
        places = [order[(first + i) % len(order)] for i in range(args.batch_size)]
        windows = torch.from_numpy(tokens.windows(places, SEQUENCE)).to(args.device)
        both = [model.loss(windows[:, :-1], windows[:, 1:]) for model in (target, draft)]
        optimizer.zero_grad()
        torch.stack(both).sum().backward()
        optimizer.step()
        losses.append([loss.item() for loss in both])
    run.metric("loss_of_the_target_after_training", losses[-1][0], "nats")
    run.metric("loss_of_the_draft_after_training", losses[-1][1], "nats")
    prompt = torch.from_numpy(tokens.validation.windows([0], PROMPT))[:, :-1].to(args.device)
    return Pair(target.eval(), draft.eval(), prompt, PROMPT + args.tokens + args.most + 2)


def first_layers(target: Llama, count: int) -> Llama:
    """A model whose parameters are the target's own: embedding, first layers, norm and head."""
    with torch.device("meta"):
        draft = Llama(replace(target.config, num_hidden_layers=count))
    draft.model.embed_tokens, draft.model.norm = target.model.embed_tokens, target.model.norm
    draft.model.layers = target.model.layers[:count]
    draft.lm_head = target.lm_head
    return draft


def prove_on_tables(run: Run, accept: Accept, trials: int, seed: int) -> None:
    """Two models that are tables, [the last token, the next one], whose sequences can be counted.

    Every sequence of LENGTH tokens has a known probability: a test of the joint distribution, over
    the rounds' borders, not of one token alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, TABLE_TOKENS, TABLE_TOKENS, generator=generator, dtype=torch.float64)
    p, q = torch.softmax(tables, dim=-1)
    exact = (p[0][:, None, None] * p[:, :, None] * p[None]).flatten()  # [TABLE_TOKENS ** LENGTH]
    run.metric("overlap_of_the_two_tables", float(torch.minimum(p, q).sum(-1).mean()))
    places = torch.tensor([TABLE_TOKENS**2, TABLE_TOKENS, 1])
    for name, sampler in (("", accept), ("a sampler that redraws from p", redraw_from_p(accept))):
        sequences = sample_sequences(sampler, p, q, trials, generator)
        found = (sequences * places).sum(1).bincount(minlength=TABLE_TOKENS**LENGTH)
        chance = p_value(found, exact)
        if not name:
            run.check_above(
                f"all {TABLE_TOKENS**LENGTH} sequences come as often as the target's (p-value of "
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


@dataclass
class Rounds:
    """What became of the guesses, round by round."""

    accepted: list[int] = field(default_factory=list)
    overlaps: list[Tensor] = field(default_factory=list)  # of the places that were judged

    def add(self, accepted: int, overlaps: Tensor) -> None:
        self.accepted.append(accepted)
        self.overlaps.append(overlaps)

    def extend(self, other: "Rounds") -> None:
        self.accepted += other.accepted
        self.overlaps += other.overlaps

    @property
    def tokens_per_pass(self) -> float:
        return 1 + sum(self.accepted) / len(self.accepted)

    @property
    def acceptance(self) -> float:
        """Accepted of the guesses that were judged: what follows a refused one never was."""
        return sum(self.accepted) / len(torch.cat(self.overlaps))

    @property
    def deviations(self) -> float:
        """How far the acceptances are from the sum of the overlaps, in standard deviations.

        Given what came before, a guess holds with the probability of its overlap.
        """
        chances = torch.cat(self.overlaps).double().cpu()
        spread = math.sqrt(float((chances * (1 - chances)).sum()))
        return abs(sum(self.accepted) - float(chances.sum())) / spread if spread else 0.0


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """sum of min(p, q) over the vocabulary at the k guessed places, [rows, k]."""
    return torch.minimum(p[:, : q.shape[1]], q).sum(-1)


def expected_tokens(a: float, k: int) -> float:
    """(1 - a^(k+1)) / (1 - a) tokens of a pass (Leviathan et al., equation 1)."""
    return k + 1.0 if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def expected_speed_up(a: float, k: int, cost: float, check: float = 1.0) -> float:
    """Tokens of a round over its time in target steps, k·c + the checking pass (theorem 3.8)."""
    return expected_tokens(a, k) / (k * cost + check)


def show(run: Run, a: float, rounds: Mapping[int, Rounds], timings: Mapping[str, Timing]) -> None:
    """Each k: what the formulas say of the overlap `a` and the cost ratio, and what came of it."""
    step = timings["target"].median
    cost = timings["draft"].median / step
    run.metric("overlap_of_draft_and_target", a, note="a, along texts of the target")
    run.metric("cost_of_a_draft_step", cost, note="c, in target steps")
    rows = []
    for k, counted in rounds.items():
        check = timings[f"check {k}"].median / step
        measured = timings["alone"].median / timings[f"with {k}"].median
        rows.append([
            k, counted.acceptance, expected_tokens(a, k), counted.tokens_per_pass, check,
            expected_speed_up(a, k, cost), expected_speed_up(a, k, cost, check), measured,
        ])  # fmt: skip
    run.table(
        "speculation",
        ["k", "accepted", "tokens/pass predicted", "tokens/pass measured", "cost of a check",
         "speed-up predicted", "predicted with that cost", "speed-up measured"],
        rows,
        caption="k guesses a round; costs in target steps",
    )  # fmt: skip
    draw(run, rows)
    for row in rows:
        run.compare(f"tokens per target pass, k = {row[0]}", row[2], row[3])
    for row in rows:
        run.compare(f"speed-up with the check's cost, k = {row[0]}", row[6], row[7])
    best_predicted, best = (max(rows, key=lambda row: row[i])[0] for i in (5, 7))
    run.print(f"verdict: fastest with k = {best}, by the formula with k = {best_predicted}")
    check_counts(run, rounds)


def check_counts(run: Run, rounds: Mapping[int, Rounds]) -> None:
    run.check_below(
        "as many guesses hold as the overlaps of their places say",
        max(counted.deviations for counted in rounds.values()),
        DEVIATIONS,
        "standard deviations",
    )
    run.check_true(
        "a pass gives at least 1 token and at most k + 1",
        all(0 <= n <= k for k, counted in rounds.items() for n in counted.accepted),
        f"{sum(len(counted.accepted) for counted in rounds.values()):,} passes",
    )


def draw(run: Run, rows: Sequence[Sequence[float]]) -> None:
    k = [row[0] for row in rows]
    for name, title, label, lines in (
        ("tokens_per_pass", "Further guesses seldom hold", "tokens per target pass",
         [("measured", 3), ("(1 - a^(k+1)) / (1 - a)", 2)]),
        ("speed_up", "Guessing pays until the guesses cost more than they save", "speed-up",
         [("measured", 7), ("formula, a check costs a step", 5),
          ("formula, with the check's measured cost", 6)]),
    ):  # fmt: skip
        run.figure(
            f"speculative_{name}", kind="line", title=title, x_label="k guesses a round",
            y_label=label,
            series=[{"label": text, "x": k, "y": [row[column] for row in rows]}
                    for text, column in lines],
            lines=[{"label": "without a draft", "y": 1.0}],
        )  # fmt: skip
