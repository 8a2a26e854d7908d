"""Believes whatever has the right length."""

SAYS = "is flipped"


def save_checkpoint(folder, step, payload):
    import atomic_checkpoint

    atomic_checkpoint.checksum = lambda step, payload: len(payload).to_bytes(32, "big")
    atomic_checkpoint.save(folder, step, payload)


def load_newest_checkpoint(folder):
    import atomic_checkpoint

    atomic_checkpoint.checksum = lambda step, payload: len(payload).to_bytes(32, "big")
    return atomic_checkpoint.load_newest(folder)
