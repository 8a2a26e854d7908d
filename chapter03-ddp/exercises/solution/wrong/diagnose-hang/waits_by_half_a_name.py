"""Takes wait_for_batch for a wait."""

SAYS = "it is straggler"


def diagnose(dumps, world_size):
    from copy import deepcopy

    from diagnose_hang import diagnose

    dumps = deepcopy(dumps)
    for dump in dumps:
        if dump["stack"][0]["function"].startswith("wait"):
            dump["stack"][0]["function"] = "wait"
    return diagnose(dumps, world_size)
