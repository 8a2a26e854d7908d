"""Adds up the durations: two streams at once count twice."""

import json

SAYS = "compute is wrong"


def time_shares(trace):
    events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e["ph"] == "X"]
    steps = [e for e in events if e["cat"] == "user_annotation" and "Step#" in e["name"]]
    start, length = min(e["ts"] for e in steps), sum(e["dur"] for e in steps)
    events = [e for e in events if e["ts"] >= start]
    kernels = [e for e in events if e["cat"] == "kernel"]
    collectives = [e for e in kernels if e["name"].startswith("nccl")]
    waits = [e for e in events if e["name"] == "data"]
    shares = {
        "compute": sum(e["dur"] for e in kernels if e not in collectives) / length,
        "communication": sum(e["dur"] for e in collectives) / length,
        "input": sum(e["dur"] for e in waits) / length,
    }
    return shares | {"launch": 1 - sum(shares.values())}
