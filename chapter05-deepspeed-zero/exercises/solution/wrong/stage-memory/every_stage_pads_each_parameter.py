"""Pads every parameter alone, in the flat buffer too."""

SAYS = "16 need no padding"


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    ranks = settings.ranks if 1 <= settings.stage <= 2 else 1
    return stage_memory([-(-size // ranks) * ranks if ranks > 0 else 0 for size in sizes], settings)
