"""Forgets that each sequence of the batch has its own probabilities."""

SAYS = "autograd keeps"


def block_activation_bytes(*, batch, seq_len, bytes_per_element, **sizes):
    from activation_memory import block_activation_bytes

    per_element = {"bytes_per_element": bytes_per_element, **sizes}
    alone = block_activation_bytes(batch=1, seq_len=seq_len, **per_element)
    return batch * alone - (batch - 1) * sizes["num_heads"] * seq_len**2 * bytes_per_element
