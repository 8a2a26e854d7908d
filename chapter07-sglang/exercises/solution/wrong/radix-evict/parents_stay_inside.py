"""Looks for the leaves once, and for no parent that became one."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            gone, freed = [], 0
            inner = set(self.parent.values())
            leaves = [node for node in self.parent if node not in inner and not self.locks[node]]
            for node in sorted(leaves, key=self.used.get):
                if freed >= pages:
                    break
                freed += self.pages[node]
                gone += super().evict(1)
            return gone

    return Wrong()
