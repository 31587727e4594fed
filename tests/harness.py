"""The agent as a process, real sockets, and a rating API server that keeps a ledger."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import gevent
import trustme
from cryptography.hazmat.primitives import serialization
from gevent.pywsgi import WSGIServer

ROOT = Path(__file__).resolve().parent.parent
# The selection that is in the repository, and all captures where they are there.
SELECTION = ROOT / "tests" / "captures"
ALL = ROOT.parent / "shared" / "captures"
# Seconds for anything that has to happen; far more than it takes on a busy machine.
DEADLINE = 30.0
LOCAL = "--sip-local-domains=sip.canyan.io"
TOLERANCE = 0.050  # seconds between a message and its forwarded copy


def captures_folder() -> Path:
    """All captures where they are there, else the selection."""
    return ALL if (ALL / "expected.json").exists() else SELECTION


def expected(folder: Path) -> dict[str, dict[str, Any]]:
    """What a right agent reports for each capture: file name to `expected.json`'s entry."""
    entries: dict[str, dict[str, Any]] = json.loads((folder / "expected.json").read_text())
    return entries


def certificates(folder: Path, *hosts: str, passphrase: bytes | None = None) -> None:
    """A new authority in `ca.pem`; for this host or others `server.pem`, `client.pem`, `.key`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("server", "client"):
        issued = authority.issue_cert(*(hosts or ("localhost", "127.0.0.1")))
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (folder / f"{name}.pem").write_bytes(chain)
        pem = issued.private_key_pem.bytes()
        if passphrase:
            key = serialization.load_pem_private_key(pem, None)
            pem = key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(passphrase),
            )
        (folder / f"{name}.key").write_bytes(pem)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> None:
    """Poll until the condition holds; fails the test with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        gevent.sleep(0.01)


class RatingServer:
    """A rating API over HTTP on loopback that answers ok and keeps each request in order.

    `requests` holds (path, body), `headers` the WSGI environment of each. `answer` may be replaced
    to answer otherwise: it takes path and body and returns (status, JSON); `location` is sent where
    it is set. With an SSL context it speaks HTTPS.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.headers: list[dict[str, Any]] = []
        self.location = ""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[str, dict[str, Any]], tuple[str, Any]] = lambda path, body: (
            "200 OK",
            {"ok": True},
        )
        more = {"ssl_context": tls} if tls else {}
        self._server = WSGIServer(("127.0.0.1", 0), self._serve, log=None, **more)
        self._server.start()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"

    def _serve(self, environ: dict[str, Any], start: Any) -> list[bytes]:
        self.headers.append(environ)
        body = json.loads(environ["wsgi.input"].read())
        self.requests.append((environ["PATH_INFO"], body))
        status, answer = self.answer(environ["PATH_INFO"], body)
        location = [("Location", self.location)] if self.location else []
        start(status, [("Content-Type", "application/json"), *location])
        return [json.dumps(answer).encode()]

    def __enter__(self) -> RatingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(timeout=1)


def kinds(api: RatingServer) -> list[tuple[str, str]]:
    """(begin or end, Call-ID) of each request."""
    return [
        (path.removeprefix("/v1/").partition("_")[0], body["transaction_tag"])
        for path, body in api.requests
    ]


def whole(number: int) -> list[tuple[str, str]]:
    """What `kinds` says of a call that was reported once, as `dialog.call` numbers it."""
    return [("begin", f"call-{number}@host"), ("end", f"call-{number}@host")]


# Becomes the command that it is given, with sockets as systemd passes them: from descriptor 3 on,
# and with the pid of the process that they are for.
PASSER = """
import os, sys
names, files, *command = sys.argv[1:]
for place, file in enumerate(files.split(), 3):
    os.dup2(int(file), place)
    os.close(int(file))
