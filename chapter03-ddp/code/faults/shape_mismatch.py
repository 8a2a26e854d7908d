"""Ranks that bring different shapes to one collective, or different dtypes: a crash, or nonsense.

Each rank counts its tokens. Rank 1's text lacks the last ones of the vocabulary, so its `bincount`
is shorter. gloo sees more bytes arrive than it expects and aborts the process from a thread of its
own: no Python exception, no line. NCCL would not check at all.

With --dtype the shapes agree and the types do not: rank 1 brings float16, the others bfloat16. The
bytes fit, so nobody complains, and the sum is wrong.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/shape_mismatch.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/shape_mismatch.py --dtype
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/shape_mismatch.py --fix

You should see: `Received data size doesn't match expected size` and SIGABRT; with --dtype a check
that fails. With --fix the counts have as many elements, of one type, on every rank.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

VOCABULARY, TOKENS = 64, 256


def main(argv: list[str] | None = None) -> int:
    parser = fault.parser(__doc__)
    parser.add_argument("--dtype", action="store_true", help="another dtype, not another shape")
    return fault.run(parser.parse_args(argv), train)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    own = torch.float16 if args.dtype and not args.fix and job.rank == 1 else torch.bfloat16
    length = VOCABULARY if args.dtype or args.fix else 0
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = torch.bincount(text(job.rank, step), minlength=length).to(job.device, own)
        dist.all_reduce(counts)  # the mistake: not the same shape, or type, on every rank
    run.print(f"sample: step {step}, counts {counts[:8].tolist()}")
    everything = torch.cat([text(rank, step) for rank in range(job.world_size)])
    expected = torch.bincount(everything, minlength=VOCABULARY)
    run.check_equal("the counts are those of all ranks", counts.tolist(), expected.tolist())


def text(rank: int, step: int) -> Tensor:
    """A rank's tokens of a step; rank 1 never has the last quarter of the vocabulary."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    known = VOCABULARY * 3 // 4 if rank == 1 else VOCABULARY
    return torch.cat([torch.arange(known), torch.randint(known, [TOKENS], generator=draw)])


if __name__ == "__main__":
    script.exit(main)
