"""Whether this machine can make a virtual cluster, by which namespaces, and what mends it."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from distlab.errors import Skipped

PROBE_LIMIT_S = 10.0
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
AS_USER = ("--user", "--map-root-user")


def unavailable() -> str | None:
    """None where a virtual cluster can be made, else a sentence: why not, and what to do."""
    if not Path("/proc/self/ns").is_dir():
        return "a virtual cluster needs Linux; run this in a Linux machine or in WSL 2"
    for programs, package in ((("ip", "tc"), "iproute2"), (("unshare", "nsenter"), "util-linux")):
        missing = [name for name in programs if find_program(name) is None]
        if missing:
            return f"{' and '.join(missing)} are missing; {install_line([package])}"
    if namespace_flags() is None:
        return f"this kernel lets this user make no network namespaces; {allow_namespaces()}"
    return None


def namespace_flags() -> tuple[str, ...] | None:
    """The flags of unshare(1) that make a cluster's namespaces here; None where none do.

    Root needs no user namespace, and is better without one: within it, it could not write the
    files of other users. An ordinary user is root only within one.
    """
    modes: tuple[tuple[str, ...], ...] = (AS_USER,)
    if os.geteuid() == 0:
        modes = ((), AS_USER)
    return next(((*mode, *NAMESPACES) for mode in modes if _allowed(mode)), None)


def _allowed(mode: tuple[str, ...]) -> bool:
    command = [find_program("unshare") or "unshare", *mode, *NAMESPACES, "--mount-proc", "true"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_LIMIT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def allow_namespaces() -> str:
    """The setting that forbids user namespaces, to be changed; root needs none of them."""
    for setting, forbidding, allowing in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
    ):
        file = Path("/proc/sys", setting)
        if file.is_file() and file.read_text(encoding="utf-8").strip() == forbidding:
            return f"sudo sysctl -w {setting.replace('/', '.')}={allowing}"
    return (
        "run the cluster's commands as root, on the machine itself or in a --privileged container"
    )


def program(name: str) -> str:
    """The path of a system program. Raises `Skipped` where it is missing."""
    if (path := find_program(name)) is None:
        raise Skipped(f"{name} is missing on this machine; `lab doctor` says how to get it")
    return path


def find_program(name: str) -> str | None:
    """The path of a program; those of the system's administrator stand in /usr/sbin."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def install_line(packages: Iterable[str]) -> str:
    """The command line that installs system packages, given by their Debian names."""
    names = " ".join(packages)
    if not _is_debian():
        return f"install with this system's package manager: {names}"
    root = "" if os.geteuid() == 0 else "sudo "
    return f"{root}apt-get install -y --no-install-recommends {names}"


def _is_debian() -> bool:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return False
    return "debian" in (release.get("ID", ""), *release.get("ID_LIKE", "").split())
