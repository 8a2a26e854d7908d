"""What a sampler has to do with the global random state: runs beside the student's code."""

import random

import numpy as np

from distlab.lab.grade_student import rig


@rig
def batches_and_next_draws(student, global_seed, steps, *arguments):
    """The batches of a sampler made with `arguments`, and what the global generators draw next."""
    random.seed(global_seed)
    np.random.seed(global_seed)
    sampler = student.make_sampler(*arguments)
    batches = [[int(example) for example in sampler.next_batch()] for _ in range(steps)]
    return batches, (random.random(), float(np.random.random()))
