"""The rights that the student's process gives away before it runs the student's code.

In a mount namespace of its own, where the system allows one, an empty folder lies over the
checkout and over its Git repository, with only the bench in it. Where Linux has Landlock (5.13
and later; no privilege is needed), the process and all that it starts can read nothing there, write
to its working directory only, and from 6.12 on not signal other processes. Where the grader is
root, the process also becomes another user. With none of these an audit hook refuses to open the
checkout's exercises and the chapters' code, which has what some of them ask for; that does not hold
in the processes that the student's code starts.

What is not prevented: to read whatever else the user may read, so another copy of the book, and to
use the network.
"""

import ctypes
import os
import pwd
import signal
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import distlab
from distlab.files import repo_root

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MNT_DETACH, CAPABILITY_VERSION_3 = 2, 0x20080522
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REFER, TRUNCATE = 1 << 13, 1 << 14
ALL_OF_1 = (1 << 13) - 1
SCOPE_SIGNALS_AND_SOCKETS = 3


@dataclass(frozen=True)
class Places:
    """Absolute folders: the student's, where it may write, what is hidden, and what of that not."""

    student: Path
    work: Path
    hidden: tuple[Path, ...]
    kept: tuple[Path, ...]

    def as_json(self) -> list[Any]:
        return [str(self.student), str(self.work), [*map(str, self.hidden)], [*map(str, self.kept)]]

    @classmethod
    def from_json(cls, told: list[Any]) -> Self:
        student, work, hidden, kept = told
        return cls(Path(student), Path(work), tuple(map(Path, hidden)), tuple(map(Path, kept)))


def make_work(folder: Path) -> None:
    """Make the student's working directory in a folder that lets its process pass."""
    folder.chmod(0o711)
    (folder / "work" / "tmp").mkdir(parents=True)


def places_of(student: Path, work: Path) -> Places:
    root = repo_root()
    python = [Path(sys.prefix), Path(sys.base_prefix)]
    kept = (path.resolve() for path in [Path(distlab.__file__).parents[1], *python])
    return Places(student, work, tuple(hidden_places(root)), tuple(kept))


def hidden_places(root: Path) -> Iterator[Path]:
    """The checkout, and where its Git repository lies, with the checkout there."""
    yield root
    if (root / ".git").is_file():  # a further work tree: "gitdir: FOLDER"
        git = Path((root / ".git").read_text(encoding="utf-8").partition(":")[2].strip())
        shared = (git / (git / "commondir").read_text(encoding="utf-8").strip()).resolve()
        yield shared.parent if shared.name == ".git" else shared


def give_away(places: Places, parent: int) -> str:
    """Give the rights away, and say in words what that came to."""
    os.umask(0o022)  # a closed one would bar the other user from the folders made on its way
    root = os.geteuid() == 0
    covered = cover(places, root)
    another = root and become_another(places)
    drop_capabilities()
    restricted = restrict([*readable(places), *writable(places)])
    if not (covered or restricted):
        forbid_opening(places)
    die_with(parent)
    found = {
        "another user": another,
        "an empty checkout": covered,
        "Landlock": restricted,
        "an audit hook only": not (covered or restricted),
    }
    return ", ".join(word for word, holds in found.items() if holds)


def cover(places: Places, root: bool) -> bool:
    """Mount an empty folder over what is hidden, with what is kept of it.

    And over folders that bar other users from what is kept, such as a Python in /root.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    covers = {*places.hidden, *(barring_folders(places.kept) if root else ())}
    covers -= {
        cover for cover in covers for other in covers - {cover} if cover.is_relative_to(other)
    }
    inside = (*places.kept, places.work)
    kept = [path for path in inside if any(path.is_relative_to(cover) for cover in covers)]
    if not possible(lambda: enter_namespace(libc, root)):
        return False
    enter_namespace(libc, root)
    try:
        opened = [(path, os.open(path, os.O_PATH)) for path in kept]
        for folder in covers:
            mount(libc, "tmpfs", folder, "tmpfs", 0)
        for path, number in opened:
            path.mkdir(parents=True, exist_ok=True)
            mount(libc, f"/proc/self/fd/{number}", path, "", MS_BIND | MS_REC)
            os.close(number)
    except OSError:
        for folder in covers:
            libc.umount2(str(folder).encode(), MNT_DETACH)
        return False
    return True


def enter_namespace(libc: ctypes.CDLL, root: bool) -> None:
    """Into a mount namespace of one's own; without root into a user namespace, with the same ids.

    Raises `OSError` where the system does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS | (0 if root else CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if not root:
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="utf-8")
    mount(libc, "none", Path("/"), "", MS_REC | MS_PRIVATE)


