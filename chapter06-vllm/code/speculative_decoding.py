"""Speculative decoding from scratch: a cheap model guesses, the real one checks, nothing changes.

A decode step reads every weight to make one token, and the same read could check several. So a
draft model guesses k tokens one by one, and the target computes its own distribution at all k + 1
places in one pass. A guess x drawn from the draft's q is accepted with probability min(1, p(x) /
q(x)); the first one refused is drawn again from what the target has more of, max(p - q, 0), and
where all k hold the pass gives one token more. What comes out is distributed exactly as the
target's own samples, whatever the draft: a bad draft costs time, never quality.

With a the chance that a guess is accepted, which is the overlap sum of min(p, q), and c the cost of
a draft step in target steps, a pass gives (1 - a^(k+1)) / (1 - a) tokens, and the speed-up is that
divided by (k·c + 1), as long as checking k + 1 tokens takes no longer than making one.

Run:
    python chapter06-vllm/code/speculative_decoding.py --figures build/figures
    python chapter06-vllm/code/speculative_decoding.py --temperature 0.5 --draft-layers 2

You should see: a chi-squared test that finds no difference between guessed-and-checked sequences
and the target's, over every sequence of a small vocabulary, and that does find the classic mistake
of drawing again from p; greedy output that is the target's token for token; a tokens-per-pass curve
that flattens as k grows, and a speed-up that rises, and falls again when guesses cost more than
they save. A checking pass is not quite free, so the best k is often below the formula's.

Sources: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding",
2023 (arXiv 2211.17192), theorems 3.5 and 3.8; Chen et al. 2023 (arXiv 2302.01318), theorem 1.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distlab import hardware, measure, script
from distlab.script import Run, UsageError
from inference.speculation import (
    Decoder,
    Pair,
    Rounds,
    overlap,
    prove_on_models,
    prove_on_tables,
    show,
    train_pair,
)

PRESETS = {
    "smoke": {"hidden": 64, "layers": 4, "steps": 8, "batch_size": 8, "trials": 20_000,
              "samples": 1000, "tokens": 24, "most": 4, "repeats": 3},
    "laptop": {"hidden": 128, "layers": 8, "steps": 50, "batch_size": 16, "trials": 100_000,
               "samples": 4000, "tokens": 96, "most": 8, "repeats": 5},
    "gpu": {"hidden": 1024, "layers": 16, "steps": 400, "batch_size": 64, "trials": 500_000,
            "samples": 20_000, "tokens": 256, "most": 8, "repeats": 9},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        prove_on_tables(run, accept, args.trials, args.seed)
        run.print()
        pair = train_pair(run, args)
        check_greedy(run, pair, args)
        with torch.inference_mode():
            prove_on_models(run, pair, accept, args)
        run.print()
        measure_speed(run, pair, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--hidden", **positive, help="hidden size of both models, a multiple of 32")
    parser.add_argument("--layers", **positive, help="of the target")
    parser.add_argument("--draft-layers", **positive, default=1, help="of these, how many the "
                        "draft has")  # fmt: skip
    parser.add_argument("--steps", **positive, help="training steps of the pair")
    parser.add_argument("--batch-size", **positive, help="training sequences of a step")
    parser.add_argument("--corpus", default="stdlib", help="stdlib, a folder of text, or hf:NAME")
    parser.add_argument("--temperature", type=script.positive_float, default=1.0)
    parser.add_argument("--most", **positive, metavar="K", help="guesses of a round, at most")
    parser.add_argument("--tokens", **positive, help="new tokens of a generation")
    parser.add_argument("--repeats", **positive, help="timed generations for each k")
    parser.add_argument("--trials", **positive, help="sequences of the chi-squared test")
    parser.add_argument("--samples", **positive, help="first tokens of the models' test")
    parser.add_argument("--seed", type=script.non_negative_int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args(argv)
    if args.hidden % 32:
        raise UsageError(f"--hidden {args.hidden} is no multiple of 32; use 64, 128 or 256")
    if args.draft_layers >= args.layers:
        raise UsageError(
            f"--draft-layers {args.draft_layers} leaves nothing to save of --layers {args.layers}; "
            f"use {args.layers - 1} or less"
        )
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    args.device = hardware.chosen_device(args.device)
    return args


def accept(
    drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How many guesses hold in each row [rows], and the token that follows them [rows].

    drafted [rows, k]: guesses, each drawn from its q [rows, k, vocab]; p [rows, k + 1, vocab]: the
    target's distributions at the same places and one further. Leviathan et al., algorithm 1.
    """
    rows, k = drafted.shape
    chance = torch.rand(rows, k, generator=generator, dtype=p.dtype, device=p.device)
    wanted = p[:, :k].gather(2, drafted[..., None])[..., 0]  # p(x), [rows, k]
    offered = q.gather(2, drafted[..., None])[..., 0]  # q(x)
    held = chance * offered < wanted  # with probability min(1, p(x) / q(x))
    accepted = held.long().cumprod(1).sum(1)  # up to the first that does not hold
    at = accepted[:, None, None].expand(-1, 1, p.shape[2])
    nothing = torch.zeros_like(p[:, :1])  # the place after the last guess has no q
    there, guessed = (x.gather(1, at)[:, 0] for x in (p, torch.cat([q, nothing], dim=1)))
    missing = (there - guessed).clamp(min=0)
    rounded_away = missing.sum(1, keepdim=True) == 0  # p and q are the same but for their last bits
    missing = torch.where(rounded_away, there, missing)
    return accepted, torch.multinomial(missing, 1, generator=generator)[:, 0]


