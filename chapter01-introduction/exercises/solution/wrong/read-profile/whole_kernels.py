"""Counts a kernel that crosses the window's end whole."""

import json

from read_profile import covered, intervals

SAYS = "compute is wrong"


def time_shares(trace):
    from read_profile import time_shares

    events = [
        e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"
    ]
    steps = [e for e in events if e["name"][:13] == "ProfilerStep#" and e["cat"][0] == "u"]
    start, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    kernels = [e for e in events if e["cat"] == "kernel" and e["name"][:4] != "nccl"]
    crossing = intervals(e for e in kernels if e["ts"] < end)
    shares = time_shares(trace)
    shares["compute"] += covered(crossing, (end, float("inf"))) / (end - start)
    return shares
