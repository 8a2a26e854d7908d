"""The lab's command line: `python3 scripts/lab.py COMMAND`, or `lab COMMAND` once installed."""

import importlib
import sys

from distlab import script

COMMANDS = {
    "tour": ("tour:main", "the book in five minutes: train, prove, serve, ask, measure"),
    "list": ("listing:main", "every script: its chapter, what it shows, what it needs"),
    "run": ("running:main", "run a chapter, or one script of it: run CH [SCRIPT] [--preset …]"),
    "test": ("testing:main", "run the tests: test [--fast] [CH]"),
    "cluster": ("clustering:main", "several nodes on this machine: cluster --nodes N -- CMD …"),
    "doctor": ("doctor:doctor", "what this machine has, what is missing, and what mends it"),
    "clean": ("clean:main", "what takes room and is not needed: clean [NAME …] [--yes]"),
    "report": ("report:report", "one HTML page of what ran here"),
    "record": ("recording:main", "run a chapter and rewrite its results and its lesson's tables"),
    "grade": ("grade:grade", "grade a student's folder: grade CH DIR [--json FILE]"),
    "mutate": ("mutate:mutate", "whether tests notice changes of the solution: mutate CH"),
    "student-tree": (
        "student_tree:student_tree",
        "export everything but the solutions: student-tree OUT",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command of the lab; the exit status is the command's."""
    return script.status_of(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] not in COMMANDS:
        raise script.UsageError(
            f"there is no command {argv[0]!r}; use one of {', '.join(COMMANDS)}"
        )
    module, function = COMMANDS[argv[0]][0].split(":")
    command = getattr(importlib.import_module(f"distlab.lab.{module}"), function)
    return int(command(argv[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python3 scripts/lab.py COMMAND [ARGUMENTS]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
