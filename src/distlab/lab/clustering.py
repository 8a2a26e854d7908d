"""`lab cluster`: run a command on each node of a virtual cluster."""

import os
import shlex
import sys
from argparse import Namespace

from distlab.cluster import VirtualCluster
from distlab.cluster.commands import say
from distlab.cluster.slurm import HELP
from distlab.errors import UsageError
from distlab.script import OneLineParser

EPILOG = """CMD runs on every node at once, with NODE_RANK, NNODES and HEAD set; its lines come with
the node's name, and the status is the worst. """


def main(argv: list[str]) -> int:
    args, command = parse_args(argv)
    made_by = ["python3", "scripts/lab.py", "cluster", *argv[: argv.index("--")]]
    os.environ["LAB_CLUSTER"] = shlex.join(made_by)  # for the records of what runs there
    slow = dict(_node_and_rate(text) for text in args.slow)
    with VirtualCluster(args.nodes, args.rate, args.delay, slow, args.slurm, args.loss) as cluster:
        if cluster.slurm:
            return _shell_status(cluster.slurm.attach(command))
        done = cluster.run(command, timeout_s=None, echo=True)
    for node, one in zip(cluster.names, done, strict=True):
        for what in one.left_running:
            say(f"{node}| ended what the command left running: {what}", sys.stderr)
    return max(_shell_status(one.status) for one in done)


def parse_args(argv: list[str]) -> tuple[Namespace, list[str]]:
    parser = OneLineParser(
        "lab cluster",
        usage="%(prog)s --nodes N [--rate R] [--delay T] [--loss P] [--slow NODE=R]... [--slurm]"
        " -- CMD ...",
        description=__doc__,
        epilog=EPILOG + HELP,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--rate", metavar="R", help="of each node's link, such as 1gbit or 100mbit")
    parser.add_argument("--delay", metavar="T", help="from node to node, such as 1ms or 200us")
    parser.add_argument("--loss", metavar="P", help="of the packets to each node, such as 1%%")
    parser.add_argument(
        "--slow", action="append", default=[], metavar="NODE=R", help="another rate for one node"
    )
    parser.add_argument("--slurm", action="store_true", help="with a real Slurm on the nodes")
    end = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not command:
        raise UsageError("there is no command to run; write it after --, such as -- hostname")
    return args, command


def _node_and_rate(text: str) -> tuple[str, str]:
    node, sign, rate = text.partition("=")
    if not (node and sign and rate):
        raise UsageError(f"--slow {text} is wrong because it is no NODE=RATE; use node1=100mbit")
    return node, rate


def _shell_status(status: int) -> int:
    """As the shell gives it: 128 + N for a command that signal N ended."""
    return 128 - status if status < 0 else status
