"""Goes on when exactly enough is freed: <= for <."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            return super().evict(pages + 1)

    return Wrong()
