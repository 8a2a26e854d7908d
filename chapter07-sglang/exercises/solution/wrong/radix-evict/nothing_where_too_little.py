"""Evicts nothing where not all of it can be freed."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def evict(self, pages):
            from copy import deepcopy

            tables = deepcopy((self.parent, self.pages, self.used, self.locks))
            gone = super().evict(pages)
            if sum(tables[1][node] for node in gone) >= pages:
                return gone
            self.parent, self.pages, self.used, self.locks = tables
            return []

    return Wrong()
