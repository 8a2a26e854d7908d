"""Sets up the environment that a command needs, then hands the command over to it.

    python3 scripts/lab.py run 1                any command of the lab: list, run, test, doctor, ...
    python3 scripts/lab.py env vllm             builds environments and prints each one's python
    python3 scripts/lab.py lock vllm            makes constraints/vllm.txt anew
    python3 scripts/lab.py uv pip list          the uv that builds them, led by pip's configuration
    python3 scripts/lab.py --torch cuda test    takes torch's CUDA build from now on (or cpu, auto)

Environments stand in .venv/ (or in $LAB_VENV_DIR), one folder each, built on first need from the
recipes in pyproject.toml, and again when their locks change. Standard library only.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python shall say this line, no traceback
    sys.exit(
        f"lab: this is Python {sys.version.split()[0]}, but 3.11 to 3.13 is needed; "
        "run it with such a Python, for example: python3.12 scripts/lab.py"
    )
if sys.platform == "win32":
    sys.exit("lab: Windows itself is not supported; run this in WSL 2")

import argparse
import os
from typing import NoReturn

# The bench is not installed yet.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src"))
from distlab.environments.building import Interrupted, ensure, lab_uv
from distlab.environments.locking import lock
from distlab.environments.recipes import FOLDER, Environment, SetupError


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        if args.command == "env":
            for name in args.arguments:
                print(ensure(name, args.torch).python, flush=True)
            return 0
        if args.command == "lock":
            lock(args.arguments)
            return 0
        if args.command == "uv":
            tool, variables = lab_uv()
            os.execve(tool, [str(tool), *args.arguments], variables)
        core = ensure("core", args.torch)
    except SetupError as error:
        return say(str(error), error.status)
    except Interrupted as error:
        return say("interrupted; the next run begins this set-up afresh", error.status)
    return hand_over(core, [args.command, *args.arguments] if args.command else [])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="lab.py",
        usage="lab.py [--torch auto|cpu|cuda] COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--torch",
        choices=["auto", "cpu", "cuda"],
        help="torch's build from now on; auto, at first: cuda where an NVIDIA driver is, else cpu",
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,  # one for all, since a positional before it would swallow a `--`
        metavar="COMMAND ...",
        help="env, lock, uv, or a command of the lab: try list; then what the command takes",
    )
    args = parser.parse_args(argv)
    args.command, *args.arguments = args.words or [None]
    if args.command == "env" and not args.arguments:
        parser.error("env takes a name, for example: lab.py env core")
    return args


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lab: {message}\n")


def say(message: str, status: int) -> int:
    print(f"lab: {message}", file=sys.stderr)
    return status


def hand_over(core: Environment, arguments: list[str]) -> NoReturn:
    """Become the lab in its environment; -P keeps the current folder's modules out of it."""
    os.environ["VIRTUAL_ENV"] = str(core.folder)
    os.environ["PATH"] = f"{core.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for misleading in ("PYTHONHOME", "PYTHONOPTIMIZE"):  # without assert no grader finds a fault
        os.environ.pop(misleading, None)
    if "LAB_VENV_DIR" in os.environ:  # it may be relative to a folder that a child leaves
        os.environ["LAB_VENV_DIR"] = str(FOLDER)
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # half of the time would go into compiling
        os.environ["PYTHONPYCACHEPREFIX"] = str(FOLDER / "bytecode")
    os.execv(core.python, [str(core.python), "-P", "-m", "distlab.lab", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
