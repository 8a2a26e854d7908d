"""What it was given is empty when it returns, and so is all that follows from it."""

SAYS = "changed the sizes"


def migrate(partitions, sizes, targets):
    from migration_map import migrate

    found = migrate(partitions, list(sizes), targets)
    sizes.clear()
    return found
