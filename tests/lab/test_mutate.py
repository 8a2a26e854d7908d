"""`lab mutate`: each simple change once, graded in a fork, and every survivor accounted for."""

import json
import os
import sys

import psutil
import pytest

from distlab.errors import RunError, Skipped, UsageError
from distlab.files import repo_root
from distlab.lab import grade_versions as versions
from distlab.lab import mutate as command
from distlab.lab.grade import read_tasks
from distlab.lab.mutants import mutants_of

SOLVED = sorted(path.parent for path in repo_root().glob("*/exercises/solution"))

TASKS = """
[[task]]
name = "twice"
title = "Double"
tests = "test_twice.py"
[task.points]
test_even = 1
test_bounds = 1
"""
ADAPTERS = """
def twice(number):
    from twice import twice

    return twice(number)
"""
SOLUTION = '''"""Doubles."""


def twice(number):
    """Two times `number`, which is not below 0."""
    if number < 0:
        raise ValueError(f'{number} is {-1 * number} too low')
    return number * 2
'''
TESTS = """
import pytest


def test_even(student, chance):
    number = int(chance.integers(3, 9))
    assert student.twice(number) == number + number


def test_bounds(student):
    assert student.twice(0) == 0
    with pytest.raises(ValueError):
        student.twice(-1)
"""
NO_TEST_OF_ZERO = TESTS.replace("    assert student.twice(0) == 0\n", "")
AT_ZERO = ["if number < 0: → if number <= 0:", "if number < 0: → if number < 1:"]


