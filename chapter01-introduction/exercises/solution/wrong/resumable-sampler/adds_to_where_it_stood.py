"""Adds the loaded steps to its own, instead of taking their place."""

from resumable_sampler import ResumableSampler

SAYS = "saved after 5 steps by 2 ranks, resumed by 2: step 5"


class Adds(ResumableSampler):
    def load_state_dict(self, state):
        self.step += state["step"]


def make_sampler(*arguments):
    return Adds(*arguments)
