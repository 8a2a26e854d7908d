"""What scripts/gpu_check.sh runs: the lessons' commands on this machine's GPU, records and tests.

Needs no network and no environment of ours: it uses the torch that is installed.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from distlab import record
from distlab.display import text_table
from distlab.errors import Skipped, UsageError
from distlab.files import repo_root
from distlab.lab.blocks import Outcome, gpu_count
from distlab.lab.lessons import RANKS, SCRIPT, Block, chapters
from distlab.lab.playing import play
from distlab.lab.running import block_folder, summary
from distlab.script import OneLineParser, exit

BLOCK_LIMIT_S = 300.0
TESTS_LIMIT_S = 400.0
STEPS = ("smoke", "record", "tests")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if gpu_count() == 0:
        raise Skipped("torch sees no GPU on this machine")
    wanted = [one for one in chapters() if args.chapters is None or one.number in args.chapters]
    typed = [b for one in wanted for b in one.blocks() if runs_here(b)]
    blocks = [b for b in typed if not b.background]
    outcomes: list[Outcome] = []
    if "smoke" in args.steps:
        outcomes += run([each for b in blocks for each in variants(b)], "smoke", args.out)
    if "record" in args.steps:
        kept = run([on_gpus(b) for b in blocks if b.record], "gpu", args.out)
        outcomes += [keep(outcome, args.out) for outcome in kept]
    print(summary(outcomes))
    failures = [[o.block.text.strip(), o.reason] for o in outcomes if o.result == "failed"]
    if failures:
        print(text_table(["command", "why"], failures, "failed"))
    passed = run_tests() if "tests" in args.steps else None
    nothing = not outcomes and passed is None
    return 1 if failures or passed is False or nothing else 0


def runs_here(block: Block) -> bool:
    """Whether `block` needs no environment but that of the machine: lab.py would set one up."""
    return block.env == "core" and not block.norun and "scripts/lab.py" not in block.text


def variants(block: Block) -> list[Block]:
    """`block` with a GPU for each rank, and, if it starts several ranks, two that share a GPU."""
    shared = SCRIPT.sub(r"\g<0> --backend gloo --device cuda", RANKS.sub(_ranks(2), block.text))
    return [on_gpus(block), *([replace(block, text=shared, gpus=1)] if block.ranks > 1 else [])]


def on_gpus(block: Block) -> Block:
    """`block` with as many ranks as there are GPUs, and no more than it asks for."""
    count = min(block.ranks, gpu_count())
    return replace(block, text=RANKS.sub(_ranks(count), block.text), gpus=max(1, block.gpus))


def run(blocks: list[Block], preset: str, out: Path) -> list[Outcome]:
    folders = [(block, out / preset / block_folder(block)) for block in blocks]
    return list(play(folders, preset, "nccl", BLOCK_LIMIT_S, out / "servers"))


def keep(outcome: Outcome, out: Path) -> Outcome:
    """Write a kept block's record as OUT/NAME@GPU.json, to be copied into the chapter's results."""
    for made in outcome.records:
        gpu = re.sub(r"[^a-z0-9]+", "-", made["machine"]["gpus"][0]["name"].lower())
        record.save(made, out / f"{outcome.block.record}@{gpu}.json")
    return outcome


def run_tests() -> bool | None:
    """Whether the tests that need a GPU pass; None where there is no pytest to run them."""
    if importlib.util.find_spec("pytest") is None:
        print("tests: not run, since this Python has no pytest")
        return None
    files = [
        str(path)
        for path in sorted((repo_root() / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *files]
    try:
        return subprocess.run(command, cwd=repo_root(), timeout=TESTS_LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"tests: not done after {TESTS_LIMIT_S:g} s")
        return False


def _ranks(count: int) -> str:
    return f"--nproc_per_node={count}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--chapters", nargs="+", type=int, metavar="N", help="default: all")
    args = parser.parse_args(argv)
    known = [one.number for one in chapters() if one.written]
    for number in args.chapters or []:
        if number not in known:
            raise UsageError(f"--chapters {number} is not written; use some of {known}")
    return args


if __name__ == "__main__":
    exit(main)
