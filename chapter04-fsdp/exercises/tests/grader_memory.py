"""Arrays in memory of other orders, and who shares it: both are lost on the way to the student."""

import numpy as np

from distlab.lab.grade_student import rig


@rig
def sharded_views(shard, tensors, rank, ranks):
    """(shard, whether it shares memory with the tensors): in column-major order, then strided."""
    columns = [np.asfortranarray(tensor) for tensor in tensors]
    strided = [np.repeat(tensor, 2, axis=-1)[..., ::2] for tensor in tensors]
    found = [(shard(views, rank, ranks), views) for views in (columns, strided, tensors)]
    return [(part, any(np.shares_memory(part, view) for view in views)) for part, views in found]


@rig
def made_of(function, given, *arguments):
    """(arrays that it makes of those given, whether one shares memory with one given or another,
    whether one is read-only)."""
    made = function(given, *arguments)
    arrays = [*given, *made]
    shared = any(
        np.shares_memory(one, other)
        for place, one in enumerate(made, start=len(given))
        for other in arrays[:place]
    )
    return made, shared, not all(array.flags.writeable for array in made)
