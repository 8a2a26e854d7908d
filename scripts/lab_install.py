"""Installs an environment's packages with uv, or with pip, and shows how far it is."""

import ast
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lab_environment import ROOT, Environment, SetupError
from lab_output import Progress, explain, is_unavailable

POLL_SECONDS = 0.2
# uv does not read pip's configuration: a setting there, and uv's names for it, the newest first.
UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": ("UV_FIND_LINKS",),
    "no-index": ("UV_NO_INDEX",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "cert": ("SSL_CERT_FILE",),
    "proxy": ("ALL_PROXY",),
}


def install(environment: Environment, lock: int) -> str:
    """Make the environment's folder and take its recipe's steps there; return uv or pip.

    lock: a file descriptor that every installing process inherits.
    Raises SetupError with cause and remedy. No process outlives this call.
    """
    return Installer(environment, lock).install()


class CommandFailed(Exception):
    """An installing command failed; `output` is what it wrote."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


class Installer:
    def __init__(self, environment: Environment, lock: int) -> None:
        self.environment = environment
        self.lock = lock
        self.uv = shutil.which("uv")
        self.variables = installing_variables(uses_uv=self.uv is not None)
        self.progress = Progress(environment.name)

    def install(self) -> str:
        tool, environment = "uv" if self.uv else "pip", self.environment
        self.progress.say(f"is set up by {tool} in {environment.folder} (log: {environment.log})")
        environment.log.write_bytes(b"")
        try:
            self.make_folder()
            for step in environment.steps:
                self.take(step)
            self.run_python(environment.check)
        except CommandFailed as failure:
            why = explain(failure.output, environment)
            raise SetupError(f"{environment.name}: {why} (log: {environment.log})") from failure
        finally:
            self.progress.clear()
        self.progress.say("ready")
        return tool

    def make_folder(self) -> None:
        python = base_python()
        if self.uv:
            self.run([self.uv, "venv", "--python", python, self.environment.folder])
        else:
            self.run([python, "-m", "venv", self.environment.folder])

    def take(self, step: dict) -> None:
        if "torch" in step:
            self.install_torch(step["torch"])
        elif "uninstall" in step:
            self.pip("uninstall", *([] if self.uv else ["--yes"]), *step["uninstall"])
        else:
            self.pip_install(*step["install"])

    def install_torch(self, build: str) -> None:
        """Install torch's CPU or CUDA build.

        On Linux the package index's own build is the CUDA one, several GB; the CPU build comes
        from wherever the user's configuration has it, else from PyTorch's index.
        """
        version = f"torch=={self.environment.torch_version}"
        if build == "cpu" and sys.platform == "linux":
            for source in ([], ["--extra-index-url", self.environment.torch_cpu_index]):
                try:
                    return self.pip_install(*source, f"{version}+cpu")
                except CommandFailed as failure:
                    if not is_unavailable(failure.output):
                        raise
            self.progress.say("no CPU build of torch is to be had; taking the index's own build")
        self.pip_install(version)
        if build == "cuda":
            self.run_python(
                "import torch; torch.version.cuda or exit('error: this is a CPU build')"
            )

    def pip_install(self, *arguments: str) -> None:
        # Python compiles what it imports, once; where it may not write that, all is compiled now.
        if os.environ.get("PYTHONDONTWRITEBYTECODE"):
            options = ["--compile-bytecode"] if self.uv else []
        else:
            options = [] if self.uv else ["--no-compile"]
        if self.environment.constraints:
            options += ["-c", self.environment.constraints]
        self.pip("install", *options, *arguments)

    def pip(self, command: str, *arguments: str) -> None:
        python = self.environment.python
        if self.uv:
            self.run([self.uv, "pip", command, "--python", python, *arguments])
        else:
            self.run([python, "-m", "pip", command, *arguments])

    def run_python(self, program: str) -> None:
        self.run([self.environment.python, "-P", "-c", program])

    def run(self, command: list[str | Path]) -> None:
        """Run a command in a process group of its own, its output to the log.

        Raises CommandFailed. On any exception, Interrupted above all, the group is killed first.
        """
        with open(self.environment.log, "r+b") as log:
            begin = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            while process.poll() is None:
                self.progress.show(self.output_since(begin))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException:
            kill_group(process)
            raise
        if process.returncode != 0:
            raise CommandFailed(self.output_since(begin))

    def output_since(self, begin: int) -> str:
        with open(self.environment.log, "rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")


def base_python() -> str:
    """Return the interpreter that virtual environments are made from, also when in one of them."""
    in_prefix = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    return str(in_prefix if in_prefix.exists() else sys.executable)


def installing_variables(uses_uv: bool) -> dict[str, str]:
    """Return the environment variables for the installer: the user's, less what misleads it."""
    variables = {**os.environ, "PIP_USER": "0", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        variables.pop(name, None)
    variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if uses_uv:
        variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # what pip does
        for setting, value in pip_configuration().items():
            names = UV_NAMES.get(setting, ())
            if names and not any(name in variables for name in names):
                separator = "," if setting == "find-links" else " "
                variables[names[0]] = separator.join(value.split())
    return variables


def pip_configuration() -> dict[str, str]:
    """Return pip's settings for `install`, from its files and variables; none where pip is not."""
    listing = subprocess.run(
        [base_python(), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listing, re.MULTILINE):
            settings[name] = str(ast.literal_eval(value))
    return settings


def die_with_parent() -> None:
    """In the child: ask Linux for a SIGTERM when lab.py dies, even of kill -9 (prctl(2))."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
