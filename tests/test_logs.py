"""Log lines: limited, parsable; metrics: added up, sent as differences, never in the way."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

import harness
import rating_agent_hep as agent

LIMIT = agent.MAX_WARNINGS_PER_SECOND


def record(
    second: float, event: str | None = "flood", level: int = logging.WARNING
) -> logging.LogRecord:
    values = {"created": second, "levelno": level, "levelname": logging.getLevelName(level)}
    return logging.makeLogRecord(values if event is None else {**values, "event": event})


def passed(limiter: agent.WarningLimiter, records: list[logging.LogRecord]) -> int:
    return sum(bool(limiter.filter(each)) for each in records)


# The limiter


def test_the_limit_is_one_that_a_person_can_read() -> None:
    assert 1 <= LIMIT <= 10


def test_at_most_so_many_warnings_of_one_event_a_second() -> None:
    limiter = agent.WarningLimiter()
    flood = [record(100 + index / 1000) for index in range(999)]
    assert passed(limiter, flood) == LIMIT
    assert all(limiter.filter(each) is True for each in [record(101)] * LIMIT)
    assert limiter.filter(record(101.9)) is False
    assert limiter.filter(record(102.0)) is True


def test_the_first_ones_pass() -> None:
    limiter = agent.WarningLimiter()
    verdicts = [bool(limiter.filter(record(5.0))) for _ in range(LIMIT + 2)]
    assert verdicts == [True] * LIMIT + [False] * 2


def test_other_events_are_unaffected() -> None:
    limiter = agent.WarningLimiter()
    passed(limiter, [record(100.0) for _ in range(50)])
    others = [record(100.1, "other") for _ in range(LIMIT)]
    assert passed(limiter, others) == LIMIT
    assert not any(hasattr(other, "held_back") for other in others)
    assert limiter.take_held() == {"flood": 50 - LIMIT}


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR, logging.CRITICAL])
def test_other_levels_are_unaffected(level: int) -> None:
    limiter = agent.WarningLimiter()
    passed(limiter, [record(100.0) for _ in range(50)])
    assert passed(limiter, [record(100.0, level=level) for _ in range(50)]) == 50
    assert limiter.take_held() == {"flood": 50 - LIMIT}


def test_warnings_without_an_event_are_unaffected() -> None:
    limiter = agent.WarningLimiter()
    assert passed(limiter, [record(100.0, None) for _ in range(50)]) == 50
    assert limiter.take_held() == {}


def test_the_next_line_says_how_many_were_held_back() -> None:
    limiter = agent.WarningLimiter()
    first = record(100.0)
    assert limiter.filter(first) and not hasattr(first, "held_back")
    passed(limiter, [record(100.0) for _ in range(LIMIT + 9)])
    passed(limiter, [record(100.0, "other") for _ in range(LIMIT + 1)])
    following, later = record(101.0), record(101.0)
    assert limiter.filter(following) and limiter.filter(later)
    assert following.held_back == 10
    assert not hasattr(later, "held_back"), "told once"
    assert limiter.take_held() == {"other": 1}


def test_what_was_held_is_taken_once() -> None:
    limiter = agent.WarningLimiter()
    passed(limiter, [record(100.0) for _ in range(LIMIT + 4)])
    assert limiter.take_held() == {"flood": 4}
    assert limiter.take_held() == {}
    following = record(101.0)
    assert limiter.filter(following) and not hasattr(following, "held_back")


def test_a_clock_set_back_does_not_silence() -> None:
    limiter = agent.WarningLimiter()
    passed(limiter, [record(100.0) for _ in range(50)])
    assert passed(limiter, [record(40.0) for _ in range(50)]) == LIMIT


# The lines


@pytest.fixture
def restored() -> Iterator[None]:
    """The module's logger as it was."""
    log = agent.log
    before = (log.handlers[:], log.propagate, log.level)
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture
def stream(restored: None) -> io.StringIO:
    return io.StringIO()


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


ODD = '"\\ \u00e4\u2603\U0001f4de\u2028 \x1b[31m\r\n\t\x00 \udcff'


def test_json_lines(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(), stream)
    before = datetime.now(timezone.utc)
    extra = {"event": "call_begin", "call_id": "c1", "attempt": 2, "replay": {"body": {"a": [1]}}}
    agent.log.info("call %s", "begun", extra=extra)
    agent.log.warning("careful", extra={"event": "w"})
    agent.log.error("bad", extra={"event": "e"})
    begun, careful, bad = parsed(stream)
    assert begun["message"] == "call begun"
    assert {name: begun[name] for name in extra} == extra
    assert [line["level"] for line in (begun, careful, bad)] == ["INFO", "WARNING", "ERROR"]
    assert [line["event"] for line in (careful, bad)] == ["w", "e"]
    for line in (begun, careful, bad):
        assert before <= datetime.fromisoformat(line["time"]) <= datetime.now(timezone.utc)


def test_json_lines_with_any_text(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(), stream)
    agent.log.info("message %s", ODD, extra={"event": "odd", "call_id": ODD, ODD: ODD})
    written = stream.getvalue()
    assert written.isascii() and written.count("\n") == 1 and written.endswith("\n")
    (line,) = parsed(stream)
    assert line["message"] == f"message {ODD}"
    assert line["call_id"] == line[ODD] == ODD


