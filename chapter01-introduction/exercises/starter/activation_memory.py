"""Task 2, activation-memory: what the forward pass of a Llama block keeps for the backward pass.

The block is `LlamaBlock` in tests/grader_llama_block.py. Read it beside this file.
"""

from collections.abc import Callable, Iterable

import torch


def saved_bytes(
    forward: Callable[[], torch.Tensor], parameters: Iterable[torch.nn.Parameter]
) -> int:
    """The bytes that autograd keeps while `forward()` runs, once, besides `parameters`.

    Use `torch.autograd.graph.saved_tensors_hooks`: its pack hook sees every tensor that is saved,
    of any dtype, an index or a constant too. Two saved tensors that share one storage (a view of
    any part, or the same tensor twice) occupy it once, and a storage counts whole, even if a view
    saved only a part of it. `parameters` may be an iterator, which can be read once, and hold some
    that are not saved. What has a parameter's shape or values need not be one, and a parameter that
    is not among `parameters` counts as any tensor does.
    """
    raise NotImplementedError("activation_memory.saved_bytes is yours to write")


def block_activation_bytes(
    *,
    batch: int,
    seq_len: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    bytes_per_element: int,
) -> int:
    """The same number for one `LlamaBlock`, predicted from its sizes alone.

    batch, seq_len: the input is [batch, seq_len, hidden_size].
    num_heads has head_dim = hidden_size / num_heads; num_kv_heads divides it (grouped queries).
    bytes_per_element: of every tensor that is kept; the block computes in one dtype.
    Of the probabilities the whole matrix is kept, the masked half too. 2 % are tolerated, so a
    number or two per token may be left out. The sizes may be larger than any machine's memory.
    """
    raise NotImplementedError("activation_memory.block_activation_bytes is yours to write")
