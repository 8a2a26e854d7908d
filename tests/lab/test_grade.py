"""`lab grade` and `lab student-tree`: fair to every chapter's exercises, and hard to fool."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distlab.errors import RunError, UsageError
from distlab.files import repo_root
from distlab.lab import student_tree as tree
from distlab.lab.grade import grade, read_tasks

EXERCISES = sorted(path.parent for path in repo_root().glob("*/exercises/tasks.toml"))
SOLVED = [path for path in EXERCISES if (path / "solution").is_dir()]  # none in a student's tree
WRONG = sorted(variant for path in SOLVED for variant in path.glob("solution/wrong/*/*.py"))
CORRECT = (SOLVED[0] / "solution" / "uneven_shards.py").read_text() if SOLVED else ""
SEED = 1  # of the random cases: what passes today passes tomorrow
needs_solution = pytest.mark.skipif(not SOLVED, reason="this is a student's tree: no solution")


@pytest.fixture
def graded(capsys):
    """Grades a directory; returns the status and the record that --json prints."""

    def run(exercises, directory, *flags):
        chapter = exercises.parent.name[len("chapter") :][:2]
        status = grade([chapter, str(directory), "--json", "-", "--seed", str(SEED), *flags])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def fooled(graded, tmp_path):
    """Grades one task of chapter 1 against the given source of adapters.py."""

    def run(source, *flags):
        (tmp_path / "adapters.py").write_text(source)
        status, record = graded(EXERCISES[0], tmp_path, "--task", "uneven-shards", *flags)
        return status, record["points"], record["tasks"][0]["message"]

    return run


@pytest.mark.parametrize("exercises", EXERCISES, ids=lambda path: path.parent.name)
def test_starter_gets_nothing_and_is_told_why(graded, exercises):
    status, record = graded(exercises, exercises / "starter")
    assert (status, record["points"]) == (1, 0)
    for task in record["tasks"]:
        assert "NotImplementedError" in task["message"]
    tasks = read_tasks(exercises)
    assert 3 <= len(tasks) <= 6
    assert record["max_points"] == sum(sum(task.points.values()) for task in tasks)


@pytest.mark.parametrize("exercises", SOLVED, ids=lambda path: path.parent.name)
def test_solution_gets_full_marks(graded, exercises):
    status, record = graded(exercises, exercises / "solution")
    assert status == 0, [task["message"] for task in record["tasks"]]
    assert record["points"] == record["max_points"]


@pytest.fixture(scope="module")
def graded_mistakes(tmp_path_factory):
    """What the mistakes of a chapter got, by task and file, from `lab mutate --wrong`."""
    folder = tmp_path_factory.mktemp("mistakes")

    def grade_chapter(number):
        record = folder / f"{number}.json"
        command = ["mutate", number, "--wrong", "--seed", str(SEED), "--json", str(record)]
        subprocess.run(
            [sys.executable, "-P", "-m", "distlab.lab", *command],
            cwd=folder, timeout=600, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        mistakes = json.loads(record.read_text(encoding="utf-8"))["mistakes"]
        return {(one["task"], one["file"]): one for one in mistakes}

    return functools.cache(grade_chapter)


@pytest.mark.slow  # hundreds of them: the solutions' and the starters' points are in the fast tier
@pytest.mark.parametrize("variant", WRONG, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_typical_mistake_loses_points_and_is_explained(graded_mistakes, variant):
    """A mistake names in SAYS what the grader must tell its author."""
    chapter = variant.parents[4].name[len("chapter") :][:2]
    one = graded_mistakes(chapter)[variant.parent.name, variant.stem]
    assert one["ended_by"] != ""
    assert one["says"] in f"{one['ended_by']}: {one['message']}"


@needs_solution
def test_correct_code_may_print_what_it_likes(fooled):
    garbage = (
        "import sys\nfor _ in range(2000):\n    print('\\x00{' * 50)\n    sys.stderr.write('!')\n"
    )
    assert fooled(garbage + CORRECT) == (0, 4, "")


@pytest.mark.slow
def test_endless_loop_is_stopped_with_all_its_processes(fooled):
    seconds = f"300.{os.getpid()}"  # by which its child is known
    source = (
        "import subprocess, time\n"
        "def combine_gradients(gradients, counts):\n"
        f"    subprocess.Popen(['sleep', '{seconds}'], start_new_session=True)\n"
        "    while True:\n        time.sleep(0.01)\n"
    )
    status, points, message = fooled(source, "--time-limit", "20")
    assert (status, points) == (1, 0)
    assert message == "test_equal_shards: stopped after 20 s, the time limit"
    end = time.monotonic() + 20  # it is killed, but may be on its way out
    while running(seconds):
        assert time.monotonic() < end, "the child is still there"
        time.sleep(0.05)


def running(argument):
    """Whether a process has this as an argument."""
    told = psutil.process_iter(["cmdline", "status"])
    return any(
        argument in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
        for process in told
    )


def test_memory_hog_is_stopped(fooled):
    source = (
        "import numpy as np\n"
        "def combine_gradients(gradients, counts):\n"
        "    hoard = []\n"
        "    while True:\n        hoard.append(np.ones(2**21))\n"
    )
    status, points, message = fooled(source, "--memory-limit", "400")
    assert (status, points) == (1, 0)
    assert message == "test_equal_shards: stopped at 400 MiB, the memory limit"


@needs_solution
@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit(0)", "pytest.exit('done', 0)"])
@pytest.mark.parametrize("place", ["import", "call"])
def test_ending_python_gains_nothing(fooled, ending, place):
    end = ending if place == "import" else f"def combine_gradients(g, c):\n    {ending}"
    status, points, message = fooled(f"import os, sys, pytest\n{CORRECT}\n{end}\n")
    assert status == 1
    assert points <= (place == "call" and ending != "os._exit(0)")  # gradient_scale is correct
    assert message


TRICKS = """
import gc, sys
import numpy as np, pytest

