"""The judge of a slow rank: all others wait for it, and only the times of arrival tell."""

from collections import Counter

from _diagnose_verdict import Verdict, shown
from _diagnose_watch import Place, Rank, as_place

LAG_SHARE = 0.35  # of the time, that the others wait for the slowest
LAST_SHARE = 0.8  # of the meetings, that it is the last to come
MEETINGS = 8
NOTABLE_S = 0.002  # a lag that is none of the scheduler's


def straggler(ranks: list[Rank], window_s: float) -> Verdict | None:
    """One rank comes last to almost every collective, and the others wait for it."""
    meetings = _meetings(ranks, window_s)
    if len(meetings) < MEETINGS:
        return None
    span = max(max(m.values()) for m in meetings) - min(min(m.values()) for m in meetings)
    if span < 0.8 * window_s:
        return None
    lags, waited = Counter[int](), 0.0
    until = 0.0
    for arrivals in meetings:
        begin, end = min(arrivals.values()), max(arrivals.values())
        waited += max(0.0, end - max(begin, until))  # meetings may overlap
        until = max(until, end)
        if end - begin > NOTABLE_S:
            lags[max(arrivals, key=lambda number: arrivals[number])] += 1
    if not lags:
        return None
    slow, times = lags.most_common(1)[0]
    if waited < LAG_SHARE * span or times < max(MEETINGS, LAST_SHARE * sum(lags.values())):
        return None
    place = _busier_line(ranks, slow, window_s)
    return Verdict(
        "straggler", slow, place,
        f"Rank {slow} came last to {times} of {sum(lags.values())} meetings in {span:.1f} s; the "
        f"others waited {100 * waited / span:.0f} % of the time. What it does meanwhile and they "
        f"do not is at {shown(place)}.",
        "Take that work off the rank, share it among all, or look at its host: heat, a neighbour, "
        "a slow disk.",
    )  # fmt: skip


def _meetings(ranks: list[Rank], window_s: float) -> list[dict[int, float]]:
    """When each rank came to each collective of the last `window_s`, the oldest first."""
    if len(ranks) < 2:
        return []
    shared = set.intersection(*(set(rank.calls) for rank in ranks))
    arrivals = [{rank.number: rank.calls[key].created for rank in ranks} for key in shared]
    newest = max((max(a.values()) for a in arrivals), default=0.0)
    recent = [a for a in arrivals if max(a.values()) >= newest - window_s]
    return sorted(recent, key=lambda a: min(a.values()))


def _busier_line(ranks: list[Rank], slow: int, window_s: float) -> Place | None:
    """The line of which the slow rank's samples have the most more than the others'."""
    shares = {rank.number: _line_shares(rank, window_s) for rank in ranks}
    others = [share for number, share in shares.items() if number != slow]
    excess = {
        place: share - max(other.get(place, 0.0) for other in others)
        for place, share in shares[slow].items()
    }
    return max(excess, key=lambda place: excess[place]) if excess else None


def _line_shares(rank: Rank, window_s: float) -> dict[Place, float]:
    counts: Counter[Place] = Counter()
    newest = rank.pulse.get("t", 0.0)
    for pulse in rank.pulses:
        if pulse["t"] >= newest - window_s:
            for where, _, count in pulse["samples"]:
                if (place := as_place(where)) is not None:
                    counts[place] += count
    total = sum(counts.values())
    return {place: count / total for place, count in counts.items()}
