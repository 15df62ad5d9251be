"""A headless Chromium, driven through a pipe by its DevTools protocol: no driver, no further package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
A4_INCHES = {"paperWidth": 8.27, "paperHeight": 11.69}
_FREE = 10
"""Least number of a file descriptor that is in nobody's way: Chromium reads from 3 and writes to 4."""
_PATIENCE_S = 120


class Chromium:
    """One page of a headless Chromium."""

    def __init__(self, program: str, home: Path) -> None:
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FREE) for end in (theirs_in, theirs_out)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-background-networking", f"--user-data-dir={home}", "--remote-debugging-pipe"]
        quiet = os.open(os.devnull, os.O_RDWR)
        self._pid = os.posix_spawn(
            program,
            [program, *options, "about:blank"],
            {**os.environ, "TMPDIR": str(home)},
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, quiet, ours) for ours in (0, 1, 2)),
                *((os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(ends, start=3)),
            ],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, quiet, *ends):
            os.close(end)
        self._unread = b""
        self._calls = 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, page: Path, *, width: int, height: int, dark: bool = False) -> None:
        """Show a file at a size in CSS pixels, in light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._call("Page.navigate", url=page.absolute().as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression on the page; the page's content policy stops none."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, *, whole: bool = False) -> bytes:
        """PNG of what is seen, or of the whole page."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole, **self._whole(whole))
        return base64.b64decode(found["data"])

    def _whole(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}}

    def pdf(self) -> bytes:
        """The page on A4."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True, **A4_INCHES)["data"])

    def close(self) -> None:
        """End the browser with all its processes; its files lie in its home."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._calls:
            pass
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _wait_for(self, event: str) -> None:
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._from, 1 << 20) if ready else b""
            assert piece, "Chromium has ended or does not answer"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def chromium(home: Path) -> Iterator[Chromium]:
    """Run a browser with its files in ``home``, or skip what asks for one."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    browser = Chromium(program, home)
    try:
        yield browser
    finally:
        browser.close()
