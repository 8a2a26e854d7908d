"""Task 3: the schedule of every stage, run in simulated time."""

SHAPES = [
    (3, 0),
    (1, 1),
    (1, 4),
    (2, 1),
    (2, 2),
    (2, 8),
    (3, 5),
    (4, 2),
    (4, 4),
    (4, 16),
    (8, 8),
    (8, 20),
]
RANDOM_SHAPES = 12
TIMES = [(1, 2), (1, 1), (3, 1), (2, 5)]  # a backward pass costs about two forward passes, or not


def shapes(chance):
    """(stages, micro-batches): the visible ones, then drawn ones, also without a micro-batch."""
    yield from SHAPES
    for _ in range(RANDOM_SHAPES):
        yield int(chance.integers(1, 13)), int(chance.integers(0, 31))


def schedules(student, stages, micro_batches):
    return [
        [tuple(action) for action in student.one_f_one_b(stage, stages, micro_batches)]
        for stage in range(stages)
    ]


def run(schedule, forward=1, backward=2):
    """When each action (stage, kind, micro-batch) ends, with every stage working in its order.

    Stops, with what is done, where all stages wait.
    """
    stages, next_of, free_at, ended = len(schedule), [0] * len(schedule), [0] * len(schedule), {}
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
                ended[stage, kind, i] = begin + (forward if kind == "F" else backward)
                free_at[stage] = ended[stage, kind, i]
                next_of[stage] += 1
                progress = True
    return ended


def test_each_micro_batch_goes_forward_once_and_then_backward_once(student, chance):
    for stages, micro_batches in shapes(chance):
        for stage, actions in enumerate(schedules(student, stages, micro_batches)):
            case = named(stage, stages, micro_batches)
            for kind in "FB":
                order = [i for k, i in actions if k == kind]
                assert order == list(range(micro_batches)), (
                    f"{case}: the {kind}s are {order}, expected 0 to {micro_batches - 1} in order"
                )
            assert len(actions) == 2 * micro_batches, (
                f"{case}: there are {len(actions)} actions, expected an F and a B of each, "
                f"{2 * micro_batches}: {actions}"
            )
            for i in range(micro_batches):
                assert actions.index(("F", i)) < actions.index(("B", i)), (
                    f"{case}: micro-batch {i} goes backward before it has gone forward: {actions}"
                )


def test_the_stages_never_wait_for_each_other_in_a_circle(student, chance):
    for stages, micro_batches in shapes(chance):
        check_end(run(schedules(student, stages, micro_batches)), stages, micro_batches)


def test_no_slower_than_the_formula(student, chance):
    for stages, micro_batches in shapes(chance):
        forward, backward = TIMES[chance.integers(len(TIMES))]
        ended = run(schedules(student, stages, micro_batches), forward, backward)
        check_end(ended, stages, micro_batches)
        rounds = micro_batches + stages - 1 if micro_batches else 0
        expected, got = rounds * (forward + backward), max(ended.values(), default=0)
        assert got == expected, (
            f"{stages} stages, {micro_batches} micro-batches, {forward} per forward and {backward} "
            f"per backward pass: they take {got} units of time; (m + p - 1) * (forward + backward) "
            f"is {expected}"
        )


def test_holds_no_more_activations_than_it_must(student, chance):
    for stages, micro_batches in shapes(chance):
        for stage, actions in enumerate(schedules(student, stages, micro_batches)):
            case = named(stage, stages, micro_batches)
            assert len(actions) == 2 * micro_batches, f"{case}: {len(actions)} actions"
            kinds = "".join(kind for kind, _ in actions)
            alive = [
                kinds[: i + 1].count("F") - kinds[: i + 1].count("B") for i in range(len(kinds))
            ]
            allowed = min(stages - stage, micro_batches)
            peak = max(alive, default=0)
            assert peak <= allowed, (
                f"{case}: it holds {peak} micro-batches' activations at once, {allowed} are "
                f"enough: {kinds}"
            )
            warm_up = kinds.find("B")
            assert micro_batches == 0 or warm_up == allowed, (
                f"{case}: {warm_up} forwards before the first backward, expected one for each of "
                f"the {stages - stage - 1} stages behind it, as far as there are micro-batches, "
                f"and then its own first: {kinds}"
            )
            steady = kinds[warm_up : kinds.rfind("F") + 1]
            assert "BB" not in steady and "FF" not in steady, (
                f"{case}: after its warm-up a stage alternates one backward and one forward until "
                f"no forward is left: {kinds}"
            )


def check_end(ended, stages, micro_batches):
    assert len(ended) == 2 * stages * micro_batches, (
        f"{stages} stages, {micro_batches} micro-batches: after {len(ended)} of "
        f"{2 * stages * micro_batches} actions every stage waits for another one"
    )


def named(stage, stages, micro_batches):
    return f"stage {stage} of {stages}, {micro_batches} micro-batches"
