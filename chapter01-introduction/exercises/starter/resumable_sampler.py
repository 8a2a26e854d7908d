"""Task 3, resumable-sampler: which examples a rank reads, now and after a restart."""


class ResumableSampler:
    """Endless batches of example numbers for one rank.

    An epoch has num_examples // global_batch steps. In each epoch every example appears at most
    once over all ranks; the examples that fill no whole batch are left out of that epoch. The
    order is a new random permutation of all examples in each epoch, not the last one's turned round
    or renumbered, so that an example left out once comes another time. It depends on the seed and
    the epoch alone: not on `random`'s or NumPy's global state, which belongs to the model and is
    not changed either, nor on other samplers of this process, nor on the process itself, which a
    restarted run has a new one of. Two seeds, near or far, share no epoch: the second epoch of seed
    7 is not the first one of seed 8, nor is epoch 1000.

    At every step the ranks' batches are disjoint, and together they are the same set of examples
    at every world size: the training run does not change with the number of workers.

    Raises `ValueError`, naming both numbers, when world_size does not divide global_batch, and when
    global_batch is larger than num_examples.
    """

    def __init__(
        self, num_examples: int, global_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        raise NotImplementedError("resumable_sampler.ResumableSampler is yours to write")

    def next_batch(self) -> list[int]:
        """This rank's next global_batch / world_size example numbers, ints of Python."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Where the run stands: small, made of what JSON can hold, and equal on all ranks.

        Its size grows neither with the examples nor with the steps. Later steps do not change it.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        """Continue behind the last batch before `state_dict()`, whatever world size wrote it.

        The sampler may have given batches before; `state` is not changed, by later steps neither.
        """
        raise NotImplementedError
