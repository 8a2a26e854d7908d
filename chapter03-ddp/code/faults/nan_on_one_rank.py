"""One bad example on one rank: its NaN goes through the average, and one step later all is lost.

The inputs are normalised by their standard deviation. In one step rank 1 gets examples that are all
equal, and 0/0 is NaN. DDP averages the gradients, so the NaN reaches every rank; each takes the
step, and from then on every weight of every replica is NaN. Who began it is no longer to be seen.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/nan_on_one_rank.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/nan_on_one_rank.py --fix

You should see: losses that are NaN on all ranks, and a check that fails. With --fix the deviation
has a floor, and the loss stays finite.
"""

from argparse import Namespace

from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

BAD_STEP = 6


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    floor = 1e-6 if args.fix else 0.0
    for step in range(1, args.steps + 1):
        features, targets = batch(job, step)
        deviation = features.std(dim=1, keepdim=True)
        inputs = features / (deviation + floor)  # the mistake: 0/0 for a constant example
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.print(f"sample: step {step}, loss {loss:.3f}")
    finite = [bool(parameter.isfinite().all()) for parameter in model.parameters()]
    run.check_equal("all weights are finite", finite, [True] * len(finite))


def batch(job: Runtime, step: int) -> tuple[Tensor, Tensor]:
    """A batch; one of rank 1's has examples that are zero everywhere, such as an empty picture."""
    features, targets = fault.examples(job.rank, step, job.device)
    return features * (job.rank != 1 or step != BAD_STEP), targets


if __name__ == "__main__":
    script.exit(main)
