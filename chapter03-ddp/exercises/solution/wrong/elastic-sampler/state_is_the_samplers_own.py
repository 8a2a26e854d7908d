"""Hands out its own dictionary as the state, and goes on writing into it."""

SAYS = "a step changed a state that was told before"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Sharing(ElasticSampler):
        told = None

        def next_batch(self):
            batch = super().next_batch()
            self.state_dict()
            return batch

        def state_dict(self):
            self.told = {} if self.told is None else self.told
            self.told.update(super().state_dict())
            return self.told

    return Sharing(num_examples, batch_size, rank, world_size, seed)