def test_json_lines_with_a_traceback(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(), stream)
    try:
        raise ValueError("of no use")
    except ValueError:
        agent.log.warning("failed", exc_info=True, extra={"event": "internal_error"})
    (line,) = parsed(stream)
    assert "ValueError: of no use" in line["exc_info"]


def test_a_flood_through_the_logger_is_limited_and_counted(stream: io.StringIO) -> None:
    limiter = agent.set_up_logging(agent.Settings(), stream)
    for _ in range(500):
        agent.log.warning("flood", extra={"event": "flood"})
        agent.log.error("each", extra={"event": "each"})
    lines = parsed(stream)
    assert len([line for line in lines if line["event"] == "each"]) == 500
    # It may have gone over the turn of a second, once or on a slow machine some times.
    seconds = {line["time"][:19] for line in lines}
    flood = [line for line in lines if line["event"] == "flood"]
    assert LIMIT <= len(flood) <= LIMIT * len(seconds)
    told = sum(line.get("held_back", 0) for line in flood)
    assert told + limiter.take_held().get("flood", 0) + len(flood) == 500


def test_text_lines(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(log_format="text"), stream)
    extra = {"event": "call_begin", "call_id": "c1", "attempt": 2, "carrier_ip": "", "none": None}
    agent.log.info("call %s", "begun", extra=extra)
    agent.log.warning("\u00e4\u2603", extra={"event": "w", "zero": 0})
    first, second = stream.getvalue().splitlines()
    assert " INFO " in first and " call begun " in first
    assert first.endswith(" call_id=c1 attempt=2"), "fields that say nothing are left out"
    assert " WARNING " in second and "\u00e4\u2603" in second and "zero=0" in second


def test_text_lines_let_no_control_character_through(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(log_format="text"), stream)
    evil = "\x1b[31m\r\n2026-11-24 00:00:00 INFO forged \x9b \u202e"
    agent.log.warning("malformed: %s", evil, extra={"event": "m", "call_id": evil})
    line = stream.getvalue()
    assert line.endswith("\n") and line[:-1].isprintable()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (agent.Settings(log_level="debug"), "dbg inf wrn err"),
        (agent.Settings(log_level="info"), "inf wrn err"),
        (agent.Settings(log_level="warning"), "wrn err"),
        (agent.Settings(log_level="error"), "err"),
        (agent.Settings(log_level="error", debug=True), "dbg inf wrn err"),
    ],
)
def test_levels(settings: agent.Settings, wanted: str, stream: io.StringIO) -> None:
    agent.set_up_logging(settings, stream)
    for method, text in (("debug", "dbg"), ("info", "inf"), ("warning", "wrn"), ("error", "err")):
        getattr(agent.log, method)(text)
    assert " ".join(line["message"] for line in parsed(stream)) == wanted


def test_setting_up_again_does_not_double_lines(stream: io.StringIO) -> None:
    agent.set_up_logging(agent.Settings(), stream)
    agent.set_up_logging(agent.Settings(), stream)
    agent.log.info("once")
    assert len(parsed(stream)) == 1


# Metrics


