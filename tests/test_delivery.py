"""Delivery by its workers: an exact ledger, what is logged, what is lost."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest

import harness
import rating_agent_hep as agent
from rating_agent_hep import DELIVERED
from ratings import Request, Server, answer, client, event, outbox, work


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after hundredths of a second."""
    monkeypatch.setattr(agent, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(agent, "RETRY_LAST", 0.04)


def tags(lines: list[dict[str, Any]], name: str) -> list[str]:
    return [line["transaction_tag"] for line in lines if line.get("event") == name]


def test_a_call_is_delivered_and_logged_once(deliveries: Any, server: Server, log: Any) -> None:
    delivery = deliveries()
    delivery.put(event("begin", url=server.url))
    delivery.put(event("end", url=server.url))
    assert server.requests == [], "put never waits"
    harness.wait_until(lambda: len(delivery) == 0, "both are delivered")
    assert [request.path for request in server.requests] == [
        "/v1/begin_transaction",
        "/v1/end_transaction",
    ]
    lines = [line for line in log() if line["level"] == "INFO"]
    assert [line["event"] for line in lines] == ["call_begin", "call_end"]
    assert {line["outcome"] for line in lines} == {"ok"}
    assert lines[0]["call_id"] == "a" and lines[0]["timestamp_begin"].endswith("Z")
    assert delivery._metrics.totals["api.answers.delivered"] == 2


class Ledger:
    """What the rating API keeps: as recorded in reference/rating-api.md, and it fails at random."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.running: dict[str, bytes] = {}
        self.records: list[str] = []
        self.faults: list[str] = []
        self.attempts: dict[tuple[str, str], int] = {}
        self.answered: set[str] = set()
        self.rude = 0

    def __call__(self, sock: Any, request: Request) -> bytes | None:
        kind = request.path.split("/")[-1].partition("_")[0]
        tag = json.loads(request.body)["transaction_tag"]
        if kind == "end" and tag not in self.answered:
            self.faults.append(f"{tag}: the end came before the begin was answered")
        attempt = self.attempts[tag, kind] = self.attempts.get((tag, kind), 0) + 1
        # By name, not by order: the workers may take calls in any order.
        dice = random.Random(f"{self.seed} {tag} {kind} {attempt}")
        fate = dice.random()
        self.rude += fate < 0.5
        if fate < 0.08:
            return None  # lost before it was done
        if fate < 0.16:
            return answer(dice.choice([500, 502, 503, 504, 408, 429]))
        if fate < 0.24:
            return answer(200, {"ok": False})  # a dead storage service
        ok = self.carry_out(kind, tag, request.body)
        if fate < 0.34:
            return None  # done, but the answer is lost
        if fate < 0.42:
            return answer(dice.choice([502, 504]))
        if fate < 0.48:
            return answer(200, b"<html>proxy</html>")
        if fate < 0.50:
            gevent.sleep(0.3)  # done, and answered too late
        if kind == "begin" and ok:
            self.answered.add(tag)
        return answer(200, {"ok": ok})

    def carry_out(self, kind: str, tag: str, body: bytes) -> bool:
        if kind == "begin":
            if self.running.setdefault(tag, body) != body or tag in self.records:
                self.faults.append(f"{tag}: begun twice")
            return True
        if self.running.pop(tag, None) is None:
            return False
        self.records.append(tag)
        return True


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_exact_ledger_under_a_server_that_fails_at_random(
    seed: int, deliveries: Any, server: Server, log: Any, fast: None
) -> None:
    ledger = Ledger(seed)
    server.behave = ledger
    token = "hunter2-token"
    delivery = deliveries(rating_api_concurrency=8, rating_api_timeout=0.2, rating_api_token=token)
    calls = [f"call {number}" for number in range(60)]
    for number, call in enumerate(calls):
        delivery.put(event("begin", call, server.url))
        # Some are over before their begin is delivered, some end later.
        if number % 2:
            delivery.put(event("end", call, server.url))
    work(delivery, lambda: len(ledger.answered) > 20, "the first calls are begun")
    for call in calls[::2]:
        delivery.put(event("end", call, server.url))
    work(delivery, lambda: len(delivery) == 0, "all are delivered")
    assert ledger.rude > 50, "the server was rude enough"
    assert ledger.faults == []
    assert ledger.running == {} and sorted(ledger.records) == sorted(calls)
    lines = log()
    assert tags(lines, "event_rejected") == []
    for name in ("call_begin", "call_end"):
        assert sorted(tags(lines, name)) == sorted(calls), "one line for each"
    assert token not in json.dumps(lines)
    bodies: dict[tuple[str, str], set[bytes]] = {}
    for request in server.requests:
        tag = json.loads(request.body)["transaction_tag"]
        bodies.setdefault((request.path, tag), set()).add(request.body)
    assert {len(octets) for octets in bodies.values()} == {1}


def test_a_slow_call_does_not_hold_another(deliveries: Any, server: Server) -> None:
    released = gevent.event.Event()

    def slow(_: Any, request: Request) -> bytes:
        if json.loads(request.body)["transaction_tag"] == "slow":
            released.wait()
        return answer()

    server.behave = slow
    delivery = deliveries(rating_api_timeout=20.0, rating_api_concurrency=2)
    for call in ("slow", *map(str, range(30))):
        delivery.put(event("begin", call, server.url))
        delivery.put(event("end", call, server.url))
    harness.wait_until(lambda: len(delivery) == 2, "all but the slow one")
    assert [each.path for each in server.requests].count("/v1/end_transaction") == 30
    released.set()
    harness.wait_until(lambda: len(delivery) == 0, "the slow one too")
    assert server.requests[-1].path == "/v1/end_transaction"


def test_a_slow_api_does_not_hold_another_apis_events(deliveries: Any, server: Server) -> None:
    stuck = Server(lambda *_: gevent.sleep(harness.DEADLINE * 2))
    delivery = deliveries(rating_api_timeout=20.0, rating_api_concurrency=2)
    for number in range(20):
        delivery.put(event("begin", str(number), stuck.url))
    harness.wait_until(lambda: len(stuck.requests) == 2, "all workers of that API are held")
    for number in range(20):
        delivery.put(event("begin", str(number), server.url))
        delivery.put(event("end", str(number), server.url))
    harness.wait_until(lambda: len(server.requests) == 40, "the other API is told")
    harness.wait_until(lambda: len(delivery) == 20, "and only the slow one's are left")
    delivery.stop()
    stuck.close()


def test_no_more_requests_at_one_time_than_allowed(deliveries: Any, server: Server) -> None:
    running = most = 0

    def busy(*_: Any) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        gevent.sleep(0.001)
        running -= 1
        return answer()

    server.behave = busy
    delivery = deliveries(rating_api_concurrency=3, rating_api_timeout=5.0)
    for number in range(100):
        delivery.put(event("begin", str(number), server.url))
    harness.wait_until(lambda: len(delivery) == 0, "all are delivered")
    assert (most, server.connections) == (3, 3)


def test_a_rejected_begin_is_logged_whole_with_its_end(
    deliveries: Any, server: Server, log: Any
) -> None:
    server.behave = answer(422, {"detail": "no"})
    delivery = deliveries()
    begin, end = event("begin", url=server.url), event("end", url=server.url)
    delivery.put(begin)
    delivery.put(end)
    harness.wait_until(lambda: len(delivery) == 0, "they are rejected")
    late = event("begin", "b", server.url), event("end", "b", server.url)
    delivery.put(late[0])
    harness.wait_until(lambda: len(delivery) == 0, "that as well")
    delivery.put(late[1])
    assert [request.path for request in server.requests] == ["/v1/begin_transaction"] * 2
    lines = [line for line in log() if line["event"] == "event_rejected"]
    assert {line["level"] for line in lines} == {"ERROR"}
    assert [line["replay"] for line in lines] == [each.replayable() for each in (begin, end, *late)]
    assert delivery._metrics.totals["events.rejected"] == 4


def check_replay(line: dict[str, Any], each: agent.RatingEvent, maybe: bool) -> None:
    """The line has what is needed to send the event by hand."""
    assert line["level"] == "ERROR"
    replay = line["replay"]
    assert replay["method"] == "POST"
    assert replay["url"] == f"{each.api_url}/v1/{each.kind}_transaction"
    assert replay["body"] == json.loads(each.body)
    assert replay["maybe_delivered"] is maybe


def test_stop_logs_each_undelivered_event_for_replay(
    deliveries: Any, server: Server, log: Any
) -> None:
    released = gevent.event.Event()

    def held(*_: Any) -> bytes:
        released.wait()
        return answer()

    server.behave = held
    delivery = deliveries(rating_api_timeout=20.0, rating_api_concurrency=1)
    calls = [event(kind, call, server.url) for call in "ab" for kind in ("begin", "end")]
    for each in calls:
        delivery.put(each)
    harness.wait_until(lambda: server.requests, "the first is under way")
    delivery.stop()
    lines = [line for line in log() if line["event"] == "event_undelivered"]
    assert len(lines) == 4
    for line, each in zip(lines, calls, strict=True):
        check_replay(line, each, maybe=each is calls[0])
    released.set()
    delivery.tick()
    probe = client(server.url)
    assert [probe.send(event("begin", "after")) for _ in range(20)] == [DELIVERED] * 20
    assert len(server.requests) == 21, "the workers have ended, though the server answers again"
    assert tags(log(), "call_begin") == []


def test_a_replayed_line_is_the_same_request(deliveries: Any, server: Server, log: Any) -> None:
    delivery = deliveries()
    each = event("begin", 'odd "\u00e4\u2603\\" tag', server.url + "/prefix")
    server.behave = answer(400)
    delivery.put(each)
    harness.wait_until(lambda: tags(log(), "event_rejected"), "it is rejected")
    (line,) = [line for line in log() if line["event"] == "event_rejected"]
    assert line["replay"]["url"] == server.url + server.requests[0].path
    assert line["replay"]["body"] == json.loads(server.requests[0].body)


def test_stop_with_nothing_left_is_silent(deliveries: Any, server: Server, log: Any) -> None:
    delivery = deliveries()
    delivery.put(event("begin", url=server.url))
    harness.wait_until(lambda: len(delivery) == 0, "it is delivered")
    delivery.stop()
    assert [line["event"] for line in log()] == ["call_begin"]


@pytest.mark.parametrize("limit", [agent.MAX_LOADED, 1])
def test_what_is_loaded_before_it_is_put_goes_once(
    deliveries: Any, server: Server, limit: int, monkeypatch: Any, tmp_path: Path
) -> None:
    """The loader may read between a commit and the turn of the greenlet that made it."""
    monkeypatch.setattr(agent, "MAX_LOADED", limit)
    delivery, journal = deliveries(), agent.Journal(str(tmp_path))

    def written(kind: str, call: str, row: int, serial: int) -> agent.RatingEvent:
        each = event(kind, call, server.url, row=row, serial=serial)
        journal.put_event(each)
        assert journal.commit()
        return each

    def delivered() -> bool:
        while journal.answered:
            delivery.release(journal.answered.pop())
        delivery.tick()
        return len(delivery) == 0 and not delivery.busy

    written("begin", "old", 1, 2)
    delivery.restore(journal)
    fresh = [written("begin", "new", 3, 4), written("end", "new", 3, 5)]
    delivery.tick()
    harness.wait_until(lambda: not delivery._lane(server.url).loader, "it has read")
    for each in fresh:
        delivery.put(each, True)
    harness.wait_until(delivered, "all are delivered")
    # What comes later is not taken for old.
    delivery.put(written("begin", "later", 6, 7), True)
    harness.wait_until(delivered, "this one, too")
    told = [(x.path[4:7], json.loads(x.body)["transaction_tag"]) for x in server.requests]
    assert sorted(told[:-1]) == [("beg", "new"), ("beg", "old"), ("end", "new")]
    assert told[-1] == ("beg", "later")
    journal.close(harness.DEADLINE)


def test_an_event_that_is_lost_is_logged_whole(
    deliveries: Any, server: Server, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "Outbox", lambda **_: outbox(limit=3))
    server.behave = lambda *_: gevent.sleep(harness.DEADLINE * 2)
    delivery = deliveries(rating_api_timeout=20.0, rating_api_concurrency=1)
    first = event("begin", "out", server.url)
    delivery.put(first)
    harness.wait_until(lambda: server.requests, "the first is under way")
    lost = [event("begin", "lost", server.url), event("end", "lost", server.url)]
    for each in (*lost, event("begin", "kept", server.url)):
        delivery.put(each)
    lines = [line for line in log() if line["event"] == "event_lost"]
    assert len(lines) == 2 and len(delivery) == 2
    for line, each in zip(lines, lost, strict=True):
        check_replay(line, each, maybe=False)
    assert delivery._metrics.totals["events.lost"] == 2


def test_an_api_that_goes_down_and_comes_back_is_told_once(
    deliveries: Any, server: Server, log: Any, fast: None
) -> None:
    server.behave = answer(503)
    delivery = deliveries()
    for number in range(10):
        delivery.put(event("begin", str(number), server.url))
    work(delivery, lambda: len(server.requests) > 12, "it is tried")
    server.behave = answer()
    work(delivery, lambda: len(delivery) == 0, "all are delivered")
    names = [line["event"] for line in log() if line["event"] in ("api_down", "api_up")]
    assert names == ["api_down", "api_up"]
    assert len(tags(log(), "call_begin")) == 10
    totals = delivery._metrics.totals
    assert totals["api.errors.status_503"] == totals["api.retries"] > 2


def test_an_end_that_was_done_before_is_told_so(
    deliveries: Any, server: Server, log: Any, fast: None
) -> None:
    answers = deque([None])
    server.behave = lambda *_: answers.popleft() if answers else answer(200, {"ok": False})
    delivery = deliveries()
    delivery.put(event("end", url=server.url))
    work(delivery, lambda: len(delivery) == 0, "it is believed")
    assert len(server.requests) == 1 + agent.MAX_REFUSALS
    (line,) = [line for line in log() if line["event"] == "call_end"]
    assert line["outcome"] == "done before"


def test_a_fault_of_ours_ends_no_worker_and_shows_no_secret(
    deliveries: Any, server: Server, log: Any, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = agent.RatingApi.send
    faults = itertools.count()

    def send(api: agent.RatingApi, each: agent.RatingEvent) -> str:
        if next(faults) < 5:
            raise RuntimeError("a fault")
        return real(api, each)

    monkeypatch.setattr(agent.RatingApi, "send", send)
    delivery = deliveries(rating_api_concurrency=1, rating_api_token="hunter2")
    for number in range(4):
        delivery.put(event("begin", str(number), server.url))
    work(delivery, lambda: len(delivery) == 0, "all are delivered")
    lines = log()
    assert len([line for line in lines if line["event"] == "internal_error"]) == 5
    assert len(tags(lines, "call_begin")) == 4
    assert "hunter2" not in json.dumps(lines)


def test_levels_of_what_is_logged(deliveries: Any, server: Server, log: Any, fast: None) -> None:
    answers = deque([answer(500), answer(200, {"ok": False}), answer()])
    server.behave = lambda *_: answers.popleft()
    delivery = deliveries()
    delivery.put(event("begin", url=server.url))
    work(delivery, lambda: len(delivery) == 0, "it is delivered")
    found = [(line["level"], line["event"]) for line in log()]
    assert found == [("WARNING", "api_error"), ("WARNING", "api_refused"), ("INFO", "call_begin")]
    assert [line["attempt"] for line in log()] == [1, 2, 3]
