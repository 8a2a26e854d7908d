"""Gives every query head its own key and value."""

SAYS = "grouped queries"


def block_activation_bytes(*, batch, seq_len, bytes_per_element, **sizes):
    per_token = 10 * sizes["hidden_size"] + 4 * sizes["intermediate_size"]
    probabilities = sizes["num_heads"] * seq_len
    return batch * seq_len * (per_token + probabilities) * bytes_per_element
