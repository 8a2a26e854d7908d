"""Gives NumPy's integers, which no JSON file takes."""

import numpy as np
from resumable_sampler import ResumableSampler

SAYS = "expected ints of Python"


class Wrong(ResumableSampler):
    def next_batch(self):
        return list(np.array(super().next_batch()))


def make_sampler(*arguments):
    return Wrong(*arguments)
