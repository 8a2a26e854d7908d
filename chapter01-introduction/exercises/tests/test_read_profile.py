"""Task 4: each trace is so small that its shares can be told by hand."""

from grader_traces import collective, data, kernel, planted, step, write

TOLERANCE = 1e-6  # the traces' times are exact; only the division rounds


def test_shares_of_a_serial_step(student, tmp_path):
    events = [*step(0, 100, 100), data(100, 30), kernel(150, 40), collective(190, 10)]
    check(
        student,
        write(tmp_path, events),
        {"compute": 0.4, "communication": 0.1, "input": 0.3, "launch": 0.2},
        "data 30 us, a gap of 20, a kernel of 40, a collective of 10",
    )


def test_overlapping_kernels_count_once(student, tmp_path):
    events = [*step(0, 100, 60), *step(1, 160, 40), kernel(110, 40), kernel(120, 10, stream=8)]
    events += [kernel(140, 30, stream=8), kernel(190, 50)]
    check(
        student,
        write(tmp_path, events),
        {"compute": 0.7, "communication": 0.0, "input": 0.0, "launch": 0.3},
        "steps from 100 to 200 us; kernels 110-150, 120-130, 140-170 and 190-240 us",
    )


def test_hidden_communication_and_loading_cost_nothing(student, tmp_path):
    events = [*step(0, 100, 100), kernel(100, 70), collective(120, 60), data(110, 30)]
    events += [data(175, 10)]
    check(
        student,
        write(tmp_path, events),
        {"compute": 0.7, "communication": 0.1, "input": 0.05, "launch": 0.15},
        "a kernel 100-170, a collective 120-180, data 110-140 and 175-185 us",
    )


def test_names_each_planted_bottleneck(student, tmp_path):
    for seed, cause in enumerate(("compute", "communication", "input", "launch")):
        path = write(tmp_path, planted(cause, seed))
        verdict = student.bottleneck(path)
        assert verdict == cause, (
            f"a trace whose steps spend half their time on {cause} was called {verdict!r}"
        )


def check(student, path, expected, story):
    shares = student.time_shares(path)
    assert sorted(shares) == sorted(expected), (
        f"expected the shares {sorted(expected)}, got {sorted(shares)}"
    )
    for name, share in expected.items():
        assert abs(float(shares[name]) - share) < TOLERANCE, (
            f"{story}: expected {expected}, got {dict(shares)}; {name} is wrong"
        )
