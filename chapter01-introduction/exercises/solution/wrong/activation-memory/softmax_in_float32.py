"""Keeps the probabilities in four bytes, as many a library does, and this block does not."""

SAYS = "which is 1."


def block_activation_bytes(*, batch, seq_len, bytes_per_element, num_heads, **sizes):
    kv_size = sizes["num_kv_heads"] * sizes["hidden_size"] // num_heads
    per_token = 8 * sizes["hidden_size"] + 2 * kv_size + 4 * sizes["intermediate_size"]
    probabilities = max(bytes_per_element, 4) * batch * num_heads * seq_len**2
    return batch * seq_len * per_token * bytes_per_element + probabilities
