"""Outbox, client and workers: order, retries, bounds, rude servers, an exact ledger."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import socket
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Sized
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any, NamedTuple

import gevent
import gevent.event
import gevent.pool
import gevent.server
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import harness
import rating_agent_hep as agent
from rating_agent_hep import DELIVERED, REFUSED_BY_API, REJECTED, DeliveryError, Outbox

URL = "http://127.0.0.1:1"
FIRST, LAST = agent.RETRY_FIRST, agent.RETRY_LAST


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


def take_all(box: Outbox, now: float = 0.0) -> list[agent.RatingEvent]:
    return list(iter(lambda: box.take(now), None))


def taken(box: Outbox, now: float = 0.0) -> agent.RatingEvent:
    found = box.take(now)
    assert found is not None
    return found


def failure(unknown: bool = False, wait: float = 0.0) -> DeliveryError:
    return DeliveryError("test", "no answer that counts", unknown, wait)


def held(box: Outbox) -> int:
    """All that an outbox holds, in whatever containers."""
    return sum(len(value) for value in vars(box).values() if isinstance(value, Sized))


# Outbox: order


def test_an_end_waits_until_its_begin_is_answered() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    assert take_all(box) == [begin]
    assert take_all(box, 1e6) == [], "however late it is"
    assert box.settle(begin, DELIVERED, 1.0) == (DELIVERED, [])
    assert take_all(box, 1.0) == [end]
    assert box.settle(end, DELIVERED, 2.0) == (DELIVERED, [])
    assert len(box) == 0 and take_all(box, 1e6) == []


@pytest.mark.parametrize("refused", [True, False])
def test_an_end_waits_while_its_begin_is_retried(refused: bool) -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    assert box.take(0.0) is begin
    if refused:
        assert box.settle(begin, REFUSED_BY_API, 0.0) == (REFUSED_BY_API, [])
    else:
        box.fail(begin, failure(), 0.0)
    assert take_all(box, 0.0) == []
    assert take_all(box, FIRST) == [begin]


def test_an_end_that_comes_later_goes_alone_after_its_begin_was_delivered() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin)
    box.settle(taken(box), DELIVERED, 0.0)
    put(box, end)
    assert take_all(box) == [end]


def test_an_end_put_while_its_begin_is_out_waits() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin)
    assert box.take(0.0) is begin
    put(box, end)
    assert box.take(0.0) is None
    box.settle(begin, DELIVERED, 0.0)
    assert box.take(0.0) is end


def test_calls_are_independent_and_go_in_order() -> None:
    box = outbox()
    begins = [event("begin", str(number)) for number in range(20)]
    put(box, *begins, *(event("end", str(number)) for number in range(20)))
    assert take_all(box) == begins
    box.settle(begins[7], DELIVERED, 0.0)
    assert [(each.kind, each.call_id) for each in take_all(box)] == [("end", "7")]


def test_of_several_that_may_go_the_oldest_goes_first() -> None:
    box = outbox()
    put(box, *(event("begin", str(serial), serial=serial) for serial in (1, 2, 3)))
    first = taken(box)
    box.settle(first, REFUSED_BY_API, 0.0)
    put(box, event("begin", "4", serial=4))
    assert [each.serial for each in take_all(box, FIRST)] == [1, 2, 3, 4]


def test_what_failed_in_an_outage_goes_first_after_it_in_order_of_time() -> None:
    box = outbox()
    put(box, *(event("begin", str(serial), serial=serial) for serial in range(100)))
    tried = set()
    for now in range(200):
        while (each := box.take(now)) is not None:
            tried.add(each.serial)
            box.fail(each, failure(), now)
    assert box.down and len(tried) > 3
    while (probe := box.take(now)) is None:
        now += 1
    box.settle(probe, DELIVERED, now)
    order = [each.serial for each in take_all(box, now)]
    assert order == sorted(order) and len(order) == 99


def test_a_held_calls_next_event_waits_for_its_release() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin)
    box.settle(taken(box), DELIVERED, 0.0, committed=False)
    put(box, end, event("begin", "b"))
    assert [each.call_id for each in take_all(box, 1e6)] == ["b"]
    box.release(begin.key)
    assert take_all(box, 1e6) == [end]


def test_one_key_is_one_api_tenant_and_tag() -> None:
    box = outbox()
    events = [event("begin"), event("begin", "b"), event("begin", url=URL + "/x"), event("begin")]
    events[3].tenant = "other"
    put(box, *events)
    assert take_all(box) == events


def test_attempts_are_counted_and_the_octets_stay() -> None:
    box = outbox()
    begin = event("begin")
    body = begin.body
    put(box, begin)
    now = 0.0
    for attempt in range(1, 6):
        now += LAST
        assert box.take(now) is begin
        assert begin.attempts == attempt and begin.body is body
        box.fail(begin, failure(), now)


# Outbox: delays and refusals


def delays(
    box: Outbox, each: agent.RatingEvent, number: int, again: Callable[[float], None]
) -> Any:
    """How long the event has to wait after each of so many attempts that `again` ends."""
    now, found = 0.0, []
    assert box.take(now) is each
    for _ in range(number):
        again(now)
        waited = next(
            step / 8 for step in range(10_000) if box.take(now + step / 8) is each
        )  # exact: delays are multiples of 1/8 s
        found.append(waited)
        now += waited
    return found


EXPONENTIAL = [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


def test_delays_after_failures_grow_to_the_last() -> None:
    box = outbox()
    begin = event("begin")
    put(box, begin)

    def fail(now: float) -> None:
        box.fail(begin, failure(), now)
        # Another call is answered meanwhile, so the API is not down.
        put(box, event("begin", f"other {now}"))
        box.settle(taken(box, now), DELIVERED, now)
        assert not box.down

    assert (FIRST, LAST) == (1.0, 30.0)
    assert delays(box, begin, len(EXPONENTIAL), fail) == EXPONENTIAL


def test_refusals_are_bounded_and_spread_over_minutes() -> None:
    box = outbox()
    begin = event("begin")
    put(box, begin)
    number = agent.MAX_REFUSALS - 1

    def refuse(now: float) -> None:
        assert box.settle(begin, REFUSED_BY_API, now) == (REFUSED_BY_API, [])

    waited = delays(box, begin, number, refuse)
    assert waited == EXPONENTIAL[:number] and sum(waited) > 90
    assert box.settle(begin, REFUSED_BY_API, 1e6) == (REJECTED, [begin])
    assert len(box) == 0 and take_all(box, 1e9) == []


def test_a_refusal_is_an_answer_and_no_failure() -> None:
    box = outbox()
    put(box, event("begin"), event("begin", "b"), event("begin", "c"), event("begin", "d"))
    a, b, c, d = take_all(box)
    box.fail(a, failure(), 0.0)
    box.fail(b, failure(), 0.0)
    box.settle(c, REFUSED_BY_API, 0.0)
    box.fail(d, failure(), 0.0)
    assert not box.down


def refuse_for_good(box: Outbox, each: agent.RatingEvent) -> tuple[str, list[agent.RatingEvent]]:
    """Answer ok: false until it is believed; the event must be out already."""
    for attempt in itertools.count(1):
        outcome = box.settle(each, REFUSED_BY_API, attempt * 1000.0)
        if outcome[0] != REFUSED_BY_API:
            return outcome
        assert attempt < 100
        assert box.take(attempt * 1000.0 + 500) is each
    raise AssertionError


def test_a_begin_that_is_rejected_takes_its_waiting_end_with_it() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    assert box.take(0.0) is begin
    assert refuse_for_good(box, begin) == (REJECTED, [begin, end])
    assert len(box) == 0 and take_all(box, 1e9) == []


def test_a_begin_that_is_rejected_takes_a_later_end_with_it() -> None:
    box = outbox()
    put(box, event("begin"))
    assert box.settle(taken(box), REJECTED, 0.0)[0] == REJECTED
    assert box.put(event("end")) == (False, [])
    assert len(box) == 0 and take_all(box, 1e9) == []


@pytest.mark.parametrize("with_end", ["before", "after", "never"])
def test_a_key_used_again_after_a_rejection_is_accepted(with_end: str) -> None:
    box = outbox()
    put(box, event("begin"))
    if with_end == "before":
        put(box, event("end"))
    assert box.settle(taken(box), REJECTED, 0.0)[0] == REJECTED
    if with_end == "after":
        assert box.put(event("end"))[0] is False
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    assert box.take(1.0) is begin
    box.settle(begin, DELIVERED, 1.0)
    assert box.take(1.0) is end
    assert box.settle(end, DELIVERED, 1.0) == (DELIVERED, [])


def test_a_rejected_begin_takes_its_own_end_only() -> None:
    """The same key may be used by the next call before the first is settled."""
    box = outbox()
    first = [event("begin"), event("end")]
    second = [event("begin"), event("end")]
    put(box, *first, second[0])
    box.settle(taken(box), REJECTED, 0.0)
    box.put(second[1])
    sent = []
    while (each := box.take(1e6)) is not None:
        sent.append(each)
        box.settle(each, DELIVERED, 1e6)
    assert sent in ([], second), "an end was sent without its begin"


@pytest.mark.parametrize("kind", ["begin", "end"])
def test_a_4xx_is_rejected_at_once(kind: str) -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    if kind == "end":
        box.settle(taken(box), DELIVERED, 0.0)
    gone = [begin, end] if kind == "begin" else [end]
    assert box.settle(taken(box), REJECTED, 0.0) == (REJECTED, gone)
    assert len(box) == 0


def refusals_until_believed(kind: str, unknown: bool) -> tuple[int, str]:
    box = outbox()
    each = event(kind)
    put(box, each)
    box.fail(taken(box), failure(unknown), 0.0)
    for number in itertools.count(1):
        assert box.take(number * 1000.0) is each
        meaning, _ = box.settle(each, REFUSED_BY_API, number * 1000.0)
        if meaning != REFUSED_BY_API:
            assert len(box) == 0
            return number, meaning
    raise AssertionError


def test_an_end_of_unknown_outcome_that_is_refused_for_minutes_was_done() -> None:
    assert refusals_until_believed("end", True) == (agent.MAX_REFUSALS, DELIVERED)
    assert refusals_until_believed("end", False) == (agent.MAX_REFUSALS, REJECTED)
    assert refusals_until_believed("begin", True) == (agent.MAX_REFUSALS, REJECTED)
    assert refusals_until_believed("begin", False) == (agent.MAX_REFUSALS, REJECTED)


def refusals_beside_others(kind: str, others: list[str], unknown: bool = True) -> tuple[int, str]:
    """Refusals until believed, where the API answers another event so after each of them."""
    box = outbox()
    put(box, event(kind))
    each = taken(box)
    each.unknown = unknown
    for refusals in itertools.count(1):
        now = refusals * 1000.0
        meaning, _ = box.settle(each, REFUSED_BY_API, now)
        if meaning != REFUSED_BY_API:
            return refusals, meaning
        put(box, event("begin", f"other {refusals}"))
        other = taken(box, now)
        box.settle(other, others[min(refusals, len(others)) - 1], now + 1)
        while (taken_now := box.take(now + 500)) is not each:
            assert taken_now is not None
            box.settle(taken_now, REFUSED_BY_API, now + 500)
    raise AssertionError


def test_it_is_believed_sooner_where_the_api_says_ok_to_others_meanwhile() -> None:
    """A dead storage service refuses all alike; one that lives refuses what it has done."""
    sure = agent.MAX_CONFIRMED_REFUSALS + 1
    assert refusals_beside_others("end", [DELIVERED]) == (sure, DELIVERED)
    dead = [REFUSED_BY_API] * 4
    assert refusals_beside_others("end", [*dead, DELIVERED]) == (4 + sure, DELIVERED)
    assert refusals_beside_others("end", dead) == (agent.MAX_REFUSALS, DELIVERED)
    assert refusals_beside_others("end", [DELIVERED], False) == (agent.MAX_REFUSALS, REJECTED)
    assert refusals_beside_others("begin", [DELIVERED]) == (agent.MAX_REFUSALS, REJECTED)


def test_an_unknown_outcome_is_remembered_over_known_ones() -> None:
    box = outbox()
    end = event("end")
    put(box, end)
    for number, unknown in enumerate((False, True, False)):
        box.fail(taken(box, number * 1000.0), failure(unknown), number * 1000.0)
    assert end.unknown is True
    assert end.replayable()["maybe_delivered"] is True


# Outbox: an API that is down


def go_down(box: Outbox, number: int = agent.DOWN_AFTER) -> list[agent.RatingEvent]:
    """That many calls fail at second 0; returns them."""
    events = [event("begin", f"failed {index}") for index in range(number)]
    put(box, *events)
    for each in events:
        assert box.take(0.0) is each
        box.fail(each, failure(), 0.0)
    return events


def test_an_api_is_down_after_failures_in_a_row() -> None:
    box = outbox()
    go_down(box, agent.DOWN_AFTER - 1)
    assert not box.down
    put(box, event("begin", "good"))
    box.settle(taken(box), DELIVERED, 0.0)
    put(box, *(event("begin", f"again {index}") for index in range(agent.DOWN_AFTER)))
    for index, each in enumerate(take_all(box), 1):
        box.fail(each, failure(), 0.0)
        assert box.down is (index >= agent.DOWN_AFTER), "a success starts the count anew"


def test_while_down_there_is_one_probe_at_a_time() -> None:
    box = outbox()
    go_down(box)
    put(box, *(event("begin", f"waits {index}") for index in range(10)))
    assert box.down
    assert take_all(box, 0.0) == take_all(box, FIRST - 0.01) == []
    probe = taken(box, FIRST)
    assert take_all(box, FIRST) == take_all(box, 1e6) == [], "until the probe is answered"
    box.fail(probe, failure(), FIRST)
    assert take_all(box, FIRST) == []
    assert len(take_all(box, 1e6)) == 1


def probe_pauses(box: Outbox, number: int) -> list[float]:
    """How long it waits for each of so many probes that fail."""
    now, pauses = 0.0, []
    for _ in range(number):
        for step in itertools.count():
            probe = box.take(now + step / 8)  # exact: pauses are multiples of 1/8 s
            if probe is not None:
                break
            assert step < 10_000
        now += step / 8
        pauses.append(step / 8)
        box.fail(probe, failure(), now)
    return pauses


def test_probes_back_off_up_to_the_last_delay() -> None:
    box = outbox()
    go_down(box)
    put(box, *(event("begin", f"waits {index}") for index in range(100)))
    assert probe_pauses(box, len(EXPONENTIAL)) == EXPONENTIAL


def test_requests_that_fail_together_are_no_reason_to_wait_longer() -> None:
    """With 16 requests under way a moment's outage fails 16 times, and is over all the same."""
    box = outbox()
    events = [event("begin", str(number)) for number in range(16)]
    put(box, *events)
    assert take_all(box) == events
    for each in events:
        box.fail(each, failure(), 0.0)
    assert box.take(FIRST) is not None


