"""Keeps its answer for whoever asks again, and gives the caller the very array."""

SAYS = "the caller has changed the last result"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class Keeping(OnlineAttention):
        kept = None

        def add(self, *block):
            self.kept = None
            super().add(*block)

        def result(self):
            self.kept = super().result() if self.kept is None else self.kept
            return self.kept

    return Keeping(queries)