passed = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(place - 2), "LISTEN_FDNAMES": names}
os.execve(command[0], command, {**os.environ, **passed})
"""


def passing(sockets: Mapping[str, socket.socket]) -> tuple[list[str], list[int]]:
    """What stands before a command to pass it sockets by name, and the files to leave open."""
    # Far above those that they are moved to.
    files = [fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 100) for sock in sockets.values()]
    named = [":".join(sockets), " ".join(map(str, files))]
    return [sys.executable, "-c", PASSER, *named], files


class AgentProcess:
    """The agent on ports of its own choice; `lines` are its JSON log lines, parsed.

    With `--listen-tls=...` among the options it has an address `tls`, too. `files` is how many it
    may open at one time, `sockets` are passed to it as systemd does; `flags` say where it listens.
    """

    def __init__(
        self,
        *options: str,
        env: dict[str, str] | None = None,
        files: int | None = None,
        sockets: Mapping[str, socket.socket] | None = None,
        flags: Sequence[str] = ("--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0"),
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        before = ["prlimit", f"--nofile={files}"] if files else []
        before, passed = passing(sockets) if sockets else (before, [])
        self._process = subprocess.Popen(
            [
                *before,
                sys.executable,
                str(ROOT / "rating_agent_hep.py"),
                *flags,
                *options,
            ],
            stdout=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            pass_fds=passed,
        )
        for file in passed:
            os.close(file)
        self.pid = self._process.pid
        self._reader = gevent.spawn(self._read)
        optional = {"hep-tls": "--listen-tls", "status": "--listen-status"}
        extra = {
            name
            for name, option in optional.items()
            if name in (sockets or {}) or any(given.startswith(option) for given in options)
        }
        tls, count = "hep-tls" in extra, 2 + len(extra)
        wait_until(
            lambda: len(self.events("listening")) == count or self.ended, "the agent listens"
        )
        assert not self.ended, "the agent ended at start"
        self.udp, self.tcp = (self._address(transport) for transport in ("udp", "tcp"))
        if tls:
            self.tls = self._address("tls")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    def _address(self, transport: str) -> tuple[str, int]:
        line = next(x for x in self.events("listening") if x["transport"] == transport)
        host, _, port = line["address"].rpartition(":")
        return host, int(port)

    @property
    def status(self) -> str:
        """The base URL of the status, where --listen-status is among the options."""
        return "http://{}:{}".format(*self._address("status"))

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        return [line for line in self.lines if line.get("event") == name]

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, wait for it, return its exit status."""
        if not self.ended:
            self.kill(number)
        wait_until(lambda: self.ended, "the agent ends")
        self._reader.join(timeout=DEADLINE)
        return int(self._process.returncode)

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()


def send_udp(address: tuple[str, int], datagrams: Iterable[bytes]) -> None:
    """Send datagrams slowly enough for the default receive buffer: UDP has no back-pressure."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        for index, datagram in enumerate(datagrams):
            sock.send(datagram)
            if index % 20 == 19:
                gevent.sleep(0.005)


def send_tcp(address: tuple[str, int], pieces: Iterable[bytes]) -> None:
    """Send pieces of a stream over one connection, each as a segment of its own."""
    with socket.create_connection(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
            gevent.sleep(0)


def seconds(stamp: str) -> float:
    """RFC 3339 to UNIX time."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def ledger_faults(
    requests: Sequence[tuple[str, dict[str, Any]]], entries: dict[str, dict[str, Any]]
) -> list[str]:
    """Where the requests of the API differ from what was expected; empty where all is right."""
    reported: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path, body in requests:
        kind = path.removeprefix("/v1/").removesuffix("_transaction")
        reported.setdefault(body["transaction_tag"], []).append((kind, body))
    faults = []
    for name, entry in entries.items():
        for call in entry["calls"]:
            got = reported.pop(call["call_id"], [])
            want = [kind for kind in ("begin", "end") if call[kind]]
            where = f"{name} {call['call_id']}"
            if [kind for kind, _ in got] != want:
                faults.append(f"{where}: {[kind for kind, _ in got]}, expected {want}")
                continue
            for kind, body in got:
                drift = seconds(body[f"timestamp_{kind}"]) - seconds(call[kind])
                if abs(drift) > TOLERANCE:
                    faults.append(f"{where}: {kind} is {drift:+.3f} s off")
                fields = ["account_tag", "destination_account_tag"]
                fields += ["source", "destination"] if kind == "begin" else []
                faults += [
                    f"{where}: {field} {body.get(field)!r}, expected {call[field]!r}"
                    for field in fields
                    if body.get(field) != call[field]
                ]
    faults += [f"reported, but not expected: {tag}: {got}" for tag, got in reported.items()]
    return faults
