"""Takes a node that a split made for one that is used now."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def split(self, node, upper, pages):
            super().split(node, upper, pages)
            self.used[upper] = next(self.clock)

    return Wrong()
