"""Leaves the old padding where new padding is."""

SAYS = "has ["


def migrate(partitions, sizes, targets):
    import numpy as np
    from migration_map import migrate, part

    migrate(partitions, sizes, targets)
    whole, found, first = np.concatenate(partitions), [[] for _ in range(targets)], 0
    for size in sizes:
        want = part(size, targets)
        padded = np.resize(np.append(whole[first:], whole[-1:]), want * targets)
        for rank in range(targets):
            found[rank].append(padded[rank * want : (rank + 1) * want].copy())
        first += size
    return found
