"""Chromium for the tests, spoken to over a pipe by its DevTools protocol: no driver is needed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gevent
import gevent.os
import pytest

import harness

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
).split()


def chromium() -> str:
    """The program; a test is skipped where it is missing, and fails under CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "Chromium is not installed: make browser"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return str(found)


class Browser:
    """One page of a headless Chromium with a profile of its own."""

    def __init__(self) -> None:
        program = chromium()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The protocol is on descriptors 3 and 4. Not sh: it knows no descriptor above 9.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{theirs_out}', "bash", program, *FLAGS]
            + [f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs, theirs_out),
            start_new_session=True,
        )
        os.close(theirs)
        os.close(theirs_out)
        gevent.os.make_nonblocking(self._in)
        self._ids = itertools.count(1)
        self._buffer = b""
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol and its result; events are left out."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(command).encode() + b"\0")
        with gevent.Timeout(harness.DEADLINE):
            while True:
                while b"\0" not in self._buffer:
                    data = gevent.os.nb_read(self._in, 1 << 16)
                    assert data, "Chromium has ended"
                    self._buffer += data
                text, _, self._buffer = self._buffer.partition(b"\0")
                answer = json.loads(text)
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return answer["result"]

    def open(self, url: str, width: int = 1100, height: int = 1000) -> None:
        """Show a page in a window of that size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        # The session that was started above, and nothing else.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
