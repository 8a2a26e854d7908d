"""Every mistake of mistakes/: what one sees of it, and that its cure cures it.

Each runs on two forked ranks with its mistake, and again with --fix. Some end in an error, some
hang until the process group's timeout, and most train on in silence: those are found by a number,
which is the check that fails here. Cured, all checks hold.

Run:
    python chapter04-fsdp/code/mistake_table.py

You should see: a row for each mistake with its symptom as it was measured, and "ok" for its cure.
"""

import time
from argparse import Namespace

from distlab import script
from distlab.run import Run
from fsdp.mistake import FOLDER, Told, rehearse

ALL = sorted(path.stem for path in FOLDER.glob("*.py"))
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"mistakes": ALL, "timeout": 8.0},
    "laptop": {"mistakes": ALL, "timeout": 15.0},
    "gpu": {"mistakes": ALL, "timeout": 15.0},
}
COLUMNS = ("mistake", "the job", "after, s", "symptom, as measured", "with --fix")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        tabulate(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--mistakes", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument(
        "--timeout", type=script.seconds, metavar="S", help="of a collective, seconds"
    )
    return parser.parse_args(argv)


def tabulate(run: Run, args: Namespace) -> None:
    rows, seen = [], {}
    fixed = rehearse(args.mistakes, fix=True, timeout_s=60.0)
    cured = {name: all(rank.silent for rank in told) for name, told in fixed.items()}
    for name in run.progress(args.mistakes, "mistakes"):
        started = time.monotonic()
        told = rehearse([name], fix=False, timeout_s=args.timeout)[name]
        seconds = time.monotonic() - started
        seen[name] = any(not rank.silent for rank in told)
        after = "ok" if cured[name] else "NOT ok"
        rows.append([name.replace("_", " "), *symptom(told, seconds), after])
    run.table(
        "mistakes", COLUMNS, rows, f"on 2 ranks; a collective waits {args.timeout:g} s at most"
    )
    run.check_equal("each mistake shows", seen, dict.fromkeys(args.mistakes, True))
    run.check_equal("each cure cures", cured, dict.fromkeys(args.mistakes, True))


def symptom(told: list[Told], seconds: float) -> tuple[str, float, str]:
    """What the job did, when, and the first thing that a rank said of it."""
    if error := next((rank.error for rank in told if rank.error), ""):
        return "ends with an error", round(seconds, 1), error.split(". ")[0]
    failed = [one for rank in told for one in rank.failed]
    return "trains on in silence", round(seconds, 1), failed[0] if failed else "none"


if __name__ == "__main__":
    script.exit(main)
