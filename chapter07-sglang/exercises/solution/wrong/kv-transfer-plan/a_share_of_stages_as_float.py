"""Multiplies the layers by a share, a float: 15 / 22 * 22 is less than 15."""

SAYS = "a layer each"


def rank_map(layers, heads, source, target):
    import kv_transfer_plan as solution

    whole = solution.part

    def part(layers, heads, layout, rank):
        def begin(stage):
            return int(stage / layout.stages * layers)

        _, *rest = whole(layers, heads, layout, rank)
        stage = rank // layout.ranks
        return range(begin(stage), begin(stage + 1)), *rest

    solution.part = part
    try:
        return solution.rank_map(layers, heads, source, target)
    finally:
        solution.part = whole
