"""Remembers how many steps were done, which mean other examples in another world."""

SAYS = "worlds of"


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    class Counting(ElasticSampler):
        def state_dict(self):
            return {"epoch": self.epoch, "step": self.position // (world_size * batch_size)}

        def load_state_dict(self, state):
            self.epoch, self.position = state["epoch"], state["step"] * world_size * batch_size

    return Counting(num_examples, batch_size, rank, world_size, seed)
