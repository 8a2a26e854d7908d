"""Hashes that are made beside the student's code: in another Python, and with a clock."""

import subprocess
import sys
import time
from pathlib import Path

from distlab.lab.grade_student import rig


@rig
def hashes_elsewhere(student):
    """The repr of the hashes of the tokens 0 to 7 in another Python process, or its error."""
    code = "import adapters; print(repr(list(adapters.block_hashes(list(range(8)), 4))))"
    folder = str(Path(student.__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"],
        capture_output=True, encoding="utf-8", timeout=30,
    )  # fmt: skip
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr


@rig
def seconds_to_hash(student, count, size):
    """The processor time of the hashes of `count` tokens in blocks of `size`."""
    tokens = list(range(count))
    began = time.process_time()
    list(student.block_hashes(tokens, size))
    return time.process_time() - began
