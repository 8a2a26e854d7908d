"""DDP divides by the world size once more."""

SAYS = "averaged by DDP"


def gradient_scale(count, total, world_size):
    return count / total
