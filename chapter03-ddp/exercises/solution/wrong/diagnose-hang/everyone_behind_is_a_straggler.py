"""Calls whoever is behind a straggler, though nobody waits."""

SAYS = "it is healthy"


def diagnose(dumps, world_size):
    from diagnose_hang import Diagnosis, diagnose

    found = diagnose(dumps, world_size)
    if found.cause == "healthy":
        last = {d["rank"]: max(e["seq"] for e in d["entries"]) for d in dumps}
        slowest = min(last, key=last.__getitem__)
        if last[slowest] < max(last.values()):
            return Diagnosis("straggler", slowest, last[slowest] + 1)
    return found
