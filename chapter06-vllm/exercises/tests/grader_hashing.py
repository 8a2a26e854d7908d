"""Hashes that are made beside the student's code: in another Python, with a clock, or very many."""

import subprocess
import sys
import time
from pathlib import Path

from distlab.lab.grade_student import rig


@rig
def hashes_elsewhere(student, tokens, size):
    """The repr of the hashes of `tokens` in another Python process, or its error, as a line."""
    folder = str(Path(student.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import adapters"
    code += f"; print(repr(list(adapters.block_hashes({tokens}, {size}))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return said.splitlines()[-1] if said else "nothing"


@rig
def seconds_to_hash(student, count, size):
    """The processor time of the hashes of `count` tokens in blocks of `size`."""
    tokens = list(range(count))
    began = time.process_time()
    list(student.block_hashes(tokens, size))
    return time.process_time() - began


@rig
def count_hashes(student, tokens, size):
    """(how many hashes, how many different ones) `tokens` in blocks of `size` have."""
    hashes = list(student.block_hashes(tokens, size))
    return len(hashes), len(set(hashes))
