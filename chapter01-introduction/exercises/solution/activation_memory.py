"""Task 2, activation-memory: what the forward pass of a Llama block keeps for the backward pass."""

from collections.abc import Callable, Iterable

import torch


def saved_bytes(
    forward: Callable[[], torch.Tensor], parameters: Iterable[torch.nn.Parameter]
) -> int:
    """The bytes of the distinct storages that autograd saves, without the parameters'."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(s.nbytes() for address, s in storages.items() if address not in owned)


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
    """Per token: 8 hidden vectors, keys and values, 4 MLP vectors, 2 scales; and the probabilities.

    The hidden vectors: each norm's input, its normalised input, and its output; the queries; the
    input of the output projection. The MLP's: gate, silu(gate), up, and their product.
    """
    kv_size = num_kv_heads * hidden_size // num_heads
    per_token = 8 * hidden_size + 2 * kv_size + 4 * intermediate_size + 2
    probabilities = batch * num_heads * seq_len**2
    return (batch * seq_len * per_token + probabilities) * bytes_per_element
