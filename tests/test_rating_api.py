"""The client of a rating API: what answers mean, rude servers, the request."""

from __future__ import annotations

import socket
import time
from base64 import b64encode
from collections import deque
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import gevent
import gevent.event
import pytest

import harness
import rating_agent_hep as agent
from rating_agent_hep import DELIVERED, REFUSED_BY_API, REJECTED, DeliveryError
from ratings import Behaviour, Request, Server, answer, client, event


def failed(api: agent.RatingApi, each: agent.RatingEvent | None = None) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        api.send(each or event("begin"))
    return caught.value


# Answers


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({"ok": True}, DELIVERED),
        ({"ok": True, "tenant": "default", "transaction_tag": "a", "more": None}, DELIVERED),
        ({"ok": False}, REFUSED_BY_API),
        ({"ok": False, "tenant": "default"}, REFUSED_BY_API),
    ],
)
def test_an_answer_that_counts(status: int, body: Any, outcome: str, server: Server) -> None:
    server.behave = answer(status, body)
    assert client(server.url).send(event("begin")) == outcome


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"ok",
        b"<html>It works!</html>",
        b'{"ok": tru',
        b"null",
        b"[]",
        b"true",
        b"[true]",
        b'"ok"',
        b"{}",
        b'{"status": "up"}',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"ok": true, "x": "' + b"x" * 100_000 + b'"}',
    ],
    ids=lambda body: body[:20].decode("latin-1"),
)
def test_a_2xx_without_a_verdict_does_not_count(body: bytes, server: Server) -> None:
    """Such as a proxy's own page: the call may have been charged or not."""
    server.behave = answer(200, body)
    error = failed(client(server.url))
    assert error.unknown is True and error.wait == 0
    assert str(error).isprintable() and len(str(error)) < 500


def test_a_204_does_not_count(server: Server) -> None:
    server.behave = b"HTTP/1.1 204 No Content\r\n\r\n"
    assert failed(client(server.url)).unknown is True


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 422, 451, 499])
def test_other_4xx_are_rejections(status: int, server: Server) -> None:
    server.behave = answer(status, {"detail": "no"}, Retry_After="5")
    assert client(server.url).send(event("begin")) == REJECTED


@pytest.mark.parametrize(
    ("status", "unknown"),
    [(408, True), (429, False), (500, False), (502, True), (503, False), (504, True)],
)
def test_statuses_that_are_tried_again(status: int, unknown: bool, server: Server) -> None:
    server.behave = answer(status, b"Internal Server Error")
    error = failed(client(server.url))
    assert (error.unknown, error.wait) == (unknown, 0)
    assert str(status) in str(error) and error.kind == f"status_{status}"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("7", 7),
        ("0", 0),
        ("100000", agent.MAX_RETRY_AFTER),
        ("9" * 400, agent.MAX_RETRY_AFTER),
        ("-5", 0),
        ("1.5", None),
        ("soon", 0),
        ("", 0),
        ("nan", 0),
        ("inf", 0),
        ("7, 8", 0),
        ("\xb2", 0),
    ],
)
def test_retry_after_in_seconds(
    status: int, value: str, wait: float | None, server: Server
) -> None:
    server.behave = answer(status, Retry_After=value).replace("\xb2".encode(), b"\xb2")
    found = failed(client(server.url)).wait
    assert found == wait if wait is not None else 0 <= found <= 2


def test_retry_after_as_a_date(server: Server) -> None:
    """RFC 9110 section 10.2.3 allows a date, and gateways send it."""
    for seconds, least, most in ((90, 80, 91), (-90, 0, 0), (86_400, 300, 300)):
        when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        server.behave = answer(503, Retry_After=format_datetime(when, usegmt=True))
        assert least <= failed(client(server.url)).wait <= most


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_never_followed(status: int, server: Server) -> None:
    """They would carry the token and the calls to somewhere else."""
    elsewhere = Server()
    server.behave = answer(status, Location=f"{elsewhere.url}/v1/begin_transaction")
    error = failed(client(server.url, rating_api_token="token"))
    assert str(status) in str(error)
    assert (len(server.requests), elsewhere.connections) == (1, 0)
    elsewhere.close()


