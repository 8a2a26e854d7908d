"""Headless Chromium, driven over a pipe by the Chrome DevTools Protocol; no driver, no port.

Protocol: https://chromedevtools.github.io/devtools-protocol/ (one JSON object a message, each ended
by a zero byte, on file descriptors 3 and 4 of the browser).
"""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
LIMIT_S = 60.0  # a cold start of Chromium on two busy cores takes about ten


def require_chromium() -> str:
    """The browser's program. Skips the test where there is none; under CI=true it fails."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    reason = "no Chromium here: apt-get install chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def open_page(path: Path) -> Iterator["Page"]:
    """Open the file `path` in a new browser with an empty profile, which ends with the block."""
    program = require_chromium()
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        redirect = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": profile},  # what it leaves there goes with the profile
            pass_fds=(to_browser, from_browser),
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(commands, answers, path)
        finally:
            os.close(commands)
            os.close(answers)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT_S)


class Page:
    """One page: what it reported as wrong, and what can be asked of it."""

    def __init__(self, commands: int, answers: int, path: Path) -> None:
        self.commands, self.answers = commands, answers
        self.events: list[dict[str, Any]] = []
        self._unread = b""
        self._session: str | None = None
        self._count = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # a width is the text's, whole
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the protocol; its result. Raises `AssertionError` for a refusal."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def resize(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Show the page in a window of CSS pixels, with the reader's light or dark preference."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, from top to bottom, as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """Uncaught exceptions, console errors, log errors, and whatever could not be loaded."""
        return [json.dumps(event["params"]) for event in self.events if _is_error(event)]

    def requests(self) -> list[str]:
        """The addresses that the page asked for, data URIs left out."""
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in asked]
        return [url for url in urls if not url.startswith("data:")]

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self.answers], [], [], deadline - time.monotonic())
            assert ready, f"Chromium said nothing for {LIMIT_S:g} s"
            received = os.read(self.answers, 1 << 20)
            assert received, "Chromium ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


def _is_error(event: dict[str, Any]) -> bool:
    parameters = event.get("params", {})
    return (
        event["method"] in ("Runtime.exceptionThrown", "Network.loadingFailed")
        or (event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error")
        or (event["method"] == "Runtime.consoleAPICalled" and parameters["type"] == "error")
    )
