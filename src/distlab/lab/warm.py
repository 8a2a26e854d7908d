"""Commands that start at once: `python` and `torchrun` as forks of a process that has torch loaded.

Half of the time of a lesson's small commands is `import torch`, three times for a torchrun of two
ranks. The tests put a folder with their own `python` and `torchrun` before the environment's in
PATH. Each asks one warm process for a fork, which takes over the caller's variables, folder and
streams, and runs what Python would; the caller waits, passes signals on, and ends as the fork does.
What a fork cannot stand for is started cold, see `warm_client`: on a machine with GPUs everything
is, since CUDA does not survive a fork. `LAB_COLD=1` starts everything cold, too.
"""

import atexit
import ctypes
import io
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from distlab.display import make_output_safe
from distlab.host import threads_asked
from distlab.lab import warm_client
from distlab.spawning import PRELOADED

VARIABLE = "LAB_WARM"  # the folder, for those who make a command's environment
CLIENT = str(warm_client.__file__)
START_S = 60.0
PADDING = "LAB_WARM_ROOM"  # room for the caller's marks where /proc shows a process's variables
ROOM = 16384
SHOWN = ("LAB_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PATH", "MASTER_")
PR_SET_PDEATHSIG = 1


@contextmanager
def warm_commands(folder: Path) -> Iterator[None]:
    """Within the block, $LAB_WARM names a folder of programs that start at once; see above."""
    from distlab.hardware import driver_present

    if sys.platform != "linux" or driver_present() or os.environ.get("LAB_COLD"):
        yield
        return
    for kind in ("python", "python3", "torchrun"):
        program = [sys.executable, "-I", "-S", CLIENT, str(folder), kind.rstrip("3")]
        (folder / kind).write_text(
            f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n', encoding="utf-8"
        )
        (folder / kind).chmod(0o755)
    told = {"python": sys.executable, "surroundings": warm_client.surroundings()}
    (folder / "warm.json").write_text(json.dumps(told), encoding="utf-8")
    ours, its = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            [sys.executable, "-m", "distlab.lab.warm", str(folder), " " * ROOM],
            env={**os.environ, PADDING: "x" * ROOM},
            stdin=its.fileno(),  # closed when this process ends in whatever way: then it ends, too
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        its.close()
        ours.settimeout(START_S)
        try:
            if ours.recv(1):  # it listens; who comes before all is loaded waits for that
                os.environ[VARIABLE] = str(folder)
            yield
        finally:
            os.environ.pop(VARIABLE, None)
            ours.close()
            process.wait(START_S)


