"""What is joined to what, how closely, and therefore which ranks belong where.

A job's ranks do not talk to all others alike. Tensor parallelism reduces activations in every
layer, so its group wants the closest links, NVLink; data parallelism talks once a step, and crosses
machines. A rank that runs on the other socket's cores, or sends through the other socket's NIC,
pays for the link between the sockets each time. This script shows the links and says where to put
the ranks: of this machine, with GPUs or without, or of another whose matrix somebody has saved.

Run:
    python chapter02-gpu-hardware-parallelism/code/topology.py --tp 4
    nvidia-smi topo -m > matrix.txt    # on the other machine
    python chapter02-gpu-hardware-parallelism/code/topology.py --matrix matrix.txt --tp 4

You should see: the caches, NUMA nodes, network devices and GPUs that there are, with unknown where
the kernel does not tell; the links as a matrix; a rank's GPU, NIC and cores on each line of the
placement; and a verdict on the tensor-parallel groups.
"""

from argparse import Namespace
from pathlib import Path

from distlab import files, host, script
from distlab.script import Run, UsageError
from parallelism import machine
from parallelism.machine import Matrix, closeness, cpu_ranks, this_matrix
from parallelism.topology import (
    MEANING,
    best_by_trying_all,
    best_groups,
    best_ring,
    draw_cores,
    draw_matrix,
    mermaid,
    nearest_nics,
    parse_matrix,
    ring_by_trying_all,
    ring_link,
    share_of_cores,
    show_devices,
    show_host,
    verdict,
    worst_of,
)

PRESETS: dict[str, dict[str, object]] = {"smoke": {}, "laptop": {}, "gpu": {}}
FEW = 8  # GPUs: all their groupings and rings can be tried


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    matrix = read_matrix(args.matrix) if args.matrix else this_matrix()
    check_degrees(args, matrix)
    with script.run(args) as run:
        if not args.matrix:
            show_host(run)
            show_devices(run)
        if matrix.gpus:
            show_links(run, matrix)
            place_on_gpus(run, matrix, args)
        else:
            place_on_cores(run, args)
        if args.mermaid:
            files.write_text(args.mermaid, mermaid(matrix))
            run.print(f"figure: {args.mermaid}")
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--matrix", metavar="FILE", help="what nvidia-smi topo -m printed")
    parser.add_argument(
        "--world-size", type=script.positive_int, help="ranks (default: one for each GPU)"
    )
    parser.add_argument(
        "--tp", type=script.positive_int, default=2, help="ranks in a tensor-parallel group"
    )
    parser.add_argument("--mermaid", metavar="FILE", type=Path, help="write a diagram of the links")
    args = parser.parse_args(argv)
    if args.mermaid:
        files.refuse_unwritable_file("--mermaid", args.mermaid)
    return args


def read_matrix(path: str) -> Matrix:
    try:
        return parse_matrix(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--matrix {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(
            f"--matrix {path} is wrong because {error}; use the text that nvidia-smi topo -m prints"
        ) from error


def check_degrees(args: Namespace, matrix: Matrix) -> None:
    """Fill in the world size, and refuse one that the groups or the machines do not divide."""
    gpus = len(matrix.gpus)
    if args.world_size is None:
        args.world_size = gpus if gpus else max(args.tp, len(machine.nodes()))
    if args.world_size % args.tp:
        raise UsageError(
            f"--tp {args.tp} does not divide {args.world_size} ranks; use a divisor of it"
        )
    if gpus and args.world_size > gpus and args.world_size % gpus:
        raise UsageError(
            f"--world-size {args.world_size} does not fill machines of {gpus} GPUs; "
            f"use a multiple of {gpus}"
        )
    if gpus and args.tp > gpus and args.tp % gpus:
        raise UsageError(f"--tp {args.tp} does not fill machines of {gpus} GPUs; use {gpus}")


def show_links(run: Run, matrix: Matrix) -> None:
    """The matrix as a table and as a figure, and what its words mean."""
    names = matrix.names
    run.table(
        "links",
        ["", *names],
        [[a, *(matrix.link(a, b) for b in names)] for a in names],
        caption="Links, the closest first: " + "; ".join(f"{k} {v}" for k, v in MEANING.items()),
    )
    draw_matrix(run, matrix)


def place_on_gpus(run: Run, matrix: Matrix, args: Namespace) -> None:
    """Groups for tensor parallelism; and each rank's GPU, NIC and cores."""
    size = min(args.tp, len(matrix.gpus))
    used = min(args.world_size, len(matrix.gpus))
    groups = best_groups(matrix, used // size, size)
    order = [gpu for group in groups for gpu in group]
    rows = []
    for rank, gpu in enumerate(order):
        beside = [other for other in order if matrix.home(other) == matrix.home(gpu)]
        nics = nearest_nics(matrix, gpu)
        cores = matrix.cores.get(gpu)
        rows.append([
            str(rank), str(rank // size), gpu,
            " ".join(matrix.devices.get(nic, nic) for nic in nics) or "none",
            matrix.link(gpu, nics[0]) if nics else "—",
            matrix.numa.get(gpu, "unknown"),
            share_of_cores(cores, len(beside), beside.index(gpu)) if cores else "unknown",
        ])  # fmt: skip
    run.table(
        "placement",
        ["local rank", "TP group", "GPU", "nearest NIC", "over", "NUMA node", "bind to cores"],
        rows,
        caption="One machine's ranks; a NIC at NODE or SYS is behind the processor",
    )
    run.print(f"verdict: {verdict(matrix, groups, args)}")
    run.extra(groups=[list(group) for group in groups])

    run.check_equal("no GPU is in two groups", len(set(order)), used)
    if used == len(matrix.gpus) <= FEW:
        run.check_equal(
            "no other grouping keeps to closer links, all of them tried",
            worst_of(matrix, groups),
            best_by_trying_all(matrix, size),
        )
        ring = best_ring(matrix, groups[0])
        run.check_equal(
            "no other ring through the first group has closer links, all of them tried",
            ring_link(matrix, ring),
            ring_by_trying_all(matrix, groups[0]),
        )
    run.check_true(
        "a group's ring is never farther than its farthest pair",
        all(
            closeness(ring_link(matrix, best_ring(matrix, group))) >= closeness(matrix.worst(group))
            for group in groups
        ),
        f"{len(groups)} groups of {size}",
    )


def place_on_cores(run: Run, args: Namespace) -> None:
    """Without a GPU a rank's device is its share of the cores: those of one NUMA node."""
    ranks = cpu_ranks(args.world_size)
    run.table(
        "placement",
        ["rank", "TP group", "NUMA node", "bind to cores", "threads"],
        [[str(r), str(r // args.tp), str(rank.node), rank.cores, rank.threads]
         for r, rank in enumerate(ranks)],
        caption="No GPU: ranks share the cores; taskset -c CORES with OMP_NUM_THREADS=threads",
    )  # fmt: skip
    draw_cores(run)
    apart = sum(
        len({rank.node for rank in ranks[start : start + args.tp]}) > 1
        for start in range(0, len(ranks), args.tp)
    )
    across = f"{apart} of them cross NUMA nodes" if apart else "each within one NUMA node"
    groups = f"groups of {args.tp}: {len(ranks) // args.tp}"
    run.print(f"verdict: tensor-parallel {groups}, {across}")
    counted = sum(rank.threads for rank in ranks)
    run.check_true(
        "no core has two ranks while another has none",
        counted <= max(host.usable_cores(), len(ranks)),
        f"{counted} threads on {host.usable_cores()} cores",
    )


if __name__ == "__main__":
    script.exit(main)
