"""Task 6, nucleus-sampling: sample from what is likely, and never from the long tail."""

import numpy as np


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities [vocab], float64, of the next token from its logits [vocab] of any float type.

    First the temperature: softmax(logits / temperature). Then only the smallest set of the
    likeliest tokens whose probabilities sum to `top_p` or more keeps its probabilities, scaled up
    to a sum of 1; all others get 0. Of tokens that are equally likely the one with the smaller
    number counts as likelier, so that of several at the border some may stay and others go. A sum
    that is less than 1e-12 below `top_p` has reached it: it is rounding. `top_p` is above 0, and 1
    keeps everything; at least one token always stays. All is computed in float64.

    temperature 0 is greedy: 1 for the token of the largest logit (the first of several), 0 for all
    others. Logits may be several thousand, and -inf for tokens that are not allowed, which get 0
    always. The logits are not changed.
    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020, section 3.1.
    """
    raise NotImplementedError("nucleus_sampling.nucleus is yours to write")


def draw(probabilities: np.ndarray, uniform: float) -> int:
    """The token that `uniform`, a number from 0 (included) to 1 (excluded), picks.

    Tokens lie one after another on the line from 0 to 1, each as long as its probability, in the
    order of their numbers; the one in which `uniform` lies is drawn, the later of two at a border.
    A token of probability 0 is never drawn, also where `uniform` is 0, and where rounding lets
    the probabilities sum to a little less than `uniform`: then the last possible token is. The
    probabilities are float32 or float64, summed in float64, and not changed; the token is an int of
    Python.
    """
    raise NotImplementedError("nucleus_sampling.draw is yours to write")
