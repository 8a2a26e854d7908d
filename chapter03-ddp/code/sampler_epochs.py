"""A forgotten `set_epoch`: every epoch in the same order. And other ways to deal samples wrongly.

torch's DistributedSampler shuffles with the seed `seed + epoch`, and the epoch is 0 until somebody
calls `sampler.set_epoch(epoch)`. Nobody complains when nobody does: each epoch has the same batches
in the same order. All ranks must shuffle with the same seed, since each takes every K-th of what it
believes to be the common order; seeds that differ by rank give some samples to several ranks, and
some to none: a sample is missed by all K with probability (1 - 1/K)^K. And where K does not divide
the samples, the sampler repeats some, or, with drop_last, leaves some out.

`distlab.data.Loader` has no epoch to be set: the position in one endless stream says everything,
and an epoch's last samples share a batch with the first of the next.

The ranks are K samplers in one process: an order needs no network, and a step on the batches of all
ranks at once is what DDP computes.

Run:
    python chapter03-ddp/code/sampler_epochs.py
    python chapter03-ddp/code/sampler_epochs.py --ranks 4 --figures build/figures

You should see: what each way to deal the samples misses, repeats, and leaves in its place; and that
the loss does not tell: forgotten or not, it differs by no more than from one seed to another.
"""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from distlab import data, script
from distlab.data import Loader, Tokens
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 16,
              "samples": 63, "epochs": 2, "repeats": 2},
    "laptop": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 32, "batch_size": 16,
               "samples": 255, "epochs": 6, "repeats": 3},
    "gpu": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 32, "batch_size": 16,
            "samples": 255, "epochs": 6, "repeats": 3},
}  # fmt: skip
COUNTED_EPOCHS = 40
Deal = Callable[[int], np.ndarray]  # an epoch's samples, in the order in which all ranks take them


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
        count_samples(run, args, tokens)
        train_both(run, args, tokens)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    parser.add_argument("--ranks", type=script.positive_int, default=2, metavar="K")
    parser.add_argument("--samples", type=script.positive_int, help="in an epoch")
    parser.add_argument("--epochs", type=script.positive_int, help="of training")
    parser.add_argument("--repeats", type=script.positive_int, help="of training, each its seed")
    parser.add_argument("--learning-rate", type=script.positive_float, default=0.03, metavar="LR")
    parser.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if min(args.epochs, args.repeats) < 2:
        raise UsageError(
            f"--epochs {args.epochs} with --repeats {args.repeats} compares nothing; use 2 or more"
        )
    if args.ranks < 2 or args.samples % args.ranks == 0 or args.batch_size % args.ranks:
        raise UsageError(
            f"--ranks {args.ranks} shows no padding with --samples {args.samples} and --batch-size "
            f"{args.batch_size}; use 2 ranks or more that divide the batch but not the samples"
        )
    return args


def count_samples(run: Run, args: Namespace, tokens: Tokens) -> None:
    """What each way to deal the samples misses, repeats and leaves where it was, per epoch."""
    n, ranks = args.samples, args.ranks
    forgotten, called, own_seeds, dropping, loader = counted = [
        counts(n, deal)
        for deal in (
            by_sampler(args, args.seed, set_epoch=False),
            by_sampler(args, args.seed),
            by_sampler(args, args.seed, own_seeds=True),
            by_sampler(args, args.seed, drop_last=True),
            by_loader(args, tokens),
        )
    ]
    names = ["set_epoch forgotten", "set_epoch called", "a seed for each rank", "drop_last",
             "distlab's Loader"]  # fmt: skip
    run.table(
        "samples",
        ["way to deal", "never seen", "seen again", "in the same place as before"],
        [[name, *row] for name, row in zip(names, counted, strict=True)],
        caption=f"{n} samples on {ranks} ranks; means over {COUNTED_EPOCHS} epochs",
    )
    run.compare("in the same place by chance, set_epoch called", 1.0, called[2], "samples")
    missed = 100 * (1 - 1 / ranks) ** ranks
    run.compare("never seen, a seed for each rank", missed, 100 * own_seeds[0] / n, "%")
    run.check_equal("forgotten: samples in the same place", forgotten[2], float(n + -n % ranks))
    run.check_below("called: samples in the same place", called[2], n / 10)
    run.check_above("a seed for each rank: samples never seen", own_seeds[0], n / 10)
    run.check_equal("padding: samples seen again", called[:2], [0.0, float(-n % ranks)])
    run.check_equal("drop_last: samples never seen", dropping[:2], [float(n % ranks), 0.0])
    run.check_equal("Loader: samples never seen, or again", loader[:2], [0.0, 0.0])