for kept in gc.get_objects():
    if type(kept).__name__ == "Recorder":
        kept.outcomes = lambda: {name: {"passed": True, "message": ""} for name in kept.phases}

honest = pytest.TestReport.from_item_and_call.__func__
def lie(cls, item, call):
    report = honest(cls, item, call)
    report.outcome, report.longrepr = "passed", None
    return report
pytest.TestReport.from_item_and_call = classmethod(lie)

np.abs = lambda values: np.zeros(1)
np.testing.assert_allclose = lambda *arguments, **options: None

class Equal(float):
    __rmul__ = __mul__ = __sub__ = __abs__ = lambda self, *other: Equal(0)
    __lt__ = __eq__ = lambda self, other: True

def gradient_scale(*arguments):
    return Equal(0)

def combine_gradients(gradients, counts):
    frame = sys._getframe()
    while frame:
        if "gradient_of" in frame.f_globals:
            return frame.f_globals["gradient_of"](slice(None))
        frame = frame.f_back
    return np.ones(5)
"""


def test_what_is_done_to_the_test_tools_is_done_in_vain(fooled):
    status, points, message = fooled(TRICKS)
    assert (status, points) == (1, 0)
    assert "expected the one-machine gradient" in message


def test_a_test_that_must_fail_and_does_not_voids_all_others(fooled):
    source = (
        "import sys\n"
        "class Nothing:\n"
        "    __bool__ = lambda self: False\n"
        "    gradient_scale = lambda self, count, total, workers: workers * count / total\n"
        "sys.modules[__name__] = Nothing()\n"
    )
    status, points, message = fooled(source)
    assert (status, points) == (1, 0)
    assert "changes the test tools" in message


THEFTS = """
import os, subprocess

def output(*command):
    return subprocess.run(command, capture_output=True).stdout

def linked(link):
    link(PATH, "stolen.py")
    return open("stolen.py").read()

def beneath_a_descriptor():
    root = os.open("/", os.O_RDONLY | os.O_PATH)
    return os.read(os.open(PATH[1:], os.O_RDONLY, dir_fd=root), 10**6)

ways = {
    "open": lambda: open(PATH).read(),
    "child": lambda: output("cat", PATH),
    "git": lambda: output("git", "-c", "safe.directory=*", "-C", ROOT, "show", f"HEAD:./{NAME}"),
    "hard link": lambda: linked(os.link),
    "soft link": lambda: linked(os.symlink),
    "descriptor": beneath_a_descriptor,
    "parent": lambda: open(f"/proc/{os.getppid()}/root{PATH}").read(),
}
for steal in ways.values():
    try:
        exec(steal())
    except Exception:
        pass