@pytest.fixture
def exercises(tmp_path, monkeypatch):
    """A chapter with one task, whose tests notice every mutant."""
    folder = tmp_path / "exercises"
    for name, text in {
        "tasks.toml": TASKS,
        "solution/adapters.py": ADAPTERS,
        "solution/twice.py": SOLUTION,
        "tests/test_twice.py": TESTS,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(command, "find_exercises", lambda chapter: folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # pytest adds the folder of what it collects
    monkeypatch.delitem(sys.modules, "test_twice", raising=False)
    return folder


def lists(exercises, changes, reason):
    text = '[[mutants]]\nfile = "twice.py"\nfunction = "twice"\n'
    text += f"changes = {changes!r}\nreason = {reason!r}\n"
    (exercises / "solution" / "equivalent.toml").write_text(text)


def changes(source):
    return [mutant.change for mutant in mutants_of(source)]


@pytest.mark.parametrize(
    ("body", "some"),
    [
        ("return a < b", ["return a <= b", "return a > b"]),
        ("return a == b", ["return a != b"]),
        ("return a + b", ["return a - b", "return a", "return b"]),
        ("return a // b", ["return a / b", "return a", "return b"]),
        ("return a and b", ["return a or b", "return a", "return b"]),
        ("return -a", ["return a"]),
        ("return 0", ["return 1", "return -1"]),
        ("return True", ["return False"]),
        ("return min(a, b)", ["return max(a, b)", "return a"]),
        ("return a.clone()", ["return a"]),
        ("return a.astype(b)", ["return a"]),
        ("return f(x=a, y=b)", ["return f(y=b)", "return f(x=a)"]),
        ("return [a, b]", ["return [b]", "return [a]"]),
        ("return a[b]", ["return a[b + 1]", "return a[b - 1]"]),
        ("return a[b:]", ["return a[:]", "return a[b + 1:]", "return a[b - 1:]"]),
        ("return a[-1]", ["return a[1]", "return a[-2]", "return a[-0]"]),
        ("return range(a)", ["return a", "return range(a + 1)", "return range(a - 1)"]),
        ("return a if b else c", ["return a if not b else c", "return a if False else c"]),
        ("return [x for x in a if x]", ["return [x for x in list(a)[1:] if x]"]),
        ("a += b", ["a = b", "a -= b"]),
        ("for x in a:\n        f(x)", ["for x in a: (once)", "for x in list(a)[:-1]:"]),
        ("while a < b:\n        f()", ["while not a < b:", "while False:", "while a <= b:"]),
        ("for x in a:\n        if x:\n            break", ["continue"]),
    ],
)
def test_each_kind_of_change_is_made(body, some):
    made = [change.partition(" → ")[2] for change in changes(f"def f(a, b):\n    {body}\n")]
    assert set(some) <= set(made), made
    assert "(left out)" in made


def test_one_change_each_and_none_twice():
    mutants = mutants_of(SOLUTION)
    assert len({mutant.source for mutant in mutants} | {SOLUTION}) == len(mutants) + 1
    assert len({(mutant.function, mutant.change) for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        before, _, after = mutant.change.partition(" → ")
        assert before == SOLUTION.splitlines()[mutant.line - 1].strip()
        assert after in ["(left out)", *map(str.strip, mutant.source.splitlines())]


def test_words_docstrings_annotations_and_the_checks_of_arguments_stay():
    source = (
        "@cache\ndef f(a: list[int] = None) -> tuple[1, 2]:\n    'Says 1.'\n"
        "    raise ValueError(f'{a + 1} is not {2 > 1}')\n"
        "def g(a, b):\n    return zip(a, b, strict=True)\n"
    )
    assert changes(source) == [
        "raise ValueError(f'{a + 1} is not {2 > 1}') → (left out)",
        "return zip(a, b, strict=True) → (left out)",
        "return zip(a, b, strict=True) → return a",
    ]


def test_outside_functions_only_numbers_change():
    source = "LIMIT = 3\nPair = tuple[int, int]\nclass A:\n    b: int = 0\n    c: str\n"
    assert changes(source) == [
        "LIMIT = 3 → LIMIT = 4",
        "LIMIT = 3 → LIMIT = 2",
        "b: int = 0 → b: int = 1",
        "b: int = 0 → b: int = -1",
    ]


def test_a_long_line_is_told_around_its_change():
    long = f"{'a' * 40} < {'b' * 40}"
    cut = f"…{'a' * 29} {{}} {'b' * 29}…"
    made = changes(f"def f():\n    return {long}\n")
    assert f"{cut.format('<')} → {cut.format('>')}" in made
    assert f"return {long} → (left out)" in made


def test_the_same_change_twice_in_a_function_has_a_number():
    assert changes("def f(a):\n    a.x()\n    a.x()\n")[-1] == "a.x() → (left out) (2)"


def test_when_tests_notice_all_the_status_is_0(exercises, tmp_path, capsys):
    record = tmp_path / "record.json"
    assert command.mutate(["9", "--jobs", "2", "--json", str(record)]) == 0
    assert "every survivor is listed" in capsys.readouterr().out
    written = json.loads(record.read_text())
    ended_by = {mutant["change"]: mutant["ended_by"] for mutant in written["mutants"]}
    assert ended_by[AT_ZERO[0]] == "test_bounds"
    assert ended_by["return number * 2 → (left out)"] == "test_even"
    [row] = written["tasks"]
    assert row["killed"] == row["mutants"] == len(mutants_of(SOLUTION))


def test_a_survivor_is_told_unless_it_is_listed_with_its_reason(exercises, capsys):
    (exercises / "tests" / "test_twice.py").write_text(NO_TEST_OF_ZERO)
    assert command.mutate(["9", "--jobs", "2"]) == 1
    told = capsys.readouterr().out
    assert f"no test notices twice.py:6 twice: {AT_ZERO[0]}\n" in told
    assert "chapter 9, --seed 0: 2 to mend" in told
    lists(exercises, AT_ZERO, "nobody doubles 0")
    assert command.mutate(["9", "--jobs", "2"]) == 0


def test_what_is_listed_must_be_made_and_survive(exercises, capsys):
    first = mutants_of(SOLUTION)[0].change
    lists(exercises, [first, "return 7 → return 8"], "it seems so")
    assert command.mutate(["9", "--limit", "1"]) == 1
    told = capsys.readouterr().out
    assert f"listed as equivalent, but test_even notices twice.py:6 twice: {first}" in told
    assert "listed as equivalent, but not made: twice.py: twice: return 7 → return 8" in told


def test_what_runs_in_circles_eats_memory_or_ends_python_is_stopped(exercises, monkeypatch):
    [task] = read_tasks(exercises)
    grader = versions.Grader(task, exercises, seed=0, jobs=3)
    monkeypatch.setattr(versions, "MEMORY_LIMIT", psutil.Process().memory_info().rss + 2**26)
    monkeypatch.setattr(versions, "SHORTEST_LIMIT_S", 4.0)
    grows = "def twice(number):\n    a = []\n    while True:\n        a.append(b'x' * 2**22)"
    circles = "import time\ndef twice(number):\n    while True:\n        time.sleep(0.1)"
    before = psutil.Process().children()  # other tests' servers
    sources = [grows, circles, "import os\nos._exit(3)"]
    ended = grader.grade([{"twice.py": source} for source in sources])
    assert [one.by for one in ended] == ["the memory limit", "the time limit", "its end"]
    assert psutil.Process().children() == before


def test_a_solution_that_fails_is_not_mutated(exercises):
    (exercises / "solution" / "twice.py").write_text(SOLUTION.replace("* 2", "* 3"))
    with pytest.raises(RunError, match="twice: the solution loses points with --seed 0: test_even"):
        command.mutate(["9"])


def test_tests_that_do_not_read_the_file_are_told(exercises):
    (exercises / "solution" / "adapters.py").write_text(SOLUTION)
    with pytest.raises(RunError, match="test_twice.py passes without twice.py"):
        command.mutate(["9"])


def test_tests_that_cannot_be_collected_are_told(exercises):
    (exercises / "tests" / "test_twice.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(RunError, match="does not have the tests of tasks.toml, or cannot be"):
        command.mutate(["9"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[mutants]\n", "equivalent.toml"),
        ('[[mutants]]\nfile = "x.py"\n', "equivalent.toml"),
        (
            '[[mutants]]\nfile = "x.py"\nfunction = "f"\nchanges = ["a → b"]\nreason = " "\n',
            "x.py f: a → b has no reason",
        ),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(exercises, text, said):
    (exercises / "solution" / "equivalent.toml").write_text(text)
    with pytest.raises(RunError, match=said) as raised:
        command.mutate(["9"])
    assert "\n" not in str(raised.value)


def test_bad_arguments_get_one_line(tmp_path):
    for arguments, message in [
        (["99"], "chapter 99 has no exercises"),
        (["1", "--task", "nap"], "--task nap is not known; use one of: uneven-shards"),
        (["1", "--json", str(tmp_path)], "is a folder"),
    ]:
        with pytest.raises(UsageError, match=message):
            command.mutate(arguments)
    with pytest.raises(SystemExit) as ended:
        command.mutate(["1", "--limit", "0"])
    assert ended.value.code == 2


def test_a_tree_without_solutions_is_told(exercises):
    os.rename(exercises / "solution", exercises / "elsewhere")
    with pytest.raises(Skipped, match="chapter 9 has no solution here"):
        command.mutate(["9"])


@pytest.mark.skipif(not SOLVED, reason="this is a student's tree: no solution")
def test_a_real_task_loses_points_by_mutants(capsys):
    assert command.mutate(["1", "--task", "uneven-shards", "--limit", "3"]) == 0
    assert "every survivor is listed" in capsys.readouterr().out


@pytest.mark.parametrize("exercises", SOLVED, ids=lambda path: path.parent.name)
def test_what_is_listed_is_made_of_a_task(exercises):
    """Survivors are graded by `lab mutate` alone; that files and lists fit the tasks is cheap."""
    solution = exercises / "solution"
    files = {command.file_of(task, solution) for task in read_tasks(exercises)}
    assert files == {*solution.glob("*.py")} - {solution / "adapters.py"}
    made = {
        (file.name, mutant.function, mutant.change)
        for file in files
        for mutant in mutants_of(file.read_text())
    }
    assert command.read_listed(solution / "equivalent.toml").keys() <= made
