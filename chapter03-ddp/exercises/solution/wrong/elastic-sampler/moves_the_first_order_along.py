"""Shuffles once, and begins each epoch one place further on."""

SAYS = "neighbours in common"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    import numpy as np
    from elastic_sampler import ElasticSampler

    class Wrong(ElasticSampler):
        def next_batch(self):
            first = np.random.default_rng(seed).permutation(num_examples)
            end = self.position + world_size * batch_size
            step = np.roll(first, self.epoch)[self.position : end]
            self.position = end
            if end >= num_examples:
                self.epoch, self.position = self.epoch + 1, 0
            return np.array_split(step, world_size)[rank].tolist()

    return Wrong(num_examples, batch_size, rank, world_size, seed)