"""


@needs_solution
def test_solution_cannot_be_read(graded, tmp_path, monkeypatch):
    path, root = SOLVED[0] / "solution" / "uneven_shards.py", repo_root()
    names = f"PATH, ROOT, NAME = {str(path)!r}, {str(root)!r}, {str(path.relative_to(root))!r}\n"
    stolen = names + THEFTS
    (tmp_path / "adapters.py").write_text(stolen)
    status, record = graded(EXERCISES[0], tmp_path, "--task", "uneven-shards")
    if record["isolation"] == "an audit hook only":
        return  # nothing keeps a child, or a link, from it on this system: that is what it says
    assert (status, record["points"]) == (1, 0)
    message = record["tasks"][0]["message"]
    assert "has no attribute 'combine_gradients'" in message, "a theft has worked"
    knowing: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(stolen, knowing)
    assert "combine_gradients" in knowing, "the thefts are none"


def test_a_chapters_code_cannot_be_run(fooled):
    """It has what some exercises ask for, such as a radix tree."""
    code = repo_root() / "chapter01-introduction" / "code"
    assert (code / "check_cuda.py").is_file()
    message = fooled(f"import runpy\nrunpy.run_path({str(code / 'check_cuda.py')!r})\n")[2]
    assert "No such file" in message or "Permission denied" in message


def test_a_link_in_the_students_folder_is_not_followed(fooled, tmp_path):
    (tmp_path / "uneven_shards.py").symlink_to(EXERCISES[0] / "tests" / "test_uneven_shards.py")
    assert "No module named 'uneven_shards'" in fooled("import uneven_shards\n")[2]


ENDS = {
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)": "by SIGKILL",
    "import os\nos._exit(0)": "with status 0",
    "import os\nos.closerange(3, 1000)": "closed its connection",
    "import os\nfor n in range(3, 99):\n    try: os.write(n, b'{' * 99)\n"
    "    except OSError: pass": "is no message",
}


@needs_solution
@pytest.mark.parametrize("source", ENDS)
def test_a_process_that_says_no_more_earns_nothing(fooled, source):
    body = source.replace("\n", "\n    ")
    status, points, message = fooled(f"{CORRECT}\ndef gradient_scale(*a):\n    {body}\n")
    assert (status, points) == (1, 0)
    assert ENDS[source] in message


def test_nothing_outside_can_be_written_or_killed(graded, tmp_path):
    (tmp_path / "adapters.py").write_text(
        "import os, signal\n"
        "def combine_gradients(gradients, counts):\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "def gradient_scale(*arguments):\n"
        f"    open({str(tmp_path / 'new')!r}, 'w')\n"
    )
    _, record = graded(EXERCISES[0], tmp_path, "--task", "uneven-shards")
    assert record["points"] == 0
    if "another user" in record["isolation"]:
        messages = [test["message"] for test in record["tasks"][0]["tests"]]
        assert all(message.startswith("PermissionError") for message in messages)


RANKS = """
import multiprocessing, tempfile, torch, torch.distributed as dist
from pathlib import Path

