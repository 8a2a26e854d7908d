"""Task 3, resumable-sampler: which examples a rank reads, now and after a restart."""


class ResumableSampler:
    """Endless batches of example numbers for one rank.

    An epoch has num_examples // global_batch steps. In each epoch every example appears at most
    once over all ranks; the examples that fill no whole batch are left out of that epoch. The
    order is a new permutation in each epoch, and depends on the seed and the epoch alone: not on
    `random`'s or NumPy's global state, which belongs to the model.

    At every step the ranks' batches are disjoint, and together they are the same set of examples
    at every world size: the training run does not change with the number of workers.

    Raises `ValueError`, naming both numbers, when world_size does not divide global_batch.
    """

    def __init__(
        self, num_examples: int, global_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        raise NotImplementedError("resumable_sampler.ResumableSampler is yours to write")

    def next_batch(self) -> list[int]:
        """This rank's next global_batch / world_size example numbers."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Where the run stands: small, made of what JSON can hold, and equal on all ranks."""
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        """Continue behind the last batch before `state_dict()`, whatever world size wrote it."""
        raise NotImplementedError
