"""Writes the file under its final name, where the whole checkpoint of that step may lie."""

SAYS = "new bytes need a new file"


def save_checkpoint(folder, step, payload):
    import os

    from atomic_checkpoint import checksum

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"step_{step}.ckpt").open("wb") as file:
        file.write(checksum(step, payload) + payload)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
