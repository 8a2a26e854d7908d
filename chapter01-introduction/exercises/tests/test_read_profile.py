"""Task 4: each trace is so small that its shares can be told by hand, or tick by tick."""

from itertools import product

import numpy as np
from grader_traces import collective, complete, data, kernel, planted, step, write

TOLERANCE = 1e-6  # the traces' times are exact; only the division rounds
CAUSES = ("compute", "communication", "input", "launch")
RANDOM_TRACES = 15
# What only looks like one of the causes, by its category or by its name.
DISTRACTIONS = [
    ("kernel", "my_fused_nccl_free_kernel", "compute"),
    ("kernel", "data", "compute"),
    ("kernel", "ncclKernel_AllGather_RING_LL_Sum_int8_t", "communication"),
    ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", None),
    ("cpu_op", "data", None),
    ("cpu_op", "nccl:all_reduce", None),
    ("user_annotation", "dataloader", None),
    ("user_annotation", "nccl:all_reduce", None),
    ("user_annotation", "Optimizer.step#AdamW.step", None),
    ("user_annotation", "EvaluationStep#3", None),
    ("gpu_user_annotation", "data", None),
]


def test_shares_of_a_serial_step(student, tmp_path, chance):
    events = [*step(0, 100, 100), data(100, 30), kernel(150, 40), collective(190, 10)]
    check(
        student,
        write(tmp_path, events, chance),
        {"compute": 0.4, "communication": 0.1, "input": 0.3, "launch": 0.2},
        "data 30 us, a gap of 20, a kernel of 40, a collective of 10",
    )
    check(
        student,
        write(tmp_path, events, chance, warm_up=False),
        {"compute": 0.4, "communication": 0.1, "input": 0.3, "launch": 0.2},
        "the same without a warm-up: the first kernel is in the step",
    )
    for _ in range(RANDOM_TRACES):
        check_drawn(student, tmp_path, chance, overlapping=False)


def test_overlapping_kernels_count_once(student, tmp_path, chance):
    events = [*step(0, 100, 60), *step(1, 160, 40), kernel(110, 40), kernel(120, 10, stream=8)]
    events += [kernel(140, 30, stream=8), kernel(190, 50)]
    check(
        student,
        write(tmp_path, events, chance),
        {"compute": 0.7, "communication": 0.0, "input": 0.0, "launch": 0.3},
        "steps from 100 to 200 us; kernels 110-150, 120-130, 140-170 and 190-240 us",
    )
    for _ in range(RANDOM_TRACES):
        check_drawn(student, tmp_path, chance, overlapping=True, only="compute")


def test_hidden_communication_and_loading_cost_nothing(student, tmp_path, chance):
    events = [*step(0, 100, 100), kernel(100, 70), collective(120, 60), data(110, 30)]
    events += [data(175, 10)]
    check(
        student,
        write(tmp_path, events, chance),
        {"compute": 0.7, "communication": 0.1, "input": 0.05, "launch": 0.15},
        "a kernel 100-170, a collective 120-180, data 110-140 and 175-185 us",
    )
    for _ in range(RANDOM_TRACES):
        check_drawn(student, tmp_path, chance, overlapping=True)


def test_names_each_planted_bottleneck(student, tmp_path, chance):
    for cause in np.array(CAUSES * 2)[chance.permutation(8)].tolist():
        path = write(tmp_path, planted(cause, int(chance.integers(10**6))), chance)
        verdict = student.bottleneck(path)
        assert verdict == cause, (
            f"a trace whose steps spend half their time on {cause} was called {verdict!r}"
        )
    # 128 us, so that shares are exact: 5/16 for two causes, 3/16 for the others; or one has more
    for (first, second), more in product([(0, 1), (0, 3), (1, 2), (2, 3)], (0.0, 2.0**-10)):
        lengths = [24, 24, 24, 24]
        lengths[first], lengths[second] = 40 - more, 40 + more
        ends = np.cumsum(lengths[:3]) + 1000
        events = [*step(3, 1000, 128), kernel(1000, lengths[0])]
        events += [collective(float(ends[0]), lengths[1]), data(float(ends[1]), lengths[2])]
        verdict = student.bottleneck(write(tmp_path, events, chance))
        expected = CAUSES[second if more else first]
        assert verdict == expected, (
            f"{CAUSES[first]} and {CAUSES[second]} have "
            f"{'nearly the same share' if more else 'the same share'}; expected {expected!r}, "
            f"which {'is 2 ns longer' if more else 'stands first in the docstring'}, got "
            f"{verdict!r}"
        )


def check_drawn(student, folder, chance, overlapping, only=None):
    """A drawn trace, divided tick by tick: each tick belongs to the first cause that covers it."""
    tick = float(chance.choice([0.125, 1.0, 3.0]))  # microseconds; exact in floats
    origin = int(chance.choice([200, 10**6, 10**10]))
    edges = np.sort(chance.choice(np.arange(20, 100), 4, replace=False))
    steps = [(int(edges[0]), int(edges[1])), (int(edges[2]), int(edges[3]))]  # a gap between them
    spans, reached = [], 10
    for _ in range(int(chance.integers(4, 12))):
        begin = int(chance.integers(0, 105)) if overlapping else reached
        length = int(chance.integers(0, 25))  # in ticks; 0 happens too
        reached = begin + length + int(chance.integers(0, 6))
        category, name, cause = drawn_event(chance)
        spans.append((begin, begin + length, category, name, cause))
    if only:
        spans = [span for span in spans if span[4] in (only, None)]
    owner = np.full(steps[1][1] - steps[0][0], "launch", dtype="<U13")
    for cause in ("input", "communication", "compute"):  # the later one has the right of way
        for begin, end, *_, of in spans:
            if of == cause:
                owner[max(begin - steps[0][0], 0) : max(end - steps[0][0], 0)] = cause
    events = [
        event
        for number, (begin, end) in enumerate(steps)
        for event in step(9 + number, origin + begin * tick, (end - begin) * tick)
    ]
    events += [
        complete(category, name, origin + begin * tick, (end - begin) * tick, int(stream))
        for (begin, end, category, name, _), stream in zip(
            spans, chance.integers(7, 10, len(spans)), strict=True
        )
    ]
    shown = "; ".join(f"{begin}-{end} {cat} {name!r}" for begin, end, cat, name, _ in spans)
    check(
        student,
        write(folder, events, chance),
        {cause: float((owner == cause).mean()) for cause in CAUSES},
        f"in units of {tick:g} us: steps {steps[0]} and {steps[1]}; {shown}",
    )


def drawn_event(chance):
    plain = [
        ("kernel", "ampere_sgemm_128x64_tn", "compute"),
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("user_annotation", "data", "input"),
    ]
    choices = plain if chance.random() < 0.6 else DISTRACTIONS
    return choices[chance.integers(len(choices))]


def check(student, path, expected, story):
    written = path.read_bytes()
    shares = student.time_shares(path)
    assert sorted(shares) == sorted(expected), (
        f"expected the shares {sorted(expected)}, got {sorted(shares)}"
    )
    shares = {name: float(shares[name]) for name in expected}
    for name, share in expected.items():
        assert abs(shares[name] - share) < TOLERANCE, (
            f"{name} is wrong: expected {expected}, got {shares}, of {story}"
        )
    assert path.read_bytes() == written, "time_shares changes the trace's file"