def rank(number, folder, totals):
    store = dist.FileStore(folder + "/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    value = torch.ones(1)
    dist.all_reduce(value)
    totals.put(int(value))

def combine_gradients(gradients, counts):
    assert Path.home().is_dir()
    forking, folder = multiprocessing.get_context("fork"), tempfile.mkdtemp()
    totals = forking.Queue()
    ranks = [forking.Process(target=rank, args=(n, folder, totals)) for n in range(2)]
    for process in ranks:
        process.start()
    raise RuntimeError(f"the ranks say {[totals.get(timeout=60) for _ in ranks]}")
"""


@pytest.mark.slow
def test_ranks_can_be_spawned_and_talk(fooled):
    assert "the ranks say [2, 2]" in fooled(RANKS)[2]


@needs_solution
@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--in-process"]])
def test_a_student_may_use_plain_pytest(tmp_path, mode):
    test = SOLVED[0] / "tests" / "test_uneven_shards.py"
    solution = ["--student", str(SOLVED[0] / "solution"), *mode]
    flags = ["-p", "distlab.lab.grade_plugin", "-p", "no:cacheprovider", "-q", "-s"]
    command = [sys.executable, "-m", "pytest", *flags, *solution, str(test)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_forged_report_counts_for_nothing(fooled):
    outcomes = {name: {"passed": True, "message": ""} for name in ("test_equal_shards", "test_x")}
    forged = json.dumps({"token": "guessed", "outcomes": outcomes})
    status, points, message = fooled(
        "import contextlib, os, pathlib\n"
        "with contextlib.suppress(OSError):\n"
        f"    pathlib.Path('../report.json').write_text({forged!r})\n"
        "os._exit(0)\n"
    )
    assert (status, points) == (1, 0)
    assert message == "your code ended its Python process, with status 0"


@needs_solution
def test_own_file_cannot_stand_for_numpy(fooled, tmp_path):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not the real one')\n")
    assert fooled(CORRECT)[:2] == (0, 4)


def test_broken_adapters_are_explained(fooled):
    assert "SyntaxError" in fooled("def combine_gradients(:\n")[2]
    assert "has no attribute 'combine_gradients'" in fooled("x = 1\n")[2]


@needs_solution
def test_a_closed_umask_and_a_closed_folder_cost_no_points(graded, tmp_path):
    """Where the grader is root, the student's process is another user."""
    shutil.copytree(EXERCISES[0] / "solution", tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o700)
    mask = os.umask(0o077)
    try:
        record = graded(EXERCISES[0], tmp_path, "--task", "read-profile")[1]
    finally:
        os.umask(mask)
    assert record["points"] == record["max_points"], record["tasks"][0]["message"]


def test_grades_are_written_and_printed(tmp_path, capsys):
    starter = EXERCISES[0] / "starter"
    record = tmp_path / "grades.json"
    flags = ["--task", "uneven-shards", "--json", str(record)]
    assert grade(["1", str(starter), *flags]) == 1
    assert capsys.readouterr().out.endswith(": 0/4 points\n")
    written = json.loads(record.read_text())
    assert (written["chapter"], written["points"], written["max_points"]) == (1, 0, 4)
    assert [test["points"] for test in written["tasks"][0]["tests"]] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99", "STARTER"], "chapter 99 has no exercises; use one of: 1"),
        (["1", "nowhere"], "DIR nowhere is no directory; begin with a copy of chapter01"),
        (["1", "EMPTY"], "has no adapters.py"),
        (["1", "SHADOW"], "trace.py hides Python's own module trace; rename it"),
        (["1", "STARTER", "--task", "nap"], "--task nap is not known; use one of: uneven-shards"),
        (["1", "STARTER", "--json", "EMPTY"], "is a folder; name a file"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shadow").mkdir()
    for name in ("adapters.py", "trace.py"):
        (tmp_path / "shadow" / name).touch()
    places = {
        "STARTER": str(EXERCISES[0] / "starter"),
        "EMPTY": str(tmp_path / "empty"),
        "SHADOW": str(tmp_path / "shadow"),
    }
    with pytest.raises(UsageError, match=message) as raised:
        grade([places.get(argument, argument) for argument in arguments])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [[], ["one", "."], ["1", ".", "--time-limit", "0"]])
def test_malformed_arguments_end_with_status_2(arguments):
    with pytest.raises(SystemExit) as ended:
        grade(arguments)
    assert ended.value.code == 2


def test_student_tree_has_no_solution_and_can_be_graded(tmp_path, capsys):
    out = tmp_path / "students"
    assert tree.student_tree([str(out)]) == 0
    assert "no solutions" in capsys.readouterr().out
    assert not list(out.glob("**/solution"))
    starter = out / EXERCISES[0].relative_to(repo_root()) / "starter"
    result = subprocess.run(
        [sys.executable, "-m", "distlab.lab", "grade", "1", starter, "--task", "uneven-shards"],
        env=os.environ | {"PYTHONPATH": str(out / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1, result.stderr
    assert "0/4 points" in result.stdout
    with pytest.raises(UsageError, match="exists and is not empty"):
        tree.student_tree([str(out)])


@pytest.fixture
def small_repository(tmp_path, monkeypatch):
    """A repository with one solution, one build output, and one ignored secret."""
    root = tmp_path / "repository"
    for name, text in {
        "README.md": "Read me.\n",
        "chapter01-x/exercises/starter/task.py": "def answer():\n    raise NotImplementedError\n",
        "chapter01-x/exercises/solution/task.py": "def answer():\n"
        "    question = ask_the_mice()\n"
        "    thought = think_for_long(question)\n"
        "    return forty_two(thought)\n",
        "build/output.txt": "made\n",
        ".venv/secret.txt": "ignored\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(tree, "repo_root", lambda: root)
    return root


@pytest.mark.parametrize("tracked", [True, False], ids=["git", "no-git"])
def test_student_tree_takes_the_repository_files_only(small_repository, tmp_path, tracked):
    if tracked:
        git = ["git", "-C", str(small_repository)]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "README.md", "chapter01-x"], check=True)
    out = tmp_path / "out"
    out.mkdir()
    assert tree.student_tree([str(out)]) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["README.md", str(Path("chapter01-x/exercises/starter/task.py"))]
    assert sorted(tmp_path.iterdir()) == [out, small_repository]


def test_student_tree_refuses_to_leak_a_solution(small_repository, tmp_path):
    solution = (small_repository / "chapter01-x/exercises/solution/task.py").read_text()
    (small_repository / "README.md").write_text(f"Hint:\n\n```\n{solution}```\n")
    with pytest.raises(RunError, match=r"README.md holds a part of chapter01-x.*take it out"):
        tree.student_tree([str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [small_repository]


def test_each_grading_draws_other_cases_and_tells_how_to_draw_them_again(capsys):
    directory = str(EXERCISES[0] / "starter")
    task = ["--task", "uneven-shards", "--json", "-"]
    seeds = []
    for flags in ([], [], ["--seed", "7"]):
        grade(["1", directory, *task, *flags])
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert seeds[0] != seeds[1]
    assert seeds[2] == 7
    grade(["1", directory, "--task", "uneven-shards", "--seed", "7"])
    assert "--seed 7" in capsys.readouterr().out.splitlines()[-1]
