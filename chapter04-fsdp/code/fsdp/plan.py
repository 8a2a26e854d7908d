"""What a rank of a sharded training needs, by the formulas: to refuse, and to advise."""

from argparse import Namespace
from typing import Any

from distlab.display import quantity
from distlab.errors import UsageError
from distlab.model import ModelConfig, num_parameters
from distlab.runtime import Runtime
from distlab.training.memory import MB
from fsdp.memory_timeline import OF_LIBRARIES, Moment, Plan, Sharding
from fsdp.training import FLOAT, MOMENTS, replicas_of


def predicted_bytes(args: Namespace, config: ModelConfig, shards: int, batch: int) -> float:
    """What a rank needs at most: a step's, by `memory_timeline.Plan`, and a copy to save.

    `shards` is the number of ranks that share the model, `batch` the sequences of a micro-batch.
    An asynchronous save copies weights and moments. A unit of several blocks is counted as if one
    block more were whole for each, and a narrow type halves what is gathered and computed.
    """
    unit, root = sizes(args, config)
    parameters, layers = num_parameters(config), config.num_hidden_layers
    block = (parameters - root) // layers
    sharding = Sharding(
        shards,
        kept=float(args.shard == "grad"),
        checkpointing=args.activation_checkpointing == "full",
        on_disk=args.offload == "disk",
    )
    plan = Plan(config.architecture, sharding, FLOAT * root, FLOAT * block, batch, args.seq_len)
    in_unit = 2 * FLOAT * (unit - block)  # gathered; and as much of gradients
    narrow = 1.0 if args.dtype == "float32" else 0.5

    def held(moment: Moment) -> float:
        kinds = moment.bytes
        computed = narrow * (kinds["gathered"] + in_unit + kinds["activations"])
        return kinds["weights"] + kinds["optimizer"] + kinds["gradients"] + in_unit + computed

    saving = args.checkpoint_dir and args.async_checkpoints and args.offload != "disk"
    copy = FLOAT * (1 + MOMENTS) * parameters / shards if saving else 0
    return max(map(held, plan.moments())) + layers * OF_LIBRARIES + copy


def sizes(args: Namespace, config: ModelConfig) -> tuple[int, int]:
    """Parameters of the largest unit, and of the root: embedding, last norm, output."""
    layers = config.num_hidden_layers
    tables = 1 if config.tie_word_embeddings else 2
    root = config.hidden_size * (config.vocab_size * tables + 1)
    block = (num_parameters(config) - root) // layers
    return (block if args.units == "block" else block * -(-layers // int(args.units))), root


def refuse_small_memory(args: Namespace, config: ModelConfig) -> None:
    """A unit is whole while it computes, and so is its gradient: no sharding goes below that."""
    unit, root = sizes(args, config)
    width = FLOAT if args.dtype == "float32" else FLOAT // 2
    needed = max(unit, root) * (width + FLOAT)
    if args.memory_mb is not None and args.memory_mb * MB < needed:
        which = "a unit of blocks" if unit >= root else "the root, with the embedding"
        cure = ", or more --units" if unit >= root and args.units != "block" else ""
        raise UsageError(
            f"--memory-mb {args.memory_mb:g} is too small for one unit: {which} is whole while it "
            f"computes, as is its gradient, together {quantity(needed, 'B')}; "
            f"use --memory-mb {-(-needed // MB)} or more{cure}"
        )


def advice(args: Namespace, config: ModelConfig, job: Runtime) -> str:
    """What the plan had predicted, and the first remedy that would fit, cheap ones first."""

    def predicted(ranks: int = job.world_size, **changes: Any) -> float:
        changed = Namespace(**{**vars(args), **changes})
        if "shard" in changes or args.shard in ("full", "grad"):
            shards = ranks
        else:
            shards = max(1, ranks // replicas_of(args, job))
        batch = max(1, args.batch_size // (ranks * args.accumulate))
        return predicted_bytes(changed, config, shards, batch)

    again: dict[str, Any] = {"activation_checkpointing": "full"}
    tried: dict[str, float] = {
        "--activation-checkpointing full": predicted(**again),
        "--shard full": predicted(shard="full"),
        "--shard full --activation-checkpointing full": predicted(shard="full", **again),
    }
    tried |= {f"--shard full on {n} ranks": predicted(n, shard="full")
              for n in (job.world_size * 2, job.world_size * 4)}  # fmt: skip
    tried["--shard full --offload disk"] = predicted(shard="full", offload="disk")
    fits = [how for how, size in tried.items() if size < args.memory_mb * MB]
    cure = f"{fits[0]} would fit ({quantity(tried[fits[0]], 'B')})" if fits else "nothing would fit"
    return f"the plan had predicted {quantity(predicted(), 'B')}; {cure}"
