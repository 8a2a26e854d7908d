"""The virtual cluster: nodes, links, faults, and that nothing of it is left, however it ends."""

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from distlab.cluster import Traffic, VirtualCluster, availability, links, probe, unavailable
from distlab.cluster.delays import FASTEST
from distlab.errors import RunError, Skipped, UsageError
from distlab.lab import clustering
from distlab.process import run_command
from distlab.script import status_of

PYTHON = sys.executable
NOBODY = 65534
PROBE = [PYTHON, "-I", "-S", probe.__file__]
SOURCES = Path(__file__).resolve().parents[2] / "src"

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SLEEP = "env --default-signal=INT sleep"  # a shell has what it starts by & ignore SIGINT

ALL_REDUCE = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
x = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(x)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {x.item()}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def cluster():
    with VirtualCluster(3) as made:
        yield made


def outputs(done):
    assert [one.status for one in done] == [0] * len(done), done
    return [one.stdout.strip() for one in done]


def listen(cluster, node):
    server = cluster.start(node, [*PROBE, "serve"])
    until(lambda: "ready" in server.output())
    return server


def send(cluster, source, target, size=1):
    """The least of three times that `size` bytes take to get there, and one byte to come back."""
    (told,) = outputs(cluster.run([*PROBE, "send", target, str(size), "3"], nodes=[source]))
    return min(json.loads(told))


