"""Stores what this rank has read, which means another step at another world size."""

from resumable_sampler import ResumableSampler

SAYS = "saved after 5 steps by 4 ranks, resumed by 1"


class OwnCount(ResumableSampler):
    def state_dict(self):
        return {"examples": self.step * self.global_batch // self.world_size}

    def load_state_dict(self, state):
        self.step = state["examples"] * self.world_size // self.global_batch


def make_sampler(*arguments):
    return OwnCount(*arguments)
