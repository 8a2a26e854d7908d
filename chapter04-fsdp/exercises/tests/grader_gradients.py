"""Gradients that share memory are known only where they are."""

from distlab.lab.grade_student import rig


@rig
def clipped(clip, sharded, replicated, *arguments):
    """What `clip` gives, and whether a gradient that comes back lies in the memory of one given."""
    norm, *parts = clip(sharded, replicated, *arguments)
    given = {one.untyped_storage().data_ptr() for one in (*sharded, *replicated) if is_some(one)}
    made = [one.untyped_storage().data_ptr() for part in parts for one in part if is_some(one)]
    return norm, *parts, any(address in given for address in made)


def is_some(tensor):
    return tensor is not None and tensor.numel() > 0
