"""Multiplies the layers of a stage, a float: 7 * (61 / 7) is less than 61."""

SAYS = "expected the copy"


def rank_map(layers, heads, source, target):
    import kv_transfer_plan as solution

    whole = solution.part

    def part(layers, heads, layout, rank):
        def begin(stage):
            return int(stage * (layers / layout.stages))

        _, *rest = whole(layers, heads, layout, rank)
        stage = rank // layout.ranks
        return range(begin(stage), begin(stage + 1)), *rest

    solution.part = part
    try:
        return solution.rank_map(layers, heads, source, target)
    finally:
        solution.part = whole
