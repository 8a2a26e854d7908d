"""Forgets that a token has a key and a value."""

SAYS = "llama-3-8b, one token: expected 131,072 B, got 65,536 B"


def kv_cache_bytes(layers, kv_heads, head_dim, bytes_per_element, tokens):
    return layers * kv_heads * head_dim * bytes_per_element * tokens
