"""The lab's uv, brought by one pip install where the user has none, and led by pip's settings."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distlab.environments.recipes import FOLDER, SetupError, pyproject

# uv does not read pip's configuration: a setting there, and uv's names for it, the newest first.
UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": ("UV_FIND_LINKS",),
    "no-index": ("UV_NO_INDEX",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("ALL_PROXY",),
}
# Where packages come from is the user's business; what goes where, and in which version, the lab's.
KEPT_OF_UV = re.compile(
    r"UV_(DEFAULT_INDEX|INDEX|EXTRA_INDEX|FIND_LINKS|NO_INDEX|INSECURE|HTTP|OFFLINE|CACHE_DIR"
    r"|NATIVE_TLS|SYSTEM_CERTS|KEYRING|LINK_MODE|CONCURRENT|CONFIG_FILE|NO_CONFIG)"
)
MISLEADING = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
Run = Callable[[Sequence[str | Path], dict[str, str]], None]


def find_or_fetch(run: Run) -> Path:
    """Return a uv as new as pyproject.toml wants it: the user's, or the lab's own in .venv/uv.

    run: runs a command with these variables, and raises an exception where it fails.
    """
    wanted = pyproject()["tool"]["lab"]["uv"]
    own = FOLDER / "uv" / "bin" / "uv"
    for uv in (shutil.which("uv"), own):
        if uv and is_new_enough(uv, wanted):
            return Path(uv)
    shutil.rmtree(FOLDER / "uv", ignore_errors=True)
    plain = plain_variables()
    python = python_with_pip()
    where = ["--target", str(FOLDER / "uv")]
    if python is None:
        run([base_python(), "-m", "venv", FOLDER / "uv"], plain)
        python, where = str(FOLDER / "uv" / "bin" / "python"), []
    settings = {f"PIP_{name.upper().replace('-', '_')}": v for name, v in pip_settings().items()}
    quiet = {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [python, "-m", "pip", "install", "--no-deps", "--no-input", *where, f"uv=={wanted}"]
    run(command, {**plain, **settings, **quiet})
    if not is_new_enough(own, wanted):
        raise SetupError(f"uv {wanted} does not run on this machine; install uv {wanted} or newer")
    return own


def is_new_enough(uv: str | Path, wanted: str) -> bool:
    try:
        told = subprocess.run(
            [uv, "--version"], capture_output=True, encoding="utf-8", errors="replace"
        ).stdout
    except OSError:
        return False
    found = re.match(r"uv ([\d.]+)", told)
    return found is not None and as_numbers(found[1]) >= as_numbers(wanted)


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.strip(".").split(".")]


def plain_variables() -> dict[str, str]:
    """The user's environment variables, less what redirects pip, uv or Python."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in MISLEADING
        and not name.startswith("PIP_")
        and (not name.startswith("UV_") or KEPT_OF_UV.match(name))
    }


def uv_variables() -> dict[str, str]:
    """The environment variables for uv: the user's, and what pip is told, in uv's words."""
    variables = plain_variables()
    variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # what pip does
    for setting, value in pip_settings().items():
        if not any(name in variables for name in UV_NAMES[setting]):
            separator = "," if setting == "find-links" else " "
            variables[UV_NAMES[setting][0]] = separator.join(value.split())
    if "UV_CACHE_DIR" not in variables and not shares_disk(user_cache()):
        variables["UV_CACHE_DIR"] = str(FOLDER / "cache")
    return variables


def forbids_indexes() -> bool:
    """Whether the user's settings let packages come from find-links alone."""
    return uv_variables().get("UV_NO_INDEX", "").lower() in ("1", "true", "yes", "on", "y", "t")


@functools.cache
def pip_settings() -> dict[str, str]:
    """Where pip takes packages from, by its files and variables; nothing where there is no pip."""
    python = python_with_pip()
    if python is None:
        return {}
    listing = subprocess.run(
        [python, "-m", "pip", "config", "list"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        errors="replace",
    ).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listing, re.MULTILINE):
            settings[name] = str(ast.literal_eval(value))
    return {name: value for name, value in settings.items() if name in UV_NAMES}


def python_with_pip() -> str | None:
    for python in (base_python(), str(FOLDER / "uv" / "bin" / "python")):
        look = [python, "-c", "import pip"]
        if os.access(python, os.X_OK) and not subprocess.run(look, capture_output=True).returncode:
            return python
    return None


def base_python() -> str:
    """Return the interpreter that virtual environments are made from, also when in one of them."""
    in_prefix = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    return str(in_prefix if in_prefix.exists() else sys.executable)


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "uv"


def shares_disk(cache: Path) -> bool:
    """Whether files can be linked from `cache` into an environment, and the cache be written."""
    there = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))
    return os.access(there, os.W_OK) and there.stat().st_dev == FOLDER.stat().st_dev
