"""The outbox: which event may go when; order, retries, outages, bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sized
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import rating_agent_hep as agent
from rating_agent_hep import DELIVERED, REFUSED_BY_API, REJECTED, Outbox
from ratings import URL, event, failure, outbox, put, taken

FIRST, LAST = agent.RETRY_FIRST, agent.RETRY_LAST


def take_all(box: Outbox, now: float = 0.0) -> list[agent.RatingEvent]:
    return list(iter(lambda: box.take(now), None))


def held(box: Outbox) -> int:
    """All that an outbox holds, in whatever containers."""
    return sum(len(value) for value in vars(box).values() if isinstance(value, Sized))


# Order


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


# Delays and refusals


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


# An API that is down


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


# Bounds


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
