"""The switch in user space (`distlab.cluster.forwarding`), as the cluster starts and tells it."""

import json
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from distlab.cluster.world import LIMIT_S, World
from distlab.errors import RunError, Skipped

JITTER_S = 5e-3  # how late it may be on a busy machine; the link catches up on as much
FASTEST = "1gbit"  # what it handed on for each of four nodes, on a machine with two cores


def kernel_has_netem(world: World) -> bool:
    """Whether the kernel itself can delay and lose packets."""
    try:
        world.administer("tc", ["qdisc add dev lo root netem delay 1ms", "qdisc del dev lo root"])
    except Skipped:
        return False
    return True


class DelaySwitch:
    """Takes the bridge's place in a world."""

    def __init__(self, world: World) -> None:
        script = str(Path(__file__).with_name("forwarding.py"))
        self._process = subprocess.Popen(
            [*world.enter(None, "--net", "--pid"), sys.executable, "-I", "-S", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def configure(self, ports: dict[str, tuple[float, float]]) -> None:
        """Set, of what leaves by each port, the seconds that it is held and the share that is lost;
        returns when it is so."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(ports) + "\n")
            self._process.stdin.flush()
        answered, _, _ = select.select([self._process.stdout], [], [], LIMIT_S)
        if not answered or not self._process.stdout.readline():
            self._process.kill()
            raise RunError("the virtual cluster's switch in user space failed")

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.wait(LIMIT_S)