class WarmProcess:
    """Listens in `folder`, forks for each caller, and tells it the fork's pid and its end."""

    def __init__(self, folder: Path) -> None:
        self.callers: dict[int, socket.socket] = {}  # by the fork's pid
        self.parent = socket.socket(fileno=os.dup(0))
        self.woken, self.wakes = socket.socketpair()
        self.wakes.setblocking(False)
        signal.set_wakeup_fd(self.wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(str(folder / "socket"))
        self.door.listen(64)
        self.events = selectors.DefaultSelector()
        self.events.register(self.door, selectors.EVENT_READ, self.fork)
        self.events.register(self.woken, selectors.EVENT_READ, self.reap)
        self.events.register(self.parent, selectors.EVENT_READ, self.end)

    def serve(self) -> NoReturn:
        self.parent.sendall(b"r")
        load()
        while True:
            for key, _ in self.events.select():
                key.data()

    def fork(self) -> None:
        caller, _ = self.door.accept()
        caller.settimeout(START_S)
        try:
            asked, streams = receive(caller)
        except OSError:  # it was killed meanwhile
            caller.close()
            return
        pid = os.fork()
        if pid == 0:
            self.events.close()
            for own in (*self.callers.values(), caller, self.door, self.parent, self.woken):
                own.close()
            signal.set_wakeup_fd(-1)
            self.wakes.close()
            become(asked, streams)
        for stream in streams:
            os.close(stream)
        self.callers[pid] = caller
        tell(caller, pid)
        # Nothing comes from a caller but its end: then its fork ends too.
        self.events.register(caller, selectors.EVENT_READ, lambda: self.kill(pid))

    def kill(self, pid: int) -> None:
        self.events.unregister(self.callers[pid])
        os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        self.woken.recv(4096)
        while self.callers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self.callers.pop(pid) as caller:
                if caller in self.events.get_map():
                    self.events.unregister(caller)
                tell(caller, status)

    def end(self) -> NoReturn:
        for pid in self.callers:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def tell(caller: socket.socket, number: int) -> None:
    with suppress(OSError):  # it was killed
        caller.sendall(f"{number}\n".encode())


def receive(caller: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a caller asks for, and its three standard streams."""
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    size, content = int.from_bytes(head, "big"), b""
    while len(content) < size:
        if not (more := caller.recv(size - len(content))):
            raise ConnectionError("the caller left")
        content += more
    return json.loads(content), list(streams)


def become(asked: dict[str, Any], streams: list[int]) -> NoReturn:
    """In the fork: run what the caller was told to, as Python would, and end with its status."""
    status = 1
    try:
        take_over(asked, streams)
        run(asked["kind"], asked["arguments"])
        status = 0
    except SystemExit as leaving:
        status = exit_status(leaving.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        flush()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits, as Python's own end does
            atexit._run_exitfuncs()
        flush()
        os._exit(status)


def take_over(asked: dict[str, Any], streams: list[int]) -> None:
    """The caller's session, signals, folder, variables and streams."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    handler = signal.SIG_IGN if asked["ignores_sigint"] else signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number, inheritable=True)
        os.close(stream)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.dont_write_bytecode = bool(asked["env"].get("PYTHONDONTWRITEBYTECODE"))
    show(asked["env"], asked["arguments"])
    unbuffered = bool(asked["env"].get("PYTHONUNBUFFERED")) or asked["arguments"][:1] == ["-u"]
    encoding = asked["env"].get("PYTHONIOENCODING", "").partition(":")[0] or "utf-8"
    sys.stdin = standard(0, "r", encoding)
    sys.stdout = standard(1, "w", encoding, write_through=unbuffered)
    sys.stderr = standard(2, "w", encoding, errors="backslashreplace", line_buffering=True)
    make_output_safe()
    import numpy as np
    import torch

    np.random.seed()
    torch.set_num_threads(threads_asked() or len(os.sched_getaffinity(0)))


def standard(number: int, mode: str, encoding: str, **options: Any) -> io.TextIOWrapper:
    """A standard stream as Python opens it, on what the caller has under this number."""
    raw = open(number, f"{mode}b", closefd=False)  # noqa: SIM115 - it lives as long as the process
    return io.TextIOWrapper(raw, encoding=encoding, **options)


def show(variables: dict[str, str], arguments: list[str]) -> None:
    """Write variables and arguments to where /proc shows them, and `distlab.process` looks.

    The kernel tells a process's environment from the memory that it was started with, which the
    fork has from the warm process; its paddings are the room.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])
    shown = {name: value for name, value in variables.items() if name.startswith(SHOWN)}
    overwrite(env_start, env_end, [f"{name}={value}" for name, value in shown.items()])
    overwrite(arg_start, arg_end, [sys.executable, *arguments])


def overwrite(start: int, end: int, words: list[str]) -> None:
    content = b"\0".join(word.encode(errors="surrogateescape") for word in words)[: end - start - 1]
    ctypes.memmove(start, content + b"\0" * (end - start - len(content)), end - start)


def run(kind: str, arguments: list[str]) -> None:
    """What `python ARGUMENTS` or `torchrun ARGUMENTS` does."""
    if kind == "torchrun":
        # Its ranks are started by this program, so that they are forks too.
        os.environ["PYTHON_EXEC"] = str(Path(os.environ[VARIABLE], "python"))
        arguments = ["-m", "torch.distributed.run", *arguments]
    if arguments[:1] == ["-u"]:
        arguments = arguments[1:]
    first, rest = (arguments[0], arguments[1:]) if arguments else ("-", [])
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        code, name = rest[0], "<string>"
    elif first == "-":
        sys.argv, sys.path[0] = ["-", *rest], ""
        code, name = sys.stdin.read(), "<stdin>"
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        code, name = Path(first).read_text(encoding="utf-8"), first
    if first != "-c":
        main.__file__ = name
    exec(compile(code, name, "exec"), main.__dict__)


def exit_status(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()


def load() -> None:
    """Import what most commands do; nothing here may start a thread."""
    for name in PRELOADED:
        __import__(name)
    from transformers import AutoTokenizer  # noqa: F401 - what chapter 6 begins with


if __name__ == "__main__":
    WarmProcess(Path(sys.argv[1])).serve()
