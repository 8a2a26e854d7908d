"""Every epoch in the same order: a DistributedSampler shuffles by its epoch, which nobody tells it.

All ranks must draw the same permutation to take disjoint shares of it, so the sampler seeds its
generator by the seed and the epoch, not by the clock. Without set_epoch the epoch stays 0: the
order of the first epoch comes again and again, each batch has the same members, and nothing
complains.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/forgotten_set_epoch.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/forgotten_set_epoch.py --fix

You should see: as many different orders as epochs with --fix, and one without.
"""

from argparse import Namespace

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

EPOCHS, EXAMPLES = 4, 64


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    numbered = TensorDataset(*fault.examples(0, 0, "cpu", EXAMPLES), torch.arange(EXAMPLES))
    sampler: DistributedSampler = DistributedSampler(numbered)
    loader = DataLoader(numbered, batch_size=fault.BATCH_SIZE, sampler=sampler)
    orders = set()
    for epoch in range(EPOCHS):
        if args.fix:
            sampler.set_epoch(epoch)
        seen: list[int] = []
        for inputs, targets, numbers in loader:  # the mistake: the sampler thinks it is epoch 0
            loss = cross_entropy(model(inputs.to(job.device)), targets.to(job.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += numbers.tolist()
        orders.add(tuple(seen))
    run.print(f"sample: loss {loss:.3f}")
    run.check_equal("each epoch has an order of its own", len(orders), EPOCHS)


if __name__ == "__main__":
    script.exit(main)
