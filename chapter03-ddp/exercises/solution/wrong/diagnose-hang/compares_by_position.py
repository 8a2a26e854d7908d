"""Compares the first entries, the second ones and so on, although the rings begin differently."""

SAYS = "varied: you say"


def diagnose(dumps, world_size):
    from diagnose_hang import Diagnosis, diagnose

    first = min((dump["entries"][0]["seq"] for dump in dumps), default=1)
    for dump in dumps:
        for position, entry in enumerate(dump["entries"]):
            entry["seq"] = first + position
    return diagnose(dumps, world_size) if dumps else Diagnosis("healthy")
