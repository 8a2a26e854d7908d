"""Gradients that share memory are known only where they are."""

from distlab.lab.grade_student import rig


@rig
def clipped(clip, sharded, replicated, *arguments):
    """What `clip` gives, and whether each gradient that comes back lies in memory of one given.

    The memory is that from before: to rebind `.data` is not to change a tensor in place.
    """
    before = [one.untyped_storage() for one in (*sharded, *replicated) if is_some(one)]
    norm, *parts = clip(sharded, replicated, *arguments)
    given = {storage.data_ptr() for storage in before}  # held until here: none of it is used again
    made = [one.untyped_storage().data_ptr() for part in parts for one in part if is_some(one)]
    return norm, *parts, [address in given for address in made]


def is_some(tensor):
    return tensor is not None and tensor.numel() > 0