# Rude servers


def test_a_refused_connection_was_not_done() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        error = failed(client(f"http://127.0.0.1:{sock.getsockname()[1]}"))
    assert error.unknown is False


def test_a_server_that_does_not_speak_tls_has_done_nothing(server: Server) -> None:
    error = failed(client(server.url.replace("http:", "https:")))
    assert error.unknown is False
    assert server.requests == []


def read_and(octets: bytes) -> Behaviour:
    """A behaviour that sends octets and closes the connection."""

    def behave(sock: Any, _: Request) -> None:
        sock.sendall(octets)

    return behave


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"ok": true}',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\njunk",
        b"HTTP/1.1 abc\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\xff" * 40,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=lambda octets: octets[:45].decode("latin-1"),
)
def test_a_connection_that_breaks_after_the_request_may_have_done_it(
    octets: bytes, server: Server
) -> None:
    server.behave = read_and(octets)
    api = client(server.url)
    error = failed(api)
    assert error.unknown is True
    assert len(server.requests) == 1, "it is not sent again in here"
    server.behave = answer()
    assert api.send(event("end")) == DELIVERED


def test_a_connection_reset_after_the_request_may_have_done_it(server: Server) -> None:
    def reset(sock: Any, _: Request) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()

    server.behave = reset
    assert failed(client(server.url)).unknown is True
    assert len(server.requests) == 1


def test_an_answer_slower_than_the_time_out(server: Server) -> None:
    released = gevent.event.Event()

    def slow(sock: Any, _: Request) -> None:
        released.wait(timeout=10)
        sock.sendall(answer(200, {"ok": False}))

    server.behave = slow
    api = client(server.url, rating_api_timeout=0.2, rating_api_concurrency=1)
    started = time.monotonic()
    error = failed(api)
    assert (error.kind, error.unknown) == ("timeout", True)
    assert 0.2 <= time.monotonic() - started < 4
    server.behave = answer()
    released.set()
    assert api.send(event("end")) == DELIVERED, "the late answer is nobody's"
    assert server.connections == 2


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"],
    ids=["head", "body"],
)
def test_a_trickled_answer_has_a_hard_limit(head: bytes, server: Server) -> None:
    """Each read is in time, but a worker must not be held for ever."""

    def trickle(sock: Any, _: Request) -> None:
        sock.sendall(head)
        for _ in range(120):
            gevent.sleep(0.05)
            sock.sendall(b"x")

    server.behave = trickle
    api = client(server.url, rating_api_timeout=0.1, rating_api_concurrency=1)
    started = time.monotonic()
    error = failed(api)
    assert (error.kind, error.unknown) == ("timeout", True)
    assert time.monotonic() - started < 4
    server.behave = answer(200, {"ok": False})
    assert api.send(event("begin", "b")) == REFUSED_BY_API, "the next gets an answer of its own"


def test_an_endless_answer_is_not_read(server: Server) -> None:
    sent = 0

    def endless(sock: Any, _: Request) -> None:
        nonlocal sent
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        while True:
            sock.sendall(b" " * 65_536)
            sent += 65_536

    server.behave = endless
    api = client(server.url, rating_api_timeout=5, rating_api_concurrency=1)
    started = time.monotonic()
    assert failed(api).unknown is True
    assert time.monotonic() - started < 4, "it was cut by its size, not by the time"
    assert sent < 50_000_000
    server.behave = answer()
    assert api.send(event("begin")) == DELIVERED


def test_failures_use_up_no_connection(server: Server) -> None:
    api = client(server.url, rating_api_concurrency=2, rating_api_timeout=0.5)
    rude = [read_and(b""), answer(500), answer(404), answer(200, b"x" * 100_000), answer(302)]
    for behave in rude * 3:
        server.behave = behave
        try:
            api.send(event("begin"))
        except DeliveryError as error:
            assert error.kind != "timeout"
    server.behave = answer()
    assert api.send(event("begin")) == DELIVERED


