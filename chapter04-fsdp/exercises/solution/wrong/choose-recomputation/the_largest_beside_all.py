"""Adds the largest layer to all that forward keeps, whichever layer's backward comes when."""

SAYS = "expected a peak of"


def peak_bytes(layers, again):
    kept = sum(one.inputs if n in again else one.whole for n, one in enumerate(layers))
    return kept + max((one.whole - one.inputs for n, one in enumerate(layers) if n in again),
                      default=0)  # fmt: skip
