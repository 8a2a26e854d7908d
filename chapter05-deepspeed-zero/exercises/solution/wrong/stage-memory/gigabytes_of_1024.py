"""Counts in GiB: 1024 to the third, where the papers' GB are billions."""

SAYS = "published are"


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    found = stage_memory(sizes, settings)
    return {kind: size * 10**9 // 2**30 if size > 10**9 else size for kind, size in found.items()}
