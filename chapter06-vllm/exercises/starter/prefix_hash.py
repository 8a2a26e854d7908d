"""Task 4, prefix-hash: which blocks of a prompt some earlier prompt has already computed."""

from collections.abc import Hashable, Mapping, Sequence


def block_hashes(tokens: Sequence[int], block_size: int) -> list[Hashable]:
    """A hash of each whole block of `tokens`; a block that is not full has none.

    Keys and values depend on every token before them, so the hash of a block stands for its own
    tokens and all before: two prompts have the same hash at place i if, and only if, their first
    (i + 1)·block_size tokens are the same. "Only if" must hold for all practical purposes, against
    prompts chosen to collide too: a digest of at least 128 bits, or something exact. It must not
    take time or memory that grows with the square of the prompt's length: make each hash of the one
    before it and the block's own tokens. Token ids are below 2**32. The same tokens give the same
    hashes in every process. No function of this task changes what it is given; `tokens` may be
    empty, and `block_size` is 1 or more.
    """
    raise NotImplementedError("prefix_hash.block_hashes is yours to write")


def cached_blocks(
    tokens: Sequence[int], block_size: int, cached: Mapping[Hashable, int]
) -> list[int]:
    """The blocks of the cache with which a new sequence of `tokens` can begin.

    `cached` maps the hashes of blocks that are computed to their numbers; 0 is one like others.
    Taken are the blocks of the longest prefix that is cached without a gap. At least one token is
    left to compute, since a pass that computes nothing gives no logits to sample from: a prompt of
    whole blocks that are all cached leaves its last block out.
    """
    raise NotImplementedError("prefix_hash.cached_blocks is yours to write")
