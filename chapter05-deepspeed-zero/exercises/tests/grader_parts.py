"""Who shares memory is lost on the way to the grader: it is looked at where the arrays are made."""

import numpy as np

from distlab.lab.grade_student import rig


@rig
def migrated(migrate, partitions, sizes, targets):
    """(parts of each rank, whether one shares memory with another or a partition, or is locked)."""
    made = migrate(partitions, sizes, targets)
    arrays = [*partitions, *(part for rank in made for part in rank)]
    shared = any(
        np.shares_memory(one, other)
        for place, one in enumerate(arrays)
        for other in arrays[max(place + 1, len(partitions)) :]
    )
    return made, shared, not all(one.flags.writeable for one in arrays[len(partitions) :])
