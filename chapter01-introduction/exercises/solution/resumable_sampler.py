"""Task 3, resumable-sampler: which examples a rank reads, now and after a restart."""

import numpy as np


class ResumableSampler:
    """One number, the steps taken, is the whole state; rank and world size only cut the batch."""

    def __init__(
        self, num_examples: int, global_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        if global_batch % world_size:
            raise ValueError(f"{world_size} ranks do not divide a global batch of {global_batch}")
        if global_batch > num_examples:
            raise ValueError(f"{num_examples} examples fill no global batch of {global_batch}")
        self.num_examples = num_examples
        self.global_batch = global_batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.step = 0

    def next_batch(self) -> list[int]:
        epoch, step = divmod(self.step, self.num_examples // self.global_batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        batch = order[step * self.global_batch :][: self.global_batch]
        self.step += 1
        return batch[self.rank :: self.world_size].tolist()

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