def test_a_probe_is_tried_though_all_events_wait_longer() -> None:
    box = outbox()
    (each,) = go_down(box, 1)
    for now in (100.0, 200.0, 300.0):
        assert box.take(now) is each
        box.fail(each, failure(), now)
    assert box.down, "one event alone can tell"
    assert box.take(300.0 + LAST) is each


def test_success_brings_all_back() -> None:
    box = outbox()
    failed = go_down(box)
    waiting = [event("begin", f"waits {index}") for index in range(10)]
    put(box, *waiting)
    probe = taken(box, FIRST)
    box.settle(probe, DELIVERED, FIRST)
    assert not box.down
    rest = {each.call_id for each in (*failed, *waiting)} - {probe.call_id}
    assert {each.call_id for each in take_all(box, FIRST)} == rest


def test_after_a_success_the_back_off_starts_anew() -> None:
    box = outbox()
    go_down(box)
    put(box, *(event("begin", f"waits {index}") for index in range(50)))
    assert probe_pauses(box, 5) == EXPONENTIAL[:5]
    box.settle(taken(box, 100.0), DELIVERED, 100.0)
    for each in [taken(box, 100.0) for _ in range(agent.DOWN_AFTER)]:
        box.fail(each, failure(), 100.0)
    assert box.down
    assert box.take(100.0 + FIRST - 0.01) is None
    assert box.take(100.0 + FIRST) is not None


