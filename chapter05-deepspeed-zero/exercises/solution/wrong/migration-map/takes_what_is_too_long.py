"""Looks only whether there are enough elements."""

SAYS = "expected a ValueError"


def migrate(partitions, sizes, targets):
    from migration_map import migrate, part

    have = part(sum(sizes), len(partitions))
    return migrate([one[:have] for one in partitions], sizes, targets)
