"""Locks what is added below a locked node."""

SAYS = "pages evictable"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def add(self, node, parent, pages):
            super().add(node, parent, pages)
            if parent is not None and self.locks[parent]:
                self.locks[node] = 1

    return Wrong()