def test_retry_after_is_obeyed() -> None:
    box = outbox()
    put(box, event("begin"), event("begin", "b"))
    box.fail(taken(box), failure(wait=120.0), 0.0)
    assert take_all(box, 0.0) == take_all(box, 119.9) == []
    assert len(take_all(box, 120.0)) == 1


def test_a_short_retry_after_does_not_shorten_the_back_off() -> None:
    box = outbox()
    put(box, event("begin"))
    for now in (0.0, 100.0, 200.0, 300.0):
        box.fail(taken(box, now), failure(wait=0.5), now)
    assert take_all(box, 300.5) == []


def test_a_poison_event_does_not_block_others_for_ever() -> None:
    """It brings the API down each time it is tried; the others go all the same."""
    box = outbox()
    poison = event("begin", "poison")
    put(box, poison)
    waiting: dict[str, float] = {}
    late = 0.0
    for step in range(20_000):
        now = step / 10
        if step % 97 == 0 and step < 15_000:
            waiting[f"good {step}"] = now
            put(box, event("begin", f"good {step}"))
        while (each := box.take(now)) is not None:
            if each is poison:
                box.fail(each, failure(), now)
            else:
                late = max(late, now - waiting.pop(each.call_id))
                box.settle(each, DELIVERED, now)
    assert waiting == {} and late <= 2 * LAST
    assert poison.attempts > 10, "nor is it given up"


