"""Keeps all blocks, and computes their attention at the end: nothing online about it."""

SAYS = "let them go"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class Hoard:
        def __init__(self):
            self.blocks = []

        def add(self, keys, values, mask=None):
            self.blocks.append((keys, values, mask))

        def result(self):
            online = OnlineAttention(queries)
            for block in self.blocks:
                online.add(*block)
            return online.result()

    return Hoard()
