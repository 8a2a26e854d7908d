"""Ways to deal an epoch's samples to ranks, and what each of them misses and repeats."""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from distlab.data import Loader, Tokens

COUNTED_EPOCHS = 40
Deal = Callable[[int], np.ndarray]  # an epoch's samples, in the order in which all ranks take them


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
