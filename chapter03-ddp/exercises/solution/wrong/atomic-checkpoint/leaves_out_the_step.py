"""Makes the checksum of the payload alone: a file may then pass for another step's."""

SAYS = "it holds the bytes of the checkpoint before it"


def payload_alone(function):
    import hashlib

    import atomic_checkpoint

    atomic_checkpoint.checksum = lambda step, payload: hashlib.sha256(payload).digest()
    return getattr(atomic_checkpoint, function)


def save_checkpoint(folder, step, payload):
    payload_alone("save")(folder, step, payload)


def load_newest_checkpoint(folder):
    return payload_alone("load_newest")(folder)