# The request


@pytest.mark.parametrize("prefix", ["", "/rating", "/a/b%20c"])
@pytest.mark.parametrize("kind", ["begin", "end"])
def test_the_request(kind: str, prefix: str, server: Server) -> None:
    each = event(kind, "c-1@host")
    assert client(server.url + prefix).send(each) == DELIVERED
    (request,) = server.requests
    assert request.path == f"{prefix}/v1/{kind}_transaction"
    assert request.body == each.body
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(each.body))
    assert "rating-agent-hep/" in request.headers["user-agent"]
    assert "authorization" not in request.headers


def test_a_bearer_token(server: Server) -> None:
    token = {"rating_api_token": "t.o-k", "rating_api_username": "u", "rating_api_password": "p"}
    client(server.url, **token).send(event("begin"))
    assert server.requests[0].headers["authorization"] == "Bearer t.o-k"


@pytest.mark.parametrize("password", ["p", "", "p:w", "\u00e4\u2603"])
def test_basic_authentication(password: str, server: Server) -> None:
    api = client(server.url, rating_api_username="user", rating_api_password=password)
    api.send(event("begin"))
    pair = b64encode(f"user:{password}".encode()).decode()
    assert server.requests[0].headers["authorization"] == f"Basic {pair}"


def test_retries_send_the_same_octets(server: Server) -> None:
    api = client(server.url)
    each = event("begin", 'odd "\u00e4\u2603" tag')
    answers = deque([answer(500), answer(200, {"ok": False}), answer(503), answer()])
    server.behave = lambda *_: answers.popleft()
    for _ in range(4):
        try:
            outcome = api.send(each)
        except DeliveryError as error:
            outcome = error.kind
    assert outcome == DELIVERED
    assert [request.body for request in server.requests] == [each.body] * 4


def test_a_connection_is_used_again(server: Server) -> None:
    api = client(server.url)
    statuses = [200, 200, 500, 404, 503, 302, 200]
    answers = deque(answer(status) for status in statuses)
    server.behave = lambda *_: answers.popleft()
    for _ in statuses:
        try:
            api.send(event("begin"))
        except DeliveryError as error:
            assert error.kind.startswith("status_")
    assert (len(server.requests), server.connections) == (len(statuses), 1)


def test_a_chunked_answer_and_its_connection(server: Server) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.behave = head + b'5\r\n{"ok"\r\n7\r\n: true}\r\n0\r\n\r\n'
    api = client(server.url)
    assert [api.send(event("begin")), api.send(event("end"))] == [DELIVERED] * 2
    assert server.connections == 1


def test_a_connection_that_was_closed_while_idle_costs_nothing(server: Server) -> None:
    closed = gevent.event.Event()

    def once(sock: Any, _: Request) -> None:
        sock.sendall(answer())
        gevent.spawn_later(0, closed.set)

    server.behave = once
    api = client(server.url)
    for number in range(1, 4):
        closed.clear()
        assert api.send(event("begin")) == DELIVERED
        assert closed.wait(harness.DEADLINE)
        gevent.sleep(0)
        assert server.connections == number


def test_requests_side_by_side_have_connections_side_by_side(server: Server) -> None:
    api = client(server.url, rating_api_concurrency=4, rating_api_timeout=10)
    together = gevent.event.Event()

    def wait(*_: Any) -> bytes:
        if len(server.requests) % 4 == 0:
            together.set()
        assert together.wait(harness.DEADLINE)
        return answer()

    server.behave = wait
    for _ in range(3):
        together.clear()
        jobs = [gevent.spawn(api.send, event("begin", str(number))) for number in range(4)]
        assert [job.get(timeout=harness.DEADLINE) for job in jobs] == [DELIVERED] * 4
    assert server.connections == 4
