"""Takes the steps from the list that it was given."""

SAYS = "the arguments were changed"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send(steps, cached, present, block_size, source, target)
    steps.clear()
    return plan