def possible(action: Callable[[], None]) -> bool:
    """Whether it succeeds in a fork: half of it would leave this process without a user."""
    pid = os.fork()
    if pid == 0:
        with suppress(OSError):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def mount(libc: ctypes.CDLL, source: str, target: Path, kind: str, flags: int) -> None:
    names = source.encode(), str(target).encode(), kind.encode() or None
    if libc.mount(*names, ctypes.c_ulong(flags), b"mode=755" if kind else None) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {target}")


def barring_folders(paths: Iterable[Path]) -> set[Path]:
    """The outermost folders on the way to these that other users may not pass."""
    ways = ([folder for folder in reversed(path.parents) if bars(folder)] for path in paths)
    return {barred[0] for barred in ways if barred}


def bars(folder: Path) -> bool:
    return not folder.stat().st_mode & stat.S_IXOTH


def die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # a change of the user has cleared it
    if os.getppid() != parent:
        os._exit(1)


def become_another(places: Places) -> bool:
    """Become `nobody`, where that user can reach Python and the work."""
    try:
        user = pwd.getpwnam("nobody")
        give(places.work, user.pw_uid, user.pw_gid)
        os.seteuid(user.pw_uid)
        reached = [*places.kept, Path(sys.executable), places.student]
        reachable = all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in reached)
        os.seteuid(0)
        if reachable:
            os.setgroups([])
            os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
            os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        else:  # a root without capabilities could not write what is another's
            give(places.work, os.getuid(), os.getgid())
    except (KeyError, OSError):
        return False
    return reachable


def give(folder: Path, user: int, group: int) -> None:
    """Make all in the folder, and itself, this user's."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, group, follow_symlinks=False)


def drop_capabilities() -> None:
    """Whatever root or a user namespace has given, for this process and all that it starts."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def readable(places: Places) -> Iterator[tuple[Path, int]]:
    """All of the file system but what is hidden, as folders of which everything may be read."""
    for path in [*visible(Path("/"), places.hidden), *places.kept]:
        yield path, EXECUTE | READ_FILE | READ_DIR


def visible(folder: Path, hidden: Iterable[Path]) -> list[Path]:
    inside = [place for place in hidden if place.is_relative_to(folder)]
    if not inside:
        return [folder]
    if folder in inside:
        return []
    try:
        entries = [path for path in folder.iterdir() if not path.is_symlink()]
    except OSError:
        return []
    return [path for entry in entries for path in visible(entry, inside)]


def writable(places: Places) -> list[tuple[Path, int]]:
    return [(path, -1) for path in (places.work, Path("/dev"), Path("/proc"))]


def restrict(grants: list[tuple[Path, int]]) -> bool:
    """Keep these rights by Landlock and give all others on files away, for good."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    handled = ALL_OF_1 | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    scoped = SCOPE_SIGNALS_AND_SOCKETS if version >= 6 else 0
    attributes = struct.pack("=QQQ", handled, 0, scoped)[: 24 if version >= 6 else 8]
    rules = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    for path, rights in grants:
        allow(libc, rules, path, rights & handled)
    done = libc.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return bool(done)


def allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    try:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it has gone, or may not be reached: then it needs no rule
        return
    if not path.is_dir():
        rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
    rule = struct.pack("=Qi", rights, target)
    libc.syscall(ADD_RULE, rules, 1, rule, 0)
    os.close(target)


def forbid_opening(places: Places) -> None:
    """Refuse to open, link or list the checkout's exercises, the chapters' code, and .git."""
    root = places.hidden[0]
    closed = [*root.glob("chapter*/exercises"), *root.glob("chapter*/code"), root / ".git"]
    prefixes = tuple(os.path.join(path, "") for path in [*closed, *places.hidden[1:]])

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.link", "os.symlink", "os.listdir", "os.scandir"):
            return
        if arguments and isinstance(arguments[0], str | bytes):
            path = os.path.join(os.path.realpath(os.fsdecode(arguments[0])), "")
            if path.startswith(prefixes):
                raise PermissionError("what solves an exercise is not to be read")

    sys.addaudithook(refuse)
