"""Believes the name alone: the device's mirror of a step makes the window longer."""

import json

import read_profile

SAYS = "compute is wrong"


class Renamed:
    def __init__(self, trace):
        self.events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        for event in self.events:
            if event["name"].startswith("ProfilerStep#"):
                event["cat"] = "user_annotation"

    def read_text(self, encoding=None):
        return json.dumps({"traceEvents": self.events})


def time_shares(trace):
    return read_profile.time_shares(Renamed(trace))
