"""Splits a locked node into one that is locked, and one that is not."""

SAYS = "pages evictable"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def split(self, node, upper, pages):
            super().split(node, upper, pages)
            self.locks[upper] = 0

        def unlock(self, node):
            for each in self.path(node):
                self.locks[each] = max(0, self.locks[each] - 1)

    return Wrong()
