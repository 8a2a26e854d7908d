"""One slow rank: all others wait for it in every step, and all of them look busy.

Data parallel training goes at the pace of its slowest rank. Here rank 1 has more to do in each step
than rank 0, and it is rank 0 that spends its time in the backward pass, waiting for gradients; a
profile of rank 0 alone would blame the network. The sleep stands for a hot GPU, a noisy neighbour,
a slow disk, or a debugging aid that somebody forgot on one machine.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/straggler.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/straggler.py --fix

You should see: rank 0 waits for rank 1 in most of its steps, for most of the time: the check of the
ranks' own work fails. With --fix they work equally long.
"""

import time
from argparse import Namespace
from statistics import median

from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime

EXTRA_S = 0.06
PRESETS = {"smoke": {"steps": 60}, "laptop": {"steps": 150}, "gpu": {"steps": 150}}


def main(argv: list[str] | None = None) -> int:
    return fault.run(fault.parser(__doc__, **PRESETS).parse_args(argv), train)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    own_work = []  # seconds of each step before the ranks meet
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        if job.rank == 1 and not args.fix:
            time.sleep(EXTRA_S)  # the mistake: work that only this rank has
        own_work.append(time.perf_counter() - begin)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    of_ranks = ranks.gathered(own_work)
    medians = [median(own) for own in of_ranks]
    run.print(f"sample: own work in a step: {', '.join(f'{1e3 * m:.1f} ms' for m in medians)}")
    least, most = min(of_ranks, key=median), max(of_ranks, key=median)
    differences = [more - less for less, more in zip(least, most, strict=True)]
    run.check_within(
        "longest minus shortest", differences, EXTRA_S / 2, unit="s", more="--steps", any_size=True
    )  # at any size: what is too long is the sleep


if __name__ == "__main__":
    script.exit(main)
