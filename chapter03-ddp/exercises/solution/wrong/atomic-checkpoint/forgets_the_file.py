"""Renames without fsync of the file: after a power cut the name is there, and the bytes are not."""

SAYS = "its fsync before it gets the name"


def save_checkpoint(folder, step, payload):
    import os

    from atomic_checkpoint import checksum

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "writing.part"
    part.write_bytes(checksum(step, payload) + payload)
    os.replace(part, folder / f"step_{step}.ckpt")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
