"""Brings the bytes to the disk and not the name: after a power cut the file is not there."""

SAYS = "its new name the folder's"


def save_checkpoint(folder, step, payload):
    import os

    from atomic_checkpoint import checksum

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "writing.part"
    with part.open("wb") as file:
        file.write(checksum(step, payload) + payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / f"step_{step}.ckpt")
