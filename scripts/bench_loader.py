"""What the loader costs beside a training step of the same batch.

Run:
    python scripts/bench_loader.py
    python scripts/bench_loader.py --preset laptop --prefetch 2

You should see: the loader's time for a batch, the step's, and their ratio, which is to be 2 % or
less at laptop size. Both are timed in turns, so other work on the machine slows both.
"""

from argparse import Namespace
from contextlib import closing

import torch

from distlab import data, script
from distlab.measure import compare
from distlab.model import SIZES, Llama

PRESETS = {
    "smoke": {"corpus_mb": 0.2, "seq_len": 64, "batch_size": 2, "repeats": 5},
    "laptop": {"corpus_mb": 2.0, "seq_len": 256, "batch_size": 8, "repeats": 15},
    "gpu": {"corpus_mb": 12.0, "seq_len": 1024, "batch_size": 16, "repeats": 30},
}
LARGEST_SHARE = 0.02


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with script.run(args) as run:
        config = SIZES[args.preset]
        tokens = data.prepare_from_args(args, config.vocab_size)
        model = Llama(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loader = data.Loader(
            tokens, args.seq_len, args.batch_size, device=device, prefetch=args.prefetch
        )
        input_ids, targets = next(loader)

        def step() -> None:
            model.loss(input_ids, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        with closing(loader):
            timings = compare(
                {"loader": lambda: next(loader), "step": step}, repeats=args.repeats, device=device
            )
        share = timings["loader"].median / timings["step"].median
        run.print(f"loader, a batch: {timings['loader']}")
        run.print(f"step, the same batch: {timings['step']}")
        run.metric("loader_seconds", timings["loader"].median, "s")
        run.metric("step_seconds", timings["step"].median, "s")
        run.metric("loader_share", 100 * share, "%")
        if args.preset != "smoke":
            run.check_below("the loader's share of a step", share, LARGEST_SHARE)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    data.add_data_flags(parser)
    parser.add_argument("--prefetch", type=script.non_negative_int, default=0, metavar="N")
    parser.add_argument("--repeats", type=script.positive_int)
    return parser.parse_args(argv)


if __name__ == "__main__":
    script.exit(main)
