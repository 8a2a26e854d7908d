"""Takes every annotation with a number for a step: an evaluation makes the window longer."""

import json

import read_profile

SAYS = "is wrong"


class Renamed:
    def __init__(self, trace):
        self.events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        for event in self.events:
            if "Step#" in event["name"]:
                event["name"] = "ProfilerStep#1"

    def read_text(self, encoding=None):
        return json.dumps({"traceEvents": self.events})


def time_shares(trace):
    return read_profile.time_shares(Renamed(trace))
