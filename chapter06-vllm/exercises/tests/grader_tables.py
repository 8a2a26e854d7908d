"""A step and a look at all of a block manager's tables: one question instead of dozens."""

from distlab.lab.grade_student import rig


@rig
def asked_and_seen(manager, sequences, method, *arguments):
    """(what the method returned, {sequence: its table} afterwards, num_free)."""
    answer = getattr(manager, method)(*arguments)
    return answer, {sequence: manager.table(sequence) for sequence in sequences}, manager.num_free
