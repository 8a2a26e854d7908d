"""Fills the last step with examples from the epoch's beginning, as DistributedSampler does."""

SAYS = "were taken more than once"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    import numpy as np
    from elastic_sampler import ElasticSampler

    class Padding(ElasticSampler):
        def next_batch(self):
            order = np.random.default_rng([seed, self.epoch]).permutation(num_examples)
            end = self.position + world_size * batch_size
            step = np.take(order, np.arange(self.position, end), mode="wrap")
            self.position = end
            if self.position >= num_examples:
                self.epoch, self.position = self.epoch + 1, 0
            return np.array_split(step, world_size)[rank].tolist()

    return Padding(num_examples, batch_size, rank, world_size, seed)
