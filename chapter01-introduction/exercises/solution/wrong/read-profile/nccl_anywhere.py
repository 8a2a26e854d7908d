"""Takes every kernel with nccl in its name for a collective."""

import json

import read_profile

SAYS = "compute is wrong"


class Renamed:
    def __init__(self, trace):
        self.events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        for event in self.events:
            event["name"] = "nccl" * ("nccl" in event["name"]) + event["name"]

    def read_text(self, encoding=None):
        return json.dumps({"traceEvents": self.events})


def time_shares(trace):
    return read_profile.time_shares(Renamed(trace))
