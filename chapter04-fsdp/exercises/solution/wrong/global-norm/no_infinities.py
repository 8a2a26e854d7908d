"""Takes what is not finite for 0, so that a broken step looks well."""

SAYS = "expected a norm of nan"


def global_norm(sharded, replicated, all_reduce, replicas):
    import torch
    from global_norm import global_norm

    def finite(gradients):
        return [
            None if one is None else torch.nan_to_num(one, nan=0.0, posinf=0.0, neginf=0.0)
            for one in gradients
        ]

    return global_norm(finite(sharded), finite(replicated), all_reduce, replicas)
