"""Serves the short requests first, and sorts the caller's array for it."""

SAYS = "expected the latencies"


def latencies(arrivals, service_seconds, servers):
    from serving_capacity import latencies

    service_seconds.sort()
    return latencies(arrivals, service_seconds, servers)
