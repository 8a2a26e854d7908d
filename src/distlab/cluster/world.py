"""The world of a cluster: its namespaces, the process that holds them, and ways into them."""

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distlab.cluster.availability import namespace_flags, program, unavailable
from distlab.errors import RunError, Skipped

LIMIT_S = 10.0
ENDED = "the virtual cluster's world has ended"
# Else whoever ends all that carries a job's mark would end the world before the commands in it,
# which then could not end in peace. The world needs no signal: it ends when its owner does.
DEAF = 'trap "" INT TERM; exec "$@"'


class World:
    """Namespaces of our own, and in them those of each node. They end with this process.

    Raises `Skipped` where this machine cannot make one.
    """

    def __init__(self, files: dict[str, str]) -> None:
        if why := unavailable():
            raise Skipped(why)
        flags = namespace_flags() or ()
        self.as_user = "--user" in flags
        self._asking = threading.Lock()
        owner = os.pidfd_open(os.getpid())
        holder = [sys.executable, "-I", "-S", str(Path(__file__).with_name("holder.py"))]
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", DEAF, "sh", program("unshare"), *flags, *holder, str(owner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[owner],
                start_new_session=True,
                encoding="utf-8",
                errors="replace",
            )
        finally:
            os.close(owner)
        try:
            self.pid: int = self.ask(files=files)["pid"]
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have the holder do something. Raises `RunError` when it cannot."""
        with self._asking:
            assert self._process.stdin and self._process.stdout
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], LIMIT_S)
            answer = self._process.stdout.readline() if ready else ""
        if not answer:
            raise RunError(ENDED)
        told: dict[str, Any] = json.loads(answer)
        if "error" in told:
            raise RunError(f"the virtual cluster failed: {told['error']}")
        return told

    def enter(self, pid: int | None = None, *namespaces: str) -> list[str]:
        """The start of a command line that runs in namespaces of `pid`, the world's by default."""
        user = ["--user", "--preserve-credentials"] if self.as_user else []
        wanted = namespaces or ("--mount", "--uts", "--ipc", "--net", "--pid")
        return [program("nsenter"), f"--target={pid or self.pid}", *user, *wanted, "--"]

    def administer(self, tool: str, lines: Sequence[str], pid: int | None = None) -> None:
        """Have ip or tc carry out `lines`, in the switch or in the node whose process is `pid`.

        Raises `Skipped` where the kernel cannot do one of them.
        """
        if lines:
            # In the host's pid namespace, so that `netns PID` names the process that we mean.
            command = [*self.enter(pid, "--net"), program(tool), "-batch", "-"]
            done = subprocess.run(
                command,
                input="\n".join(lines),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=LIMIT_S,
            )
            if self._process.poll() is not None:
                raise RunError(ENDED)
            if done.returncode != 0:
                said = " ".join(done.stderr.split())
                raise Skipped(f"this kernel makes no such link: {tool} says {said}")

    def close(self) -> None:
        """End the world, and wait until it is gone."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(LIMIT_S)
        self._process.stdout.close()
