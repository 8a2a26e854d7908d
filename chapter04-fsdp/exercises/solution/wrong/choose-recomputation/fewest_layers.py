"""The fewest layers, whatever they take."""

SAYS = "expected"


def choose_recomputation(layers, budget):
    from dataclasses import make_dataclass

    from choose_recomputation import choose

    one = make_dataclass("One", ["whole", "inputs", "microseconds"])
    return choose([one(layer.whole, layer.inputs, 1) for layer in layers], budget)
