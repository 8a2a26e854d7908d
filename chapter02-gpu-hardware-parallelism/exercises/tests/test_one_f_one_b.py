"""Task 3: the schedule of every stage, run in simulated time."""

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 8), (3, 5), (4, 2), (4, 4), (4, 16), (8, 8), (8, 20)]
FORWARD, BACKWARD = 1.0, 2.0  # a backward pass costs about two forward passes


def schedules(student, stages, micro_batches):
    return [list(student.one_f_one_b(s, stages, micro_batches)) for s in range(stages)]


def run(schedule):
    """When each action (stage, kind, micro-batch) ends, with every stage working in its order.

    Stops, with what is done, where all stages wait.
    """
    stages, next_of, free_at, ended = len(schedule), [0] * len(schedule), [0.0] * len(schedule), {}
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(schedule):
            while next_of[stage] < len(actions):
                kind, i = actions[next_of[stage]]
                if kind == "F":
                    waits_for = [] if stage == 0 else [(stage - 1, "F", i)]
                else:
                    waits_for = [(stage, "F", i)]
                    waits_for += [] if stage == stages - 1 else [(stage + 1, "B", i)]
                if any(other not in ended for other in waits_for):
                    break
                begin = max([free_at[stage], *(ended[other] for other in waits_for)])
                ended[stage, kind, i] = begin + (FORWARD if kind == "F" else BACKWARD)
                free_at[stage] = ended[stage, kind, i]
                next_of[stage] += 1
                progress = True
    return ended


def test_each_micro_batch_goes_forward_once_and_then_backward_once(student):
    for stages, micro_batches in SHAPES:
        for stage, actions in enumerate(schedules(student, stages, micro_batches)):
            for kind in "FB":
                order = [i for k, i in actions if k == kind]
                assert order == list(range(micro_batches)), (
                    f"stage {stage} of {stages}, {micro_batches} micro-batches: the {kind}s are "
                    f"{order}, expected 0 to {micro_batches - 1} in order"
                )


def test_the_stages_never_wait_for_each_other_in_a_circle(student):
    for stages, micro_batches in SHAPES:
        ended = run(schedules(student, stages, micro_batches))
        assert len(ended) == 2 * stages * micro_batches, (
            f"{stages} stages, {micro_batches} micro-batches: after {len(ended)} of "
            f"{2 * stages * micro_batches} actions every stage waits for another one"
        )


def test_no_slower_than_the_formula(student):
    for stages, micro_batches in SHAPES:
        ended = run(schedules(student, stages, micro_batches))
        assert len(ended) == 2 * stages * micro_batches, "the schedule does not come to its end"
        expected = (micro_batches + stages - 1) * (FORWARD + BACKWARD)
        assert max(ended.values()) == expected, (
            f"{stages} stages, {micro_batches} micro-batches take {max(ended.values()):g} units of "
            f"time; (m + p - 1) * (forward + backward) is {expected:g}"
        )


def test_holds_no_more_activations_than_it_must(student):
    for stages, micro_batches in SHAPES:
        for stage, actions in enumerate(schedules(student, stages, micro_batches)):
            assert len(actions) == 2 * micro_batches, f"stage {stage} has {len(actions)} actions"
            alive = peak = 0
            for kind, _ in actions:
                alive += 1 if kind == "F" else -1
                peak = max(peak, alive)
            allowed = min(stages - stage, micro_batches)
            assert peak <= allowed, (
                f"stage {stage} of {stages}, {micro_batches} micro-batches: it holds {peak} "
                f"micro-batches' activations at once, {allowed} are enough"
            )
