"""Hands out its own dictionary as the state, and goes on writing into it."""

from resumable_sampler import ResumableSampler

SAYS = "some steps later, and was"


class Wrong(ResumableSampler):
    told = None

    def next_batch(self):
        batch = super().next_batch()
        self.state_dict()
        return batch

    def state_dict(self):
        self.told = {} if self.told is None else self.told
        self.told["step"] = self.step
        return self.told


def make_sampler(*arguments):
    return Wrong(*arguments)
