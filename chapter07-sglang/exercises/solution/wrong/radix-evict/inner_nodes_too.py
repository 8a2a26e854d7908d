"""Evicts what was unused longest, also where other nodes stand below it."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            kept, self.parent = self.parent, dict.fromkeys(self.parent)
            gone = super().evict(pages)
            self.parent = {
                n: p if p not in gone else None for n, p in kept.items() if n not in gone
            }
            return gone

    return Wrong()
