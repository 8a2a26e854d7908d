"""Shuffles once, and adds to the numbers in each epoch."""

import numpy as np
from resumable_sampler import ResumableSampler

SAYS = "draw a new permutation"


class Wrong(ResumableSampler):
    def next_batch(self):
        epoch, step = divmod(self.step, self.num_examples // self.global_batch)
        first = np.random.default_rng(self.seed).permutation(self.num_examples)
        order = (first + 7 * epoch) % self.num_examples
        self.step += 1
        batch = order[step * self.global_batch :][: self.global_batch]
        return batch[self.rank :: self.world_size].tolist()


def make_sampler(*arguments):
    return Wrong(*arguments)
