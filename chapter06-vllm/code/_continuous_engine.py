"""continuous_batch_scheduler.py's real engine: paged_engine behind the simulation's methods."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch
from _continuous_trace import Job

from distlab.errors import UsageError
from distlab.model import SIZES, Llama, save


class MeasuredEngine:
    """paged_engine with float32 weights, greedy; `seconds` has the time of each step so far.

    Prefix caching is off and the cache large enough for all slots: only the policy matters here.
    """

    def __init__(self, directory: str, args: Namespace) -> None:
        from paged_engine.engine import Engine, EngineConfig

        longest = 2 * args.longest + 1
        self.engine = Engine(
            EngineConfig(
                directory,
                dtype="float32",
                device=args.device,
                num_blocks=2 * args.slots * (longest // 16 + 1),
                max_batch_tokens=args.budget,
                max_sequences=args.slots,
                prefix_caching=False,
            )
        )
        if self.engine.max_model_len < 2 * args.longest:
            limit = self.engine.max_model_len
            self.engine.close()
            raise UsageError(
                f"--longest {args.longest} tokens of prompt and as many of output are more than "
                f"the {limit} of --model {args.model}; use at most {limit // 2}"
            )
        self.vocabulary = self.engine.runner.config.vocab_size
        self.description = self.engine.runner.description
        self.seconds: list[float] = []
        self.jobs: dict[str, Job] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.engine.close()

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add(self, job: Job) -> None:
        """The prompt's tokens depend on the job alone, so that every policy asks the same."""
        from paged_engine.sampling_params import SamplingParams

        drawn = np.random.default_rng([job.prompt, job.output])
        prompt = drawn.integers(self.vocabulary, size=job.prompt).tolist()
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=job.output)
        self.jobs[self.engine.add_request(prompt, params)] = job

    def step(self) -> tuple[list[Job], float]:
        started = time.perf_counter()
        outputs = self.engine.step()
        self.seconds.append(time.perf_counter() - started)
        for output in outputs:
            job = self.jobs[output.request_id]
            job.tokens += output.token_ids
            job.written = len(job.tokens)
        return [self.jobs[output.request_id] for output in outputs], self.seconds[-1]


@contextmanager
def model_directory(args: Namespace) -> Iterator[str]:
    """The folder of --model; a size is made with random weights and deleted again."""
    if args.model not in SIZES:
        yield args.model
        return
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        yield str(save(Llama(SIZES[args.model]), Path(folder) / args.model))


def fit_cost(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The coefficients, none negative, of the columns of `steps` [steps, 3] that give `seconds`.

    Steps that took more than three times as long as a first fit says are left out: the first ones
    of an engine, and those that something else interrupted.
    """
    kept = seconds < 3 * steps @ _least_squares(steps, seconds)
    return _least_squares(steps[kept], seconds[kept])


def _least_squares(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares; a column whose coefficient would be negative is left out. On a small model
    noise hides what attention costs."""
    kept = list(range(steps.shape[1]))
    while True:
        fitted, *_ = np.linalg.lstsq(steps[:, kept], seconds)
        if fitted.min() >= 0:
            break
        del kept[int(fitted.argmin())]
    cost = np.zeros(steps.shape[1])
    cost[kept] = fitted
    return cost
