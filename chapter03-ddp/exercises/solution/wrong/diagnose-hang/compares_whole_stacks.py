"""Takes two calls for different when the ranks came to the same line by different ways."""

SAYS = "it is order swap, rank 0, collective 6"


def diagnose(dumps, world_size):
    import diagnose_hang

    diagnose_hang.place = lambda call: str([(f["file"], f["line"]) for f in call["stack"]])
    return diagnose_hang.diagnose(dumps, world_size)
