"""Begins an epoch of no examples when the one before ended with a whole step: > for >=."""

SAYS = "were left out"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    import numpy as np
    from elastic_sampler import ElasticSampler

    class Over(ElasticSampler):
        def next_batch(self):
            order = np.random.default_rng([seed, self.epoch]).permutation(num_examples)
            end = self.position + world_size * batch_size
            step = order[self.position : end]
            self.position = end
            if end > num_examples:
                self.epoch, self.position = self.epoch + 1, 0
            return np.array_split(step, world_size)[rank].tolist()

    return Over(num_examples, batch_size, rank, world_size, seed)
