"""Writes steps without leading zeros, so that step 9 comes after step 10."""

SAYS = "one after another: expected step 10"


def save_checkpoint(folder, step, payload):
    from atomic_checkpoint import save

    save(folder, step, payload)
    (folder / f"step_{step:012d}.ckpt").rename(folder / f"step_{step}.ckpt")
