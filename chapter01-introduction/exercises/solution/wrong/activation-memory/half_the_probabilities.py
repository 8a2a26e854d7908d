"""Believes that the masked half of the probabilities is not kept."""

SAYS = "the formula says"


def block_activation_bytes(*, batch, seq_len, bytes_per_element, num_heads, **sizes):
    from activation_memory import block_activation_bytes

    whole = block_activation_bytes(
        batch=batch,
        seq_len=seq_len,
        bytes_per_element=bytes_per_element,
        num_heads=num_heads,
        **sizes,
    )
    return whole - batch * num_heads * seq_len * (seq_len - 1) // 2 * bytes_per_element
