"""Takes the number of pages for a number of nodes."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            gone = []
            for _ in range(pages):
                gone += super().evict(1)
            return gone

    return Wrong()
