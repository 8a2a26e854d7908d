"""Adds thousands to the seed: seed 7 in its second epoch is seed 1007."""

import numpy as np
from resumable_sampler import ResumableSampler

SAYS = "near or far, must share no epoch"


class Wrong(ResumableSampler):
    def next_batch(self):
        epoch, step = divmod(self.step, self.num_examples // self.global_batch)
        order = np.random.default_rng(self.seed + 1000 * epoch).permutation(self.num_examples)
        self.step += 1
        batch = order[step * self.global_batch :][: self.global_batch]
        return batch[self.rank :: self.world_size].tolist()


def make_sampler(*arguments):
    return Wrong(*arguments)