# Outbox: bounds


def test_over_the_limit_the_oldest_waiting_call_goes_whole() -> None:
    box = outbox(limit=4)
    first = [event("begin", "1"), event("end", "1")]
    second = [event("begin", "2"), event("end", "2")]
    put(box, *first, *second)
    assert box.put(event("begin", "3")) == (True, first)
    assert len(box) == 3
    assert box.undelivered()[:2] == second
    assert [each.call_id for each in take_all(box)] == ["2", "3"]


def test_over_the_limit_what_is_out_stays() -> None:
    box = outbox(limit=2)
    put(box, event("begin", "1"), event("begin", "2"))
    out = taken(box)
    assert [each.call_id for each in box.put(event("begin", "3"))[1]] == ["2"]
    assert box.settle(out, DELIVERED, 0.0) == (DELIVERED, [])


def test_an_end_whose_begin_left_memory_is_not_sent_alone() -> None:
    box = outbox(limit=2)
    put(box, event("begin", "1"), event("begin", "2"))
    assert [each.call_id for each in box.put(event("begin", "3"))[1]] == ["1"]
    accepted, _ = box.put(event("end", "1"))
    assert accepted is False
    assert all(each.kind == "begin" for each in take_all(box, 1e6))


def test_an_end_whose_begin_left_memory_behind_another_call_is_not_sent_alone() -> None:
    """The same key was used by two calls; both left memory, the second before its end came."""
    box = outbox(limit=3)
    put(box, event("begin", "1"), event("end", "1"), event("begin", "1"))
    assert len(box.put(event("begin", "2"))[1]) == 3
    assert box.put(event("end", "1"))[0] is False
    assert [(each.kind, each.call_id) for each in take_all(box, 1e6)] == [("begin", "2")]


