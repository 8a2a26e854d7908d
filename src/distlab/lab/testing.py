"""`lab test [--fast] [CH] [-- PYTEST ARGUMENTS]`: the whole suite, or a part of it.

It takes three processes from two cores on, as tests wait for something half of the time: ranks that
start, nodes that time out. `-- -n 0` takes one, for a debugger or a test's own prints.

The environments that the lessons' commands run in are set up meanwhile; a test that needs one waits
for it, before its own limit begins. With CI=true so are those that other tests use, and the system
packages, by root on Debian; elsewhere the tests that miss something are skipped, and `lab doctor`
tells what.
"""

import argparse
import os
import subprocess
import sys

from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.host import usable_cores
from distlab.lab.lessons import Chapter, chapter, chapters
from distlab.lab.needs import ENVIRONMENTS, install_line, missing_system_packages
from distlab.script import OneLineParser

INSTALL_LIMIT_S = 900
PROCESSES = 3


def main(argv: list[str]) -> int:
    """Run pytest in this process's place, so that Ctrl-C and its exit status are its own."""
    place = argv.index("--") if "--" in argv else len(argv)
    args, for_pytest = _parse(argv[:place]), argv[place + 1 :]
    if args.chapter and _is_test(args.chapter):
        raise UsageError(
            f"{args.chapter} is no chapter; pytest's arguments come after --, "
            f"as in: python3 scripts/lab.py test -- {args.chapter}"
        )
    in_ci = os.environ.get("CI") == "true"
    if in_ci:
        install_system_packages()
    tested = [chapter(args.chapter)] if args.chapter else [c for c in chapters() if c.written]
    if not args.fast:
        # A few chosen tests may need no environment; one that does sets it up itself.
        chosen = args.chapter is None and any(map(_is_test, for_pytest))
        set_up_meanwhile(environments(tested, in_ci), start=not chosen)
    command = [sys.executable, "-m", "pytest", *processes()]
    if args.fast:
        command += ["-m", "not slow"]
    if args.chapter:
        folder = tested[0].folder.name
        command += ["tests/test_commands.py", "tests/test_lessons.py", f"tests/{folder[:9]}"]
        command += ["-k", f"{folder} or {folder[:9]}"]
    os.chdir(repo_root())
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *for_pytest])


def processes() -> list[str]:
    """pytest's flags for as many processes as pay; a file's tests share what it sets up."""
    if usable_cores() < 2:
        return []
    return ["-n", str(PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]


def environments(tested: list[Chapter], in_ci: bool) -> list[str]:
    """Those, beside core, that commands of the chapters run in; in CI also those of their tests."""
    blocks = [block for chapter in tested for block in chapter.blocks() if not block.norun]
    numbers = {chapter.number for chapter in tested}
    of_tests = [name for name, users, _ in ENVIRONMENTS if in_ci and numbers.intersection(users)]
    return sorted({block.env for block in blocks}.union(of_tests) - {"core"})


def set_up_meanwhile(names: list[str], start: bool = True) -> None:
    """`start` to build these environments, one after the other, and name them to the tests.

    A test that needs one asks for it itself (`environment_python`), waits for its lock, and tells
    why it cannot be had. The builder ends with its work, or by the terminal's Ctrl-C.
    """
    if not names:
        return
    os.environ["LAB_TEST_ENVIRONMENTS"] = " ".join(names)
    if not start:
        return
    lab = [sys.executable, str(repo_root() / "scripts" / "lab.py")]
    subprocess.Popen(
        ["nice", "-n", "5", *lab, "env", *names],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def install_system_packages() -> None:
    """apt-get what is missing, as root on Debian; a failed install is left to the tests to tell."""
    missing = missing_system_packages()
    if not missing:
        return
    line = install_line(missing)
    if os.geteuid() != 0 or not line.startswith("apt-get "):
        print(f"missing system packages; some tests will fail. Install: {line}", flush=True)
        return
    print(f"installing system packages: {' '.join(missing)}", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-qq"], line.split()):
        done = subprocess.run(
            step, env=env, stdout=subprocess.DEVNULL, timeout=INSTALL_LIMIT_S, check=False
        )
        if done.returncode:
            raise RunError(f"{' '.join(step)} failed with status {done.returncode}")


def _is_test(word: str) -> bool:
    """Whether it names a file or folder of tests, or a test in a file, as pytest takes them."""
    path = repo_root() / word.partition("::")[0]
    return path.is_relative_to(repo_root() / "tests") and path.exists()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("lab test", description=__doc__)
    parser.add_argument("chapter", nargs="?", help="only this chapter's tests")
    parser.add_argument("--fast", action="store_true", help="the fast tier, under 3 minutes")
    return parser.parse_args(argv)
