"""Permutes only as many examples as fill whole batches: the last ones are never read."""

from resumable_sampler import ResumableSampler

SAYS = "were never read"


class NoTail(ResumableSampler):
    def __init__(self, num_examples, global_batch, *arguments):
        super().__init__(num_examples, global_batch, *arguments)
        self.num_examples -= num_examples % global_batch


def make_sampler(*arguments):
    return NoTail(*arguments)
