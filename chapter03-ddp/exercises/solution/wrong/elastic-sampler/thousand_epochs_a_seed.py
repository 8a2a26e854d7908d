"""Leaves each seed room for a thousand epochs."""

SAYS = "two seeds, near or far"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Wrong(ElasticSampler):
        def next_batch(self):
            epoch = self.epoch
            self.seed, self.epoch = 1000 * seed + epoch, 0
            batch = super().next_batch()
            self.seed, self.epoch = seed, epoch + self.epoch
            return batch

    return Wrong(num_examples, batch_size, rank, world_size, seed)
