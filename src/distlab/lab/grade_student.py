"""The process in which the student's code runs, and the grader's end of the wire to it.

It is forked from a process that has loaded Python's packages and knows nothing else: no test, no
expected value, no token of a report. It gets the student's folder, gives its rights away
(`grade_rights`), and then does what it is asked.
"""

import functools
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from distlab.lab.grade_handles import ACTIONS, BrokenWire, Handle, Method, Side
from distlab.lab.grade_rights import Places, give_away, places_of
from distlab.lab.grade_wire import Wire

LOOK_S = 0.2  # how often a waiting grader looks whether the student's process is still there
END_S = 2.0  # how long an end of the wire may be older than that of the process
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__")


class Student(Side):
    """The grader's side: the student's process, and what was asked of it last."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        super().__init__()
        self.pid, self.control = pid, control
        self.local = threading.local()
        self.failure = ""  # why nothing that was answered counts
        self.isolation = ""
        self.rigs: dict[Path, Handle] = {}

    def start(self, folder: Path, work: Path, quiet: bool) -> None:
        """Give it a copy of the student's `folder`, and the directory `work` to work in."""
        copy = work / "student"
        shutil.copytree(folder, copy, symlinks=True, ignore=LEFT_OUT)
        places = places_of(copy, work)
        self.control.sendall(json.dumps([places.as_json(), quiet]).encode())
        self.isolation = self.control.recv(4096).decode()
        if not self.isolation:
            self.ended()
        if "another user" in self.isolation:
            os.umask(0)  # what a test makes in its tmp_path is the student's to change

    def adapters(self) -> Handle:
        """The student's adapters.py."""
        return self.connected().ask("import", "adapters")

    def add_rig(self, path: Path) -> Handle:
        """Have the module of this file run over there, and those beside it that it imports."""
        if path not in self.rigs:
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r"^(?:from|import) (grader_\w+)", text, re.MULTILINE):
                self.add_rig(path.with_name(f"{name}.py"))
            self.rigs[path] = self.connected().ask("rig", path.stem, text)
        return self.rigs[path]

    def connected(self) -> Wire:
        """This thread's connection: a thread over there answers it, and asks back on it."""
        if not hasattr(self.local, "wire"):
            ours, its = socket.socketpair()
            limit = struct.pack("ll", int(LOOK_S), int(LOOK_S % 1 * 1e6))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            with its, suppress(OSError):
                socket.send_fds(self.control, [b"c"], [its.fileno()])
            self.local.wire = Wire(self, ours)
        return self.local.wire

    def wire(self, handle: Handle) -> Wire:
        return self.connected()

    def perform(self, action: str, *args: Any) -> Any:
        if action != "call" or args[1] is not None:
            raise AttributeError("the grader's functions can be called, and nothing else")
        function, _, positional, keywords = args
        return function(*positional, **(keywords or {}))

    def export(self, value: Any) -> list[Any]:
        if not callable(value) or isinstance(value, type):
            kind = type(value).__name__
            raise TypeError(f"a {kind} of the grader cannot be handed to the student's process")
        return super().export(value)

    def check_alive(self) -> None:
        if self.failure:
            raise BrokenWire(self.failure)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            how = f"with status {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            self.broken(f"your code ended its Python process, {how}")

    def ended(self) -> NoReturn:
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            self.check_alive()
            time.sleep(0.01)
        self.broken("your code closed its connection to the grader")

    def broken(self, why: str) -> NoReturn:
        self.failure = self.failure or why
        raise BrokenWire(self.failure)

    def stop(self) -> None:
        """End the process."""
        if not self.failure.startswith("your code ended"):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def rig(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that must run beside the student's code, in its process.

    It is for what only works there: to watch a call, to measure it, or to make it very often. Its
    module's text is sent there when it is called with something of the student's, so that it holds
    no expected values; it returns plain facts, which the test then judges.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        handles = (arg._handle if isinstance(arg, Method) else arg for arg in args)
        sides = (handle._side for handle in handles if isinstance(handle, Handle))
        if not isinstance(side := next(sides, None), Student):
            return function(*args, **kwargs)
        module = side.add_rig(Path(inspect.getfile(function)))
        return getattr(module, function.__name__)(*args, **kwargs)

    return call


def fork_student() -> Student:
    """Fork the student's process. To be called before this one knows what that must not."""
    ours, its = socket.socketpair()
    sys.set_int_max_str_digits(0)  # integers travel as text, however long they are
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        its.close()
        return Student(pid, ours)
    try:
        ours.close()
        live(its)
    finally:
        os._exit(1)


def live(control: socket.socket) -> NoReturn:
    """In the fork: give the rights away, then answer, on one thread for each of the grader's."""
    parent = os.getppid()
    os.setsid()
    order, quiet = json.loads(control.recv(2**16))
    places = Places.from_json(order)
    keep = 0 if quiet else 3
    for number in range(keep):
        os.set_inheritable(number, True)
    if quiet:
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
    os.closerange(3, control.fileno())
    os.closerange(control.fileno() + 1, 2**16)
    os.environ.update(HOME=str(places.work), TMPDIR=str(places.work / "tmp"), USER="student")
    tempfile.tempdir = None
    sys.modules["__main__"] = ModuleType("__main__")  # the processes it spawns begin with none
    sys.path.insert(0, str(places.student))
    sys.argv = [str(places.student / "adapters.py")]
    told = give_away(places, parent)
    os.chdir(places.work)
    control.sendall(told.encode())
    first = accepted(control)
    inside = Inside(places.student)
    threading.Thread(target=accept, args=(control, inside), daemon=True).start()
    inside.answer(first)
    time.sleep(2 * END_S)  # the grader ends this process; if not, its code has closed the wire
    os._exit(0)


def accepted(control: socket.socket) -> socket.socket:
    _, numbers, _, _ = socket.recv_fds(control, 1, 1)
    if not numbers:
        os._exit(0)
    return socket.socket(fileno=numbers[0])


def accept(control: socket.socket, inside: "Inside") -> None:
    while True:
        connection = accepted(control)
        threading.Thread(target=inside.answer, args=(connection,), daemon=True).start()


class Inside(Side):
    """The student's side."""

    key_parity = 1

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.local = threading.local()

    def answer(self, connection: socket.socket) -> None:
        self.local.wire = Wire(self, connection)
        with suppress(BrokenWire):
            self.local.wire.serve()

    def wire(self, handle: Handle) -> Wire:
        return getattr(self.local, "wire", handle._wire)

    def perform(self, action: str, *args: Any) -> Any:
        return ACTIONS[action](*args)

    def place(self, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).is_relative_to(self.folder)]
        if not own:
            return ""
        return f"{Path(own[-1].filename).relative_to(self.folder)}:{own[-1].lineno}"


def add_module(name: str, text: str) -> ModuleType:
    """A module of this text, which others may import."""
    module = sys.modules[name] = ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


ACTIONS |= {"import": importlib.import_module, "rig": add_module}
