"""Builds an environment with uv, as a whole or not at all, and shows how far it is.

Who builds one holds its lock, and so does the installer that it started: should lab.py be killed
outright, the next one waits until that installer, too, is gone.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from distlab.environments import uv
from distlab.environments.progress import Progress, explain, is_unavailable
from distlab.environments.recipes import (
    FOLDER,
    ROOT,
    Environment,
    SetupError,
    pyproject,
    read,
    torch_build,
)

POLL_SECONDS = 0.1
CUDA_CHECK = "import torch; torch.version.cuda or exit('error: this is a CPU build'); "


class Interrupted(BaseException):
    """Ctrl-C, a closed terminal or a kill; `status` is what the shell expects then."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


def ensure(name: str, torch: str | None = None) -> Environment:
    """Return environment `name`, ready for use; build it first where it is not.

    torch: auto, cpu or cuda, remembered for all environments; None takes what is remembered.
    Raises SetupError, and Interrupted when a signal ends the building.
    """
    with problems_in_a_line():
        environment = read(name, torch_build(torch))
        if not environment.is_ready():
            catch_signals()
            with locked(name) as lock:
                if not environment.is_ready():  # unless another process built it meanwhile
                    build(environment, lock)
    return environment


def lab_uv() -> tuple[Path, dict[str, str]]:
    """Return the lab's uv, fetched where there is none, and the variables that it runs under."""
    with problems_in_a_line():
        catch_signals()
        FOLDER.mkdir(parents=True, exist_ok=True)
        tool = fetch_uv(Progress("uv"))
        return tool, uv.uv_variables()


def build(environment: Environment, lock: int) -> None:
    """Make the environment anew; its stamp, which makes it count, comes last."""
    began = time.monotonic()
    environment.stamp.unlink(missing_ok=True)
    if environment.folder.exists():
        shutil.rmtree(environment.folder)
    progress = Progress(environment.name)
    progress.say(f"is set up in {environment.folder} (log: {environment.log})")
    installing = Command(environment.log, progress, lock)
    try:
        install(environment, fetch_uv(progress), installing)
    except CommandFailed as failure:
        why = explain(failure.output, environment.gigabytes)
        packages = " ".join(environment.system)
        needs = f"; it needs {packages} (Debian: apt-get install {packages})" if packages else ""
        raise SetupError(f"{environment.name}: {why}{needs} (log: {environment.log})") from failure
    finally:
        progress.clear()
    stamp = {"digest": environment.digest, "seconds": round(time.monotonic() - began)}
    temporary = environment.stamp.with_suffix(".part")
    temporary.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(temporary, environment.stamp)
    progress.say("ready")


def install(environment: Environment, tool: Path, run: "Command") -> None:
    """Make the virtual environment, install what its lock says, and see whether it works."""
    run.variables = uv.uv_variables()
    run([tool, "venv", "--python", uv.base_python(), environment.folder])
    command = [str(tool), "pip", "install", "--python", str(environment.python)]
    command += ["--constraints", str(environment.lock)]
    if environment.without:
        left_out = environment.folder / "left-out.txt"
        left_out.write_text("\n".join(environment.without) + "\n", encoding="utf-8")
        command += ["--excludes", str(left_out)]
    if environment.alone:
        run([*command, *environment.requirements])
    else:
        tools = ["--build-constraints", str(ROOT / "constraints" / "core.txt")]
        torch = torch_arguments(environment, [*command, "--dry-run", "--no-deps"], run)
        override = environment.folder / "torch.txt"  # for who pins another one
        override.write_text(f"{torch[-1]}\n", encoding="utf-8")
        tools += ["--overrides", str(override)]
        run([*command, *tools, *torch, "--editable", f".[{environment.extra}]"])
    is_cuda = environment.torch == "cuda" and not environment.alone
    check = CUDA_CHECK * is_cuda + environment.check
    run([environment.python, "-P", "-c", check])


def torch_arguments(
    environment: Environment, look: Sequence[str | Path], run: "Command"
) -> list[str]:
    """What to tell uv so that it takes torch's CPU or CUDA build.

    On Linux the package index's own build is the CUDA one, several GB; the CPU build comes from
    wherever the user's configuration has it, else from PyTorch's index.
    """
    version = f"torch=={environment.torch_version}"
    if environment.torch == "cpu" and sys.platform == "linux":
        index = pyproject()["tool"]["lab"]["torch-cpu-index"]
        for source in ([], ["--index", index]):
            try:
                run([*look, *source, f"{version}+cpu"])
                return [*source, f"{version}+cpu"]
            except CommandFailed as failure:
                if not is_unavailable(failure.output):
                    raise
        run.progress.say("no CPU build of torch is to be had; taking the index's own build")
    return [version]


def fetch_uv(progress: Progress) -> Path:
    with locked("uv") as lock:
        run = Command(FOLDER / "uv.log", progress, lock)
        try:
            return uv.find_or_fetch(run.with_variables)
        except CommandFailed as failure:
            raise SetupError(f"uv: {explain(failure.output)} (log: {run.log})") from failure


class CommandFailed(Exception):
    """An installing command failed; `output` is what it wrote."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


class Command:
    """Runs commands in a process group each, with the lock, their output added to the log."""

    def __init__(self, log: Path, progress: Progress, lock: int) -> None:
        self.log, self.progress, self.lock = log, progress, lock
        self.variables: dict[str, str] = {}
        self.log.write_bytes(b"")

    def with_variables(self, command: Sequence[str | Path], variables: dict[str, str]) -> None:
        self.variables = variables
        self(command)

    def __call__(self, command: Sequence[str | Path]) -> None:
        """Raise CommandFailed. On any exception, Interrupted above all, the group is killed."""
        with open(self.log, "r+b") as log:
            begin = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            while process.poll() is None:
                self.progress.show(self.output_since(begin))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException:
            kill_group(process)
            raise
        if process.returncode != 0:
            raise CommandFailed(self.output_since(begin))

    def output_since(self, begin: int) -> str:
        with open(self.log, "rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")


def die_with_parent() -> None:
    """In the child: ask Linux for a SIGTERM when lab.py dies, even of kill -9 (prctl(2))."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def catch_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def locked(name: str) -> Iterator[int]:
    """Hold the lock of an environment (or of uv), and give its file descriptor."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"lab: another process sets up {FOLDER / name}; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextmanager
def problems_in_a_line() -> Iterator[None]:
    """Turn an operating system's error into the SetupError that says what to do about it."""
    try:
        yield
    except OSError as error:
        place = error.filename or FOLDER
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"the disk is full at {place}; make room and run this again"
        elif isinstance(error, PermissionError):
            remedy = (
                f"no permission to write {place}; name a folder of yours in LAB_VENV_DIR, or give "
                f"{FOLDER} to the user who runs this"
            )
        else:
            remedy = f"{place}: {error.strerror or error}; mend that and run this again"
        raise SetupError(remedy) from error
