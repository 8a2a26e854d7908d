"""Task 5, elastic-sampler: the reference solution."""

import numpy as np


class ElasticSampler:
    def __init__(self, num_examples, batch_size, rank, world_size, seed):
        self.num_examples, self.batch_size = num_examples, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = self.position = 0

    def next_batch(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_examples)
        end = self.position + self.world_size * self.batch_size
        step = order[self.position : end]
        self.position = end
        if self.position >= self.num_examples:
            self.epoch, self.position = self.epoch + 1, 0
        return np.array_split(step, self.world_size)[self.rank].tolist()

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
