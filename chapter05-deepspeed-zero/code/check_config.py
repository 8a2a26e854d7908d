"""A DeepSpeed config and a job's log, read before the next job starts: what is wrong, and its cure.

DeepSpeed reads a config when the model is built and all ranks have met. Some mistakes it refuses
then, a misspelt key at the top level it ignores, and a few end in a hang. Here each is one line
that names the key, its value and what to write in its place. A job that has failed already is read
from its log, whose decisive line stands between hundreds of others.

Run:
    python chapter05-deepspeed-zero/code/check_config.py CONFIG.json --world-size 4
    python chapter05-deepspeed-zero/code/check_config.py CONFIG.json --world-size 4 --log job.log

You should see: a line for each finding and status 1, or none and status 0.
"""

from argparse import Namespace

from distlab import script
from distlab.errors import UsageError
from distlab.hardware import machine
from distlab.run import Run
from zero.config_check import Plan, check
from zero.engine import read_config
from zero.known_keys import MICRO
from zero.messages import read_log

MOST_RANKS = 10**7
PRESETS: dict[str, dict[str, object]] = {"smoke": {}, "laptop": {}, "gpu": {}}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        return report(run, args)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("config", metavar="FILE", help="a DeepSpeed config, JSON")
    parser.add_argument(
        "--world-size", type=script.positive_int, required=True, metavar="K", help="ranks"
    )
    parser.add_argument(
        "--micro-batch", type=script.positive_int, metavar="N",
        help="sequences of a rank's micro-batch, where the script and not the config sets them",
    )  # fmt: skip
    parser.add_argument(
        "--pipeline-stages", type=script.positive_int, default=1, metavar="N",
        help="stages of the script's PipelineModule",
    )  # fmt: skip
    parser.add_argument(
        "--client-optimizer", action="store_true", help="the script makes the optimizer"
    )
    parser.add_argument(
        "--auto-filled", action="store_true", help='it replaces "auto", as the Trainer does'
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="that the job runs on")
    parser.add_argument("--log", metavar="FILE", help="what a job with this config wrote")
    args = parser.parse_args(argv)
    if args.world_size > MOST_RANKS:
        raise UsageError(f"--world-size has {len(str(args.world_size))} digits; no job is so large")
    return args


def report(run: Run, args: Namespace) -> int:
    config = read_config(args.config, flag="FILE")
    if args.micro_batch:
        config[MICRO] = args.micro_batch
    here = machine()
    device = args.device or ("cuda" if here.gpus else "cpu")
    card = here.gpus[0].memory_bytes if device == "cuda" and here.gpus else None
    plan = Plan(
        config, args.world_size, device, args.pipeline_stages, args.client_optimizer,
        args.auto_filled, read_log(args.log, "--log") if args.log else "",
        memory=card or here.memory_bytes,
    )  # fmt: skip
    findings = [str(finding) for finding in check(plan)]
    for finding in findings:
        run.print(finding)
    run.check_equal("findings", len(findings), 0)
    run.extra(findings=findings)
    return run.status


if __name__ == "__main__":
    script.exit(main)
