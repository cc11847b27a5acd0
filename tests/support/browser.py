"""Chromium without a screen, as a person uses it: a page is opened, clicked, typed into, looked at.

Over its debugging pipe (file descriptors 3 and 4): no port, no driver, no package.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import HANG_S


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self.session: str | None = None
        self.said: list[str] = []
        """Errors and messages of the page's own console."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and what it returns."""
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            asked["sessionId"] = self.session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, *, width: int = 1000, height: int = 800) -> None:
        """Go there in a window of this size, and wait until it has loaded."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.command("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression on the page."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + HANG_S
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression}\n{self.said}"
            time.sleep(0.05)

    def hover(self, selector: str) -> None:
        """Put the mouse on it."""
        place = self._middle(selector)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", **place)

    def click(self, selector: str) -> None:
        """With the mouse."""
        place = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place
            )

    def _middle(self, selector: str) -> dict[str, float]:
        """Where it is in the window, once it has been scrolled into it."""
        x, y = self.value(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            "it.scrollIntoView({block: 'center', inline: 'center'});"
            "const box = it.getClientRects()[0];"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        return {"x": x, "y": y}

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.command("Input.insertText", text=text)
        # Some pages look when a key is let go.
        self.command("Input.dispatchKeyEvent", type="keyUp", key="Shift", code="ShiftLeft")

    def choose(self, selector: str, *files: Path) -> None:
        """Files in an input of files, as its dialogue would."""
        found = self.command("Runtime.evaluate", expression=f"document.querySelector('{selector}')")
        self.command("DOM.setFileInputFiles", files=[str(file) for file in files],
                     objectId=found["result"]["objectId"])  # fmt: skip

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                         windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "")  # fmt: skip

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))
        return path


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a chromium that keeps its files in `profile`; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The shell puts the two ends where chromium looks for them.
    words = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
               "--remote-debugging-pipe", "--no-proxy-server", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", words, program, *options], pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
