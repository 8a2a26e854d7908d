"""Checkpoints from any of seven kinds to any other, and the proof that the run goes on unchanged.

ddp and fsdp (chapters 3 and 4), zero1, zero2 and zero3 (DeepSpeed's, each of a fixed number of
ranks), universal (DeepSpeed's for any number) and hf (a Hugging Face folder). Each is read into one
neutral state, weights and AdamW's two moments whole by their names, and written from it; what was
written is read back and compared bit for bit. --matrix begins a small run in every kind's own way
and converts every kind to every other, to other numbers of ranks: the next ten losses must be those
of the run that was not converted.

Run:
    python chapter05-deepspeed-zero/code/migrate.py --matrix
    python chapter05-deepspeed-zero/code/migrate.py --from fsdp --to zero3 --ranks 3 \\
        --input build/sharded --output build/zero3

It starts the ranks that DeepSpeed needs itself, as processes of this machine.

You should see: no tensor that differs, and losses that differ by float32's rounding only; from hf,
which has no moments, the same first loss, and then another run.
"""

import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from distlab import script
from distlab.errors import UsageError
from distlab.model import SIZES, add_model_flags, config_from_args
from distlab.model_config import ModelConfig
from distlab.run import Run
from distlab.spawning import spawn
from zero import migration
from zero.deepspeed_files import write_universal
from zero.migrated_runs import AFTER, UNMENDED, Pair, begin, converted, go_on
from zero.migration import KINDS, STAGES
from zero.state import State, differing

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke"}, "laptop": {"model": "laptop"}, "gpu": {"model": "laptop"},
}  # fmt: skip
ALL = [(one, other) for one in KINDS for other in KINDS if (one, other) != ("hf", "hf")]
FEW = [  # at smoke: every kind once from and once to
    ("ddp", "zero3"), ("fsdp", "zero1"), ("zero1", "zero2"), ("zero2", "fsdp"),
    ("zero3", "universal"), ("universal", "ddp"), ("hf", "zero2"), ("zero1", "hf"),
]  # fmt: skip
RANKS = {"ddp": 2, "fsdp": 3, "zero1": 2, "zero2": 3, "zero3": 4}  # that the sources are begun on
OF = {"universal": "zero1", "hf": "ddp"}  # made of these runs' checkpoints
Item = TypeVar("Item")
SAME_LOSS = 1e-5  # nats: float32 sums in another order, carried through ten steps


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        if args.matrix:
            with tempfile.TemporaryDirectory(prefix="migrate_") as folder:
                prove(run, args, Path(folder))
        else:
            convert(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--matrix", action="store_true", help="convert every kind to every other")
    parser.add_argument("--from", dest="source", choices=KINDS)
    parser.add_argument("--to", dest="target", choices=KINDS)
    parser.add_argument("--input", type=Path, metavar="DIR", help="a run's folder, or a checkpoint")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--ranks", type=script.positive_int, help="that will load zero1, zero2 or zero3"
    )
    parser.add_argument(
        "--new-moments", action="store_true", help="from hf: let AdamW begin anew with the weights"
    )
    parser.add_argument("--timeout", type=script.seconds, default=300.0, help="seconds")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if not args.matrix:
        refuse(args)
    return args


def refuse(args: Namespace) -> None:
    """What does not fit together."""
    for flag, value in {"--from": args.source, "--to": args.target, "--input": args.input,
                        "--output": args.output}.items():  # fmt: skip
        if value is None:
            raise UsageError(f"{flag} is missing; give it, or use --matrix")
    if (args.ranks is None) == (args.target in STAGES):
        told = "a number of ranks, such as --ranks 2" if args.ranks is None else "no --ranks"
        raise UsageError(f"--to {args.target} needs {told}: only zero1, zero2 and zero3 are bound "
                         "to one")  # fmt: skip
    if args.source == "hf" and args.target != "hf" and not args.new_moments:
        raise UsageError(
            f"--from hf has no moments, which --to {args.target} wants; convert the run's own "
            "checkpoint, or let AdamW begin anew by --new-moments"
        )


