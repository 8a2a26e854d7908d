"""Shuffles once, and begins each epoch one place further on."""

import numpy as np
from resumable_sampler import ResumableSampler

SAYS = "neighbours in common"


class Wrong(ResumableSampler):
    def next_batch(self):
        epoch, step = divmod(self.step, self.num_examples // self.global_batch)
        first = np.random.default_rng(self.seed).permutation(self.num_examples)
        order = np.roll(first, epoch)
        self.step += 1
        batch = order[step * self.global_batch :][: self.global_batch]
        return batch[self.rank :: self.world_size].tolist()


def make_sampler(*arguments):
    return Wrong(*arguments)
