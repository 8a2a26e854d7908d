"""A chapter script's contract: its flags and presets, its exit status, and what its run records.

    def main(argv=None) -> int:
        args = parse_args(argv)
        with script.run(args) as run:
            run.metric("tokens_per_second", 4312.0, "tok/s")
            run.check_close("K workers equal one machine", actual, expected, tolerance=1e-12)
        return run.status

Exit status: 0 when all checks hold, 1 when one fails, 2 for a bad argument, 77 when this machine
cannot run the script, 130 after Ctrl-C.
"""

import argparse
import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from distlab.errors import RunError, Skipped, UsageError
from distlab.run import Run

__all__ = ["Parser", "Run", "RunError", "Skipped", "UsageError", "exit", "run", "status_of"]

CHECK_FAILED, BAD_ARGUMENT, SKIPPED, INTERRUPTED = 1, 2, 77, 130
PRESET_NAMES = ("smoke", "laptop", "gpu")
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|std::bad_alloc", re.IGNORECASE)
MORE_PROCESSES = "end some of yours, or raise the limit (ulimit -u), and run again"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(BAD_ARGUMENT)


class Parser(OneLineParser):
    """An argument parser whose defaults come from a preset, and whose errors are one line.

    `presets` maps smoke, laptop and gpu to the values of the flags named in them. The preset is
    --preset, else $LAB_PRESET, else gpu where there is a CUDA device, else laptop.
    """

    def __init__(self, doc: str | None, presets: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if missing := set(PRESET_NAMES) - presets.keys():
            raise ValueError(f"no values for the preset {', '.join(sorted(missing))}")
        self.presets = presets
        _add_common_flags(self, default=None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, filling in the preset's values; `args.preset` is always set afterwards."""
        preset = self._chosen_preset(sys.argv[1:] if args is None else args)
        known = {action.dest for parser in self._all_parsers() for action in parser._actions}
        for name, values in self.presets.items():
            if unknown := values.keys() - known:
                raise ValueError(f"the preset {name} sets flags that do not exist: {unknown}")
        for parser in self._all_parsers():
            own = {action.dest for action in parser._actions}
            parser.set_defaults(**{k: v for k, v in self.presets[preset].items() if k in own})
        parsed = super().parse_args(args, namespace)
        self._refuse_empty(parsed)
        parsed.preset = preset
        return parsed

    def _refuse_empty(self, parsed: argparse.Namespace) -> None:
        """`--checkpoint-dir "$UNSET"` must not train for a day and save nothing."""
        for action in [a for parser in self._all_parsers() for a in parser._actions]:
            if getattr(parsed, action.dest, None) == "" and action.default != "":
                name = action.option_strings[-1] if action.option_strings else action.dest
                self.error(f"{name} is empty; give it a value, or leave it out")

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse's; the flags of every script may stand after the subcommand too."""
        return super().add_subparsers(parser_class=_Subcommand, **options)

    def _chosen_preset(self, argv: Sequence[str]) -> str:
        chosen = None
        for word, following in pairwise([*argv, ""]):
            if word == "--preset":
                chosen = following
            elif word.startswith("--preset="):
                chosen = word.removeprefix("--preset=")
        if chosen in PRESET_NAMES:
            return str(chosen)
        if chosen is None and (named := os.environ.get("LAB_PRESET")):
            if named not in PRESET_NAMES:
                self.error(f"LAB_PRESET={named} is no preset; use {', '.join(PRESET_NAMES)}")
            return named
        from distlab.hardware import has_cuda

        return "gpu" if has_cuda() else "laptop"  # a wrong --preset is refused by its choices

    def _all_parsers(self) -> list[argparse.ArgumentParser]:
        """This parser and its subcommands' parsers."""
        subparsers = [
            parser
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for parser in action.choices.values()
        ]
        return [self, *subparsers]


class _Subcommand(OneLineParser):
    """A subcommand's parser; it has no default for the common flags, lest it hide the parent's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        _add_common_flags(self, default=argparse.SUPPRESS)


def _add_common_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    group = parser.add_argument_group("every script")
    group.add_argument(
        "--preset", choices=PRESET_NAMES, default=default, help="sizes; every flag overrides it"
    )
    group.add_argument("--json", metavar="FILE", default=default, help="write the run's record")
    group.add_argument(
        "--figures", metavar="DIR", default=default, help="draw the run's figures as PNG files"
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return int(_number(text, int, lambda value: value >= 0, "a whole number of at least 0"))


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def seconds(text: str) -> float:
    """An argparse type: a time that every clock of a collective can count."""
    return _number(text, float, lambda value: 0 < value <= 1e7, "a number above 0 and up to 1e7")


def seed(text: str) -> int:
    """An argparse type: what Python's, NumPy's and torch's generators all take."""
    wanted = "a whole number from 0 to 2^63 - 1"
    return int(_number(text, int, lambda value: 0 <= value < 2**63, wanted))


def refuse_no_median(args: argparse.Namespace, name: str, least: int = 3) -> None:
    """Raise `UsageError` where the flag --`name` asks for fewer than `least` timings."""
    if (count := getattr(args, name)) < least:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} {count} gives no median; use {least} or more")


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(
    text: str, convert: Callable[[str], float], fits: Callable[[float], bool], wanted: str
) -> float:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def run(args: argparse.Namespace) -> Run:
    """The run's record, used as a context manager: see `distlab.run.Run`."""
    return Run(args)


def exit(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with the contract's status and, for a mistake, one line.

    A rank ends without Python's own shutdown: a thread of gloo or autograd that lets go of a tensor
    meanwhile aborts the process ("terminate called without an active exception"), and a process
    group whose collective failed may wait for its own thread for ever. The error is kept until
    then, because its traceback holds that group.
    """
    kept: list[Exception] = []

    def keeping() -> int:
        try:
            return main()
        except Exception as error:
            kept.append(error)
            raise

    try:
        status = status_of(keeping)
    except Exception:
        if not _is_rank(main):
            raise
        traceback.print_exc()
        status = CHECK_FAILED
    if _is_rank(main):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _is_rank(main: Callable[[], int]) -> bool:
    """Whether this process is a script, and not a test of one, that has joined a process group."""
    runtime = sys.modules.get("distlab.runtime")
    return main.__module__ == "__main__" and runtime is not None and runtime.has_joined


def status_of(main: Callable[[], int]) -> int:
    """Run `main`; its status, or that of the mistake it raised, which is told in one line."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except UsageError as mistake:
        return _fail(mistake, BAD_ARGUMENT)
    except RunError as failure:
        return _fail(failure, CHECK_FAILED)
    except Skipped as reason:
        print(f"SKIPPED: {reason}", flush=True)
        return SKIPPED
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        if not _output_is_unwanted():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CHECK_FAILED
    except MemoryError as failure:
        return _out_of_memory(failure)
    except RuntimeError as failure:
        if NO_MEMORY.search(str(failure)):  # torch's, of a CPU or a GPU
            return _out_of_memory(failure)
        if str(failure) != "can't start new thread":  # Python's, see threading.Thread.start
            raise
        return _fail(f"{failure}; {MORE_PROCESSES}", CHECK_FAILED)
    except OSError as failure:
        where = f" while writing {failure.filename}" if failure.filename else ""
        if failure.errno == errno.EFBIG:
            limit = "a file would be larger than this process may write"
            return _fail(f"{limit}{where}; raise the limit (ulimit -f)", CHECK_FAILED)
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full{where}; free some space and run again", CHECK_FAILED)
        if failure.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit (ulimit -n 4096) and run again"
            return _fail(f"{failure.strerror}, of this process or machine; {remedy}", CHECK_FAILED)
        if failure.errno == errno.EAGAIN and not hasattr(failure, "characters_written"):  # a fork's
            return _fail(f"can't start a process; {MORE_PROCESSES}", CHECK_FAILED)
        if failure.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and failure.filename:
            remedy = "run this as its owner, or in a copy of the checkout that is yours"
            return _fail(f"{failure.filename}: {failure.strerror}; {remedy}", CHECK_FAILED)
        raise


def _output_is_unwanted() -> bool:
    """Whether the reader of our output left, as in `script | head`."""
    output = select.poll()
    output.register(sys.stdout, 0)  # an error and a hang-up are always reported
    return bool(output.poll(0))


def _out_of_memory(failure: Exception) -> int:
    first_line = (str(failure).splitlines() or [type(failure).__name__])[0]
    remedy = "use smaller sizes, or a machine with more"
    return _fail(f"there is not enough memory ({first_line}); {remedy}", CHECK_FAILED)


def _fail(message: object, status: int) -> int:
    print("error: " + re.sub(r"\s*\n\s*", " ", str(message)), file=sys.stderr, flush=True)
    return status
