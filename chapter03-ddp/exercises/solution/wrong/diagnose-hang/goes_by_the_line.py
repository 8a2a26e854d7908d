"""Looks at a call's line, whatever its file."""

SAYS = "a new job: you say"


def diagnose(dumps, world_size):
    import diagnose_hang

    diagnose_hang.place = lambda call: call["stack"][0]["line"]
    return diagnose_hang.diagnose(dumps, world_size)
