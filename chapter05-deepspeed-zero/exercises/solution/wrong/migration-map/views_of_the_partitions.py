"""Hands out a view of a partition where a part is whole in it."""

SAYS = "shares memory"


def migrate(partitions, sizes, targets):
    from migration_map import copies_to, migrate

    made = migrate(partitions, sizes, targets)
    for target, parts in enumerate(made):
        for source, begin, end, number, _ in copies_to(target, sizes, len(partitions), targets):
            if end - begin == len(parts[number]):
                parts[number] = partitions[source][begin:end]
    return made
