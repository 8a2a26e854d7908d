"""A sampler beside the global random state, over very many epochs, and in another process."""

import random
import subprocess
import sys
from pathlib import Path

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


@rig
def batches_of(student, steps, *arguments):
    """The examples of each of so many batches of a sampler made with `arguments`, sorted."""
    sampler = student.make_sampler(*arguments)
    return [sorted(int(example) for example in sampler.next_batch()) for _ in range(steps)]


@rig
def batches_elsewhere(student, steps, *arguments):
    """The repr of the first batches in another Python process, or its error, as a line."""
    folder = str(Path(student.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import adapters"
    code += f"; sampler = adapters.make_sampler(*{arguments!r})"
    code += f"; print([sampler.next_batch() for _ in range({steps})])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return said.splitlines()[-1] if said else "nothing"
