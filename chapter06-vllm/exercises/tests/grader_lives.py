"""Long lives of a block manager, lived beside the student's code: tens of thousands of calls."""

import random

from distlab.lab.grade_student import rig


@rig
def random_life(student, seed, blocks, size, steps):
    """What a manager of `blocks` blocks says in `steps` random steps.

    Of each step (kind, name, start, stop or the child's name, what grow returned, {sequence: its
    table afterwards}, num_free).
    """
    chance = random.Random(seed)
    manager = student.make_block_manager(blocks, size)
    lengths, told = {}, []
    for step in range(steps):
        kind = chance.choice(["new", "grow", "grow", "grow", "fork", "free"])
        name = chance.choice(list(lengths)) if lengths else None
        if kind == "new":
            name = f"s{step}"
            lengths[name] = 0
        if name is None:
            continue
        start, end, copies = lengths[name], f"s{step}", None
        if kind == "fork":
            manager.fork(name, end)
            lengths[end] = start
        elif kind == "free":
            manager.free(name)
            del lengths[name]
        else:
            end = start + chance.randint(1, 6)
            copies = manager.grow(name, start, end)
            lengths[name] = start if copies is None else end
        tables = {sequence: manager.table(sequence) for sequence in lengths}
        told.append((kind, name, start, end, copies, tables, manager.num_free))
    return told
