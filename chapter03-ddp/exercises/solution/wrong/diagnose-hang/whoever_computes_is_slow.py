"""Calls whoever does not wait a straggler, although it has called all that the others have."""

SAYS = "it is healthy"


def diagnose(dumps, world_size):
    from diagnose_hang import Diagnosis, diagnose

    found = diagnose(dumps, world_size)
    busy = [dump for dump in dumps if dump["stack"][0]["function"] != "wait"]
    if found.cause == "healthy" and len(busy) == 1:
        seq = max((entry["seq"] for entry in busy[0]["entries"]), default=0)
        return Diagnosis("straggler", busy[0]["rank"], seq + 1)
    return found
