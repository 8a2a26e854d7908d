"""The counted collectives: right results, and the bytes that follow from their definitions."""

import json
import sys

import pytest
import torch

from distlab.cluster import VirtualCluster, unavailable
from distlab.spawning import spawn
from parallelism.traffic import Traffic


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_collective_gives_its_result_and_counts_its_bytes(world_size):
    for rank, results in enumerate(spawn(every_collective, world_size, timeout_s=60)):
        for name, (found, expected, sent, predicted) in results.items():
            assert found == expected, f"{name} on rank {rank}"
            assert sent == pytest.approx(predicted), f"{name} on rank {rank}"


@pytest.mark.slow
def test_the_counted_bytes_are_those_on_the_wire():
    """Three machines' own network cards say what gloo has sent."""
    if (why := unavailable()) is not None:
        pytest.skip(why)
    command = [sys.executable, "-c", ON_EACH_NODE]
    with VirtualCluster(nodes=3) as cluster:
        nodes = [json.loads(done.stdout) for done in cluster.run_ranks(command, timeout_s=60)]
    # gloo's reduce-scatter all-reduces, and keeps a part: twice what one needs.
    factors = {"reduce_scatter": 2}
    for name in ("all_reduce", "all_gather", "all_to_all", "send", "reduce_scatter"):
        for counted, sent, overhead in (node[name] for node in nodes):
            expected = factors.get(name, 1) * counted
            assert expected <= sent <= expected + overhead, name
    # A broadcast's bytes are shared out otherwise, by a tree, and are the same in all.
    counted, sent, overhead = (
        sum(numbers) for numbers in zip(*(node["broadcast"] for node in nodes), strict=True)
    )
    assert counted <= sent <= counted + overhead


ON_EACH_NODE = """
import json
import torch
from parallelism.traffic import Traffic
from distlab import runtime

# Each packet that TCP sends, an acknowledgement too, has headers; a lost one is sent again.
HEADERS, PACKET = 14 + 20 + 32, 1514
BARRIERS = 100_000  # and what torch's store says meanwhile

def on_the_wire():
    line = next(line for line in open("/proc/self/net/dev") if "eth0:" in line)
    return int(line.split(":")[1].split()[8])

def overhead():
    lines = [line.split() for line in open("/proc/self/net/snmp") if line.startswith("Tcp:")]
    tcp = dict(zip(*lines))
    return HEADERS * int(tcp["OutSegs"]) + PACKET * int(tcp["RetransSegs"])

with runtime.distributed(device="cpu") as job:
    x, ranks = torch.ones(3 << 20), job.world_size
    calls = {
        "all_reduce": lambda traffic: traffic.all_reduce(x),
        "all_gather": lambda traffic: traffic.all_gather(x),
        "reduce_scatter": lambda traffic: traffic.reduce_scatter(list(x.chunk(ranks))),
        "all_to_all": lambda traffic: traffic.all_to_all(x.view(ranks, -1)),
        "broadcast": lambda traffic: traffic.broadcast(x),
        "send": lambda traffic: traffic.exchange(x, (job.rank + 1) % ranks, (job.rank - 1) % ranks),
    }
    found = {}
    for name, call in calls.items():
        job.barrier()
        traffic, before, extra = Traffic(), on_the_wire(), overhead()
        call(traffic)
        job.barrier()
        sent = on_the_wire() - before
        found[name] = traffic.total, sent, overhead() - extra + BARRIERS
    print(json.dumps(found))
"""


def every_collective(job):
    """By collective: what came out, what should have, the bytes counted, those by definition."""
    rank, ranks = job.rank, job.world_size
    others, after, before = ranks - 1, (rank + 1) % ranks, (rank - 1) % ranks
    own = torch.full((6, 2), float(rank))  # 48 bytes
    whole = own.nbytes
    results = {}

    def record(name, expected, predicted, call):
        traffic = Traffic()
        found = call(traffic)
        found = [t.tolist() for t in found] if isinstance(found, list) else found.tolist()
        results[name] = (found, expected, traffic.total, predicted)
        assert traffic.total_calls == len(traffic.bytes) == 1

    def rows(*values):
        return torch.tensor(values).float().unsqueeze(1).expand(-1, 2).tolist()

    total = float(sum(range(ranks)))
    record(
        "all_reduce", rows(*[total] * 6), 2 * others / ranks * whole,
        lambda traffic: traffic.all_reduce(own.clone()),
    )  # fmt: skip
    record(
        "all_gather", [rows(*[r] * 6) for r in range(ranks)], others * whole,
        lambda traffic: traffic.all_gather(own),
    )  # fmt: skip
    record(
        "reduce_scatter", rows(*[total] * 6), others * whole,
        lambda traffic: traffic.reduce_scatter([own.clone() for _ in range(ranks)]),
    )  # fmt: skip
    record(
        "all_to_all", rows(*[r for r in range(ranks) for _ in range(6 // ranks)]),
        others / ranks * whole, lambda traffic: traffic.all_to_all(own),
    )  # fmt: skip
    record(
        "broadcast from the last", rows(*[ranks - 1] * 6),
        whole if ranks > 1 and rank != (ranks - 2) % ranks else 0,
        lambda traffic: traffic.broadcast(own.clone(), source=ranks - 1),
    )  # fmt: skip
    send = [1 + (rank + r) % 2 for r in range(ranks)]  # uneven, the same there and back
    uneven = torch.full((sum(send), 2), float(rank))
    record(
        "all_to_all, uneven", rows(*[r for r in range(ranks) for _ in range(1 + (rank + r) % 2)]),
        8 * (sum(send) - send[rank]), lambda traffic: traffic.all_to_all(uneven, send, send),
    )  # fmt: skip
    if ranks > 1:
        record(
            "exchange", rows(*[before] * 6), whole,
            lambda traffic: traffic.exchange(own.t().contiguous().t(), after, before),
        )  # fmt: skip

        def in_turn(traffic):
            if rank == 0:
                traffic.send(own, after)
            received = traffic.receive(own, before)
            if rank != 0:
                traffic.send(own, after)
            return received

        record("send and receive", rows(*[before] * 6), whole, in_turn)
    else:
        traffic = Traffic()
        assert traffic.exchange(own, 0, 0) is own and traffic.total == 0
    return results
