"""Of equals it chooses the one that was chosen last."""

SAYS = "chosen longest ago"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, last=-abs(w.last)) for w in workers], limit, page_size)
