"""What chapters need: found or missing, and the one command that mends it."""

import json

import pytest

from distlab.lab import doctor, needs
from distlab.lab.needs import Need

DEBIAN = {"ID": "ubuntu", "ID_LIKE": "debian"}


@pytest.fixture
def debian_as_root(monkeypatch):
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: DEBIAN)
    monkeypatch.setattr("os.geteuid", lambda: 0)


def need(what, chapters, found, remedy="mend it", packages=()):
    return Need(chapters, what, "a test", lambda: found, remedy, packages)


def test_every_need_has_its_chapters_a_working_probe_and_a_remedy():
    for one in needs.needs():
        found = one.probe()
        assert found is None or found.strip()
        assert one.chapters and set(one.chapters) <= set(range(1, 12))
        assert one.remedy or one.what == "NVIDIA driver"  # no command brings a GPU


def test_install_line(debian_as_root, monkeypatch):
    line = "apt-get install -y --no-install-recommends iproute2 munge"
    assert needs.install_line(["iproute2", "munge"]) == line
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert needs.install_line(["iproute2", "munge"]) == f"sudo {line}"
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "fedora"})
    assert needs.install_line(["iproute2"]).endswith("package manager: iproute2")


def test_system_packages_are_those_of_written_chapters(debian_as_root, monkeypatch):
    wanted = [
        need("a", (1,), None, packages=("pkg-a", "pkg-b")),
        need("b", (1, 2), None, packages=("pkg-b", "pkg-c")),
        need("c", (1,), "here", packages=("pkg-d",)),
        need("d", (99,), None, packages=("pkg-e",)),
        need("e", (1,), None),
    ]
    monkeypatch.setattr(needs, "needs", lambda: wanted)
    assert needs.missing_system_packages() == ["pkg-a", "pkg-b", "pkg-c"]


def test_rows_name_what_can_be_mended():
    wanted = [need("gpu", (1, 2), None, ""), need("slurm", (2, 3, 5), None), need("ip", (2,), "x")]
    found = [one.probe() for one in wanted]
    lacking = {row[0]: row[2] for row in needs.chapter_rows(wanted, found)}
    assert (lacking["1"], lacking["2"], len(lacking)) == ("✓", "slurm", 11)
    assert needs.remedies(wanted, found) == [["slurm", "2-3, 5", "mend it"]]


def test_an_environment_names_the_system_packages_that_its_recipe_asks_for(
    debian_as_root, monkeypatch
):
    recipe = {"minutes": 1, "gigabytes": 2, "system": ["libnuma1"]}
    project = {"tool": {"lab": {"environments": {"some": recipe}}}}
    monkeypatch.setattr(needs, "pyproject", lambda: project)
    monkeypatch.setattr(needs, "ENVIRONMENTS", [("some", (6,), "an engine")])
    (found,) = [one for one in needs.needs() if one.what == "environment some"]
    assert found.packages == ("libnuma1",)
    line = f"{needs.install_line(['libnuma1'])} && python3 scripts/lab.py env some"
    assert found.remedy == line


def test_an_environment_is_found_when_it_is_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_VENV_DIR", str(tmp_path))
    assert needs._environment("vllm") is None
    (tmp_path / "vllm").mkdir()
    assert needs._environment("vllm") is None
    (tmp_path / "vllm" / ".lab-stamp.json").write_text("{}")
    assert needs._environment("vllm") == "built"


def test_doctor_tells_and_does_not_judge(capsys):
    assert doctor.doctor([]) == 0
    assert capsys.readouterr().out.startswith("machine: ")
    assert doctor.doctor(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"machine", "needs", "missing_system_packages"} <= told.keys()
    assert all(
        one["found"] or one["remedy"] or one["what"] == "NVIDIA driver" for one in told["needs"]
    )


def test_check_cuda_checks_a_wrong_product(monkeypatch, capsys, tmp_path):
    """A device that computes wrongly is found out."""
    import torch

    import check_cuda

    right = torch.Tensor.__matmul__
    path = tmp_path / "machine.json"
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: right(a, b) * (1 if a.dtype is torch.float64 else 1.5),
    )
    assert check_cuda.main(["--preset", "smoke", "--json", str(path)]) == 1
    assert "matrix product on cpu is within its bound … FAILED" in capsys.readouterr().out
    monkeypatch.undo()
    assert json.loads(path.read_text())["tables"]["chapters"]["rows"]
