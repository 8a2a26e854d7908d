"""How samples are dealt to four ranks, counted by hand, and flags that would show nothing."""

from argparse import Namespace

import numpy as np
import pytest

import sampler_epochs
from distlab.data import Tokens
from distlab.errors import UsageError
from sampler_epochs import by_loader, counts


def test_counts_by_hand():
    orders = {0: [0, 1, 2, 3], 1: [0, 2, 2, 1]}  # the second: 3 never, 2 again; two in place
    assert counts(4, lambda epoch: np.array(orders[epoch % 2])) == [0.5, 0.5, 2.0]


@pytest.mark.parametrize(("ranks", "samples"), [(2, 63), (4, 63), (4, 62)])
def test_the_loader_deals_every_window_once_an_epoch(ranks, samples):
    tokens = Tokens((np.arange(1000, dtype=np.uint16),), 512, "numbers")
    args = Namespace(samples=samples, seq_len=8, batch_size=16, ranks=ranks, seed=0)
    orders = [by_loader(args, tokens)(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(samples))
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize(
    "flags", [["--ranks", "1"], ["--samples", "64"], ["--ranks", "3", "--samples", "64"]]
)
def test_flags_that_would_show_nothing_are_refused(flags):
    with pytest.raises(UsageError, match="shows no padding"):
        sampler_epochs.parse_args(["--preset", "smoke", *flags])
