"""continuous_batch_scheduler.py's requests: their lengths, and what has been done of each."""

from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Job:
    """A request on the server's clock, in seconds, and what has been done of it, in tokens."""

    arrival: float
    prompt: int
    output: int
    written: int = 0
    computed: int = 0  # tokens whose keys and values are in the cache
    started: float = 0.0  # when the step began that gave the first token
    finished: float = 0.0
    tokens: list[int] = field(default_factory=list)  # where they are really computed


def draw_lengths(args: Namespace) -> np.ndarray:
    """Prompt and output lengths [requests, 2]: lognormal with a spread (of the logarithm) of 1."""
    location = np.log([args.prompt_mean, args.output_mean]) - 0.5
    drawn = np.random.default_rng(args.seed).lognormal(location, 1.0, (args.requests, 2))
    return np.clip(np.rint(drawn), 1, args.longest).astype(int)


def make_jobs(arrivals: np.ndarray, lengths: np.ndarray) -> list[Job]:
    return [
        Job(float(arrival), int(prompt), int(output))
        for arrival, (prompt, output) in zip(arrivals, lengths, strict=True)
    ]
