"""Evicts what was added first, however often it was used since."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def use(self, node):
            pass

    return Wrong()
