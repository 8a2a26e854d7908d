"""Training that outlives its nodes: a worker killed, a node without power, a node that comes back.

torchrun runs an agent on each node, and the agent runs the worker. Nothing moves a dead worker's
state anywhere: everybody is started again, from the newest checkpoint, as a new generation. The
chain is always the same, and its parts add up to the time lost:

1. A collective fails. When a *process* dies, its kernel closes the connections, and the peers know
   at once. When a *node* dies, nobody says goodbye, and the peers wait until the process group's
   timeout (--timeout; torch's own is 30 minutes).
2. The worker ends with an error, and its agent sees it.
3. The agents meet again (rendezvous). A dead one is left out once its heartbeats have been missing
   for keep_alive_interval * keep_alive_max_attempt seconds; with --nnodes=1:2 the others then wait
   last_call_timeout seconds for whoever may still come, and go on without.
4. Each agent starts its worker with a new rank and world size, and the worker resumes.

The global batch never changes; it is divided among the ranks that there are. So the job trains the
same sequences in the same steps however many ranks have died, which the log proves line by line.

The trap (--with-trap): by default the agents keep the store in which the workers meet, and it still
holds the addresses of the dead. A restarted worker that is faster than a peer reads the peer's old
address and connects to nobody. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a store for each start.

Whoever hosts the rendezvous must survive: here the agent of node0 (--rdzv_endpoint). Without it the
others cannot meet again, so node1 is what gets lost. `kill -9` of an agent alone is no power cut:
its worker lives on and trains, as an orphan that nobody restarts.

Run:
    python chapter03-ddp/code/elastic_train.py
    python chapter03-ddp/code/elastic_train.py --scenario node-lost --runs 10
    python chapter03-ddp/code/elastic_train.py --with-trap
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=1:2 --nproc_per_node=1 --max-restarts=3 \
        --rdzv_backend=c10d --rdzv_endpoint=node0:29500 \
        chapter03-ddp/code/elastic_train.py --folder /shared/run

The first three rehearse it on a virtual cluster; the last is the job itself, on each real node. A
rehearsal steers its workers by two variables: ELASTIC_HOLD=STEP (wait before it until FOLDER/go-on
exists) and ELASTIC_LATE=S (rank 0 comes back so late after a restart).

You should see: every job goes on; the steps since the newest checkpoint are repeated, and no other;
and the losses are those of the job that nobody disturbed: to the last bit when the number of ranks
is what it was, to rounding when some steps were trained by fewer.
"""

