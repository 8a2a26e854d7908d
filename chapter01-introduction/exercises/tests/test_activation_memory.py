"""Task 2: what autograd keeps: of small functions by its rules, then of a Llama block."""

import torch
from grader_forwards import make_block, saved_by_block, saved_by_steps

TOLERANCE = 0.02  # the docstring's: room for a term that grows only with the tokens
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
RANDOM_PROGRAMS, RANDOM_BLOCKS = 40, 2


def test_saved_bytes_counts_each_storage_once(student, chance):
    check_steps(
        student,
        # exp keeps its result; so does the product, twice; sin keeps a part of it; the gather
        # keeps its indices, and the last product keeps a constant, but not v4
        ["v0.exp()", "v1 * v1", "v1[2:5].sin()", "v0[first]", "v4 * c[3:5]"],
        (10, 100, "float32"),
        4000 + 16 + 4000,
    )
    for _ in range(RANDOM_PROGRAMS):
        check_drawn_steps(student, chance, ["exp", "sin", "slice", "mul", "gather", "add", "c"])


def test_saved_bytes_leaves_parameters_out(student, chance):
    check_steps(student, ["v0 @ w"], (16, 64, "float32"), 16 * 64 * 4)
    own = (16 + 64) * 64 * 4
    check_steps(student, ["v0 @ w"], (16, 64, "float32"), own, owned=("p",))
    for _ in range(RANDOM_PROGRAMS):
        check_drawn_steps(student, chance, ["exp", "slice", "mul", "p", "p", "linear", "linear"])


