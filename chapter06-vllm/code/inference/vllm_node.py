"""One node of vllm_multi_node.sh: starts vLLM's part on it, and ends it when the head is gone."""

import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import closing
from itertools import islice
from pathlib import Path

from distlab import script
from distlab.errors import RunError, UsageError
from distlab.hardware import has_cuda
from distlab.process import Job, job
from distlab.service import answers as answers_http
from distlab.service import await_that
from distlab.serving.tiny_model import PRESETS, add_model_flags, model_directory
from inference.vllm_settings import CPU_CACHE_BYTES, refuse, set_environment

POLL_S = 0.5
HEAD_GONE_S = 3.0
UDP_PORT = 9  # nothing is sent to it


def main() -> int:
    args, flags, command = parse_args(sys.argv[1:])
    rank, nodes, head = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"]), os.environ["HEAD"]
    model = model_directory(args)
    refuse(model, args.max_model_len)
    set_environment(multiprocessing=True)
    os.environ["VLLM_HOST_IP"] = own_address(head)
    line = [sys.executable, "-m", "inference.vllm_command"]
    line += [*serve_line(args, model, rank, nodes, head), *flags]
    with job(line, os.environ, Path.cwd(), echo=True) as server:
        if rank > 0:
            return follow(server, head, args)
        await_ready(server, args)
        if command:
            return subprocess.run(command).returncode
        print(f"serving {model.name} over {nodes} nodes at http://127.0.0.1:{args.port}/v1")
        return server.process.wait()


def parse_args(argv: list[str]) -> tuple[Namespace, list[str], list[str]]:
    """Our flags, vLLM's, and the head's command."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--port", type=script.positive_int, default=8100)
    parser.add_argument("--master-port", type=script.positive_int, default=29511)
    parser.add_argument("--max-model-len", type=script.positive_int, default=1024)
    parser.add_argument("--start-timeout", type=script.positive_float, default=300.0)
    known = {option for action in parser._actions for option in action.option_strings}
    ours, flags = split_flags(argv[:end], known)
    for name in ("NODE_RANK", "NNODES"):
        if not os.environ[name].isdecimal():
            raise UsageError(f"{name}={os.environ[name]} is no number; use 0, 1, 2, ...")
    return parser.parse_args(ours), flags, argv[end + 1 :]


def split_flags(words: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The words that are known flags, each with its one value, and the others."""
    ours: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, is_whole, _ = word.partition("=")
        if flag not in known:
            others.append(word)
        else:
            ours += [word] if is_whole else [word, *islice(rest, 1)]
    return ours, others


def serve_line(args: Namespace, model: Path, rank: int, nodes: int, head: str) -> list[str]:
    """`vllm serve`, with as many tensor-parallel ranks as there are GPUs, or one a node."""
    line = ["serve", str(model), "--served-model-name", model.name]
    line += ["--host", "127.0.0.1", "--port", str(args.port)]
    line += ["--max-model-len", str(args.max_model_len), "--disable-uvicorn-access-log"]
    line += ["--tensor-parallel-size", str(nodes * ranks_here()), "--nnodes", str(nodes)]
    line += ["--node-rank", str(rank), "--master-addr", socket.gethostbyname(head)]
    line += ["--master-port", str(args.master_port)]
    if rank > 0:
        line.append("--headless")
    if not has_cuda():
        line += ["--dtype", "float32", "--gpu-memory-utilization", "0.1", "--block-size", "32"]
        line += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES[args.preset]), "--enforce-eager"]
    return line


def ranks_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def own_address(head: str) -> str:
    """This node's address on the way to the head; no packet is sent for it."""
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((head, UDP_PORT))
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"HEAD={head} cannot be reached from this node: {error}") from error


def await_ready(server: Job, args: Namespace) -> None:
    """Return when the head's server answers."""

    def runs() -> None:
        if server.process.poll() is not None:
            raise RunError("vLLM ended before it was ready; its last lines stand above")

    url = f"http://127.0.0.1:{args.port}/health"
    late = "vLLM was not ready (do all nodes run, and reach each other? see --start-timeout)"
    await_that(lambda: answers_http(url), args.start_timeout, late, runs)


def follow(server: Job, head: str, args: Namespace) -> int:
    """Wait while the head is there; by itself a headless vLLM would wait for it for ever."""
    deadline = time.monotonic() + args.start_timeout
    last_seen = None
    while server.process.poll() is None:
        now = time.monotonic()
        if answers(head, args.master_port):
            last_seen = now
        elif last_seen is None and now > deadline:
            raise RunError(f"HEAD={head} did not come up within {args.start_timeout:g} s")
        elif last_seen is not None and now - last_seen > HEAD_GONE_S:
            return 0
        time.sleep(POLL_S)
    # It ends by itself, with whatever status, when the connection to the head breaks.
    time.sleep(HEAD_GONE_S)
    if answers(head, args.master_port):
        raise RunError(f"vLLM ended on this node with status {server.process.returncode}")
    return 0


def answers(head: str, port: int) -> bool:
    """Whether the head's rank 0, where all ranks meet, still listens."""
    try:
        with closing(socket.create_connection((head, port), timeout=1)):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    script.exit(main)
