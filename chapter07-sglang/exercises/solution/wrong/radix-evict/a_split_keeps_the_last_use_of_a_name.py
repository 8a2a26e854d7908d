"""Takes the upper half of a node for as old as an earlier node of its name."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def __init__(self):
            super().__init__()
            self.gone = {}

        def split(self, node, upper, pages):
            super().split(node, upper, pages)
            self.used[upper] = self.gone.get(upper, self.used[upper])

        def evict(self, pages):
            before = dict(self.used)
            gone = super().evict(pages)
            self.gone |= {node: before[node] for node in gone}
            return gone

    return Wrong()
