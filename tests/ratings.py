"""Rating events, an outbox to put them in, and a rating API that can be rude."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import gevent
import gevent.event
import gevent.pool
import gevent.server

import harness
import rating_agent_hep as agent
from rating_agent_hep import DeliveryError, Outbox

URL = "http://127.0.0.1:1"


def event(kind: str, call: str = "a", url: str = URL, **more: Any) -> agent.RatingEvent:
    body = {
        "tenant": "default",
        "transaction_tag": call,
        "account_tag": "2000",
        f"timestamp_{kind}": "2026-11-24T00:00:00.000Z",
    }
    return agent.RatingEvent(
        kind=kind,
        call_id=call,
        tenant="default",
        transaction_tag=call,
        account_tag="2000",
        destination_account_tag="",
        time=1_790_000_000_000_000,
        reason="answer" if kind == "begin" else "bye",
        api_url=url,
        body=json.dumps(body).encode(),
        **more,
    )


def outbox(limit: int = 1000) -> Outbox:
    """One without jitter, so that delays are exact."""
    return Outbox(limit, jitter=lambda: 1.0)


def put(box: Outbox, *events: agent.RatingEvent) -> None:
    """Put events that must be accepted without any loss."""
    for each in events:
        assert box.put(each) == (True, [])


def taken(box: Outbox, now: float = 0.0) -> agent.RatingEvent:
    found = box.take(now)
    assert found is not None
    return found


def failure(unknown: bool = False, wait: float = 0.0) -> DeliveryError:
    return DeliveryError("test", "no answer that counts", unknown, wait)


def fill(journal: agent.Journal, number: int, url: str = "http://127.0.0.1:1") -> None:
    """Calls that began and ended and left the table; both events wait."""
    for index in range(number):
        for offset, kind in enumerate(("begin", "end"), 2):
            serial = index * 3 + offset
            journal.put_event(event(kind, f"c{index}", url, row=index * 3 + 1, serial=serial))
        journal.drop_call(index * 3 + 1)


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes


def answer(status: int = 200, body: Any = None, **headers: str) -> bytes:
    """The octets of a response; `body` is octets, or becomes JSON."""
    octets = body if isinstance(body, bytes) else json.dumps(body or {"ok": True}).encode()
    lines = [f"HTTP/1.1 {status} Whatever", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(octets)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + octets


Behaviour = Callable[[gevent.socket.socket, Request], Any]


class Server:
    """HTTP on loopback; `behave` gets the socket and a request, and returns the octets to send.

    It may send by itself and return None, which closes the connection.
    """

    def __init__(self, behave: Behaviour | bytes = b"") -> None:
        self.behave: Behaviour | bytes = behave or answer()
        self.connections = 0
        self.requests: list[Request] = []
        self._pool = gevent.pool.Pool()
        self._server = gevent.server.StreamServer(("127.0.0.1", 0), self._serve, spawn=self._pool)
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _serve(self, sock: Any, _: Any) -> None:
        self.connections += 1
        try:
            with sock.makefile("rb") as file:
                while (request := self._read(file)) is not None:
                    self.requests.append(request)
                    behave = self.behave
                    octets = behave if isinstance(behave, bytes) else behave(sock, request)
                    if octets is None:
                        return
                    sock.sendall(octets)
        except OSError:
            return

    @staticmethod
    def _read(file: Any) -> Request | None:
        start = file.readline(65_536)
        if not re.match(rb"POST \S+ HTTP/1\.1\r\n", start):
            return None
        headers = {}
        while (line := file.readline(65_536)) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
        return Request(start.split()[1].decode(), headers, body)

    def close(self) -> None:
        self._server.stop(timeout=0)


def client(url: str, **more: Any) -> agent.RatingApi:
    more.setdefault("rating_api_timeout", 0.3)
    return agent.RatingApi(url, agent.Settings(**more))


def work(delivery: agent.Delivery, done: Callable[[], Any], what: str) -> None:
    """Tick as the agent does until it is done."""

    def check() -> Any:
        delivery.tick()
        return done()

    harness.wait_until(check, what)
