"""Run a job, and when it hangs, crashes or goes wrong say which rank, which line, and why.

    diagnose.py [--stall-after S] [--json FILE] [--ignore CAUSE] -- CMD...

CMD is any command that starts ranks: torchrun, srun, a script that makes its own nodes. Its scripts
need no change: an agent in each rank, brought by PYTHONPATH, tells diagnose what the flight
recorder has, where each thread is, and fingerprints of parameters and buffers. diagnose compares
the ranks.

A healthy job shows its own output and its own status, and nothing else. When something is wrong,
diagnose names the cause, the rank, the collective and the line, ends the job with all that it
started, and ends with status 1. A job that fails by itself, and of whose failure diagnose can say
no more than the job has, keeps its status.

The evidence is read in this order (ddp/diagnosis/watching.py): ranks that stand still, by the first
collective in which they differ, since all that comes later is a consequence; a rank that tells
nothing any more; what should be equal on all ranks and is not; and when a rank is lost, how it
ended, after the others have told what they saw.

A stall is judged when every rank has waited for --stall-after seconds. Give more than the longest
wait that your job has by right, such as for rank 0's checkpoint, and less than the timeout of its
process group, after which the ranks that could be asked are gone. Fingerprints are for replicas:
where ranks hold different parts of one model, --ignore unsynced_parameters.

Run:
    python chapter03-ddp/code/diagnose.py -- \\
        torchrun --nproc_per_node=2 chapter03-ddp/code/faults/rank_only_collective.py

You should see: the job's own output, then, about 5 s after it has come to stand, the verdict.
"""

import argparse
import json
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

from ddp.diagnosis.evidence import CAUSES, source
from ddp.diagnosis.watching import Found, run_watched
from distlab import files, script
from distlab.errors import UsageError


def main(argv: list[str] | None = None) -> int:
    args, command = parse_args(sys.argv[1:] if argv is None else argv)
    found, status = run_watched(command, args.stall_after, set(args.ignore), echo=True)
    if found is not None:
        print(told(found), file=sys.stderr, flush=True)
    if args.json:
        files.write_text(Path(args.json), json.dumps(found.as_json() if found else None, indent=1))
    return status if found is None else 1


def parse_args(argv: list[str]) -> tuple[Namespace, list[str]]:
    parser = script.OneLineParser(
        usage="diagnose.py [--stall-after S] [--json FILE] [--ignore CAUSE] -- CMD ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stall-after", type=script.positive_float, default=5.0, metavar="S",
        help="seconds that all ranks must have waited (default: %(default)s)")  # fmt: skip
    add("--json", metavar="FILE", help="write the verdict there, or null")
    add("--ignore", action="append", default=[], choices=sorted(CAUSES), metavar="CAUSE",
        help=f"do not look for it: {', '.join(sorted(CAUSES))}")  # fmt: skip
    end = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not command:
        raise UsageError("there is no command to run; write it after --, such as -- torchrun X.py")
    if args.json:
        files.refuse_unwritable_file("--json", args.json)
    return args, command


def told(found: Found) -> str:
    """A verdict says what is wrong, which rank, which collective and line, why, and what helps."""
    verdict = found.verdict
    rows = [
        ("cause", f"{verdict.cause}: {CAUSES[verdict.cause]}"),
        ("rank", "-" if verdict.rank is None else str(verdict.rank)),
        ("collective", verdict.collective or "-"),
        ("line", f"{verdict.where}: {source(verdict.place)}" if verdict.place else "unknown"),
        ("evidence", verdict.what),
        ("remedy", verdict.remedy),
        ("found after", f"{found.seconds:.1f} s"),
    ]
    wide = " " * len("diagnose: found after  ")
    return "\n".join(
        textwrap.fill(text, 100, initial_indent=f"diagnose: {name:<11}  ", subsequent_indent=wide)
        for name, text in rows
    )


if __name__ == "__main__":
    script.exit(main)