def test_a_key_used_again_after_it_left_memory_keeps_its_delays() -> None:
    box = outbox(limit=1)
    put(box, event("begin", "1"))
    box.put(event("begin", "2"))
    again = event("begin", "1")
    box.put(again)
    assert box.take(0.0) is again
    box.fail(again, failure(), 0.0)
    assert box.take(0.0) is None, "given out before its delay is over"


@pytest.mark.parametrize("down", [False, True])
def test_memory_is_bounded_through_a_long_outage(
    down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_GIVEN_UP", 50)
    box = outbox(limit=100)
    if down:
        go_down(box)
    for number in range(5_000):
        box.put(event("begin", str(number)))
        assert len(box) <= 100
    assert held(box) <= 1_000


def test_given_up_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_GIVEN_UP", 50)
    box = outbox(limit=10)
    for number in range(1_000):
        put_event = event("begin", str(number))
        box.put(put_event)
        assert box.take(0.0) is put_event
        box.settle(put_event, REJECTED, 0.0)
    assert held(box) <= 100
    assert box.put(event("end", "999"))[0] is False, "the latest are remembered"


def test_undelivered_are_all_that_wait_oldest_call_first() -> None:
    box = outbox()
    events = [event("begin", "1"), event("end", "1"), event("begin", "2"), event("end", "3")]
    put(box, events[0], events[2], events[1], events[3])
    box.fail(taken(box), failure(), 0.0)
    out = taken(box)
    assert box.undelivered() == events
    assert len(box) == 4
    assert [each.unknown for each in events] == [each is out for each in events], (
        "what is out may be carried out still"
    )


class OutboxMachine(RuleBasedStateMachine):
    """Random operations against a model: where each event is, and what must not be given out."""

    LIMIT = 8

    def __init__(self) -> None:
        super().__init__()
        self.box = outbox(self.LIMIT)
        self.now = 0.0
        self.state: dict[int, str] = {}
        self.events: list[agent.RatingEvent] = []
        self.begin_of: dict[int, agent.RatingEvent] = {}
        self.open: dict[str, agent.RatingEvent] = {}
        self.out: list[agent.RatingEvent] = []
        self.held: list[Any] = []

    def _where(self, place: str) -> list[agent.RatingEvent]:
        return [each for each in self.events if self.state[id(each)] == place]

    @rule(call=st.sampled_from("abcdef"))
    def put(self, call: str) -> None:
        """The next event of a key: begin and end by turns, as calls with one key follow."""
        begin = self.open.pop(call, None)
        each = event("end" if begin else "begin", call)
        if begin:
            self.begin_of[id(each)] = begin
        else:
            self.open[call] = each
        self.events.append(each)
        accepted, lost = self.box.put(each)
        self.state[id(each)] = "waiting" if accepted else "rejected"
        if not accepted:
            assert each.kind == "end" and self.state[id(begin)] in ("rejected", "lost")
        for gone in lost:
            assert self.state[id(gone)] == "waiting"
            self.state[id(gone)] = "lost"
        # Room is made where something comes; only calls that are under way keep their events.
        out = {each.key for each in self.out} | set(self.held)
        pending = self._where("waiting") + self._where("out")
        kept = len([each for each in pending if each.key not in out])
        assert kept == 0 or len(pending) <= self.LIMIT

    def _check_given_out(self, each: agent.RatingEvent) -> None:
        assert self.state[id(each)] == "waiting", "given out twice, or after its end"
        assert all(other.key != each.key for other in self.out), "two of one call are out"
        assert each.key not in self.held, "before it is on disk that the one before was answered"
        earlier = itertools.takewhile(lambda other: other is not each, self.events)
        assert not [
            other
            for other in earlier
            if other.key == each.key and self.state[id(other)] in ("waiting", "out")
        ], "out of order"
        if each.kind == "end":
            assert self.state[id(self.begin_of[id(each)])] == "delivered", "an end alone"

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 5.0, 60.0]))
    def take(self, seconds: float) -> None:
        self.now += seconds
        was_down, others = self.box.down, bool(self.out)
        each = self.box.take(self.now)
        if each is None:
            free = [x for x in self._where("waiting") if x.key not in self.held]
            assert was_down or others or not free or seconds < 60
            return
        self._check_given_out(each)
        self.state[id(each)] = "out"
        self.out.append(each)

    @precondition(lambda self: self.out)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([DELIVERED, REFUSED_BY_API, REJECTED]),
        committed=st.booleans(),
    )
    def settle(self, data: st.DataObject, outcome: str, committed: bool) -> None:
        each = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        meaning, gone = self.box.settle(each, outcome, self.now, committed)
        if not committed and meaning != REFUSED_BY_API:
            self.held.append(each.key)
        if meaning == REFUSED_BY_API:
            assert outcome == REFUSED_BY_API and gone == []
            assert each.refusals < agent.MAX_REFUSALS
            self.state[id(each)] = "waiting"
        elif meaning == DELIVERED:
            assert gone == []
            assert outcome == DELIVERED or (each.kind == "end" and each.unknown)
            self.state[id(each)] = "delivered"
        else:
            assert gone[0] is each and outcome != DELIVERED
            for other in gone:
                assert other.key == each.key and self.state[id(other)] in ("waiting", "out")
                self.state[id(other)] = "rejected"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.box.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), unknown=st.booleans(), wait=st.sampled_from([0.0, 0.0, 0.0, 10.0, 120.0]))
    def fail(self, data: st.DataObject, unknown: bool, wait: float) -> None:
        each = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.box.fail(each, failure(unknown, wait), self.now)
        self.state[id(each)] = "waiting"

    @invariant()
    def counts_are_right(self) -> None:
        pending = self._where("waiting") + self._where("out")
        assert len(self.box) == len(pending)

    def teardown(self) -> None:
        """A good API in the end: all that was neither lost nor rejected is delivered."""
        for each in list(self.out):
            self.box.settle(each, DELIVERED, self.now)
            self.state[id(each)] = "delivered"
        self.out.clear()
        for key in self.held:
            self.box.release(key)
        self.held.clear()
        assert {id(each) for each in self.box.undelivered()} == {
            id(each) for each in self._where("waiting")
        }
        for _ in range(10 * len(self.events) + 10):
            self.now += agent.MAX_RETRY_AFTER
            while (each := self.box.take(self.now)) is not None:
                self._check_given_out(each)
                self.state[id(each)] = "delivered"
                self.box.settle(each, DELIVERED, self.now)
        assert len(self.box) == 0 and not self._where("waiting")


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# A server that can be rude


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


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def client(url: str, **more: Any) -> agent.RatingApi:
    more.setdefault("rating_api_timeout", 0.3)
    return agent.RatingApi(url, agent.Settings(**more))