class Statsd:
    """A statsd server on loopback; what was sent to it lies in its receive buffer."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.port = self.socket.getsockname()[1]

    def settings(self, **more: Any) -> agent.Settings:
        return agent.Settings(statsd_host="127.0.0.1", statsd_port=self.port, **more)

    def lines(self) -> list[tuple[str, float, str]]:
        """(name, value, kind) of all lines that came since the last look."""
        lines = []
        while True:
            try:
                data = self.socket.recv(65_536)
            except BlockingIOError:
                return lines
            for line in data.decode("ascii").split("\n"):
                name, colon, rest = line.partition(":")
                value, bar, kind = rest.partition("|")
                assert name and colon and bar, line
                lines.append((name, float(value), kind))


@pytest.fixture
def server() -> Iterator[Statsd]:
    statsd = Statsd()
    yield statsd
    statsd.socket.close()


def test_counts_are_added_up_and_sent_as_differences(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    for _ in range(1000):
        metrics.count("packets")
    metrics.count("packets", 5)
    metrics.count("calls.begun")
    assert server.lines() == [], "nothing is sent before the flush"
    metrics.flush({}, 1.0)
    assert sorted(server.lines()) == [
        ("rating_agent_hep.calls.begun", 1, "c"),
        ("rating_agent_hep.packets", 1005, "c"),
    ]
    metrics.flush({}, 2.0)
    assert server.lines() == [], "nothing has changed"
    metrics.count("packets", 2)
    metrics.flush({}, 3.0)
    assert server.lines() == [("rating_agent_hep.packets", 2, "c")]
    assert metrics.totals == {"packets": 1007, "calls.begun": 1}


def test_timers_are_milliseconds_and_sent_once(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    metrics.time("api.time", 0.25)
    metrics.time("api.time", 1.5)
    metrics.flush({}, 1.0)
    assert server.lines() == [
        ("rating_agent_hep.api.time", 250, "ms"),
        ("rating_agent_hep.api.time", 1500, "ms"),
    ]
    metrics.flush({}, 2.0)
    assert server.lines() == []


def test_samples_of_a_timer_are_bounded(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    for _ in range(agent.MAX_TIMER_SAMPLES * 10):
        metrics.time("a", 0.001)
    metrics.time("b", 0.002)
    metrics.flush({}, 1.0)
    names = [name for name, _, _ in server.lines()]
    assert names.count("rating_agent_hep.a") == agent.MAX_TIMER_SAMPLES
    assert names.count("rating_agent_hep.b") == 1
    metrics.time("a", 0.003)
    metrics.flush({}, 2.0)
    assert server.lines() == [("rating_agent_hep.a", 3, "ms")], "each flush has samples anew"


def test_gauges_are_sent_at_each_flush(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    for now in (1.0, 2.0):
        metrics.flush({"events.waiting": 7, "connections": 0}, now)
        assert sorted(server.lines()) == [
            ("rating_agent_hep.connections", 0, "g"),
            ("rating_agent_hep.events.waiting", 7, "g"),
        ]


@pytest.mark.parametrize(
    ("prefix", "name"), [("acme.hep", "acme.hep.packets"), ("x", "x.packets"), ("", "packets")]
)
def test_the_prefix(prefix: str, name: str, server: Statsd) -> None:
    metrics = agent.Metrics(server.settings(statsd_prefix=prefix))
    metrics.count("packets")
    metrics.flush({}, 1.0)
    assert server.lines() == [(name, 1, "c")]


def test_many_metrics_go_in_datagrams_that_pass_any_network(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    for index in range(300):
        metrics.count(f"packets.malformed.kind_{index}")
    metrics.flush({}, 1.0)
    sizes = []
    while True:
        try:
            sizes.append(len(server.socket.recv(65_536)))
        except BlockingIOError:
            break
    assert 1 < len(sizes) < 100 and max(sizes) <= 1432


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The statsd clients that were made: what each was made of."""
    clients: list[tuple[Any, ...]] = []
    real = agent.statsd.StatsClient

    def make(*args: Any, **kwargs: Any) -> Any:
        clients.append((*args, *kwargs.values()))
        return real(*args, **kwargs)

    monkeypatch.setattr(agent.statsd, "StatsClient", make)
    return clients


def test_without_a_host_no_socket_is_made(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", no_socket)
    metrics = agent.Metrics(agent.Settings())
    metrics.count("packets")
    for _ in range(agent.MAX_TIMER_SAMPLES):
        metrics.time("api.time", 0.1)
    metrics.flush({"connections": 1}, 1.0)
    metrics.flush({"connections": 1}, 1000.0)
    assert made == []
    assert metrics.totals == {"packets": 1}, "counted all the same"


def test_the_name_is_resolved_again_after_a_while(made: list[Any], server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    after = agent.STATSD_RESOLVE
    for now in (100.0, 101.0, 99.9 + after):
        metrics.flush({"g": 1}, now)
        assert len(made) == 1
    for now in (100.0 + after, 101.0 + after, 99.9 + 2 * after):
        metrics.flush({"g": 1}, now)
        assert len(made) == 2
    assert made[0][:2] == ("127.0.0.1", server.port)
    assert len(server.lines()) == 6, "each flush arrived, whatever client sent it"


def test_nobody_listening_disturbs_nothing(server: Statsd) -> None:
    metrics = agent.Metrics(server.settings())
    server.socket.close()
    for now in range(1, 6):
        metrics.count("packets")
        metrics.time("api.time", 0.1)
        metrics.flush({"connections": 1}, float(now))
    assert metrics.totals == {"packets": 5}


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
def test_a_name_that_does_not_resolve_disturbs_nothing_and_is_told(
    host: str, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, server: Statsd
) -> None:
    agent.set_up_logging(agent.Settings(), stream)
    real = socket.getaddrinfo

    def resolve(name: Any, port: Any, *rest: Any) -> Any:
        # Nobody is asked for a name from here; the others fail by themselves.
        if name == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, port, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    metrics = agent.Metrics(agent.Settings(statsd_host=host, statsd_port=server.port))
    metrics.count("packets", 3)
    metrics.flush({}, 1.0)
    metrics.count("packets", 4)
    metrics.flush({}, 2.0)
    lines = parsed(stream)
    assert [(line["level"], line["event"]) for line in lines] == [("WARNING", "statsd")] * 2
    # The name is there at last: what was counted meanwhile is told.
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest: real("127.0.0.1", *rest))
    metrics.flush({}, 3.0)
    assert server.lines() == [("rating_agent_hep.packets", 7, "c")]


def test_a_statsd_server_may_have_an_ipv6_address() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        sock.settimeout(harness.DEADLINE)
        port = sock.getsockname()[1]
        metrics = agent.Metrics(agent.Settings(statsd_host="::1", statsd_port=port))
        metrics.count("packets")
        metrics.flush({}, 1.0)
        assert sock.recv(1_000) == b"rating_agent_hep.packets:1|c"