def generate(
    target: Decoder, draft: Decoder, prompt: Tensor, count: int, k: int, generator: torch.Generator
) -> tuple[Tensor, Rounds]:
    """`prompt` [1, seq] and `count` more tokens of the target's distribution, k guesses a round.

    Both caches are cut back to the tokens that held: the keys of a refused guess are wrong.
    """
    tokens, rounds = prompt, Rounds()
    wanted = prompt.shape[1] + count
    target.rewind(0)
    draft.rewind(0)
    while tokens.shape[1] < wanted:
        known = tokens.shape[1]
        guesses, q = guess(draft, tokens, k, generator)
        p = target.probabilities(torch.cat([tokens, guesses], dim=1))[:, -k - 1 :]
        accepted, following = accept(guesses, q, p, generator)
        held = int(accepted)
        tokens = torch.cat([tokens, guesses[:, :held], following[:, None]], dim=1)
        target.rewind(known + held)
        draft.rewind(known + held)
        rounds.add(held, overlap(p, q)[0, : held + 1])
    return tokens[:, :wanted], rounds


def guess(
    draft: Decoder, tokens: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """k tokens [rows, k] after `tokens` [rows, seq], and the q they are drawn from."""
    known, q = tokens.shape[1], []
    for _ in range(k):
        q.append(draft.probabilities(tokens)[:, -1])
        following = torch.multinomial(q[-1], 1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens[:, known:], torch.stack(q, dim=1)


def generate_alone(
    target: Decoder, prompt: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """The same without a draft: one pass, one token."""
    tokens = prompt
    target.rewind(0)
    for _ in range(count):
        p = target.probabilities(tokens)[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    return tokens


def check_greedy(run: Run, pair: Pair, args: Namespace) -> None:
    """At temperature 0 the distributions are single tokens, and so is the output: the target's."""
    target, draft = (pair.decoder(model, 0.0) for model in (pair.target, pair.draft))
    expected = pair.target.generate(pair.prompt, args.tokens)
    found = {
        str(k): generate(target, draft, pair.prompt, args.tokens, k, pair.generator(args.seed))[0]
        for k in range(1, args.most + 1)
    }
    run.check_equal(
        f"greedy output with k = 1 to {args.most} is the target's token for token",
        found,
        dict.fromkeys(found, expected),
    )


def measure_speed(run: Run, pair: Pair, args: Namespace) -> None:
    """Predict tokens per pass and speed-up from the overlap and the cost ratio, then measure."""
    target, draft = (pair.decoder(model, args.temperature) for model in (pair.target, pair.draft))
    seeds = iter(range(args.seed, args.seed + 100 * args.repeats * (args.most + 1)))
    rounds = {k: Rounds() for k in range(1, args.most + 1)}

    def with_guesses(k: int) -> Callable[[], None]:
        def once() -> None:
            generator = pair.generator(next(seeds))
            rounds[k].extend(generate(target, draft, pair.prompt, args.tokens, k, generator)[1])

        return once

    def alone() -> None:
        generate_alone(target, pair.prompt, args.tokens, pair.generator(next(seeds)))

    expected = pair.mean_overlap(args, pair.generator(args.seed))
    variants = {"alone": alone, **{f"with {k}": with_guesses(k) for k in rounds}}
    timings = measure.compare(pair.steps(args) | variants, 1, args.repeats, args.device)
    show(run, expected, rounds, timings)


if __name__ == "__main__":
    script.exit(main)
