"""One job of `comm_hooks.py` on a virtual cluster whose links change when the job asks for it."""

import tempfile
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distlab.cluster import VirtualCluster, flags_for_nodes, record_of
from distlab.errors import RunError
from distlab.files import write_text
from distlab.runtime import Runtime

FOR_THE_NODES = (
    "preset", "model", "hidden_size", "layers", "heads", "kv_heads", "vocab_size", "corpus",
    "corpus_mb", "seq_len", "batch_size", "steps", "timed_steps", "learning_rate",
    "start_powersgd", "seed", "timeout",
)  # fmt: skip
REQUEST = "rate-wanted"
LOOK_EVERY_S = 0.02


def measure_on_links(args: Namespace, script: Path) -> dict[str, Any]:
    """Run `script` on `args.nodes` nodes, a rank on each; rank 0's record.

    The job trains while the links are as fast as this machine, and is timed on each of the rates.
    """
    with (
        VirtualCluster(args.nodes) as cluster,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as pool,
    ):
        ended = threading.Event()
        served = pool.submit(change_links, cluster, Path(folder), ended)
        try:
            flags = [*node_flags(args), "--ask", folder]
            record = record_of(cluster, script, flags, timeout_s=4 * args.timeout)
        finally:
            ended.set()
        served.result()
    return record


def node_flags(args: Namespace) -> list[str]:
    """The script's flags on a node: those given here, its interface, and gloo on its CPU."""
    return [*flags_for_nodes(args, ["hooks", "rates", *FOR_THE_NODES]), "--interface", "eth0"]


def change_links(cluster: VirtualCluster, folder: Path, ended: threading.Event) -> None:
    """Give every link the rate that a file in `folder` names, and take the file away."""
    request = folder / REQUEST
    while not ended.wait(LOOK_EVERY_S):
        if request.exists():
            for node in cluster.names:
                cluster.rate(node, request.read_text())
            request.unlink()


def ask_for_rate(folder: Path, rate: str, job: Runtime, timeout_s: float) -> None:
    """Have the links changed to `rate`; every rank returns when they are."""
    if job.is_main:
        write_text(folder / REQUEST, rate)
        deadline = time.monotonic() + timeout_s
        while (folder / REQUEST).exists():
            if time.monotonic() > deadline:
                raise RunError(f"the links did not change to {rate} within {timeout_s:g} s")
            time.sleep(LOOK_EVERY_S)
    job.barrier()