def test_formula_matches_autograd(student, chance):
    check_block(student, "an ordinary block", 2, 64, "float32", (128, 352, 4, 4))
    check_block(student, "a long sequence", 2, 256, "float32", (64, 128, 8, 8))
    check_block(student, "a wide MLP", 1, 32, "float32", (128, 1024, 2, 2))
    check_block(student, "grouped queries", 3, 48, "float32", (256, 128, 8, 1))
    check_block(student, "bfloat16", 2, 64, "bfloat16", (128, 352, 4, 2))
    check_block(student, "float64", 1, 48, "float64", (128, 256, 4, 2))
    for _ in range(RANDOM_BLOCKS):
        for name, seq, widths, heads_per_kv in (
            ("a drawn block, long", (150, 190), (0.5, 2), [2, 3]),
            ("a drawn block, wide", (9, 40), (5, 9), [1, 3]),
            ("a drawn block, narrow", (9, 20), (0.1, 0.5), [1]),
            ("a drawn block, grouped", (9, 80), (0.5, 3), [2, 4]),
        ):
            kv_heads = int(chance.integers(1, 4))
            heads = kv_heads * int(chance.choice(heads_per_kv))
            hidden = heads * int(chance.integers(-(-60 // heads), 120 // heads + 1))
            sizes = (hidden, int(hidden * chance.uniform(*widths)), heads, kv_heads)
            dtype = str(chance.choice(list(ITEMSIZE)))
            check_block(
                student, name, int(chance.integers(1, 4)), int(chance.integers(*seq)), dtype, sizes
            )
    check_large_block(student, chance)


def check_steps(student, steps, size, expected, owned=("p", "w")):
    got, calls = saved_by_steps(student, steps, *size, owned)
    rows, cols, dtype = size
    story = "; ".join(f"v{i} = {step}" for i, step in enumerate(steps, start=1))
    story = (
        f"of v0 [{rows}, {cols}] {dtype} (c is a constant and p a parameter of that shape and of "
        f"the same values, w [{cols}, {cols}] a parameter, first the index [0, 0] in int64; given "
        f"as parameters: {', '.join(owned) or 'none of these'}): {story}"
    )
    assert got == expected, f"{story}: expected {expected} bytes to be kept, got {got}"
    assert calls == 1, f"{story}: forward was called {calls} times; expected once"


def check_drawn_steps(student, chance, operations):
    """A chain of operations, and the bytes that their derivatives need, each storage once.

    A value is (name, rows, cols, storage); storages are numbered, and `sizes` holds their bytes.
    """
    rows, cols = int(chance.integers(2, 9)), int(chance.integers(2, 9))
    dtype = str(chance.choice(list(ITEMSIZE)))
    values, sizes, kept, steps = [("v0", rows, cols, 0)], [rows * cols * ITEMSIZE[dtype]], set(), []
    constant, owned = 0, [name for name in "pw" if chance.random() < 0.7]
    flat = {"p": rows * cols + 1, "w": cols * cols}  # p is a part of a buffer, which counts whole
    foreign = set()  # parameters that are kept, and not among those given
    for number in range(1, int(chance.integers(3, 9))):
        name, r, c, storage = values[chance.integers(len(values))]
        operation = str(chance.choice(operations))
        fresh, whole = len(sizes), (r, c) == (rows, cols)
        if operation == "slice":
            start = int(chance.integers(r))
            stop = int(chance.integers(start + 1, r + 1))
            steps.append(f"{name}[{start}:{stop}]")
            values.append((f"v{number}", stop - start, c, storage))
            continue
        sizes.append(r * c * ITEMSIZE[dtype])
        if operation == "exp":
            steps.append(f"{name}.exp()")
            kept.add(fresh)  # its derivative is its result
        elif operation == "mul":
            partner = [value for value in values if value[1:3] == (r, c)]
            other = partner[chance.integers(len(partner))]
            steps.append(f"{name} * {other[0]}")
            kept |= {storage, other[3]}
        elif operation == "gather":
            steps.append(f"{name}[first]")
            kept.add("index")
            r, sizes[fresh] = 2, 2 * c * ITEMSIZE[dtype]
        elif operation == "c" and whole:
            steps.append(f"{name} * c")  # no gradient for c, so the other factor is not needed
            constant = rows * cols * ITEMSIZE[dtype]
        elif operation == "p" and whole:
            steps.append(f"p * {name}")
            kept.add(storage)
            foreign |= {"p"} - set(owned)
        elif operation == "linear":
            steps.append(f"{name} @ w")
            kept.add(storage)
            foreign |= {"w"} - set(owned)
        elif operation == "add":
            steps.append(f"{name} + {name}")
        else:
            steps.append(f"{name}.sin()")
            kept.add(storage)
        values.append((f"v{number}", r, c, fresh))
    total = sum(16 if storage == "index" else sizes[storage] for storage in kept)
    total += constant + sum(flat[name] for name in foreign) * ITEMSIZE[dtype]
    check_steps(student, steps, (rows, cols, dtype), total, owned)


def check_block(student, name, batch, seq, dtype, sizes):
    sizes = dict(
        zip(("hidden_size", "intermediate_size", "num_heads", "num_kv_heads"), sizes, strict=True)
    )
    kept = kept_by_graph(*make_block(batch, seq, dtype, **sizes))
    check_formula(student, name, kept, batch, seq, dtype, sizes)
    measured = saved_by_block(student, batch, seq, dtype, **sizes)
    assert abs(measured / kept - 1) <= TOLERANCE, (
        f"{name} ({described(batch, seq, dtype, sizes)}): saved_bytes measures {measured:,} bytes, "
        f"but autograd keeps {kept:,}"
    )


def check_large_block(student, chance):
    """What a block keeps is a * seq + b * seq^2 per sequence: two short ones tell a long one's."""
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_heads": 8, "num_kv_heads": 2}
    one, two = (kept_by_graph(*make_block(1, seq, "bfloat16", **sizes)) for seq in (32, 64))
    quadratic = (two - 2 * one) / (2 * 32**2)
    linear = one / 32 - quadratic * 32
    batch, seq = int(chance.integers(5, 65)), int(chance.integers(1000, 100_000))
    kept = round(batch * (linear * seq + quadratic * seq**2))
    check_formula(student, "a block too large for this test", kept, batch, seq, "bfloat16", sizes)


def check_formula(student, name, kept, batch, seq, dtype, sizes):
    predicted = student.block_activation_bytes(
        batch=batch, seq_len=seq, bytes_per_element=ITEMSIZE[dtype], **sizes
    )
    assert isinstance(predicted, int), f"{name}: expected whole bytes, got {predicted!r}"
    assert abs(predicted / kept - 1) <= TOLERANCE, (
        f"{name} ({described(batch, seq, dtype, sizes)}): autograd keeps {kept:,} bytes, the "
        f"formula says {predicted:,}, which is {predicted / kept:.2f} of it"
    )


def described(batch, seq, dtype, sizes):
    hidden, intermediate, heads, kv_heads = sizes.values()
    return (
        f"batch {batch}, sequence {seq}, hidden {hidden}, MLP {intermediate}, heads {heads}, "
        f"kv heads {kv_heads}, {dtype}"
    )


def kept_by_graph(block, x):
    """The bytes that the graph of block(x) holds, read from its nodes and not by hooks."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    output = block(x)
    storages, seen, waiting = {}, set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage
    return sum(s.nbytes() for address, s in storages.items() if address not in owned)
