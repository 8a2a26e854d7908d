"""Answers from memory, whatever is in the files now."""

SAYS = "another Python process, which has saved nothing"
MEMORY = {}


def save_checkpoint(folder, step, payload):
    from atomic_checkpoint import save

    save(folder, step, payload)
    MEMORY.setdefault(folder, {})[step] = payload


def load_newest_checkpoint(folder):
    return max(MEMORY.get(folder, {}).items(), default=None)
