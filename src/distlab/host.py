"""What the kernel tells of this machine, as far as this process may use it."""

import os
import platform
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")
PACKET_HEADERS = 14 + 20 + 32  # bytes: Ethernet, IPv4, TCP with its timestamp
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def cpu_name() -> str:
    """The processor's name without its decoration; an ARM board's name; else the architecture."""
    for file, pattern in (
        ("/proc/cpuinfo", r"^model name\s*: (.+)$"),
        ("/proc/device-tree/model", r"^([^\0]+)"),  # ARM boards have no model name
    ):
        if match := re.search(pattern, read(file), re.MULTILINE):
            name = re.sub(r"\((?:R|TM)\)| CPU(?= @)| \d+-Core Processor", "", match[1])
            return " ".join(name.split())
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(
            asked, capture_output=True, encoding="utf-8", errors="replace", timeout=5
        ).stdout.strip()
    return platform.processor() or platform.machine()


@cache
def own_address() -> str | None:
    """What this machine's name stands for; None where it cannot be resolved.

    Containers and laptops away from their network often have such a name. torchrun asks for it, and
    tries for five minutes.
    """
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return None


def interface_bytes() -> tuple[int, int]:
    """(received, sent) so far by this node's network interfaces but the loopback."""
    (received, _), (sent, _) = _interface_counts()
    return received, sent


def interface_payload() -> tuple[int, int]:
    """`interface_bytes` without the packets' headers: Ethernet's, IPv4's and TCP's.

    An acknowledgement is nothing but headers, so that what is left is what was written to sockets.
    """
    received, sent = _interface_counts()
    return received[0] - PACKET_HEADERS * received[1], sent[0] - PACKET_HEADERS * sent[1]


def _interface_counts() -> tuple[tuple[int, int], tuple[int, int]]:
    """((bytes, packets) received, (bytes, packets) sent)."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    fields = [line.replace(":", " ").split() for line in lines]
    counted = [[int(f[column]) for column in (1, 2, 9, 10)] for f in fields if f[0] != "lo"]
    received, packets_in, sent, packets_out = map(sum, zip([0] * 4, *counted, strict=True))
    return (received, packets_in), (sent, packets_out)


def reach_itself() -> None:
    """Have this process and its children ask this machine's own servers without a proxy.

    A proxy that the user has for the world (http_proxy and its kin) would be asked for 127.0.0.1
    too, by the OpenAI client, curl and exporters of traces alike, and answers that it knows of no
    such server. What NO_PROXY holds already stays. `import distlab` calls this.
    """
    if not any(name.lower() in PROXIES for name in os.environ):
        return
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    named = [host for host in direct.split(",") if host.strip()]
    both = ",".join([*named, *(host for host in LOOPBACK if host not in named)])
    os.environ |= {"no_proxy": both, "NO_PROXY": both}


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and whole cores of its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for text in _cgroup_files("cpu", "cpu.max"):  # "150000 100000", or "max 100000"
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    quotas = _cgroup_files("cpu", "cpu.cfs_quota_us")
    periods = _cgroup_files("cpu", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        if int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def threads_asked() -> int | None:
    """What OMP_NUM_THREADS asks for, as OpenMP reads it: of a list, which is one for each level of
    nesting, the first; None where it is not set, or is no number above 0 and so ignored."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def allow_open_files(count: int) -> int:
    """Raise this process's limit of open files, connections among them, to `count`; what it is now.

    `ulimit -n` tells it: 256 on macOS, often 1024 on Linux. A hard limit is not passed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if soft < count:
        soft = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def usable_memory() -> int:
    """Bytes that this process may use: the machine's, or its cgroup's limit if that is lower."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory.limit_in_bytes"):
        limits = [int(text) for text in _cgroup_files("memory", file) if text != "max"]
        memory = min([memory, *limits])
    return memory


def _cgroup_files(controller: str, file: str) -> Iterator[str]:
    """The contents of `file` in this process's control group and the groups that hold it.

    Version 2 has one tree, version 1 one for each controller; see cgroups(7).
    """
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        path = PurePosixPath(group)
        for folder in (path, *path.parents):
            if text := read(root / str(folder).lstrip("/") / file).strip():
                yield text


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the kernel does not tell."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [text.strip() for text in map(read, caches)]  # "32768K"
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=0)


def operating_system() -> str:
    """The distribution's name, if it tells one, and the kernel's."""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', read("/etc/os-release"), re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{pretty[1]}, {kernel}" if pretty else kernel


def read(path: str | Path) -> str:
    """The text of a file of the system; empty where there is none."""
    try:
        return Path(path).read_text(errors="replace", encoding="utf-8")
    except OSError:
        return ""
