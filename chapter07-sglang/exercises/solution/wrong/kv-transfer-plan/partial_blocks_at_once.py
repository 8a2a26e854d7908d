"""Sends a block with its first token, and never what comes into it later."""

SAYS = "to be sent after step"


def blocks_to_send(steps, cached, present, block_size, source, target):

    plan, sent = [], present
    for number in range(len(steps)):
        done = -(-(cached + sum(steps[: number + 1])) // block_size)
        plan.append([(source[b], target[b]) for b in range(sent, done)])
        sent = max(sent, done)
    return plan
