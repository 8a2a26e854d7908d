"""What an online attention still holds of its blocks: measured beside the student's code."""

import gc
import tracemalloc

import numpy as np

from distlab.lab.grade_student import rig


@rig
def bytes_held(student, blocks, block, dim):
    """The bytes that are in use after so many blocks of [block, dim], and were not before."""
    generator = np.random.default_rng(0)
    online = student.make_online_attention(generator.normal(size=(4, dim)))
    tracemalloc.start()
    try:
        for _ in range(blocks):
            online.add(generator.normal(size=(block, dim)), generator.normal(size=(block, dim)))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
