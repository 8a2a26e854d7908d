"""Task 4, kv-transfer-plan: the reference solution."""


def blocks_to_send(steps, cached, present, block_size, source, target):
    plan, computed, sent = [], cached, present
    for left, count in zip(reversed(range(len(steps))), steps, strict=True):
        computed += count
        complete = computed // block_size
        if not left and computed % block_size:
            complete += 1
        plan.append([(source[block], target[block]) for block in range(sent, complete)])
        sent = max(sent, complete)
    return plan


def rank_map(layers, heads, source, target):
    for layout in (source, target):
        numbers = (layers, heads, layout.stages, layout.ranks)
        if min(numbers) < 1 or layout.stages > layers:
            raise ValueError(f"{layers} layers of {heads} heads in {layout}")
        if heads % layout.ranks and layout.ranks % heads:
            raise ValueError(f"{heads} heads on {layout.ranks} ranks")
    found = []
    for giver in range(source.stages * source.ranks):
        for taker in range(target.stages * target.ranks):
            given, of_given, copies, place = part(layers, heads, source, giver)
            taken, of_taken, _, wanted = part(layers, heads, target, taker)
            both, shared = meet(given, taken), meet(of_given, of_taken)
            if both and shared and wanted % copies == place:
                offsets = shared[0] - of_given[0], shared[0] - of_taken[0]
                found.append((giver, taker, both[0], len(both), *offsets, len(shared)))
    return found


def part(layers, heads, layout, rank):
    """(its layers, its heads, how many copies there are of them, which of these it has)."""
    stage, place = divmod(rank, layout.ranks)
    own = range(stage * layers // layout.stages, (stage + 1) * layers // layout.stages)
    copies = max(1, layout.ranks // heads)
    group, copy = divmod(place, copies)
    width = max(1, heads // layout.ranks)
    return own, range(group * width, (group + 1) * width), copies, copy


def meet(one, other):
    return range(max(one.start, other.start), min(one.stop, other.stop))
