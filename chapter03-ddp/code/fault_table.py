"""Every fault of faults/ under diagnose: what the job did, what was found, where, and how soon.

Each fault runs on two ranks with its mistake, and again with --fix. With the mistake diagnose must
name the cause and the very line that the source marks as the mistake; cured, it must be silent and
the job must end with status 0. The ranks are forked from one warm process in place of torchrun's;
the dead link makes its own two nodes.

Run:
    python chapter03-ddp/code/fault_table.py

You should see: a table with a row for each fault. A job that stands still is judged after it has
stood for --stall-after seconds, one that crashes at once, one that goes wrong while it runs
after a few steps.
"""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

from ddp.fault_cases import CASES, Case, Outcome, cannot_run, end_fork_server, run_case
from distlab import script
from distlab.errors import Skipped
from distlab.run import Run

FEW = ["rank_only_collective", "shape_mismatch", "killed_rank", "nan_on_one_rank", "same_device"]
ALL = list(dict.fromkeys(case.cause for case in CASES))
PRESETS = {
    "smoke": {"faults": FEW, "stall_after": 4.0},
    "laptop": {"faults": ALL, "stall_after": 5.0},
    "gpu": {"faults": ALL, "stall_after": 5.0},
}
COLUMNS = ("fault", "the job", "found after, s", "verdict", "rank", "line", "with --fix")
AT_ONCE = 3  # jobs: those that stand still leave the processor to the others


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        try:
            tabulate(run, args)
        finally:
            end_fork_server()
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--faults", nargs="+", choices=ALL, metavar="NAME")
    parser.add_argument("--stall-after", type=script.positive_float, metavar="S")
    return parser.parse_args(argv)


def tabulate(run: Run, args: Namespace) -> None:
    chosen = [case for case in CASES if case.cause in args.faults]
    skipped = {case: why for case in chosen if (why := cannot_run(case))}
    if len(skipped) == len(chosen):
        raise Skipped("; ".join(f"{case.name}: {why}" for case, why in skipped.items()))
    runs = [(case, fix) for case in chosen if case not in skipped for fix in (False, True)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = pool.map(lambda one: run_case(one[0], one[1], args.stall_after), runs)
        outcomes = dict(zip(runs, run.progress(made, "jobs", len(runs)), strict=True))
    rows = [
        row(case, outcomes[case, False], outcomes[case, True]) for case in chosen
        if case not in skipped
    ]  # fmt: skip
    run.table("faults", COLUMNS, rows, f"diagnosed with --stall-after {args.stall_after:g}")
    for case, why in skipped.items():
        run.print(f"sample: {case.name} was skipped: {why}")
    named = {case.name: told(outcomes[case, False]) for case in chosen if case not in skipped}
    marked = {case.name: f"{case.cause}, line {case.line()}" for case in chosen}
    marked = {name: text for name, text in marked.items() if name in named}
    run.check_equal("diagnose names each cause and its line", named, marked)
    cured = {f"{case.name} --fix": silent(o) for (case, fix), o in outcomes.items() if fix}
    run.check_equal("it is silent about the cured ones", cured, dict.fromkeys(cured, True))


def row(case: Case, faulty: Outcome, cured: Outcome) -> list[object]:
    after = "silent, status 0" if silent(cured) else f"NOT silent, status {cured.status}"
    if faulty.found is None:
        return [case.name, "ends", "", "nothing found", "", "", after]
    verdict = faulty.found.verdict
    rank = "-" if verdict.rank is None else verdict.rank
    seconds = round(faulty.found.seconds, 1)
    return [case.name, faulty.found.state, seconds, verdict.cause, rank, verdict.where, after]


def silent(outcome: Outcome) -> bool:
    return outcome.found is None and outcome.status == 0


def told(outcome: Outcome) -> str:
    if outcome.found is None:
        return "nothing"
    place = outcome.found.verdict.place
    return f"{outcome.found.verdict.cause}, line {place[1] if place else 'unknown'}"


if __name__ == "__main__":
    script.exit(main)
