"""What scripts/gpu_check.sh runs: every lesson's commands on this machine's GPU, then the records.

Needs no network and no environment of ours: it uses the torch that is installed.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from distlab import record
from distlab.display import text_table
from distlab.errors import Skipped
from distlab.lab.blocks import Outcome, Servers, gpu_count, run_block
from distlab.lab.lessons import RANKS, SCRIPT, Block, chapters
from distlab.lab.running import block_folder, summary
from distlab.script import OneLineParser, exit

BLOCK_LIMIT_S = 300.0


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if gpu_count() == 0:
        raise Skipped("torch sees no GPU on this machine")
    blocks = [b for one in chapters() for b in one.blocks() if b.env == "core" and not b.norun]
    outcomes: list[Outcome] = []
    with Servers("smoke", args.out / "servers") as servers:
        for block in [b for b in blocks if not b.background]:
            servers.start_for(block)
            if "smoke" in args.steps:
                outcomes += [run_one(each, "smoke", args.out) for each in variants(block)]
            if "record" in args.steps and block.record:
                outcomes.append(keep(run_one(on_gpus(block), "gpu", args.out), args.out))
    print(summary(outcomes))
    failures = [[o.block.text.strip(), o.reason] for o in outcomes if o.result == "failed"]
    if failures:
        print(text_table(["command", "why"], failures, "failed"))
    return 1 if failures or not outcomes else 0


def variants(block: Block) -> list[Block]:
    """`block` with a GPU for each rank, and, if it starts several ranks, two that share a GPU."""
    shared = SCRIPT.sub(r"\g<0> --backend gloo --device cuda", RANKS.sub(_ranks(2), block.text))
    return [on_gpus(block), *([replace(block, text=shared, gpus=1)] if block.ranks > 1 else [])]


def on_gpus(block: Block) -> Block:
    """`block` with as many ranks as there are GPUs, and no more than it asks for."""
    count = min(block.ranks, gpu_count())
    return replace(block, text=RANKS.sub(_ranks(count), block.text), gpus=max(1, block.gpus))


def run_one(block: Block, preset: str, out: Path) -> Outcome:
    folder = out / preset / block_folder(block)
    print(f"\n$ {block.text.strip()}", flush=True)
    outcome = run_block(block, preset, folder, "nccl", BLOCK_LIMIT_S, echo=True)
    if outcome.result != "ran":
        print(f"{outcome.result}: {outcome.reason}", flush=True)
    return outcome


def keep(outcome: Outcome, out: Path) -> Outcome:
    """Write a kept block's record as OUT/NAME@GPU.json, to be copied into the chapter's results."""
    for made in outcome.records:
        gpu = re.sub(r"[^a-z0-9]+", "-", made["machine"]["gpus"][0]["name"].lower())
        record.save(made, out / f"{outcome.block.record}@{gpu}.json")
    return outcome


def _ranks(count: int) -> str:
    return f"--nproc_per_node={count}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument(
        "--steps", nargs="+", choices=["smoke", "record"], default=["smoke", "record"]
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit(main)
