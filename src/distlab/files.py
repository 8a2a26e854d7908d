"""Where files go, and how they are written: no partial file is ever seen in a final place."""

import errno
import os
import pwd
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlab.errors import RunError, UsageError

CACHES = {  # variables that lead to caches, and the place in our folder where the user's is closed
    "XDG_CACHE_HOME": "",  # uv's, this bench's, torch's, Hugging Face's, vLLM's
    "TRITON_HOME": "",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; fsync and rename it to `path` when the block succeeds.

    Raises `RunError` with one line when the disk is full; the temporary file is removed then,
    and after any other exception.
    """
    final = Path(os.path.realpath(path))  # what a link points to is written, the link stays
    if final.exists() and not final.is_file():  # a folder, or a device such as /dev/null
        raise UsageError(f"{path} is no regular file; name another")
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=final.suffix, dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private; a result is for everybody
        os.replace(temporary, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full while writing {path}; free some space and run again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)  # what another thread creates just now is too private, not too open
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_synced_folder(folder: Path) -> None:
    """Make `folder`, and those around it; a power cut does not take the new names away again."""
    if not folder.is_dir():
        make_synced_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a new file's name is lost in a power cut without it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def refuse_unwritable_file(flag: str, path: str | Path) -> None:
    """Make the folder of `path`; `UsageError` if no file can be written there.

    Called before a long run, so that it is not found out after it.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path} is no regular file; name another")
    _make_writable(f"{flag} {path}", path.parent)


def refuse_unwritable_folder(flag: str, path: str | Path) -> None:
    """As `refuse_unwritable_file`, for a folder of files."""
    path = Path(path)
    if path.is_file():
        raise UsageError(f"{flag} {path} is a file; name a folder")
    _make_writable(f"{flag} {path}", path)


def refuse_unwritable_beside(flag: str, path: str | Path) -> None:
    """As `refuse_unwritable_file`, for a folder that is made at the end, by renaming."""
    _make_writable(f"{flag} {path}", Path(path).parent)


def _make_writable(what: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{what} cannot be written: {folder} is read-only")


def cache_dir() -> Path:
    """Where tokenizers and token shards are kept: $DISTLAB_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("DISTLAB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distlab"


def have_caches() -> str:
    """Give this process and its children caches where the user's folder for them cannot be written.

    That folder is $XDG_CACHE_HOME, else ~/.cache. On many a cluster's node, in a container that
    runs as a mere number (`docker run --user 12345`), and for a service's user there is none. Then
    the variables of all that keep caches (uv, this bench, torch, Triton, Hugging Face, matplotlib)
    lead into the environments' folder, or where that cannot be written either, into the temporary
    one. A user without a name gets one, since torch asks for it. `import distlab` calls this.

    Returns one line that says what was done, empty where nothing was.
    """
    if not any(name in os.environ for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and no such user
        usual = None
    if usual and _may_be_written(usual):
        return ""
    environments = Path(
        os.environ.get("LAB_VENV_DIR") or Path(__file__).resolve().parents[2] / ".venv"
    )
    folder = environments.expanduser().absolute() / "cache"
    if not _may_be_written(folder):
        folder = Path(tempfile.gettempdir(), f"distlab-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return ""  # somebody's trap: what needs a cache says that it cannot be written
    os.environ |= {name: str(folder / place) for name, place in CACHES.items()}
    if usual is None:
        os.environ["HOME"] = str(folder)
    return f"{usual or 'HOME'} cannot be written; caches are kept in {folder}"


def _may_be_written(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def repo_root() -> Path:
    """The checkout that holds the chapters: around this package, or around the working directory.

    Raises `UsageError` when neither holds them (the package was installed without its checkout).
    """
    for start in (Path(__file__).resolve(), Path.cwd() / "here"):
        for folder in start.parents:
            if (folder / "chapter01-introduction").is_dir():
                return folder
    raise UsageError("the book's checkout is not here; change into it and run again")
