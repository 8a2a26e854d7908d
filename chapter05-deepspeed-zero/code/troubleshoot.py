"""Errors that users of DeepSpeed report, each caused here: what one sees, what finds it, its cure.

Each runs as a small job of its own, with its mistake and again cured. Some end in an error, whose
decisive line is shown; some hang, and a limit ends them; some train on in silence, and are found by
a number. Before a job starts, the checker of check_config.py reads its config; after it, its log.
The mistakes themselves are the functions of zero/troubles.py, a few lines each.

Run:
    python chapter05-deepspeed-zero/code/troubleshoot.py
    python chapter05-deepspeed-zero/code/troubleshoot.py --only stale_lock plain_backward

You should see: a row for each error with what finds it, and that no cured job shows it.
"""

from argparse import Namespace

from distlab import script
from distlab.run import Run
from zero.messages import brief
from zero.rehearsal import Outcome, refuse_unbuilt, rehearse, warm_up
from zero.troubles import TROUBLES

ALL = list(TROUBLES)
QUICK = ["batch_sizes", "misspelt_key", "stale_lock", "plain_backward", "parameter_not_gathered"]
PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"only": QUICK, "timeout": 4.0},
    "laptop": {"only": ALL, "timeout": 8.0},
    "gpu": {"only": ALL, "timeout": 8.0},
}
COLUMNS = ("error", "what is seen", "after, s", "found by", "cure")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        tabulate(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument(
        "--timeout", type=script.seconds, metavar="S", help="of a collective, seconds"
    )
    return parser.parse_args(argv)


def tabulate(run: Run, args: Namespace) -> None:
    refuse_unbuilt(args.only, "--only")
    warm_up()
    rows, caused, cured = [], {}, {}
    for name in run.progress(args.only, "errors"):
        trouble = TROUBLES[name]
        caused[name] = rehearse(trouble, cured=False, collective_s=args.timeout)
        cured[name] = rehearse(trouble, cured=True, collective_s=60.0)
        rows.append(row(name, caused[name], trouble.cure))
    run.table(
        "troubles", COLUMNS, rows, f"on 1 or 2 ranks; a collective waits {args.timeout:g} s at most"
    )
    shows = {name: bool(one.symptom) for name, one in caused.items()}
    nothing = dict.fromkeys(args.only, "")
    run.check_equal("each error shows", shows, dict.fromkeys(args.only, True))
    run.check_equal("each cure works", {n: one.symptom for n, one in cured.items()}, nothing)
    run.check_equal("no cure leaves a finding", {n: o.found_by for n, o in cured.items()}, nothing)
    run.extra(diagnoses={name: one.found_by for name, one in caused.items()})


def row(name: str, seen: Outcome, cure: str) -> list[object]:
    found_by, *_ = seen.found_by.split(":")
    return [name.replace("_", " "), brief(seen.symptom), round(seen.seconds, 1), found_by, cure]


if __name__ == "__main__":
    script.exit(main)
