"""Cuts the batches once, and shuffles only their order."""

import numpy as np
from resumable_sampler import ResumableSampler

SAYS = "global batch"


class Batches(ResumableSampler):
    def next_batch(self):
        steps = self.num_examples // self.global_batch
        epoch, step = divmod(self.step, steps)
        first = np.random.default_rng([self.seed, epoch]).permutation(steps)[step]
        self.step += 1
        batch = np.arange(self.num_examples)[first * self.global_batch :][: self.global_batch]
        return batch[self.rank :: self.world_size].tolist()


def make_sampler(*arguments):
    return Batches(*arguments)
