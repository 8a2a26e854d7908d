"""A look at all of a block manager's tables: one question to the student's process, not dozens."""

from distlab.lab.grade_student import rig


@rig
def tables_and_free(manager, sequences):
    """({sequence: its table}, num_free)."""
    return {sequence: manager.table(sequence) for sequence in sequences}, manager.num_free