def failed(api: agent.RatingApi, each: agent.RatingEvent | None = None) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        api.send(each or event("begin"))
    return caught.value


# RatingApi: answers


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


# RatingApi: rude servers


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


# RatingApi: the request


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


# Delivery, end to end


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """A function that returns the JSON lines logged so far, as they would be on stdout."""
    logger = agent.log
    before = (logger.handlers[:], logger.propagate, logger.level)
    stream = io.StringIO()
    agent.set_up_logging(agent.Settings(), stream)
    # These tests count warnings, so none may be held back.
    for handler in logger.handlers:
        handler.filters.clear()
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after hundredths of a second."""
    monkeypatch.setattr(agent, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(agent, "RETRY_LAST", 0.04)


@pytest.fixture
def deliveries(log: Any) -> Iterator[Callable[..., agent.Delivery]]:
    """Makes deliveries and ends their workers when the test is over."""
    made: list[agent.Delivery] = []

    def make(**more: Any) -> agent.Delivery:
        more = {"rating_api_timeout": 0.3, "rating_api_concurrency": 4} | more
        chosen = agent.Settings(**more)
        made.append(agent.Delivery(chosen, agent.Metrics(chosen)))
        return made[-1]

    yield make
    for delivery in made:
        delivery.stop()


def work(delivery: agent.Delivery, done: Callable[[], Any], what: str) -> None:
    """Tick as the agent does until it is done."""

    def check() -> Any:
        delivery.tick()
        return done()

    harness.wait_until(check, what)


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
