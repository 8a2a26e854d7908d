"""Numbers the ranks stage by stage in turns: stage = rank % stages."""

SAYS = "expected"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    def other(rank, layout):
        stage, place = divmod(rank, layout.ranks)
        return place * layout.stages + stage

    return sorted(
        (other(copy[0], source), other(copy[1], target), *copy[2:])
        for copy in rank_map(layers, heads, source, target)
    )
