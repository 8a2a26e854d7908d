"""The rules of the house, for the whole tree: who may import whom, and what lies where.

Imports are read from the source, never executed: those of functions and those under
`if TYPE_CHECKING:` count like all others. DESIGN.md, "The house", has the rules in words.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from distlab.files import repo_root
from distlab.lab.lessons import Chapter, all_blocks, chapters

ROOT = repo_root()
WRITTEN = [one for one in chapters() if one.written]
BY_NAME = pytest.mark.parametrize("one", WRITTEN, ids=lambda one: one.folder.name)
SHARED = {"paged_engine", "llm_router", "serving_stack"}  # real software, for later chapters too
MOST_ENTRIES, MOST_LINES = 25, 420
EDITS_PATH = re.compile(
    r"sys\.path(\.\w+\(|\[.*\] *=| *\+?=)|syspath_prepend|spec_from_file_location"
)
NO_TEXT = {"os.open", "webbrowser.open", "direct.open"}
MAY_EDIT_PATH = {"tests/lab/test_setup.py", "tests/lab/test_setup_parts.py"}  # scripts/ is nowhere


@cache
def modules() -> dict[Path, str]:
    """Every module of the project that is no test and no exercise, and its name."""
    named = {path: _name(path, ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    named |= {path: path.stem for path in (ROOT / "scripts").glob("*.py")}
    for code in (one.folder / "code" for one in WRITTEN):
        named |= {path: _name(path, code) for path in code.rglob("*.py")}
    return named


def _name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def folder(path: Path) -> Path:
    """What a module belongs to: src/, scripts/, or its chapter's code/."""
    code = next((parent for parent in path.parents if parent.name == "code"), None)
    return code or ROOT / path.relative_to(ROOT).parts[0]


def is_package(path: Path) -> bool:
    """Whether a module is part of a package, and no script."""
    return (path.parent / "__init__.py").exists()


def package(path: Path) -> str:
    return modules()[path].partition(".")[0]


@cache
def imports() -> dict[Path, list[Path]]:
    """The project's modules that each module imports: its own folder's first, as Python finds them.

    `from a.b import c` is an import of a.b.c where that is a module, else of a.b; that Python
    imports the packages around a module as well makes no circle.
    """
    by_name: dict[str, list[Path]] = {}
    for path, name in modules().items():
        by_name.setdefault(name, []).append(path)
        if path.parent.name == "faults":  # is started from there, and finds its neighbours so
            by_name.setdefault(path.stem, []).append(path)
    found = {}
    for path in modules():
        targets = []
        for names in imported_names(path):
            candidates = next((by_name[name] for name in names if name in by_name), [])
            if candidates:
                targets.append(min(candidates, key=lambda other: folder(other) != folder(path)))
        found[path] = list(dict.fromkeys(target for target in targets if target != path))
    return found


def imported_names(path: Path) -> Iterator[list[str]]:
    """What each import of a module may mean, the likeliest first."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield [alias.name]
        elif isinstance(node, ast.ImportFrom):
            around = modules()[path].split(".")
            depth = len(around) - node.level + (path.name == "__init__.py")
            before = around[:depth] if node.level else []
            origin = ".".join([*before, *([node.module] if node.module else [])])
            for alias in node.names:
                yield [f"{origin}.{alias.name}", origin]


def told(pairs: list[tuple[Path, Path]]) -> str:
    shown = [f"{one.relative_to(ROOT)} imports {other.relative_to(ROOT)}" for one, other in pairs]
    return "\n".join(shown)


def edges() -> Iterator[tuple[Path, Path]]:
    for path, targets in imports().items():
        for target in targets:
            yield path, target


def test_the_reader_of_imports_sees_them_all() -> None:
    """Of a package, relative, of a function, and for types alone."""
    seen = {(modules()[one], modules()[other]) for one, other in edges()}
    assert ("distlab.run", "distlab.record") in seen  # from distlab import check, files, record
    assert ("distlab.record", "distlab.hardware") in seen  # within a function
    assert ("lab", "distlab.environments.building") in seen  # from scripts/
    assert len(modules()) > 200 and len(seen) > 400


def test_a_script_imports_no_script() -> None:
    """What two scripts use is a module of the chapter's package."""
    wrong = [
        (one, other)
        for one, other in edges()
        if folder(one).name == "code" and not is_package(one) and not is_package(other)
    ]
    assert not wrong, told(wrong)


