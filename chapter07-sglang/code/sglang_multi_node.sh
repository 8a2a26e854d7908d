#!/bin/bash
# One model over several nodes: SGLang with tensor or pipeline parallelism, a rank on each node.
#
# Start it on each node, with NODE_RANK (0, 1, ...), NNODES and HEAD (node 0's name or address) set.
# `lab cluster` sets them, on a virtual cluster on this machine:
#
#     python -m distlab.lab cluster --nodes 2 -- bash chapter07-sglang/code/sglang_multi_node.sh \
#         -- python chapter07-sglang/code/sglang_client.py --reference
#
# On two machines by hand, from the repository's root, in the environment sglang:
#
#     NODE_RANK=0 NNODES=2 HEAD=10.0.0.1 bash chapter07-sglang/code/sglang_multi_node.sh --model DIR
#     NODE_RANK=1 NNODES=2 HEAD=10.0.0.1 bash chapter07-sglang/code/sglang_multi_node.sh --model DIR
#
#   --model DIR           a Hugging Face folder, the same on every node (default: a tiny model)
#   --parallel tp|pp      a part of every matrix on each node (tp, default), or some of the layers (pp)
#   --port P              of the server, on the head's 127.0.0.1 (default 8200)
#   --dist-port P         of the head's, by which the ranks find each other (default 29521)
#   --start-timeout S     until the server answers (default 300)
#   -- COMMAND            run this on the head when the server is ready, then end all nodes
#
# Every other flag goes to SGLang. Slurm's SLURM_NODEID and SLURM_NNODES stand in for NODE_RANK and
# NNODES; give HEAD the first node's name. A node whose head is gone ends too.
set -euo pipefail
case "${1:-}" in
    --help | -h)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
esac
export NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}" NNODES="${NNODES:-${SLURM_NNODES:-}}"
if [ -z "$NODE_RANK" ] || [ -z "$NNODES" ] || [ -z "${HEAD:-}" ]; then
    echo "error: NODE_RANK, NNODES and HEAD say which node this is; see --help" >&2
    exit 2
fi
exec python -m radix.sglang_node "$@"
