"""Looks at the begin of backward only, where most is kept; but a large layer may come later."""

SAYS = "expected a peak of"


def peak_bytes(layers, again):
    kept = sum(one.inputs if n in again else one.whole for n, one in enumerate(layers[:-1]))
    return kept + (layers[-1].whole if layers else 0)
