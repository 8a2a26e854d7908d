"""The judge of a rank that lives and tells nothing: not even its agent's thread can run.

So it is when compiled code keeps Python's lock, the GIL. The stack is asked for by a signal then,
which faulthandler answers from C; on another machine the last line that was heard of must do.
"""

import os
import re
import signal
import socket
import sysconfig
import time
from contextlib import suppress

from _diagnose_verdict import Verdict, shown
from _diagnose_watch import Place, Rank

PATIENCE = 2.0  # times the stall: a busy machine may keep a thread from running for a moment
ANSWER_S = 0.5
FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')


def silent_rank(ranks: list[Rank], stall_after: float) -> Verdict | None:
    for rank in ranks:
        lives = rank.died is None and rank.exit is None
        quiet = time.time() - rank.heard
        if lives and quiet > PATIENCE * stall_after:
            place = asked(rank) or rank.place
            return Verdict(
                "silent_rank", rank.number, place,
                f"{rank.name.capitalize()} lives, but has told nothing for {quiet:.1f} s: no "
                f"thread of its Python can run. It is at {shown(place)}.",
                "Compiled code there keeps the GIL: a C extension, a lock in one, a debugger, or "
                "a process that was stopped.",
            )  # fmt: skip
    return None


def asked(rank: Rank) -> Place | None:
    """The main thread's own line, by a signal to a process of this machine."""
    if rank.host != socket.gethostname():
        return None
    with suppress(ProcessLookupError, PermissionError):
        os.kill(rank.hello["pid"], signal.SIGUSR2)
        time.sleep(ANSWER_S)
    main_thread = rank.crash_file.read_text(errors="replace").rstrip().rpartition("\n\n")[2]
    libraries = ("<", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for file, line, function in FRAME.findall(main_thread):
        if not file.startswith(libraries):
            return file, int(line), function
    return None
