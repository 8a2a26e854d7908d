"""Gives rank r every world_size-th example of the epoch, as if nobody ever came or went."""

SAYS = "worlds of"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    import numpy as np
    from elastic_sampler import ElasticSampler

    class Striding(ElasticSampler):
        def next_batch(self):
            order = np.random.default_rng([seed, self.epoch]).permutation(num_examples)
            begin = self.position // world_size
            own = order[rank::world_size][begin : begin + batch_size]
            self.position += world_size * batch_size
            if self.position >= num_examples:
                self.epoch, self.position = self.epoch + 1, 0
            return own.tolist()

    return Striding(num_examples, batch_size, rank, world_size, seed)
