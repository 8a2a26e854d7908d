"""Reports the service time, as if every request found a free server."""

SAYS = "expected the latencies [3, 5, 7, 1], got [3.0, 3.0, 3.0, 1.0]"


def latencies(arrivals, service_seconds, servers):
    return service_seconds.astype(float)
