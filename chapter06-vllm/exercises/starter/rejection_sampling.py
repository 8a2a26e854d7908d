"""Task 5, rejection-sampling: which of a draft's guesses hold, so that nothing is changed."""

from collections.abc import Callable, Sequence

import numpy as np


def check_guesses(
    guesses: Sequence[int], q: np.ndarray, p: np.ndarray, uniform: Callable[[], float]
) -> list[int]:
    """The tokens that a round of speculative decoding gives: 1 to k + 1 of them.

    guesses: k tokens (k may be 0), guess i drawn by the draft from q[i]; q [k, vocab]. p
    [k + 1, vocab]: the target's distributions at the same places, p[k] the one behind them all.
    `uniform()` gives a random number from 0 (included) to 1 (excluded), a new one at each call: the
    only chance that you may use.

    One guess x after another is accepted with probability min(1, p[i][x] / q[i][x]): where a number
    from `uniform()` is below it, so never where p is 0. One number decides on a guess, and another
    draws a token; none is used twice. The first guess that is refused is replaced by a token drawn
    from max(p[i] - q[i], 0), scaled to a sum of 1, and ends the round. Where all
    are accepted, a token drawn from p[k] is added. So the tokens have the target's distribution,
    whatever q is: nobody can tell them from the target's own.

    A token of which p is 0 is never returned, nor in place of a guess one that has no share in
    max(p[i] - q[i], 0), whatever `uniform()` says. Where that has nothing above 0, as rounding may
    have it, the token is drawn from p[i]. The arrays (float32 or float64) and the list are not
    changed; the result is a list of ints of Python.
    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318.
    """
    raise NotImplementedError("rejection_sampling.check_guesses is yours to write")
