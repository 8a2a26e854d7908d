"""Evicts the largest leaf, so that few need to go."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            kept, self.used = self.used, {n: -size for n, size in self.pages.items()}
            gone = super().evict(pages)
            self.used = {n: time for n, time in kept.items() if n not in gone}
            return gone

    return Wrong()
