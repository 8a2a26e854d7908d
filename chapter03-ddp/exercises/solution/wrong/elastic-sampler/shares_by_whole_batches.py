"""Gives the rest to the first ranks in whole batches."""

SAYS = "the batches have"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Greedy(ElasticSampler):
        def next_batch(self):
            whole = ElasticSampler(num_examples, batch_size, 0, 1, seed)
            whole.load_state_dict(self.state_dict())
            whole.batch_size = world_size * batch_size
            step = whole.next_batch()
            self.load_state_dict(whole.state_dict())
            return step[rank * batch_size : (rank + 1) * batch_size]

    return Greedy(num_examples, batch_size, rank, world_size, seed)
