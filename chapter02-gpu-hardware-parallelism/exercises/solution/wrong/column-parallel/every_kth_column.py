"""Deals the columns out like cards: the products are right, the shards are not those asked for."""

SAYS = "of up, in order"


def split_weights(up, down, rank, world_size):
    from column_parallel import split_weights

    split_weights(up, down, rank, world_size)
    return up[:, rank::world_size], down[rank::world_size]
