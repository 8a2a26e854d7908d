"""The student's code in a Python of its own, which has seen no call before."""

import subprocess
import sys
from pathlib import Path

from distlab.lab.grade_student import rig


@rig
def told_elsewhere(function, expression):
    """The repr of `expression`, which may name `adapters` and `pathlib`, or the error, as a line.

    `function` is one of the student's adapters: it tells where they lie.
    """
    folder = str(Path(function.__code__.co_filename).parent)
    code = f"import sys, pathlib; sys.path.insert(0, {folder!r}); import adapters"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(repr({expression}))"],
        capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return said.splitlines()[-1] if said else "nothing"
