"""Task 4, atomic-checkpoint: the reference solution."""

import hashlib
import os
import re

DIGEST = 32  # bytes of a SHA-256
NAME = re.compile(r"step_([0-9]+)\.ckpt")


def save(folder, step, payload):
    make(folder)
    final = folder / f"step_{step}.ckpt"
    temporary = final.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(checksum(step, payload) + payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, final)
    sync(folder)


def make(folder):
    """Make the folder and those around it, and bring their names to the disk."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(folder):
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_newest(folder):
    names = [found for path in folder.glob("*") if (found := NAME.fullmatch(path.name))]
    for name in sorted(names, key=lambda found: int(found[1]), reverse=True):
        try:
            content = (folder / name[0]).read_bytes()
        except OSError:
            continue
        step, payload = int(name[1]), content[DIGEST:]
        if content[:DIGEST] == checksum(step, payload):
            return step, payload
    return None


def checksum(step, payload):
    return hashlib.sha256(b"%d:" % step + payload).digest()
