"""One node of sglang_multi_node.sh: starts SGLang there, and ends it when the head is gone."""

import os
import socket
import sys
from argparse import Namespace

from distlab import script
from distlab.serving.node import Engine, known_options, ranks_here, split_flags, this_node
from distlab.serving.tiny_model import PRESETS, add_model_flags, model_directory
from radix.sglang_server import refuse_without_sglang, serve_line, set_environment


def main() -> int:
    args, flags, command = parse_args(sys.argv[1:])
    place = this_node()
    refuse_without_sglang()
    model = model_directory(args)
    ranks = place.nodes * ranks_here()
    set_environment(ranks)
    os.environ.setdefault("SGLANG_HOST_IP", place.own_address)
    line = ["--host", "127.0.0.1", "--port", str(args.port), "--log-level", "warning"]
    line += ["--enable-cache-report", f"--{args.parallel}-size", str(ranks)]
    line += ["--nnodes", str(place.nodes), "--node-rank", str(place.rank)]
    line += ["--dist-init-addr", f"{socket.gethostbyname(place.head)}:{args.dist_port}"]
    line = [sys.executable, "-m", "sglang.launch_server",
            *serve_line(model, args.preset, [*line, *flags])]  # fmt: skip
    # With a command its output is what is wanted, not SGLang's.
    engine = Engine("SGLang", model.name, line, args.port, args.dist_port, args.start_timeout,
                    echo=not command)  # fmt: skip
    return engine.run(place, command)


def parse_args(argv: list[str]) -> tuple[Namespace, list[str], list[str]]:
    """Our flags, SGLang's, and the head's command."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    parser.add_argument("--parallel", choices=["tp", "pp"], default="tp")
    parser.add_argument("--port", type=script.positive_int, default=8200)
    parser.add_argument("--dist-port", type=script.positive_int, default=29521)
    parser.add_argument("--start-timeout", type=script.positive_float, default=300.0)
    ours, flags = split_flags(argv[:end], known_options(parser))
    return parser.parse_args(ours), flags, argv[end + 1 :]


if __name__ == "__main__":
    script.exit(main)
