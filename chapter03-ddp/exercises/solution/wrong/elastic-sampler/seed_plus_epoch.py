"""Adds seed and epoch, so that the next seed has the next epoch's order."""

SAYS = "the order of another epoch of another seed"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Adding(ElasticSampler):
        def next_batch(self):
            epoch = self.epoch
            self.seed, self.epoch = seed + epoch, 0
            batch = super().next_batch()
            self.seed, self.epoch = seed, epoch + self.epoch
            return batch

    return Adding(num_examples, batch_size, rank, world_size, seed)
