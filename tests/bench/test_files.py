"""Files appear whole or not at all, whatever ends the writer."""

import errno
import getpass
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from distlab import files
from distlab.errors import RunError, UsageError
from distlab.spawning import fork_context


def test_the_file_is_there_when_the_block_succeeds_and_not_before(tmp_path):
    path = tmp_path / "new" / "result.json"
    with files.atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permission_bits_are_those_of_an_ordinary_new_file(mask, mode, tmp_path):
    previous = os.umask(mask)
    try:
        files.write_text(tmp_path / "result", "text")
        assert os.umask(mask) == mask  # it is as before
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == mode


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_names_the_file(number, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(RunError, match="^the disk is full while writing .*result; free some space"):
        files.write_text(tmp_path / "result", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path):
    """A megabyte of tmpfs, in a mount namespace of its own where this user may make one."""
    code = (
        "import pathlib, distlab.files as files, distlab.errors as errors\n"
        "try:\n"
        "    files.write_text('small/result', 'x' * 2**21)\n"
        "except errors.RunError as error:\n"
        "    print(error, list(pathlib.Path('small').iterdir()))\n"
    )
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=1m none small && exec "$0" -c "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, code]
    if shutil.which("unshare") is None:
        pytest.skip("no mount namespaces here: unshare(1) is missing")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert done.stdout.strip() == (
        "the disk is full while writing small/result; free some space and run again []"
    ), done.stderr


def test_another_error_while_writing_passes_through_and_leaves_nothing(tmp_path):
    done = run_in_a_child(write_past_a_limit, tmp_path)
    assert done == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def write_past_a_limit(folder: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        files.write_text(folder / "result", "x" * 5000)
    except OSError as error:
        return error.errno
    return 0


def run_in_a_child(function, *args) -> int:
    with fork_context().Pool(1) as pool:
        return pool.apply(function, args)


def test_concurrent_writers_never_mix(tmp_path):
    path = tmp_path / "result"
    with fork_context().Pool(4) as pool:
        writing = pool.starmap_async(write_often, [(path, letter) for letter in "abcd"])
        seen = set()
        while not writing.ready():
            if path.exists():
                text = path.read_text()
                assert len(text) == 100_000 and len(set(text)) == 1
                seen.add(text[0])
        writing.get()
    assert seen <= set("abcd") and path.read_text()[0] in "abcd"
    assert list(tmp_path.iterdir()) == [path]


def write_often(path: Path, letter: str) -> None:
    for _ in range(20):
        files.write_text(path, letter * 100_000)


@pytest.mark.parametrize("place", ["/dev/null", tempfile.gettempdir()])
def test_a_device_and_a_folder_are_never_replaced(place):
    with pytest.raises(UsageError, match=f"{place} is no regular file"):
        files.write_text(place, "text")


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "result").write_text("old")
    (tmp_path / "link").symlink_to("store/result")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "store" / "result").read_text() == "new"


def test_text_is_utf8_whatever_the_locale(tmp_path):
    files.write_text(tmp_path / "result", "µs — 微秒")
    assert (tmp_path / "result").read_bytes().decode("utf-8") == "µs — 微秒"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DISTLAB_CACHE": "/a/b"}, "/a/b"),
        ({"DISTLAB_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/distlab"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/reader"}, "/home/reader/.cache/distlab"),
        ({"HOME": "/home/reader"}, "/home/reader/.cache/distlab"),
    ],
)
def test_cache_dir(variables, folder, monkeypatch):
    for name in ("DISTLAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_dir() == Path(folder)


@pytest.fixture
def no_caches(monkeypatch, tmp_path):
    """A user without a name and without a home, as in a container; what may be written is given."""

    def nameless(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nameless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "DISTLAB_CACHE", *files.CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAB_VENV_DIR", str(tmp_path / "venv"))
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({}, "HOME"),
        ({"HOME": "/dev/null"}, "/dev/null/.cache"),
        ({"HOME": "/", "XDG_CACHE_HOME": "/dev/null/x"}, "/dev/null/x"),
    ],
)
def test_caches_are_had_without_a_home_of_ones_own(variables, what, no_caches, tmp_path):
    for name, value in variables.items():
        no_caches.setenv(name, value)
    folder = tmp_path / "venv" / "cache"
    assert files.have_caches() == f"{what} cannot be written; caches are kept in {folder}"
    assert files.cache_dir() == folder / "distlab"
    assert {Path(os.environ[name]) for name in files.CACHES} >= {folder, folder / "matplotlib"}
    assert os.environ["HOME"] == variables.get("HOME", str(folder)), "configuration is found there"
    assert getpass.getuser() == f"uid{os.getuid()}", "torch asks for it"
    assert files.have_caches() == "", "children, who inherit this, have nothing to say"


def test_caches_are_temporary_where_nothing_else_can_be_written(no_caches, tmp_path):
    no_caches.setenv("LAB_VENV_DIR", "/dev/null")
    folder = tmp_path / f"distlab-{os.getuid()}"
    assert str(folder) in files.have_caches()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_users_own_caches_stay(no_caches, tmp_path):
    no_caches.setenv("HOME", str(tmp_path))
    assert files.have_caches() == ""
    assert not files.CACHES.keys() & os.environ.keys()


def test_repo_root_is_around_the_package_else_around_the_working_directory(monkeypatch, tmp_path):
    assert (files.repo_root() / "src" / "distlab" / "files.py").samefile(files.__file__)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "lib" / "files.py"))
    (tmp_path / "clone" / "chapter01-introduction" / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "chapter01-introduction" / "code")
    assert files.repo_root() == tmp_path / "clone"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="change into it"):
        files.repo_root()
