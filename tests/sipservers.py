"""A real Kamailio before a carrier played by SIPp, mirrored to an agent: all on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness

SCENARIOS = harness.ROOT / "tests" / "scenarios"
CONFIGURATION = harness.ROOT / "conf" / "kamailio" / "kamailio.cfg"
RUN_SCENARIO = str(harness.ROOT / "scripts" / "run_scenario.py")
OPTIONS = """OPTIONS sip:ping@{target} SIP/2.0\r
Via: SIP/2.0/UDP {me};branch=z9hG4bK-ready\r
From: <sip:ready@{me}>;tag=1\r
To: <sip:ping@{target}>\r
Call-ID: ready@{me}\r
CSeq: 1 OPTIONS\r
Max-Forwards: 70\r
Content-Length: 0\r
\r
"""


def program(name: str) -> str:
    """Where the program is. Skips the test where it is not, which under CI is a failure."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        reason = f"{name} is not installed, and packages could not be (make sip-servers says why)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def free_port(kind: socket.SocketKind = socket.SOCK_DGRAM) -> int:
    """A port of 127.0.0.1 that nobody has, UDP by default."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is stopped in the end by the process that was started."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers_sip(port: int) -> bool:
    """Does a SIP server answer on this port? Our proxy answers OPTIONS with 405."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", port))
        host, mine = sock.getsockname()
        sock.send(OPTIONS.format(target=f"127.0.0.1:{port}", me=f"{host}:{mine}").encode())
        with contextlib.suppress(OSError):
            return sock.recv(65_536).startswith(b"SIP/2.0 405 ")
    return False


def listens(port: int) -> bool:
    """Does anybody have this UDP port? Asked of Linux, as SIPp answers nothing but its calls."""
    lines = Path("/proc/net/udp").read_text(encoding="ascii").splitlines()[1:]
    return any(int(line.split()[1].rpartition(":")[2], 16) == port for line in lines)


@contextlib.contextmanager
def proxy(
    agent: tuple[str, int], folder: Path, *defines: str, configuration: Path = CONFIGURATION
) -> Iterator[str]:
    """Kamailio with our configuration, and the carrier behind it; yields where to call."""
    kamailio, sipp = program("kamailio"), program("sipp")
    sip, carrier = free_port(), free_port()
    serve = [sipp, "-sf", str(SCENARIOS / "carrier.xml"), "-i", "127.0.0.1", "-bind_local"]
    serve += ["-p", str(carrier), "-nostdin"]
    # In the foreground, with nothing in a place that another run might use.
    route = [kamailio, "-DD", "-E", "-f", str(configuration), "-Y", str(folder)]
    route += ["-m", "32", "-A", f"LISTEN=udp:127.0.0.1:{sip}"]
    route += ["-A", f'AGENT_URI="sip:{agent[0]}:{agent[1]}"']
    route += ["-A", f'CARRIER_URI="sip:127.0.0.1:{carrier}"']
    route += [word for define in defines for word in ("-A", define)]
    with (
        running(serve, folder / "carrier.log", folder) as carrying,
        running(route, folder / "kamailio.log", folder) as routing,
    ):
        harness.wait_until(
            lambda: listens(carrier) or carrying.poll() is not None, "the carrier listens"
        )
        assert carrying.poll() is None, (folder / "carrier.log").read_text(errors="replace")
        harness.wait_until(
            lambda: answers_sip(sip) or routing.poll() is not None, "Kamailio answers"
        )
        assert routing.poll() is None, (folder / "kamailio.log").read_text(errors="replace")
        yield f"127.0.0.1:{sip}"
        assert routing.poll() is None, (folder / "kamailio.log").read_text(errors="replace")


@contextlib.contextmanager
def sandbox(folder: Path) -> Iterator[str]:
    """The rating sandbox; yields its URL."""
    log = folder / "sandbox.log"
    script = str(harness.ROOT / "scripts" / "rating_sandbox.py")
    command = [sys.executable, script, "--listen", "127.0.0.1:0"]
    with running(command, log, folder):
        harness.wait_until(lambda: "listening on" in log.read_text(), "the sandbox listens")
        yield log.read_text().split()[-1]


class ScenarioRun:
    """`run_scenario.py` as a process, so that several scenarios run side by side."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, RUN_SCENARIO, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._done: tuple[int, str] | None = None

    def result(self) -> tuple[int, str]:
        """Wait for its end; exit status and what it printed."""
        if self._done is None:
            try:
                output, _ = self._process.communicate(timeout=60)
            finally:
                self.stop()
            self._done = self._process.returncode, output
        return self._done

    def stop(self) -> None:
        """End it where it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
