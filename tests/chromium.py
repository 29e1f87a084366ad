"""A headless Chromium, driven over a pipe by its own protocol: pages, scripts, screenshots."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Nothing but the page itself; and it runs as root in containers, where its sandbox does not.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--remote-debugging-pipe"
).split()

# Chromium reads its commands from descriptor 3 and writes to 4.
BECOME = """
import fcntl, os, sys
its_in, its_out = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(its_in, 3)
os.dup2(its_out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. ``requests`` are the URLs it asked for, ``complaints`` its errors."""

    def __init__(self, into: int, out: int) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._into = os.fdopen(into, "wb", buffering=0)
        self._out = os.fdopen(out, "rb", buffering=0)
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False

    def open(self, url: str, width: int, height: int) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            # Phones have no bar to scroll with.
            mobile=width < 600,
        )
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._receive())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true, looked at once a frame."""
        self.run(
            "new Promise((done) => { const look = () => "
            f"({condition}) ? done(true) : requestAnimationFrame(look); look(); }})"
        )

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """A picture of what is seen, or of the ``whole`` page."""
        more: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": size | {"scale": 1}}
        shot = self.call("Page.captureScreenshot", **more)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._into.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._out.read(1 << 16)
            assert data, "Chromium has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(params["entry"]["text"])

    def close(self) -> None:
        self._into.close()
        self._out.close()


@contextmanager
def browsing(url: str, profile: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A tab at ``url`` in a browser of its own, whose files lie in ``profile``."""
    assert PATH is not None
    its_in, into = os.pipe()
    out, its_out = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", BECOME, str(its_in), str(its_out), PATH, *FLAGS]
        + [f"--user-data-dir={profile}"],
        pass_fds=(its_in, its_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    page = Page(into, out)
    try:
        page.open(url, width, height)
        yield page
    finally:
        page.close()
        process.kill()
        process.wait()
