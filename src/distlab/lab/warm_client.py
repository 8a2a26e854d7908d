"""What stands for `python` and `torchrun` in the tests' PATH: asks the warm process for a fork.

    python -I -S warm_client.py FOLDER python|torchrun ARGUMENT...

Where the warm process cannot stand for a cold one, a cold one is started instead: with variables
that are read when torch is imported, in another network namespace, under other limits, or with
flags of Python itself. Only the standard library, and little of it, since this runs each time.
"""

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")
READ_AT_IMPORT = (  # beginnings of variables; these must be as they were for the warm process
    *("ATEN_", "CUDA_", "DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "NCCL_", "ONEDNN_", "OPENBLAS_"),
    *("PYTHON", "PYTORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_"),
)
READ_LATER = (
    *("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHON_EXEC"),
    *("TORCH_NCCL_", "TORCH_DISTRIBUTED_DEBUG"),
)


def decisive(variables: dict[str, str]) -> dict[str, str]:
    """The variables that a process reads before a script of ours can say what they are."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(READ_LATER)
    }


def surroundings() -> list[object]:
    """What a fork would take from the warm process instead of its caller, and cannot change."""
    import resource

    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    spaces = ("net", "mnt", "pid", "user", "uts")
    return [
        [list(resource.getrlimit(getattr(resource, name))) for name in limits],
        [os.readlink(f"/proc/self/ns/{space}") for space in spaces],
        sorted(os.sched_getaffinity(0)),
        [os.getuid(), os.getgid()],
        decisive(dict(os.environ)),
    ]


def main() -> None:
    folder, kind, *arguments = sys.argv[1:]
    with open(os.path.join(folder, "warm.json"), encoding="utf-8") as told:
        warm = json.load(told)
    own_flag = kind == "python" and arguments[:1] and arguments[0].startswith("-")
    takes = not own_flag or arguments[0] in ("-", "-m", "-c", "-u")
    if not takes or surroundings() != warm["surroundings"]:
        start_cold(warm["python"], kind, arguments)
    try:
        line = ask(folder, kind, arguments, os.getcwd(), dict(os.environ), [0, 1, 2])
    except OSError:
        start_cold(warm["python"], kind, arguments)
    answers = line.makefile("rb")
    pid = int(answers.readline())
    for name in FORWARDED:
        signal.signal(getattr(signal, name), lambda number, _: forward(pid, number))
    status = os.waitstatus_to_exitcode(int(answers.readline() or 9))  # SIGKILL: the warm one died
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def ask(
    folder: str,
    kind: str,
    arguments: list[str],
    cwd: str,
    env: dict[str, str],
    streams: list[int],
) -> socket.socket:
    """Ask for a fork; its pid comes as a line, then, when it has ended, its wait status as one."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(os.path.join(folder, "socket"))
    asked = {
        "kind": kind,
        "arguments": arguments,
        "cwd": cwd,
        "env": env,
        "ignores_sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }
    content = json.dumps(asked).encode()
    socket.send_fds(line, [len(content).to_bytes(8, "big")], streams)
    line.sendall(content)
    return line


def forward(pid: int, number: int) -> None:
    try:  # noqa: SIM105 - contextlib takes longer to import than all the rest here
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended, and its status is on its way


def start_cold(python: str, kind: str, arguments: list[str]) -> "NoReturn":
    module = ["-m", "torch.distributed.run"] if kind == "torchrun" else []
    os.execv(python, [python, *module, *arguments])


if __name__ == "__main__":
    main()
