"""Adds the bytes up, in whatever order they are."""

SAYS = "are exchanged"


def with_sums(function):
    import atomic_checkpoint

    atomic_checkpoint.checksum = lambda step, payload: (step + sum(payload)).to_bytes(32, "big")
    return getattr(atomic_checkpoint, function)


def save_checkpoint(folder, step, payload):
    with_sums("save")(folder, step, payload)


def load_newest_checkpoint(folder):
    return with_sums("load_newest")(folder)