def until(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# Nodes


def test_a_node_has_a_name_an_address_and_knows_the_others(cluster):
    tell = (
        "import socket; print(*map(socket.gethostbyname, ['node0', 'node1', socket.gethostname()]))"
    )
    assert outputs(cluster.run([PYTHON, "-c", tell])) == [
        f"10.77.0.10 10.77.0.11 10.77.0.1{index}" for index in range(3)
    ]
    assert outputs(cluster.run(["hostname"])) == cluster.names == ["node0", "node1", "node2"]


def test_a_command_has_the_callers_files_folder_and_variables(cluster, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_TEST", "told")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    line = "echo $(cat file) $PWD $LAB_TEST $MORE $NODE_RANK $NNODES $HEAD $https_proxy"
    done = cluster.run(["sh", "-c", line], env={"MORE": "more"})
    assert outputs(done) == [f"here {tmp_path} told more {i} 3 node0" for i in range(3)]
    for path in outputs(cluster.run(["sh", "-c", "echo $PATH"])):
        assert str(Path(PYTHON).parent) in path.split(os.pathsep)  # torchrun is there


def test_an_active_environment_stays_first_in_the_path(cluster, monkeypatch):
    for active, first in [("/of/vllm", "/of/vllm/bin"), ("/not/in/path", str(Path(PYTHON).parent))]:
        monkeypatch.setenv("VIRTUAL_ENV", active)
        monkeypatch.setenv("PATH", "/of/vllm/bin:/usr/bin:/bin")
        assert {
            path.split(":")[0] for path in outputs(cluster.run(["sh", "-c", "echo $PATH"]))
        } == {first}


def test_nodes_share_the_cores_between_them(cluster, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = max(1, len(os.sched_getaffinity(0)) // 3)
    tell = ["sh", "-c", "echo $OMP_NUM_THREADS"]
    assert outputs(cluster.run(tell)) == [str(share)] * 3
    assert outputs(cluster.run(tell, env={"OMP_NUM_THREADS": "5"})) == ["5"] * 3


def test_nodes_share_no_processes_and_no_memory(cluster):
    cluster.start("node1", ["sleep", "98765"])
    outputs(cluster.run(["sh", "-c", "echo > /dev/shm/of-node1"], nodes=["node1"]))
    line = "ps ax -o args | grep -c '[s]leep 98765'; ls /dev/shm"
    seen = [one.stdout.split() for one in cluster.run(["sh", "-c", line])]
    assert [words[:2] for words in seen] == [["0"], ["1", "of-node1"], ["0"]]


def test_output_and_status_of_each_node_are_its_own(cluster, capsys):
    done = cluster.run(["sh", "-c", "echo to $NODE_RANK; echo oh >&2; exit $NODE_RANK"], echo=True)
    assert [(one.status, one.stdout, one.stderr) for one in done] == [
        (index, f"to {index}\n", "oh\n") for index in range(3)
    ]
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == [f"node{index}| to {index}" for index in range(3)]
    assert sorted(shown.err.splitlines()) == [f"node{index}| oh" for index in range(3)]


def test_some_nodes_in_their_order(cluster):
    assert outputs(cluster.run(["hostname"], nodes=["node2", "node0"])) == ["node2", "node0"]
    with pytest.raises(UsageError, match="node9 is wrong because the cluster has no node9"):
        cluster.run(["hostname"], nodes=["node0", "node9"])


def test_each_rank_has_the_variables_of_torchrun(cluster):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    line = "echo $(hostname) " + " ".join(f"${name}" for name in names.split())
    done = cluster.run_ranks(["sh", "-c", line], nodes=["node1", "node2"], ranks_per_node=2)
    assert outputs(done) == [
        "node1 0 0 4 2 node1",
        "node1 1 1 4 2 node1",
        "node2 2 0 4 2 node1",
        "node2 3 1 4 2 node1",
    ]


# How commands end


def test_a_command_past_its_limit_is_ended_with_all_that_it_started(cluster):
    done = cluster.run(["sh", "-c", "[ $NODE_RANK = 1 ] || { setsid sleep 76543; }"], timeout_s=1)
    assert [one.status for one in done] == [124, 0, 124]
    assert not processes_with(b"76543", "cmdline")


def test_what_a_command_leaves_is_ended_and_named(cluster):
    done = cluster.run(["sh", "-c", f"{SLEEP} 65432 >&- 2>&- & echo $NODE_RANK"])
    assert outputs(done) == ["0", "1", "2"]
    assert all("sleep 65432" in one.left_running[0] for one in done)
    assert not processes_with(b"65432", "cmdline")


def test_a_started_command_can_be_asked_awaited_ended_and_killed(cluster):
    process = cluster.start("node1", ["sh", "-c", "echo begun; read nothing; sleep 1000"])
    until(lambda: process.output() == "begun\n")
    assert process.poll() is None
    process.end()
    assert process.poll() in (-signal.SIGINT, 128 + signal.SIGINT)
    assert cluster.start("node1", ["sh", "-c", "exit 3"]).wait(20) == 3
    assert cluster.start("node1", ["sleep", "1000"]).wait(0.2) == 124
    killed = cluster.start("node1", ["sleep", "1000"])
    killed.kill()
    assert killed.poll() == -signal.SIGKILL


@pytest.mark.slow
def test_a_job_around_the_cluster_ends_the_commands_on_its_nodes():
    """As `distlab.process` marks processes: a script that makes a cluster runs past its limit."""
    script = """
from distlab.cluster import VirtualCluster
with VirtualCluster(1) as cluster:
    cluster.run(["sh", "-c", "trap 'echo in peace; exit' INT; SLEEP 54321 & wait"], echo=True)
"""
    done = run_command([PYTHON, "-c", script.replace("SLEEP", SLEEP)], timeout_s=3)
    assert (done.status, done.stdout) == (124, "node0| in peace\n")
    assert not processes_with(b"54321", "cmdline")


# Links


def test_a_link_has_its_rate_both_ways():
    size = 500_000
    queues = [availability.program("tc"), "qdisc", "show", "dev", "eth0"]
    with VirtualCluster(2, rate="40mbit", slow={"node1": "20mbit"}) as cluster:
        for node in cluster.names:
            listen(cluster, node)
        for source, target in (("node0", "node1"), ("node1", "node0")):
            assert send(cluster, source, target, size) >= 0.9 * size * 8 / 20e6
        cluster.rate("node1", None)
        assert send(cluster, "node1", "node0", size) >= 0.9 * size * 8 / 40e6
        before, now = outputs(cluster.run(queues))
        assert "tbf" in before and "tbf" not in now


@pytest.mark.slow
def test_packets_take_the_delay_and_the_rate_holds_too():
    with VirtualCluster(2, rate="20mbit", delay="100ms") as cluster:
        for node in cluster.names:
            listen(cluster, node)
        assert send(cluster, "node0", "node1") >= 0.200  # there and back
        assert send(cluster, "node0", "node1", 250_000) >= 0.9 * 250_000 * 8 / 20e6 + 0.200
        cluster.rate("node0", "20mbit", delay="0ms")
        assert 0.100 <= send(cluster, "node0", "node1") < 0.200
        cluster.power_off("node1")
        cluster.power_on("node1")
        listen(cluster, "node1")
        assert 0.100 <= send(cluster, "node0", "node1") < 0.200


COUNT = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE: all, while others have the cores
link.bind(("", 5001))
print("ready", flush=True)
link.settimeout(60)
arrived, word = 0, b""
while word != b"end":  # of which enough are sent that some arrive
    word, sender = link.recvfrom(100)
    arrived += word == b"word"
    if word == b"hello":
        link.sendto(word, sender)
print(arrived)
"""
# Addresses are asked for by packets too, which may be lost, and all that waits for them with them:
# so the two nodes find each other first.
SEND = """
import contextlib, socket, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.settimeout(0.5)
answer = b""
while answer != b"hello":
    link.sendto(b"hello", ("node1", 5001))
    with contextlib.suppress(TimeoutError):
        answer = link.recv(100)
for word in [b"word"] * 1000 + [b"end"] * 20:
    link.sendto(word, ("node1", 5001))
    time.sleep(0.0005)
"""


@pytest.mark.slow
def test_a_share_of_the_packets_is_lost():
    with VirtualCluster(2, loss="30%") as cluster:
        counting = cluster.start("node1", [sys.executable, "-c", COUNT])
        until(lambda: "ready" in counting.output())
        outputs(cluster.run([sys.executable, "-c", SEND], ["node0"]))
        assert counting.wait(60) == 0
    arrived = int(counting.output().split()[-1])
    assert 500 < arrived < 900  # 700 are expected, with a standard deviation of 15


def test_a_delay_can_come_while_the_cluster_is_up():
    with VirtualCluster(2) as cluster:
        listen(cluster, "node1")
        cluster.rate("node1", "50mbit", delay="100ms")
        assert send(cluster, "node0", "node1") >= 0.100


def test_a_rate_that_user_space_cannot_carry_is_told(capfd):
    with VirtualCluster(1, rate="10gbit", delay="1ms") as cluster:
        told = capfd.readouterr().err
        assert (f"about {FASTEST} a node" in told) == (not cluster._network.netem)


def test_traffic_is_counted_at_both_ends(cluster):
    listen(cluster, "node1")
    before = {node: cluster.traffic(node) for node in cluster.names}
    size = 1_000_000
    send(cluster, "node0", "node1", size)
    after = {node: cluster.traffic(node) for node in cluster.names}
    assert 3 * size <= after["node0"].sent - before["node0"].sent <= 3.6 * size
    assert 3 * size <= after["node1"].received - before["node1"].received <= 3.6 * size
    assert after["node2"].sent - before["node2"].sent < 0.1 * size


# Faults


@pytest.mark.slow
def test_a_cut_link_carries_nothing_until_it_is_healed():
    ask = "import socket; socket.create_connection(('node1', 5000), timeout=1.0)"
    with VirtualCluster(2) as cluster:
        listen(cluster, "node1")
        cluster.cut("node1")
        (lost,) = cluster.run([PYTHON, "-c", ask], nodes=["node0"])
        assert lost.status == 1 and re.search("timed out|No route to host", lost.stderr)
        cluster.heal("node1")
        until(lambda: cluster.run([PYTHON, "-c", ask], nodes=["node0"])[0].status == 0)


def test_a_power_cut_ends_a_node_at_once_and_its_peers_hear_nothing():
    wait = """
import socket
link = socket.create_connection(("node1", 5000))
print("connected", flush=True)
link.settimeout(1.5)
try:
    print("heard", link.recv(1))
except TimeoutError:
    print("silence")
"""
    with VirtualCluster(2) as cluster:
        server = listen(cluster, "node1")
        client = cluster.start("node0", [PYTHON, "-c", wait])
        until(lambda: client.output())
        cluster.power_off("node1")
        assert server.wait(20) == -signal.SIGKILL
        assert (client.wait(20), client.output()) == (0, "connected\nsilence\n")
        assert outputs(cluster.run(["hostname"])) == ["node0"]
        for use in (lambda: cluster.start("node1", ["true"]), lambda: cluster.cut("node1")):
            with pytest.raises(UsageError, match="node1 is off"):
                use()
        cluster.power_on("node1")
        assert cluster.traffic("node1").sent < 1000
        listen(cluster, "node1")
        send(cluster, "node0", "node1")


# Nothing is left

CHILD = """
import sys
from distlab.cluster import VirtualCluster
with VirtualCluster(2, rate="100mbit", delay="1ms") as cluster:
    for node in cluster.names:
        cluster.start(node, ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
    print("up", flush=True)
    if sys.argv[1] == "exception":
        raise RuntimeError("as asked")
    if sys.argv[1] != "exit":
        cluster.run(["sh", "-c", "echo running; sleep 1000"], timeout_s=None, echo=True)
"""


@pytest.mark.parametrize("end", ["exit", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left(end, tmp_path):
    mark = uuid.uuid4().hex
    before = machine_state()
    parent = subprocess.Popen(
        [PYTHON, "-c", CHILD, end],
        env={**os.environ, "LAB_TEST_MARK": mark, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = [parent.stdout.readline()]
    namespaces = set()
    if end.startswith("SIG"):
        while lines[-1].strip() != "node1| running":
            lines.append(parent.stdout.readline())
            assert lines[-1], parent.stderr.read()
        namespaces = {names for pid in processes_with(mark.encode()) for names in spaces(pid)}
        assert len(namespaces) > len(spaces(os.getpid()))
        parent.send_signal(getattr(signal, end))
    _, errors = parent.communicate(timeout=30)
    status = {"exit": 0, "exception": 1, "SIGINT": -2, "SIGTERM": -15, "SIGKILL": -9}[end]
    assert parent.returncode == status, errors
    until(lambda: not processes_with(mark.encode()))
    assert list(tmp_path.iterdir()) == []
    assert machine_state() == before
    alive = {
        names for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) for names in spaces(pid)
    }
    assert not (namespaces - spaces(os.getpid())) & alive


def test_nothing_is_left_when_the_start_fails(monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv("LAB_TEST_MARK", mark)
    monkeypatch.setattr(links, "node_lines", lambda index: ["link set nowhere up"])
    with pytest.raises(Skipped, match="ip says"), VirtualCluster(2):
        pass
    own = {os.getpid()}
    until(lambda: processes_with(mark.encode()) <= own)


def processes_with(text, file="environ"):
    """The processes, zombies left out, whose environment or command line holds `text`."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if text in Path("/proc", pid, file).read_bytes():
                found.add(int(pid))
    return found


def spaces(pid):
    with suppress(OSError):
        return {os.readlink(link) for link in Path(f"/proc/{pid}/ns").iterdir()}
    return set()


def machine_state():
    """The mounts and links of this machine that a cluster could have left."""
    mounts = re.findall(r"^.* - (?:tmpfs lab|nsfs) .*$", read("/proc/self/mountinfo"), re.MULTILINE)
    return mounts, re.findall(r"(?:sw\d+|br0):", read("/proc/self/net/dev"))


def read(path):
    return Path(path).read_text()


# The command line


def lab_cluster(*arguments):
    return status_of(lambda: clustering.main(list(arguments)))


def test_the_worst_status_and_whose_line_it_is(capfd):
    line = "echo hi from $NODE_RANK; exit $((3 - NODE_RANK))"
    assert lab_cluster("--nodes", "3", "--rate", "1gbit", "--", "sh", "-c", line) == 3
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"node{i}| hi from {i}" for i in range(3)
    ]
    assert lab_cluster("--nodes", "1", "--", "sh", "-c", "kill -9 $$") == 128 + 9
    assert lab_cluster("--nodes", "1", "--", "no-such-program") == 127


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--nodes 0 -- true", "--nodes 0 is wrong because a cluster has 1 to 64 nodes"),
        ("--nodes -1 -- true", "--nodes -1 is wrong"),
        ("--nodes 65 -- true", "--nodes 65 is wrong"),
        ("--nodes two -- true", "--nodes"),
        ("-- true", "--nodes"),
        ("--nodes 2", "there is no command to run; write it after --"),
        ("--nodes 2 --", "there is no command to run"),
        ("--nodes 2 true", "unrecognized arguments: true"),
        ("--nodes 2 --rate 5foo -- true", "--rate 5foo is wrong because foo is no known unit; use"),
        ("--nodes 2 --rate 100 -- true", "--rate 100 is wrong because it has no unit; use one of"),
        (
            "--nodes 2 --rate fast -- true",
            "--rate fast is wrong because it is no rate; use 100mbit",
        ),
        ("--nodes 2 --rate 0mbit -- true", "--rate 0mbit is wrong"),
        ("--nodes 2 --rate -1mbit -- true", "--rate"),
        ("--nodes 2 --delay 5 -- true", "--delay 5 is wrong because it has no unit; use one of us"),
        ("--nodes 2 --loss 0.1 -- true", "--loss 0.1 is wrong because it has no unit; use one"),
        ("--nodes 2 --loss 100% -- true", "--loss 100% is wrong because nothing would arrive"),
        ("--nodes 2 --slow node1 -- true", "--slow node1 is wrong because it is no NODE=RATE"),
        ("--nodes 2 --slow node1=5foo -- true", "--slow node1=5foo is wrong because foo is no"),
        ("--nodes 2 --slow node2=1mbit -- true", "has no node2; use one of node0, node1"),
    ],
)
def test_bad_input_is_one_line(arguments, told, capfd):
    try:
        status = lab_cluster(*arguments.split())
    except SystemExit as left:  # argparse
        status = left.code
    errors = capfd.readouterr().err
    assert status == 2 and told in errors and errors.count("\n") == 1


def test_ctrl_c_ends_all_with_130():
    line = [PYTHON, "-m", "distlab.lab", "cluster", "--nodes", "2", "--", "sh", "-c"]
    mark = uuid.uuid4().hex
    lab = subprocess.Popen(
        [*line, f"trap 'echo ended in peace; exit 7' INT; echo running; {SLEEP} 1000 & wait"],
        env={**os.environ, "LAB_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(2):
        assert "running" in lab.stdout.readline()
    time.sleep(1)  # a shell misses a signal that comes just before it waits
    os.killpg(lab.pid, signal.SIGINT)
    told, errors = lab.communicate(timeout=30)
    assert (lab.returncode, errors) == (130, "error: interrupted\n")
    assert sorted(told.splitlines()) == ["node0| ended in peace", "node1| ended in peace"]
    assert not processes_with(mark.encode())


def test_attached_commands_use_the_callers_streams(cluster, capfd):
    assert cluster.attach("node1", ["sh", "-c", "hostname; exit 4"]) == 4
    assert capfd.readouterr().out == "node1\n"


def test_a_shell_has_the_terminal_and_gives_it_back():
    """On a terminal that `script` makes: a Ctrl-C is for what runs in the shell."""
    asking = """
from distlab.cluster import VirtualCluster
with VirtualCluster(1) as cluster:
    print("status", cluster.attach("node0", ["env", "PS1=ready> ", "bash", "--norc"]))
    print("then", input("more? "))
"""
    shell = subprocess.Popen(
        ["script", "-qec", f"{PYTHON} -c {shlex.quote(asking)}", "/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    told = b""
    try:
        for awaited, typed in (
            (b"ready> ", b"sh -c 'echo at $(hostname); exec sleep 1000'\n"),
            (b"at node0", b"\x03"),
            (b"ready> ", b"exit 3\n"),
            (b"more? ", b"yes\n"),
            (b"then yes", b""),
        ):
            while awaited not in told:
                assert select.select([shell.stdout], [], [], 20)[0], told
                assert (more := os.read(shell.stdout.fileno(), 4096)), told
                told += more
            told = told.partition(awaited)[2]
            shell.stdin.write(typed)
            shell.stdin.flush()
        assert shell.wait(20) == 0
    finally:
        shell.kill()
        shell.communicate()


# Where there can be none


def test_missing_programs_are_named_with_their_package(monkeypatch, capfd):
    monkeypatch.setattr(availability, "find_program", lambda name: None)
    assert "ip and tc are missing" in unavailable() and "iproute2" in unavailable()
    assert lab_cluster("--nodes", "2", "--", "true") == 77
    assert capfd.readouterr().out.startswith("SKIPPED: ip and tc are missing; ")


def test_a_kernel_that_forbids_namespaces_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(availability, "_allowed", lambda mode: False)
    why = unavailable()
    assert why.startswith("this kernel lets this user make no network namespaces; ")
    assert "sysctl" in why or "as root" in why
    with pytest.raises(Skipped, match="no network namespaces"), VirtualCluster(1):
        pass


def test_root_is_root_where_it_may_and_a_user_where_it_must(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(availability, "_allowed", lambda mode: True)
    assert "--user" not in availability.namespace_flags()
    monkeypatch.setattr(availability, "_allowed", lambda mode: "--user" in mode)
    assert "--user" in availability.namespace_flags()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(availability, "_allowed", lambda mode: True)
    assert "--user" in availability.namespace_flags()


def test_netem_is_used_where_the_kernel_has_it():
    both = links.Shape(bits_per_s=1e8, delay_s=2e-3)
    first, second = links.shape_line("sw0", both, netem=True).splitlines()
    assert first == "qdisc replace dev sw0 root handle 1: netem delay 2000us limit 100000"
    assert second.startswith("qdisc replace dev sw0 parent 1:1 handle 10: tbf rate 100000000bit ")
    assert "netem" not in links.shape_line("sw0", both, netem=False)
    lossy = links.shape_line("sw0", links.Shape(loss=0.015), netem=True)
    assert lossy.endswith("netem delay 0us loss 1.5% limit 100000")


def test_a_world_that_has_ended_says_so():
    with VirtualCluster(1) as made:
        os.kill(made._world.pid, signal.SIGKILL)
        until(lambda: made._world._process.poll() is not None)
        with pytest.raises(RunError, match="world has ended"):
            made.power_off("node0")


# Real jobs


@pytest.mark.slow
def test_the_line_of_real_machines_runs_unchanged(tmp_path):
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    line = (
        "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_id=job --rdzv_backend=c10d "
        f"--rdzv_endpoint=node0:29500 {script}"
    )
    with VirtualCluster(2) as cluster:
        done = outputs(cluster.run(line.split(), timeout_s=120, env={"OMP_NUM_THREADS": "1"}))
        assert sorted(done) == ["rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]
        sent = cluster.traffic("node1")
        assert isinstance(sent, Traffic) and sent.sent > 1000 and sent.received > 1000


@pytest.mark.slow
def test_the_benchmark_runs(root):
    done = run_command([PYTHON, str(root / "scripts/bench_cluster.py"), "--preset", "smoke"])
    assert done.status == 0 and "measured / predicted" in done.stdout, done.stderr


@pytest.mark.slow
def test_ranks_without_an_agent(tmp_path):
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    with VirtualCluster(2) as cluster:
        done = cluster.run_ranks([PYTHON, str(script)], env={"OMP_NUM_THREADS": "1"})
        assert outputs(done) == ["rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]


def test_an_ordinary_user_has_a_cluster_too():
    if os.geteuid() != 0:
        pytest.skip("all tests here run as an ordinary user")
    script = """
import os
from distlab.cluster import VirtualCluster
assert os.geteuid() != 0
with VirtualCluster(2, rate="100mbit", delay="1ms") as cluster:
    names = [one.stdout.strip() for one in cluster.run(["hostname"])]
    cluster.power_off("node1")
    cluster.power_on("node1")
    print(*names, cluster.run(["true"])[1].status, cluster.traffic("node0").sent >= 0)
"""
    done = as_nobody(users_python(), script)
    if "no network namespaces" in done.stderr:
        pytest.skip("an ordinary user may make no user namespaces here")
    assert (done.status, done.stdout) == (0, "node0 node1 0 True\n"), done.stderr


def users_python():
    """A Python that an ordinary user can run: ours, or the system's of the same version."""
    version = [str(number) for number in sys.version_info[:2]]
    for python in (PYTHON, "/usr/bin/python3"):
        done = as_nobody(python, "import sys, psutil; print(*sys.version_info[:2])")
        if done.stdout.split() == version:
            return python
    pytest.skip("an ordinary user can read no Python of this version here")


def as_nobody(python, script):
    # Through a shell: setpriv itself would still find a program that the user cannot.
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return run_command(
        [*become, "sh", "-c", 'exec "$@"', "sh", python, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), *packages()])},
        cwd=Path("/"),
        timeout_s=60,
    )


def packages():
    return [path for path in sys.path if path.endswith("site-packages")]
