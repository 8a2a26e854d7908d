"""What the tensor-parallel scripts say of the bytes they sent, beside what the formulas say."""

from argparse import Namespace
from typing import Protocol

from _parallel import FLOAT

from distlab import predict
from distlab.model import Llama, ModelConfig, config_from_args, num_parameters
from distlab.run import Run

OF_THE_LOSS = 3  # all-reduces of one number a token: maximum, sum, and the target's logit


class Counted(Protocol):
    """What a rank has sent: bytes, and in how many collectives."""

    @property
    def total(self) -> float: ...

    @property
    def total_calls(self) -> int: ...


def parts_of(config: ModelConfig) -> dict[str, int]:
    """What tensor parallelism shares out."""
    return {
        "heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "columns of the MLP": config.intermediate_size,
        "words": config.vocab_size,
    }


def all_reduce_bytes(args: Namespace, workers: int, numbers: int) -> float:
    """What a rank sends in an all-reduce of so many numbers for each token of the batch."""
    ring = predict.BUS_FACTORS["all_reduce"](workers)
    return ring * FLOAT * args.batch_size * args.seq_len * numbers


def report_tensor_traffic(
    run: Run, form: str, args: Namespace, workers: int, forward: Counted, backward: Counted
) -> None:
    """Each of the 2·L blocks, and the vocabulary at its two ends, has an f and a g.

    The two of them send an all-reduce's bytes in each direction.
    """
    config = config_from_args(args)
    pairs = 2 * config.num_hidden_layers + 1
    activations = pairs * all_reduce_bytes(args, workers, config.hidden_size)
    loss = OF_THE_LOSS * all_reduce_bytes(args, workers, 1)
    if "sequence" in form:
        norms, collectives = pairs, 2 * pairs  # a reduce-scatter and an all-gather for each pair
    else:
        norms, collectives = 0, pairs
    of_norms = norms * predict.data_parallel_bytes(FLOAT * config.hidden_size, workers)
    run.compare(f"{form}: forward, bytes", activations + loss, forward.total, "B")
    run.compare(f"{form}: backward, bytes", activations + of_norms, backward.total, "B")
    run.compare(f"{form}: forward, collectives", collectives + OF_THE_LOSS, forward.total_calls)
    run.compare(f"{form}: backward, collectives", collectives + norms, backward.total_calls)


def report_parameters(run: Run, model: Llama, workers: int) -> None:
    predicted = predict.rank_parameters(model.config.architecture, tp=workers)
    run.compare("parameters of a rank", predicted, num_parameters(model), "params")
