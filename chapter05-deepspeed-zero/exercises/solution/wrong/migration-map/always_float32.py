"""Makes the parts float32, as weights are."""

SAYS = "of parameter"


def migrate(partitions, sizes, targets):
    import numpy as np
    from migration_map import migrate

    with np.errstate(all="ignore"):
        made = migrate(partitions, sizes, targets)
        return [[part.astype(np.float32) for part in rank] for rank in made]
