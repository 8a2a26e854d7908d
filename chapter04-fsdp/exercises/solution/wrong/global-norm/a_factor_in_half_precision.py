"""Rounds the factor to the gradient's type before it multiplies."""

SAYS = "rounded once"


def clip(sharded, replicated, max_norm, all_reduce, replicas, in_place):
    import torch
    from global_norm import clip_factor, global_norm

    clip_factor(0.0, max_norm)
    norm = global_norm(sharded, replicated, all_reduce, replicas)
    factor = clip_factor(norm, max_norm)

    def scaled(one):
        if one is None:
            return None
        product = one * torch.tensor([factor], dtype=one.dtype)
        return one.copy_(product) if in_place else product

    return norm, [scaled(one) for one in sharded], [scaled(one) for one in replicated]
