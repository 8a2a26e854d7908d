"""Adds thousands to the seed: seed 7 in its second epoch is seed 1007."""

SAYS = "two seeds, near or far"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Wrong(ElasticSampler):
        def next_batch(self):
            epoch = self.epoch
            self.seed, self.epoch = seed + 1000 * epoch, 0
            batch = super().next_batch()
            self.seed, self.epoch = seed, epoch + self.epoch
            return batch

    return Wrong(num_examples, batch_size, rank, world_size, seed)
