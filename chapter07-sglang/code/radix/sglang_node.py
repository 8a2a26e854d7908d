"""One node of sglang_multi_node.sh: starts SGLang there, and ends it when the head is gone."""

import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import closing
from pathlib import Path

from distlab import script
from distlab.errors import RunError, UsageError
from distlab.hardware import has_cuda
from distlab.process import Job, job
from distlab.service import answers, await_that
from distlab.serving.tiny_model import PRESETS, add_model_flags, model_directory
from radix.sglang_server import (
    known_options,
    refuse_without_sglang,
    serve_line,
    set_environment,
    split_flags,
)

POLL_S, HEAD_GONE_S = 0.5, 3.0
LAST_LINES = 20
UDP_PORT = 9  # nothing is sent to it


def main() -> int:
    args, flags, command = parse_args(sys.argv[1:])
    refuse_without_sglang()
    rank, nodes, head = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"]), os.environ["HEAD"]
    model = model_directory(args)
    per_node = ranks_here()
    set_environment(ranks=nodes * per_node)
    interface_of(head)
    line = ["--host", "127.0.0.1", "--port", str(args.port), "--log-level", "warning"]
    line += ["--enable-cache-report", f"--{args.parallel}-size", str(nodes * per_node)]
    line += ["--nnodes", str(nodes), "--node-rank", str(rank)]
    line += ["--dist-init-addr", f"{socket.gethostbyname(head)}:{args.dist_port}"]
    line = [sys.executable, "-m", "sglang.launch_server",
            *serve_line(model, args.preset, [*line, *flags])]  # fmt: skip
    # With a command its output is what is wanted: SGLang's is shown where it fails.
    with job(line, os.environ, Path.cwd(), echo=not command) as server:
        if rank > 0:
            return follow(server, head, args, bool(command))
        await_ready(server, args, bool(command))
        if command:
            return subprocess.run(command).returncode
        print(f"serving {model.name} over {nodes} nodes at http://127.0.0.1:{args.port}/v1")
        return server.process.wait()


def parse_args(argv: list[str]) -> tuple[Namespace, list[str], list[str]]:
    """Our flags, SGLang's, and the head's command."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--parallel", choices=["tp", "pp"], default="tp")
    parser.add_argument("--port", type=script.positive_int, default=8200)
    parser.add_argument("--dist-port", type=script.positive_int, default=29521)
    parser.add_argument("--start-timeout", type=script.positive_float, default=300.0)
    for name in ("NODE_RANK", "NNODES"):
        if not os.environ[name].isdecimal():
            raise UsageError(f"{name}={os.environ[name]} is no number; use 0, 1, 2, ...")
    ours, flags = split_flags(argv[:end], known_options(parser))
    return parser.parse_args(ours), flags, argv[end + 1 :]


def ranks_here() -> int:
    """As many as this node has GPUs, or one."""
    if not has_cuda():
        return 1
    import torch

    return torch.cuda.device_count()


def interface_of(head: str) -> None:
    """Have gloo and SGLang use this node's address on the way to the head; no packet is sent."""
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((head, UDP_PORT))
            os.environ.setdefault("SGLANG_HOST_IP", probe.getsockname()[0])
    except OSError as error:
        raise UsageError(f"HEAD={head} cannot be reached from this node: {error}") from error


def await_ready(server: Job, args: Namespace, silent: bool) -> None:
    """Return when the head's server answers."""

    def runs() -> None:
        if server.process.poll() is not None:
            show_end(server, silent)
            raise RunError("SGLang ended before it was ready; its last lines stand above")

    url = f"http://127.0.0.1:{args.port}/health"
    late = "SGLang was not ready (do all nodes run, and reach each other? see --start-timeout)"
    await_that(lambda: answers(url), args.start_timeout, late, runs)


def follow(server: Job, head: str, args: Namespace, silent: bool) -> int:
    """Wait while the head's rank 0 listens where all ranks meet; without it end this part too."""
    deadline = time.monotonic() + args.start_timeout
    last_seen = None
    while server.process.poll() is None:
        now = time.monotonic()
        if listens(head, args.dist_port):
            last_seen = now
        elif last_seen is None and now > deadline:
            raise RunError(f"HEAD={head} did not come up within {args.start_timeout:g} s")
        elif last_seen is not None and now - last_seen > HEAD_GONE_S:
            return 0
        time.sleep(POLL_S)
    # It ends by itself, with whatever status, when the connection to the head breaks.
    time.sleep(HEAD_GONE_S)
    if listens(head, args.dist_port):
        show_end(server, silent)
        raise RunError(f"SGLang ended on this node with status {server.process.returncode}")
    return 0


def show_end(server: Job, silent: bool) -> None:
    """The last lines of an SGLang whose output was not shown."""
    if silent:
        server.read_to_end()
        sys.stderr.writelines(server.texts["stderr"][-LAST_LINES:])


def listens(head: str, port: int) -> bool:
    try:
        with closing(socket.create_connection((head, port), timeout=1)):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    script.exit(main)
