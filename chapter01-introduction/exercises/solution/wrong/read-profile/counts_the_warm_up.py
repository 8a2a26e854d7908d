"""Takes the whole trace for the profiled steps."""

import json

from read_profile import covered, intervals

SAYS = "of data 30 us, a gap of 20, a kernel of 40, a collective of 10"


def time_shares(trace):
    events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e["ph"] == "X"]
    found = {
        "compute": [e for e in events if e["cat"] == "kernel" and "nccl" not in e["name"]],
        "communication": [e for e in events if e["cat"] == "kernel" and "nccl" in e["name"]],
        "input": [e for e in events if e["name"] == "data"],
        "launch": events,
    }
    window = (min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events))
    explained, shares = [], {}
    for cause, of_cause in found.items():
        before = covered(explained, window)
        explained += intervals(of_cause)
        shares[cause] = (covered(explained, window) - before) / (window[1] - window[0])
    return shares
