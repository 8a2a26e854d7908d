"""Makes the folder and leaves its own name to luck: with it all that is in it is lost."""

SAYS = "a new folder that of the one around it"


def save_checkpoint(folder, step, payload):
    from atomic_checkpoint import save

    folder.mkdir(parents=True, exist_ok=True)
    save(folder, step, payload)
