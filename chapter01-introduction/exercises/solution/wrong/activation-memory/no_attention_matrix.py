"""Leaves out the probabilities, which grow with the square of the sequence."""

SAYS = "an ordinary block"


def block_activation_bytes(*, batch, seq_len, bytes_per_element, **sizes):
    hidden, kv_share = sizes["hidden_size"], sizes["num_kv_heads"] / sizes["num_heads"]
    per_token = 8 * hidden + 2 * kv_share * hidden + 4 * sizes["intermediate_size"]
    return round(batch * seq_len * per_token * bytes_per_element)