def by_sampler(
    args: Namespace,
    seed: int,
    set_epoch: bool = True,
    own_seeds: bool = False,
    drop_last: bool = False,
) -> Deal:
    """DistributedSampler on every rank."""
    samples = TensorDataset(torch.arange(args.samples))
    samplers: list[DistributedSampler] = [
        DistributedSampler(samples, args.ranks, rank, seed=seed + 1000 * rank * own_seeds,
                           drop_last=drop_last)
        for rank in range(args.ranks)
    ]  # fmt: skip

    def deal(epoch: int) -> np.ndarray:
        for sampler in samplers:
            if set_epoch:
                sampler.set_epoch(epoch)
        return np.array([list(sampler) for sampler in samplers]).T.ravel()

    return deal


def by_loader(args: Namespace, tokens: Tokens) -> Deal:
    """The bench's loader on every rank."""
    text = tokens.windows(range(args.samples), args.seq_len)
    few = Tokens((np.append(text[:, :-1], text[-1, -1]),), tokens.vocab_size, "the first samples")
    loaders = [Loader(few, args.seq_len, args.batch_size, rank, args.ranks, args.seed)
               for rank in range(args.ranks)]  # fmt: skip

    def deal(epoch: int) -> np.ndarray:
        first = epoch * args.samples
        begin = first - first % args.batch_size  # an epoch may begin within a batch
        positions = range(begin, first + args.samples, args.batch_size)
        stream = [loader.window_indices(position) for position in positions for loader in loaders]
        return np.concatenate(stream)[first - begin :][: args.samples]

    return deal


def counts(samples: int, deal: Deal) -> list[float]:
    """Samples of an epoch that are never seen, seen again, and where they were in the last one."""
    orders = np.array([deal(epoch) for epoch in range(COUNTED_EPOCHS)])
    times = np.array([np.bincount(order, minlength=samples) for order in orders])
    never, again = (times == 0).sum(axis=1), np.maximum(times - 1, 0).sum(axis=1)
    same = (orders[1:] == orders[:-1]).sum(axis=1)
    return [float(values.mean()) for values in (never, again, same)]


def train_both(run: Run, args: Namespace, tokens: Tokens) -> None:
    """Train with and without set_epoch from the same seeds; held-out losses [repeats, epochs]."""
    seeds = range(args.seed, args.seed + args.repeats)
    jobs = [(set_epoch, seed) for set_epoch in (False, True) for seed in seeds]
    losses = np.array([train(args, tokens, *job) for job in run.progress(jobs, "training")])
    forgotten, called = losses.reshape(2, args.repeats, args.epochs)
    epochs = list(range(1, args.epochs + 1))
    run.figure(
        "losses", kind="line", title="Held-out loss with and without set_epoch",
        x_label="epoch", y_label=f"held-out loss, mean of {args.repeats} runs (nats)",
        series=[{"label": label, "x": epochs, "y": list(values.mean(axis=0))}
                for label, values in (("forgotten", forgotten), ("called", called))],
    )  # fmt: skip
    apart = forgotten[:, -1] - called[:, -1]
    run.metric("held_out_loss_set_epoch_forgotten", float(forgotten[:, -1].mean()), "nats")
    run.metric("held_out_loss_set_epoch_called", float(called[:, -1].mean()), "nats")
    run.metric("forgotten_minus_called", float(apart.mean()), "nats", "mean over the seeds")
    run.metric("spread_over_the_seeds", float(apart.std(ddof=1)), "nats", "standard deviation")
    run.check_equal("the first epochs are the same", forgotten[:, 0], called[:, 0])
    run.check_equal("the last epochs are not", int((apart != 0).sum()), args.repeats)


def train(args: Namespace, tokens: Tokens, set_epoch: bool, seed: int) -> list[float]:
    """Held-out losses after each epoch."""
    torch.manual_seed(seed)
    model = model_from_args(args, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    deal = by_sampler(args, seed, set_epoch)
    held_out = tokens.validation
    some = range(min(128, held_out.num_windows(args.seq_len)))
    test = torch.from_numpy(held_out.windows(some, args.seq_len))
    losses = []
    for epoch in range(args.epochs):
        for batch in torch.from_numpy(deal(epoch)).split(args.batch_size):
            text = torch.from_numpy(tokens.windows(batch.tolist(), args.seq_len))
            model(text[:, :-1], targets=text[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(model(test[:, :-1], targets=test[:, 1:])))
    return losses


if __name__ == "__main__":
    script.exit(main)
