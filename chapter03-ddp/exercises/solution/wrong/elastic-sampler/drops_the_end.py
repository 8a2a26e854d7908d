"""Begins a new epoch when the rest does not fill a step (drop_last)."""

SAYS = "were left out"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Dropping(ElasticSampler):
        def next_batch(self):
            if self.position + self.world_size * self.batch_size > self.num_examples:
                self.epoch, self.position = self.epoch + 1, 0
            return super().next_batch()

    return Dropping(num_examples, batch_size, rank, world_size, seed)
