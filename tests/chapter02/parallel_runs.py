"""The parallelism scripts' own runs on spawned ranks, and what torchrun would tell a rank."""

import math
from types import SimpleNamespace

import torch

from distlab import script
from distlab.model import ModelConfig
from parallelism.problem import parser

SMOKE = ["--preset", "smoke", "--device", "cpu"]


def one_of(ranks):
    """What torchrun tells one of the ranks; the others are not there."""
    return {
        "RANK": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def run_scripts(job, comparisons, change=lambda: None):
    """What the scripts compare on this rank: their checks, and predicted and measured numbers."""
    change()
    runs = []
    for compare_with_one_process in comparisons:
        torch.manual_seed(0)  # which the script before has changed
        args = parser("").parse_args(SMOKE)
        with script.run(args) as run:
            compare_with_one_process(run, args, job)
        numbers = {key: (c["predicted"], c["measured"]) for key, c in run.comparisons.items()}
        runs.append(SimpleNamespace(checks=run.checks, comparisons=numbers))
    return runs


def failed(run):
    return [check.name for check in run.checks if not check.ok]


LUCK = 8  # 1 in 10^10 for the few thousand additions here


def most_rounding(config: ModelConfig, tokens: int) -> float:
    """How far two float32 gradients may be apart that add the same terms in different orders.

    In units of the largest element of their tensor. Roundings have both signs, so a sum of n terms,
    in whatever order, rounds by no more than LUCK * sqrt(n) * eps / 2 of its terms' magnitudes,
    with a probability of 1 - 2 n exp(-LUCK^2 / 2) (Higham and Mary 2019, A New Approach to
    Probabilistic Rounding Error Analysis, theorem 2.4); two orders differ by twice that. n here are
    the additions on the longest way from the tokens to a weight's gradient. A mechanism that loses
    a rank, a token or a head is off by a part of the gradient: a hundredth.
    """
    heads = config.hidden_size // config.num_attention_heads  # a score's products
    attention = 2 * config.hidden_size + heads + tokens  # to q, k and v, scores, values, and out
    mlp = config.hidden_size + config.intermediate_size
    forward = config.num_hidden_layers * (attention + mlp) + config.hidden_size
    loss = 2 * config.vocab_size  # the softmax's sum, and the way back through the head
    additions = 2 * forward + loss + tokens  # a weight's gradient is a sum over the tokens
    return LUCK * math.sqrt(additions) * torch.finfo(torch.float32).eps


def assert_same_sums(found, expected, most):
    """The gradients are equal but for `most_rounding`, each in units of its largest element."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=most * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
