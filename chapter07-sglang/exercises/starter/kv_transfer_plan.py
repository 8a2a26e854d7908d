"""Task 4, kv-transfer-plan: keys and values go from a prefill engine to a decode engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


def blocks_to_send(
    steps: Sequence[int],
    cached: int,
    present: int,
    block_size: int,
    source: Sequence[int],
    target: Sequence[int],
) -> list[list[tuple[int, int]]]:
    """Of each step of a prompt's chunked prefill, the blocks that are sent when it is done.

    The prefill engine finds the prompt's first `cached` tokens in its own cache; each step computes
    so many tokens more, which may be 0 in a step without room for it, and after the last step the
    prompt is complete. There is one step at least, and nothing is sent before the first is done.
    The decode engine has the first `present` blocks already, which are whole blocks of the prompt.

    A block is sent as soon as all of its block_size tokens are there: while the next step computes,
    it travels. No block is sent twice, nor one that is present. The last block of the prompt, where
    it is not full, is sent with the last step, whenever its tokens were computed.

    The k-th block of the prompt is source[k] of the prefill engine's cache and target[k] of the
    decode engine's; each table covers the prompt, those present included, and may be longer.
    Blocks are sent in the order of the prompt, as pairs (source block, target block). No argument
    is changed.
    """
    raise NotImplementedError("kv_transfer_plan.blocks_to_send is yours to write")


@dataclass
class Layout:
    """How an engine is spread; the grader hands over objects like this."""

    stages: int  # of its pipeline
    ranks: int  # of each stage: the tensor-parallel degree


class Copy(NamedTuple):
    """Heads `source_head`, … of `source` become heads `target_head`, … of `target`."""

    source: int  # a rank of the prefill engine
    target: int  # a rank of the decode engine
    first_layer: int  # of the model
    layers: int  # how many
    source_head: int  # counted in the source's own heads, from 0
    target_head: int  # counted in the target's own heads, from 0
    heads: int  # how many


def rank_map(layers: int, heads: int, source: Layout, target: Layout) -> list[Copy]:
    """Who sends which layers and key-value heads to whom, sorted: by source, then by target.

    In both engines rank number r is place r % ranks of stage r // ranks. Of L layers, stage s of S
    has those from floor(s * L / S) to floor((s + 1) * L / S), the latter excluded.

    The ranks of a stage share its heads evenly, in order: with n = heads / ranks, place p has the
    heads p * n to (p + 1) * n - 1. Where there are more ranks than heads each rank has one head,
    and c = ranks / heads neighbours have the same: place p has head p // c. They are the copies
    0 to c - 1 of it.

    Every rank of the decode engine gets each of its heads, in each of its layers, from exactly one
    rank of the prefill engine. Where several have it, the target that has copy j of a head gets it
    from copy j % c of the source's c copies, so that the copies share the work. One `Copy` is all
    that goes from one rank to another.

    Raises `ValueError` where a number is below 1, an engine has more stages than there are layers,
    or of an engine's ranks and the heads neither is a multiple of the other.
    """
    raise NotImplementedError("kv_transfer_plan.rank_map is yours to write")
