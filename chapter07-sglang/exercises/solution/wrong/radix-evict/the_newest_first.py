"""Evicts what was used last: max for min."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            self.used = {node: -time for node, time in self.used.items()}
            gone = super().evict(pages)
            self.used = {node: -time for node, time in self.used.items()}
            return gone

    return Wrong()
