"""Which processes run, for tests that say what is left and what is not.

One that has ended and is not yet waited for, a zombie, runs no more: its command line cannot be
read, and nobody needs to end it.
"""

from contextlib import suppress

import psutil


def running_below(word: str, parent: int | None = None) -> list[int]:
    """Those started by `parent` (this process) or by its own, with `word` in an argument."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a zombie's, too
                if any(word in argument for argument in process.cmdline()):
                    found.append(process.pid)
    return found
