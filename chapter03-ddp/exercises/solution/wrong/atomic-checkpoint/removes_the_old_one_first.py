"""Makes room before the new checkpoint is there."""

SAYS = "expected step 1 with 2000 bytes, got None"


def save_checkpoint(folder, step, payload):
    import os

    from atomic_checkpoint import save

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step_*.ckpt"):
        if step == 2:  # the second of a run
            old.unlink()
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    save(folder, step, payload)
