"""What the lesson's table of networks says: each mistake is made, and looks as the table has it."""

import os
import sys
import tempfile

import pytest

from distlab.cluster import VirtualCluster, unavailable
from distlab.cluster.availability import find_program, install_line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

JOB = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from distlab import script
from distlab.runtime import distributed

def main():
    # Both have imported torch now: the time-out, of which gloo's is five times, may be short.
    pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
    until = time.monotonic() + 60
    while len(os.listdir(sys.argv[1])) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    with distributed(timeout_s=3) as job:
        total = torch.ones(())
        dist.all_reduce(total)
        print("all ranks:", total.item())
    return 0

script.exit(main)
"""
STORE = 29511  # the port of rank 0 where the ranks meet
SECOND_NETWORK = """
ip link add private type veth peer name elsewhere
ip addr add 192.168.7.1/24 dev private
ip link set private up
ip link set elsewhere up
"""
FIREWALL = f"""
nft add table inet site
nft add chain inet site in '{{ type filter hook input priority 0; }}'
nft add rule inet site in iifname eth0 tcp dport {STORE} accept
nft add rule inet site in iifname eth0 tcp sport {STORE} accept
nft add rule inet site in iifname eth0 meta l4proto tcp drop
"""
OPENED = """
ports=$(tr '\\t' - < /proc/sys/net/ipv4/ip_local_port_range)
nft insert rule inet site in iifname eth0 tcp dport $ports accept
"""


@pytest.fixture(scope="module")
def cluster():
    with VirtualCluster(2) as made:
        yield made


def on_all_nodes(cluster, shell):
    for done in cluster.run(["sh", "-ec", f"PATH=$PATH:/usr/sbin:/sbin\n{shell}"]):
        assert done.status == 0, done.stderr


def run_job(cluster, **env):
    """Statuses, and what the two ranks printed, together."""
    env = {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(STORE), **env}
    with tempfile.TemporaryDirectory() as folder:
        done = cluster.run_ranks([sys.executable, "-c", JOB, folder], env=env, timeout_s=90)
    return [one.status for one in done], "\n".join(one.stdout + one.stderr for one in done)


def test_ranks_that_offer_an_address_of_another_network_are_refused_there(cluster):
    on_all_nodes(cluster, SECOND_NETWORK)
    statuses, told = run_job(cluster, GLOO_SOCKET_IFNAME="private")
    assert statuses == [1, 1] and "could not meet the others" in told
    assert "Connection refused" in told and "[192.168.7.1]" in told
    assert run_job(cluster, GLOO_SOCKET_IFNAME="eth0")[0] == [0, 0]


def test_behind_a_firewall_the_store_answers_and_the_ranks_time_out(cluster):
    if find_program("nft") is None and os.environ.get("CI") != "true":
        pytest.skip(f"no nft here: {install_line(['nftables'])}")
    on_all_nodes(cluster, FIREWALL)
    statuses, told = run_job(cluster)
    assert statuses == [1, 1] and "could not meet the others" in told
    assert "connectFullMesh" in told and "imeout" in told  # gloo's, so the store was reached
    on_all_nodes(cluster, OPENED)
    assert run_job(cluster)[0] == [0, 0]
