"""One node of vllm_multi_node.sh: starts vLLM's part on it, and ends it when the head is gone."""

import os
import socket
import sys
from argparse import Namespace
from pathlib import Path

from distlab import script
from distlab.hardware import has_cuda
from distlab.serving.node import Engine, Place, known_options, ranks_here, split_flags, this_node
from distlab.serving.tiny_model import PRESETS, add_model_flags, model_directory
from inference.vllm_settings import CPU_CACHE_BYTES, refuse, set_environment


def main() -> int:
    args, flags, command = parse_args(sys.argv[1:])
    place = this_node()
    model = model_directory(args)
    refuse(model, args.max_model_len)
    set_environment(multiprocessing=True)
    os.environ["VLLM_HOST_IP"] = place.own_address
    line = [sys.executable, "-m", "inference.vllm_command", *serve_line(args, model, place), *flags]
    engine = Engine("vLLM", model.name, line, args.port, args.master_port, args.start_timeout)
    return engine.run(place, command)


def parse_args(argv: list[str]) -> tuple[Namespace, list[str], list[str]]:
    """Our flags, vLLM's, and the head's command."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--port", type=script.positive_int, default=8100)
    parser.add_argument("--master-port", type=script.positive_int, default=29511)
    parser.add_argument("--max-model-len", type=script.positive_int, default=1024)
    parser.add_argument("--start-timeout", type=script.positive_float, default=300.0)
    ours, flags = split_flags(argv[:end], known_options(parser))
    return parser.parse_args(ours), flags, argv[end + 1 :]


def serve_line(args: Namespace, model: Path, place: Place) -> list[str]:
    """`vllm serve`, with as many tensor-parallel ranks as there are GPUs, or one a node."""
    line = ["serve", str(model), "--served-model-name", model.name]
    line += ["--host", "127.0.0.1", "--port", str(args.port)]
    line += ["--max-model-len", str(args.max_model_len), "--disable-uvicorn-access-log"]
    line += [
        "--tensor-parallel-size",
        str(place.nodes * ranks_here()),
        "--nnodes",
        str(place.nodes),
    ]
    line += ["--node-rank", str(place.rank), "--master-addr", socket.gethostbyname(place.head)]
    line += ["--master-port", str(args.master_port)]
    if place.rank > 0:
        line.append("--headless")
    if not has_cuda():
        line += ["--dtype", "float32", "--gpu-memory-utilization", "0.1", "--block-size", "32"]
        line += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES[args.preset]), "--enforce-eager"]
    return line


if __name__ == "__main__":
    script.exit(main)
