"""The first process of a cluster's world, which the world lives and dies with.

Run by `distlab.cluster.virtual` inside new namespaces; the standard library only, so that it
starts at once. It boots nodes and cuts their power as lines of JSON on its standard input say,
and ends when that closes or when the process whose pidfd it was given ends, in whatever way. The
kernel then kills all other processes of the world, and its network and mounts vanish with them.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_BIND, MNT_DETACH = 4096, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def main(parent: int) -> None:
    host_proc = os.open("/proc", os.O_PATH)  # of the pid namespace that the world was made in
    own_pid = os.readlink("self", dir_fd=host_proc)
    mount("proc", "/proc", "proc")
    world_proc = os.open("/proc", os.O_PATH)
    tune()
    nodes: dict[str, int] = {}  # pid, as seen in the world
    for request in requests(parent):
        answer: dict[str, Any] = {"pid": int(own_pid)}
        try:
            if files := request.get("files"):
                put_files(files)
            if name := request.get("boot"):
                nodes[name], answer["pid"] = boot(name, host_proc, world_proc)
            if name := request.get("kill"):
                pid = nodes.pop(name)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        except OSError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def requests(parent: int) -> Any:
    """The requests on standard input, until it closes or the process behind `parent` is gone."""
    text = b""
    while True:
        ready, _, _ = select.select([0, parent], [], [])
        if parent in ready or not (more := os.read(0, 65536)):
            return
        *lines, text = (text + more).split(b"\n")
        yield from map(json.loads, lines)


def put_files(files: dict[str, str]) -> None:
    """Put texts over files of the host, in this world only; nothing is written to a disk."""
    mount("lab", "/tmp", "tmpfs")
    for number, (path, text) in enumerate(files.items()):
        source = Path(f"/tmp/{number}")
        source.write_text(text, encoding="utf-8")
        mount(str(source), path, None, MS_BIND)
    check(LIBC.umount2(b"/tmp", MNT_DETACH), "/tmp")  # the files stay where they were bound
    if os.path.isdir("/run/nscd"):  # its cache would answer for the host
        mount("lab", "/run/nscd", "tmpfs")


def boot(name: str, host_proc: int, world_proc: int) -> tuple[int, int]:
    """Start a node: its first process, in namespaces of its own; its pid here and on the host."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:  # unshare moves this process's children only, so it takes one more fork
        with suppress(OSError):
            unshare = CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNS | CLONE_NEWPID
            check(LIBC.unshare(unshare), name)
            if os.fork() == 0:
                be_node(name, host_proc, world_proc, writer)
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as told:
        words = told.read().split()
    if len(words) != 2:
        raise OSError(f"{name} did not start: {' '.join(words) or 'no more namespaces'}")
    return int(words[0]), int(words[1])


def be_node(name: str, host_proc: int, world_proc: int, writer: int) -> NoReturn:
    """Be a node's first process: end only by a power cut, which ends all others of the node."""
    try:
        os.setsid()
        pids = [os.readlink("self", dir_fd=proc) for proc in (world_proc, host_proc)]
        socket.sethostname(name)
        mount("proc", "/proc", "proc")
        with suppress(OSError):  # machines share no memory; but a container may have no /dev/shm
            mount("lab", "/dev/shm", "tmpfs")
        tune()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the orphans
        os.write(writer, " ".join(pids).encode())
        silence = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(silence, number)
        os.closerange(3, 256)
        while True:
            signal.pause()
    except BaseException as error:
        os.write(writer, str(error).encode())
        os._exit(1)


def tune() -> None:
    """Settings that let each transfer go as fast as the link, on every machine.

    TCP shall not begin slowly again after a pause, remember an earlier job's losses, or guess the
    link's rate, as BBR does: in a ring of more than two nodes acknowledgements wait behind a node's
    own data, and BBR then sends 5 to 8 % less. Every kernel has Reno. New links have no IPv6, whose
    announcements would count as traffic.
    """
    for setting, value in (
        ("ipv4/tcp_slow_start_after_idle", "0"),
        ("ipv4/tcp_no_metrics_save", "1"),
        ("ipv4/tcp_congestion_control", "reno"),
        ("ipv6/conf/default/disable_ipv6", "1"),
    ):
        with suppress(OSError):  # a kernel without it
            Path("/proc/sys/net", setting).write_text(value, encoding="utf-8")


def mount(source: str, target: str, kind: str | None, flags: int = 0) -> None:
    filesystem = kind.encode() if kind else None
    check(LIBC.mount(source.encode(), target.encode(), filesystem, flags, None), target)


def check(result: int, about: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), about)


if __name__ == "__main__":
    main(int(sys.argv[1]))
