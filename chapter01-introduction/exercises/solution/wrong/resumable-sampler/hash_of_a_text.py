"""Seeds with the hash of a text, which is another one in each process."""

import random

from resumable_sampler import ResumableSampler

SAYS = "in another Python process"


class Wrong(ResumableSampler):
    def next_batch(self):
        epoch, step = divmod(self.step, self.num_examples // self.global_batch)
        order = list(range(self.num_examples))
        random.Random(hash(f"{self.seed}, {epoch}")).shuffle(order)
        self.step += 1
        batch = order[step * self.global_batch :][: self.global_batch]
        return batch[self.rank :: self.world_size]


def make_sampler(*arguments):
    return Wrong(*arguments)
