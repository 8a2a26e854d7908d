"""speculative_decoding.py's counts, its table and its figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distlab.measure import Timing
from distlab.script import Run

DEVIATIONS = 4.5  # of a normal variable: once in 150,000


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
        ["k", "accepted", "tokens/pass: formula", "measured", "cost of a check",
         "speed-up: formula", "with that cost", "measured"],
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