import os
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp.checkpoints import Checkpoints
from ddp.elastic_log import StepLog, generations, global_batches, history, read_log
from ddp.elastic_rehearsal import SCENARIOS, come_late, hold, rehearse
from ddp.training_state import collect, load_agreed, restore
from distlab import data, runtime, script
from distlab.cluster import unavailable
from distlab.data import Tokens
from distlab.errors import Skipped, UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8, "steps": 24,
              "timeout": 30.0, "scenario": "worker-killed"},
    "laptop": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 64, "batch_size": 8, "steps": 60,
               "timeout": 10.0, "scenario": "all"},
    "gpu": {"model": "smoke", "corpus_mb": 0.5, "seq_len": 64, "batch_size": 8, "steps": 60,
            "timeout": 10.0, "scenario": "all"},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if "RANK" not in os.environ:
        if why := unavailable():
            raise Skipped(why)
        with script.run(args) as run:
            rehearse(run, args, data.prepare_from_args(args, config_from_args(args).vocab_size))
        return run.status
    come_late()
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        work(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    worker = parser.add_argument_group("the job")
    worker.add_argument("--steps", type=script.positive_int)
    worker.add_argument("--learning-rate", type=script.positive_float, default=0.03, metavar="LR")
    worker.add_argument("--checkpoint-every", type=script.positive_int, default=6, metavar="N")
    worker.add_argument("--folder", type=Path, help="checkpoints and log, seen by all nodes")
    worker.add_argument("--step-seconds", type=float, default=0.05, metavar="S",
                        help="of each step at least, as of a larger model's")  # fmt: skip
    rehearsal = parser.add_argument_group("the rehearsal on a virtual cluster")
    rehearsal.add_argument("--scenario", choices=[*SCENARIOS, "all"])
    rehearsal.add_argument("--nodes", type=int, choices=[2, 3], default=2)
    rehearsal.add_argument("--runs", type=script.positive_int, default=1, help="of each")
    rehearsal.add_argument("--limit", type=script.positive_float, default=180.0, metavar="S",
                           help="for each run, which has failed if it takes longer")  # fmt: skip
    rehearsal.add_argument("--with-trap", action="store_true",
                           help="first with torch's shared store, its default")  # fmt: skip
    args = parser.parse_args(argv)
    config_from_args(args)  # a wrong shape is told before anything starts
    if "RANK" not in os.environ:
        refuse_rehearsal(args)
    return args


def refuse_rehearsal(args: Namespace) -> None:
    least = 3 * args.checkpoint_every
    if args.steps < least:
        raise UsageError(
            f"--steps {args.steps} with --checkpoint-every {args.checkpoint_every} ends before it "
            f"can be disturbed; use --steps {least} or more"
        )
    for ranks in range(2, args.nodes + 1):
        if args.batch_size % ranks:
            raise UsageError(
                f"--batch-size {args.batch_size} is not divisible by {ranks} ranks, and so many "
                f"there may be; use {2 * args.nodes * (args.nodes - 1)}"
            )


def work(run: Run, args: Namespace, job: Runtime) -> None:
    """What torchrun starts, and starts again: resume, train, write checkpoints."""
    if args.folder is None:
        raise UsageError("--folder is missing; use a folder that all nodes see, for checkpoints")
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    loader = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device
    )
    model = DDP(model_from_args(args, job.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    log = StepLog(args.folder, job.rank, job.world_size)
    with Checkpoints(args.folder / "checkpoints") as checkpoints:
        loaded = load_agreed(checkpoints, job)
        if loaded is not None:
            restore(loaded.state, model, optimizer, loader, job=job)
        first = loaded.step if loaded is not None else 0
        log.generation = begin_generation(args.folder, job)
        log.write("begin", resumed_at=first)
        for step in range(first, args.steps):
            started = time.monotonic()
            hold(args.folder, step)
            position = loader.samples_consumed
            log.write("take", step=step, position=position,
                      windows=loader.window_indices(position).tolist())  # fmt: skip
            loss = train_step(model, optimizer, next(loader), job)
            if job.is_main:
                log.write("trained", step=step, loss=loss)
            if (step + 1) % args.checkpoint_every == 0:
                state = collect(model, optimizer, loader, job=job)
                if job.is_main:
                    checkpoints.save(step + 1, state)
            time.sleep(max(0.0, started + args.step_seconds - time.monotonic()))
    log.close()
    if job.is_main:
        report_job(run, args, tokens)


def begin_generation(folder: Path, job: Runtime) -> int:
    """The number of this start of the job. The agents' restart counts differ from node to node."""
    number = torch.tensor([len(generations(read_log(folder))) + 1], device=job.device)
    dist.broadcast(number, src=0)
    return int(number)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    job: Runtime,
) -> float:
    """One step on this rank's share, [B / world size, seq]; the mean loss of the global batch."""
    input_ids, targets = batch
    loss = model(input_ids, targets=targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / job.world_size
    dist.all_reduce(mean)
    return float(mean)


def report_job(run: Run, args: Namespace, tokens: Tokens) -> None:
    """The job's own proof, from its log, that nothing was skipped and nothing kept twice."""
    lines = read_log(args.folder)
    past = history(lines, args.steps, global_batches(args, tokens))
    run.metric("generations", len(generations(lines)))
    run.metric("steps_repeated", sum(past.repeated.values()))
    run.metric("final_loss", past.losses[-1] if past.losses else None, "nats")
    run.check_equal("steps whose global batch was not trained exactly once", len(past.wrong), 0)


if __name__ == "__main__":
    script.exit(main)