def test_a_package_imports_no_script() -> None:
    wrong = [(one, other) for one, other in edges() if is_package(one) and not is_package(other)]
    assert not wrong, told(wrong)


def test_no_import_goes_in_a_circle() -> None:
    circles = list(find_circles(imports()))
    shown = [" → ".join(str(path.relative_to(ROOT)) for path in circle) for circle in circles]
    assert not circles, "\n".join(shown)


def find_circles(graph: dict[Path, list[Path]]) -> Iterator[list[Path]]:
    """A shortest circle of imports through each module that is on one and not on an earlier's."""
    told: set[Path] = set()
    for start in sorted(graph):
        came_from: dict[Path, Path] = {}
        reached = [start]
        for path in reached:  # grows as it goes: breadth first
            for target in graph[path]:
                if target not in came_from:
                    came_from[target] = path
                    reached.append(target)
        if start not in came_from or start in told:
            continue
        circle = [start, came_from[start]]
        while circle[-1] != start:
            circle.append(came_from[circle[-1]])
        told.update(circle)
        yield circle[::-1]


def test_a_circle_is_found_and_named() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert list(find_circles({a: [b], b: [c], c: [b, d], d: []})) == [[b, c, b]]
    assert list(find_circles({a: [b, c], b: [d], c: [d], d: []})) == []


def test_the_bench_knows_no_chapter_and_chapters_know_each_others_engines_alone() -> None:
    wrong = [
        (one, other)
        for one, other in edges()
        if folder(other) not in (folder(one), ROOT / "src")
        and not (folder(one).name == "code" and package(other) in SHARED)
    ]
    assert not wrong, told(wrong)


@BY_NAME
def test_code_shows_what_a_reader_runs(one: Chapter) -> None:
    """`ls code/` is a table of contents: scripts of the lesson, packages, and named folders."""
    run = {name for block in all_blocks() if not block.norun for name in block.scripts}
    entries = [path for path in (one.folder / "code").iterdir() if path.name != "__pycache__"]
    files = {str(path.relative_to(ROOT)) for path in entries if path.is_file()}
    assert files <= run, f"no lesson runs {', '.join(sorted(files - run))}"
    assert len(entries) <= MOST_ENTRIES
    assert not [path.name for path in entries if path.name.startswith("_")]


def test_no_module_is_too_long_to_be_read() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lines.items() if n > MOST_LINES]
    assert not long, "\n".join(long)


def test_no_path_is_edited() -> None:
    """Packages are installed, and pytest's pythonpath has every code/: names are enough."""
    tested = [*(ROOT / "tests").rglob("*.py"), *(p for p in modules() if folder(p).name == "code")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tested
        if path != Path(__file__) and str(path.relative_to(ROOT)) not in MAY_EDIT_PATH
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if EDITS_PATH.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_text_names_its_encoding() -> None:
    """Else it is the locale's: ASCII in many a container, Latin-1 on many a cluster."""
    read = [*modules(), *ROOT.glob("chapter*/exercises/**/*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for path in read
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _leaves_encoding_open(call)
    ]
    assert not wrong, "\n".join(wrong)


def _leaves_encoding_open(call: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if named.keys() & {"encoding", None}:  # None: **options
        return False
    whole = ast.unparse(call.func)
    name = whole.rpartition(".")[2]
    if name in ("read_text", "write_text"):
        own = "." not in whole or whole.startswith("files.")  # distlab's, which names it
        return not own and len(call.args) < (1 if name == "read_text" else 2)
    if name in ("open", "fdopen", "makefile", "NamedTemporaryFile") and whole not in NO_TEXT:
        place = int(whole == "open" or name == "fdopen")  # of the mode, in the arguments
        usual = ast.Constant("w+b" if name == "NamedTemporaryFile" else "r")
        mode = named.get("mode", call.args[place] if len(call.args) > place else usual)
        return "b" not in ast.unparse(mode).strip("f'")
    return isinstance(named.get("text"), ast.Constant) or "universal_newlines" in named
