"""Task 5, elastic-sampler: every example once an epoch, while ranks come and go."""


class ElasticSampler:
    """Endless batches of example numbers for one rank; each rank makes its own sampler.

    At every step each of the `world_size` ranks takes `batch_size` examples: all together take the
    next world_size * batch_size of the epoch's order. At the end of an epoch fewer are left. They
    are shared so that the ranks' batches differ by one at the most, and some may be empty; no
    example is repeated or left out, and the next step begins the next epoch.

    The order is a new random permutation in each epoch, not the last one's moved along or
    renumbered. It depends on the seed and the epoch alone (and on both of them: epoch 1 of seed 7
    is not epoch 0 of seed 8 or 1007, nor is epoch 1000), so the first n examples of an
    epoch are the same set whatever the world sizes were. Every rank takes part in every step, with
    an empty batch too. There may be fewer examples than ranks, at least one; a rank knows nothing
    of the others but their number.
    """

    def __init__(
        self, num_examples: int, batch_size: int, rank: int, world_size: int, seed: int
    ) -> None:
        raise NotImplementedError("elastic_sampler.ElasticSampler is yours to write")

    def next_batch(self) -> list[int]:
        """This rank's examples of the next step: ints of Python. The list is the caller's."""
        raise NotImplementedError("elastic_sampler.ElasticSampler.next_batch is yours to write")

    def state_dict(self) -> dict:
        """Where the job stands: a few numbers that JSON can hold, the same on every rank.

        Later steps do not change it.
        """
        raise NotImplementedError("elastic_sampler.ElasticSampler.state_dict is yours to write")

    def load_state_dict(self, state: dict) -> None:
        """Go on behind the last step before `state_dict()`, whatever world size it was taken at.

        Wherever this sampler stood before. Examples, batch size and seed are the same.
        """
        raise NotImplementedError("elastic_sampler.ElasticSampler.load_state_dict: yours to write")