def convert(run: Run, args: Namespace) -> None:
    """One checkpoint; what was written is read back."""
    config = config_from_args(args)
    state = migration.read(args.source, args.input, config)
    migration.write(args.target, state, args.output, args.ranks or 1, args.timeout)
    tensors = len(state.weights)
    kept = "weights" if args.target == "hf" else "weights and moments"
    numbers = sum(weight.numel() for weight in state.weights.values())
    run.print(
        f"job: {args.source} of step {state.step} to {args.target}: {kept} of {tensors} "
        f"parameters, {numbers:,} numbers, in {args.output}"
    )
    wrong = changed(args.target, state, args.output)
    for one in wrong[:3]:
        run.print(f"sample: differs when read back: {one}")
    run.check_equal("tensors and settings that differ when read back", len(wrong), 0)


def changed(target: str, state: State, folder: Path) -> list[str]:
    """What is not in the written checkpoint as it was; in a folder of weights, of the weights."""
    back = migration.read(target, folder, state.config)
    wrong = differing(state, back)
    return [one for one in wrong if target != "hf" or one.startswith("weights")]


def prove(run: Run, args: Namespace, folder: Path) -> None:
    """The matrix: begin the sources, convert them, go on from what was written, and compare."""
    config = ModelConfig(**{**vars(SIZES["smoke"]), "vocab_size": 500})  # 3 divides no dimension
    smoke, limit = args.preset == "smoke", args.timeout
    expected: dict[str, list[float]] = {}
    for ranks, kinds in together(RANKS, lambda kind: 2 if smoke else RANKS[kind]).items():
        expected |= spawn(begin, ranks, config, kinds, folder, timeout_s=limit)[0]
    expected |= {kind: expected[of] for kind, of in OF.items()}
    states = {source: migration.read(source, folder / source, config) for source in KINDS}
    for source, state in states.items():
        write_universal(state, folder / "between" / source)
    pairs = FEW if smoke else ALL
    for source, target in pairs:
        if target not in STAGES:
            made = converted(folder, source, target)
            migration.write(target, states[source], made, 1, limit)
    found: dict[Pair, list[float]] = {}
    groups = together(pairs, lambda pair: ranks_of(pair, smoke))
    for ranks, some in run.progress(sorted(groups.items()), "numbers of ranks"):
        found |= spawn(go_on, ranks, config, folder, some, timeout_s=limit)[0]
    wrong = 0
    for source, target in pairs:
        if why := changed(target, states[source], converted(folder, source, target)):
            run.print(f"sample: {source} to {target}: {why[0]} differs")
            wrong += 1
    run.check_equal(f"of {len(pairs)} conversions, those that change a bit", wrong, 0)
    report(run, expected, found, smoke)


def together(items: Iterable[Item], by: Callable[[Item], int]) -> dict[int, list[Item]]:
    groups: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        groups[by(item)].append(item)
    return groups


def ranks_of(pair: Pair, smoke: bool) -> int:
    """That go on: every kind comes to 1, 2, 3 and 4."""
    return 3 if smoke else 1 + sum(KINDS.index(kind) for kind in pair) % 4


def report(
    run: Run, expected: dict[str, list[float]], found: dict[Pair, list[float]], smoke: bool
) -> None:
    off: dict[Pair, float] = {}
    first, last = [], []  # of those from or to weights alone
    unmended = 0.0
    for pair, losses in found.items():
        differences = [abs(a - b) for a, b in zip(losses, expected[pair[0]], strict=True)]
        if pair[1] == UNMENDED:
            unmended = max(differences)
        elif "hf" in pair:
            first.append(differences[0])
            last.append(max(differences))
        else:
            off[pair] = max(differences)
    cells = {p: f"{off[p]:.0e}" if p in off else "params" for p in found}
    rows = [
        [one, *[f"{cells[p]}, K={ranks_of(p, smoke)}" if (p := (one, to)) in cells else ""
                for to in KINDS]]
        for one in KINDS
    ]  # fmt: skip
    run.table(
        "conversions", ["from", *[f"to {kind}" for kind in KINDS]], rows,
        f"the largest difference of the {AFTER} losses that follow, in nats, and the number K of "
        "ranks that go on; params: hf has no moments, and the first loss is compared",
    )  # fmt: skip
    name = f"of {len(off)} conversions, {AFTER} losses differ by"
    run.check_below(name, max(off.values()), SAME_LOSS, "nats")
    name = f"of {len(first)} from or to hf, the first loss differs by"
    run.check_below(name, max(first), SAME_LOSS, "nats")
    run.check_above(
        "there, without moments, a later loss differs by", min(last), 100 * SAME_LOSS, "nats"
    )
    run.check_above("loaded by stage 3 of DeepSpeed and not mended, a loss differs by", unmended,
                    10 * SAME_LOSS, "nats")  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
