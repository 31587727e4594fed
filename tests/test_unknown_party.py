"""Begins of which the API knows one account only: who is sent, what is taken, how its end goes."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import harness
import hepbuild
import rating_agent_hep as agent
from dialog import ack, bye, bye_reply, invite, numbered, reply
from harness import LOCAL
from rating_agent_hep import DELIVERED, REFUSED_BY_API, REJECTED, DeliveryError, Outbox
from ratings import URL, failure, outbox, put, taken, work

BOTH, CALLER, CALLEE = ["2000", "39"], ["2000"], ["39"]
# Random lives of one call; each takes some 0.5 ms.
MODEL_SEEDS = 4_000


def event(kind: str, call: str = "a", tags: Any = ("2000", "39"), **more: Any) -> agent.RatingEvent:
    """As the call table makes it: an empty tag is left out of the body."""
    body = {"tenant": "default", "transaction_tag": call}
    names = ("account_tag", "destination_account_tag")
    body |= {name: tag for name, tag in zip(names, tags, strict=True) if tag}
    body[f"timestamp_{kind}"] = "2026-11-24T00:00:00.000Z"
    return agent.RatingEvent(
        kind, call, "default", call, *tags, 1_790_000_000_000_000, "bye",
        more.pop("url", URL), json.dumps(body, separators=(",", ":")).encode(), **more,
    )  # fmt: skip


def parties(body: bytes) -> list[str]:
    """Whom a request names, the caller first."""
    content = json.loads(body)
    names = ("account_tag", "destination_account_tag")
    return [content[name] for name in names if name in content]


def next_event(box: Outbox, now: float) -> tuple[agent.RatingEvent, float]:
    """The next that may go, and when."""
    for step in range(10_000):
        found = box.take(now + step / 8)  # exact: delays are multiples of 1/8 s
        if found is not None:
            return found, now + step / 8
    raise AssertionError("nothing may go any more")


def settle(box: Outbox, each: agent.RatingEvent, answer: str, now: float) -> str:
    """The API's answer: "ok", "no", or none: "lost" (may be carried out), "refused" (was not)."""
    if answer in ("ok", "no"):
        return box.settle(each, DELIVERED if answer == "ok" else REFUSED_BY_API, now)[0]
    box.fail(each, failure(answer == "lost"), now)
    return answer


def talk(box: Outbox, script: str, now: float = 0.0) -> list[tuple[float, list[str]]]:
    """When each request of a script of answers went, and whom it named; each takes 1/8 s."""
    sent = []
    for answer in script.split():
        each, now = next_event(box, now)
        sent.append((now, parties(each.request())))
        now += 1 / 8
        settle(box, each, answer, now)
    return sent


# Answers to a begin, whom its requests name, and whom its end.
TALKS = {
    "both known": ("ok", [BOTH], BOTH),
    "a passing refusal": ("no ok", [BOTH, BOTH], BOTH),
    "the callee is unknown": ("no no ok", [BOTH, BOTH, CALLER], CALLER),
    "the caller is unknown": ("no no no ok", [BOTH, BOTH, CALLER, CALLEE], CALLEE),
    "the storage comes back after a round": (
        "no no no no no ok", [BOTH, BOTH, CALLER, CALLEE, BOTH, CALLER], CALLER,
    ),
    "both are known by then": ("no no no no ok", [BOTH, BOTH, CALLER, CALLEE, BOTH], BOTH),
    "a connection fails in between": (
        "no no refused no ok", [BOTH, BOTH, CALLER, BOTH, CALLER], CALLER,
    ),
    "refused, not carried out": ("refused no no ok", [BOTH, BOTH, BOTH, CALLER], CALLER),
    # An attempt with both may be carried out while the storage is away: believed after two more
    # refusals of both, each with an ok before.
    "both may be begun": (
        "lost no no ok no ok no ok",
        [BOTH, BOTH, BOTH, CALLER, BOTH, CALLER, BOTH, CALLER], CALLER,
    ),
    "both were begun": ("lost no no ok ok", [BOTH, BOTH, BOTH, CALLER, BOTH], BOTH),
    "the caller may be begun, then both": (
        "no no lost ok", [BOTH, BOTH, CALLER, BOTH], BOTH,
    ),
    "the caller may be begun, then the callee is known": (
        "no no lost no no ok ok", [BOTH, BOTH, CALLER, BOTH, CALLER, CALLEE, BOTH], BOTH,
    ),
    "what was believed before a time-out is not believed after it": (
        "lost no no ok no ok lost no ok no ok no ok",
        [BOTH, BOTH, BOTH, CALLER, BOTH, CALLER, BOTH, BOTH, CALLER, BOTH, CALLER, BOTH, CALLER],
        CALLER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("with_end", ["waits", "later"])
@pytest.mark.parametrize("name", TALKS)
def test_whom_requests_name(name: str, with_end: str) -> None:
    script, expected, ends = TALKS[name]
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin)
    if with_end == "waits":
        put(box, end)
    sent = talk(box, script)
    assert [named for _, named in sent] == expected
    if with_end == "later":
        assert len(box) == 0
        put(box, end)
    each, now = next_event(box, sent[-1][0] + 1)
    assert each is end and parties(end.request()) == parties(end.body) == ends
    assert parties(begin.body) == ends
    assert [begin.account_tag, begin.destination_account_tag] == [
        tag if tag in ends else "" for tag in BOTH
    ]
    box.settle(end, DELIVERED, now)
    assert len(box) == 0 and box._one_sided == {}


def test_when_they_go() -> None:
    """Both twice, a second or more apart; one alone right behind a refusal of both."""
    box = outbox()
    put(box, event("begin"))
    sent = talk(box, "no no no no no no no ok")
    assert [round(now, 3) for now, _ in sent] == [
        0.0, 1.125, 1.25, 1.375, 3.5, 3.625, 3.75, 7.875,
    ]  # fmt: skip


def test_two_refusals_within_a_second_do_not_count() -> None:
    box = Outbox(jitter=lambda: 0.75)
    put(box, event("begin"))
    named = [parties for _, parties in talk(box, "no no no ok")]
    assert named == [BOTH, BOTH, BOTH, CALLER]


def test_after_a_failure_both_go_again_however_soon() -> None:
    box = Outbox(jitter=lambda: 0.75)
    put(box, event("begin"))
    sent = talk(box, "no no no refused no")
    assert [named for _, named in sent] == [BOTH, BOTH, BOTH, CALLER, BOTH]
    assert sent[4][0] - sent[3][0] < agent.REFUSED_APART


def test_one_alone_that_had_to_wait_goes_with_both_again() -> None:
    """Such as behind an API that is down: the reason of the refusals may be over by then."""
    box = outbox()
    put(box, event("begin"))
    talk(box, "no no")
    each = taken(box, 1.25 + agent.REFUSED_APART)
    assert parties(each.request()) == BOTH


def test_a_request_with_one_alone_is_the_same_octets_each_time() -> None:
    box = outbox()
    begin = event("begin")
    put(box, begin)
    talk(box, "no no")
    first = taken(box, 1.25).request()
    box.settle(begin, REFUSED_BY_API, 1.25)
    talk(box, "no", 1.25)
    talk(box, "no", 3.0)
    assert taken(box, 4.0).request() == first == begin.request()
    whole = json.loads(begin.body)
    assert json.loads(first) == {k: v for k, v in whole.items() if k != "destination_account_tag"}


@pytest.mark.parametrize("unknown", [False, True])
def test_refused_in_all_forms_is_rejected_with_both(unknown: bool) -> None:
    box = outbox()
    begin, end = event("begin", unknown=unknown), event("end")
    put(box, begin, end)
    body = begin.body
    named = [each for _, each in talk(box, "no " * (1 + 3 * (agent.MAX_REFUSALS - 1)))]
    assert named == [BOTH, *[BOTH, CALLER, CALLEE] * (agent.MAX_REFUSALS - 1)]
    assert len(box) == 0 and (begin.body, begin.left_out) == (body, "")


@pytest.mark.parametrize(
    ("drop", "tags"), [(False, ("2000", "39")), (True, ("2000", "")), (True, ("", "39"))]
)
def test_there_is_nobody_to_drop(drop: bool, tags: tuple[str, str]) -> None:
    box = Outbox(jitter=lambda: 1.0, drop=drop)
    put(box, event("begin", tags=tags))
    named = [each for _, each in talk(box, "no " * agent.MAX_REFUSALS)]
    assert named == [[tag for tag in tags if tag]] * agent.MAX_REFUSALS
    assert len(box) == 0


def test_an_end_is_refused_as_before() -> None:
    box = outbox()
    put(box, event("end"))
    assert [each for _, each in talk(box, "no no ok")] == [BOTH] * 3


def test_a_4xx_to_one_alone_rejects_all() -> None:
    box = outbox()
    begin, end = event("begin"), event("end")
    put(box, begin, end)
    talk(box, "no no")
    assert box.settle(taken(box, 1.25), REJECTED, 1.25) == (REJECTED, [begin, end])
    assert parties(begin.body) == parties(end.body) == BOTH


def take_alone(box: Outbox, call: str = "a", now: float = 0.0, callee: str = "39") -> None:
    """A call whose callee is unknown, begun with the caller alone."""
    each = event("begin", call, ("2000", callee))
    put(box, each)
    talk(box, "no no ok", now)
    assert each.left_out == callee
    assert box.leave_out(each, now) is True, "this is news"


def test_an_unknown_party_is_left_out_of_further_begins_for_a_while() -> None:
    box = outbox()
    take_alone(box)
    again, other = event("begin", "b"), event("begin", "c", ("2000", "40"))
    elsewhere = event("begin", "d")
    elsewhere.tenant = "other"
    put(box, again, other, elsewhere)
    assert [parties(each.request()) for each in iter(lambda: box.take(9.0), None)] == [
        CALLER, ["2000", "40"], BOTH,
    ]  # fmt: skip
    assert box.settle(again, DELIVERED, 9.0) == (DELIVERED, [])
    assert box.leave_out(again, 9.0) is False, "named once a minute"
    later = event("begin", "e")
    put(box, later)
    assert parties(taken(box, agent.UNKNOWN_PAUSE).request()) == BOTH
    assert box.leave_out(again, agent.UNKNOWN_PAUSE) is True


def test_a_party_that_was_left_out_wrongly_is_tried_again() -> None:
    box = outbox()
    take_alone(box)
    put(box, event("begin", "b"))
    assert talk(box, "no ok", 9.0) == [(9.0, CALLER), (10.125, BOTH)]


def test_an_event_that_may_be_begun_with_both_leaves_nobody_out_at_once() -> None:
    box = outbox()
    take_alone(box)
    put(box, event("begin", "b", unknown=True))
    assert parties(taken(box, 9.0).request()) == BOTH


def test_with_both_unknown_both_are_tried() -> None:
    box = outbox()
    take_alone(box)
    take_alone(box, "b", callee="2000")
    put(box, event("begin", "c"))
    assert parties(taken(box, 9.0).request()) == BOTH


def test_unknown_parties_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_UNKNOWN_PARTIES", 10)
    box = outbox()
    for number in range(30):
        take_alone(box, str(number), callee=f"39{number}")
    assert [tag for _, tag in box._unknown] == [f"39{number}" for number in range(20, 30)]
    take_alone(box, "x", agent.UNKNOWN_PAUSE)
    assert len(box._unknown) == 1, "what is over is forgotten"


def test_over_the_limit_of_running_calls_nobody_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they were begun with could not be remembered for their end."""
    monkeypatch.setattr(agent, "MAX_ONE_SIDED", 2)
    box = outbox()
    take_alone(box, "a")
    take_alone(box, "b", callee="40")
    put(box, event("begin", "c"), event("begin", "d", ("2000", "41")))
    assert [each for _, each in talk(box, "no no no no", 1.0)] == [BOTH, ["2000", "41"]] * 2
    put(box, event("end", "a"))
    assert parties(taken(box, 3.0).request()) == CALLER
    talk(box, "no no", 9.0)
    assert parties(taken(box, 9.25).request()) == CALLER, "there is room again"


def test_a_key_used_again_has_its_own_parties() -> None:
    """The first call's end left memory and never came."""
    box = outbox()
    take_alone(box)
    put(box, event("begin", tags=("2000", "2001")), event("end", tags=("2000", "2001")))
    assert [each for _, each in talk(box, "ok ok", 9.0)] == [["2000", "2001"]] * 2


# A model of the API, and the agent with its journal


class Clock:
    """What the module takes for `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_790_000_000 + self.now

    def time_ns(self) -> int:
        return round(self.time() * 1_000_000_000)


Leg = tuple[str, str]


class Canyan:
    """Accounts, running entries, records as reference/rating-api.md says; `faults` stay []."""

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self.alive = True
        self.running: dict[str, dict[Leg, set[str]]] = {}
        self.records: dict[str, set[Leg]] = {}
        self.faults: list[str] = []

    def carry_out(self, kind: str, body: bytes) -> bool:
        content = json.loads(body)
        tag = content["transaction_tag"]
        names = ("account_tag", "destination_account_tag")
        legs = [(name, content.pop(name)) for name in names if name in content]
        running, records = self.running.setdefault(tag, {}), self.records.setdefault(tag, set())
        if kind == "end" and running and set(running) != set(legs):
            self.faults.append(f"{tag}: begun for {sorted(running)}, ended for {legs}")
        if not self.alive or any(account not in self.known for _, account in legs):
            return False
        if kind == "begin":
            for leg in legs:
                running.setdefault(leg, set()).add(json.dumps(content))
                if leg in records or len(running[leg]) > 1:
                    self.faults.append(f"{tag}: {leg} begun twice")
            return True
        if any(leg not in running for leg in legs):
            return False
        for leg in legs:
            del running[leg]
            records.add(leg)
        return True


class OneCall:
    """One call, an outbox, and chance: what an answer, a time-out or a kill finds at each step.

    A kill makes a new outbox and a new event with the octets of the first, for that is what the
    disk has until the begin is settled. Requests that were frozen are carried out before any later
    one. The storage service is away for a second at least, and twice at most: each further time
    takes one more confirmed refusal to be sure.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        chance = self.dice.random
        self.api = Canyan({tag for tag in ("2000", "39") if chance() < 0.6})
        self.frozen: list[tuple[str, bytes]] = []
        self.now = self.died = 0.0
        self.deaths = 0
        # Few of them, so that it gets somewhere.
        self.rate, self.left = self.dice.choice((0.03, 0.1, 0.3)), 6
        self.box = Outbox()
        self.begin = event("begin")
        put(self.box, self.begin)

    def storage(self) -> None:
        if self.api.alive:
            if self.deaths < 2 and self.dice.random() < 2 * self.rate:
                self.api.alive, self.died = False, self.now
                self.deaths += 1
        elif self.now - self.died >= 1 and self.dice.random() < 0.4:
            self.api.alive = True

    def request(self, each: agent.RatingEvent) -> str:
        """One request; what came of it, "kill" where the process died before the answer."""
        octets = (each.kind, each.request())
        fate = self.dice.random() / self.rate if self.left else 9
        self.left -= fate < 3
        if fate < 1:
            self.frozen.append(octets)
            return self.dice.choice(("lost", "kill"))
        if fate < 2:
            return self.dice.choice(("lost", "refused", "kill"))
        for earlier in self.frozen:
            self.api.carry_out(*earlier)
        self.frozen.clear()
        ok = self.api.carry_out(*octets)
        return self.dice.choice(("lost", "kill")) if fate < 3 else "ok" if ok else "no"

    def settle_begin(self) -> str:
        """DELIVERED or REJECTED."""
        while True:
            self.storage()
            each, self.now = next_event(self.box, self.now)
            self.now += 0.05
            came = self.request(each)
            self.storage()
            if came == "kill":
                self.now += self.dice.choice((0.1, 1.0, 5.0))
                self.box = Outbox()
                put(self.box, event("begin", unknown=True))
            elif (meaning := settle(self.box, each, came, self.now)) in (DELIVERED, REJECTED):
                return meaning

    def run(self) -> set[str]:
        """Begin and end; returns what was charged."""
        if self.settle_begin() == DELIVERED:
            self.api.alive = True
            put(self.box, event("end"))
            each, self.now = next_event(self.box, self.now)
            assert not self.frozen, "what was before the answer is carried out"
            assert self.api.carry_out("end", each.request()), "the end is taken at once"
            assert not self.api.running["a"], "nothing runs for ever"
        assert self.api.faults == []
        return {account for _, account in self.api.records.get("a", ())}


def test_whatever_happens_a_call_ends_as_it_was_begun() -> None:
    charged: Counter[tuple[int, int]] = Counter()
    for seed in range(MODEL_SEEDS):
        call = OneCall(seed)
        try:
            records = call.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None
        known = call.api.known
        assert records <= known
        if not call.deaths:
            assert records == known
        charged[len(known), len(records)] += 1
    assert min(charged[2, 2], charged[1, 1], charged[0, 0]) > MODEL_SEEDS / 10


STORAGE = st.sampled_from([*[""] * 8, "away", "back"])
FATES = st.sampled_from([*["answered"] * 16, "lost", "frozen", "answer lost", "closed"])
BEHIND = st.sampled_from([*["commit"] * 16, "", "kill"])


class AgentMachine(RuleBasedStateMachine):
    """Calls, an API with faults, a storage service that goes away, kills between any two steps.

    Requests that were frozen are carried out before any later one. The storage service is away for
    a second at least, for half a minute at most, and goes away twice: with each further time it
    takes one more confirmed refusal to be sure. What the disk has is what was committed.
    """

    CALLS = (("2000", "2001"), ("2000", "39"), ("3000", "2001"), ("3000", "39"))

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.clock = Clock()
        self.patches.setattr(agent, "time", self.clock)
        self.patches.setattr(agent.Delivery, "_work", lambda *_: None)
        self.patches.setattr(agent.RatingApi, "send", lambda _, event: self.send(event))
        # In memory where there is such a place: a commit is soon done.
        memory = "/dev/shm"
        self.folder = tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None)
        self.api = Canyan({"2000", "2001"})
        self.frozen: list[tuple[str, bytes]] = []
        self.fate = "answered"
        self.calls: dict[str, tuple[str, str]] = {}
        self.talking: list[int] = []
        self.deaths = 0
        self.died = 0.0
        self.start()

    def start(self) -> None:
        options: Any = {"state_dir": self.folder.name, "sip_local_domains": ("sip.canyan.io",)}
        chosen = agent.Settings(
            **options, rating_api_url=URL, max_call_duration=86_400.0, reorder_window=0
        )
        self.store = agent.Journal(self.folder.name)
        self.agent = agent.Agent(
            chosen,
            agent.parse_routes("", "", chosen),
            agent.WarningLimiter(),
            self.store,
        )

    def send(self, each: agent.RatingEvent) -> str:
        """What `RatingApi.send` gets from the API."""
        request = (each.kind, each.request())
        if self.fate == "frozen":
            self.frozen.append(request)
        if self.fate in ("lost", "frozen"):
            raise DeliveryError("timeout", "no answer", True)
        if self.fate == "closed":
            raise DeliveryError("connection", "refused", False)
        for earlier in self.frozen:
            self.api.carry_out(*earlier)
        self.frozen.clear()
        ok = self.api.carry_out(*request)
        if self.fate == "answer lost":
            raise DeliveryError("timeout", "no answer", True)
        return DELIVERED if ok else REFUSED_BY_API

    def feed(self, number: int, *payloads: bytes) -> None:
        caller, callee = self.calls[f"call-{number}@host"]
        sender = self.agent.senders.of("127.0.0.1")
        for payload in payloads:
            text = numbered(payload, number).replace(b"sip:2001@", b"sip:%b@" % callee.encode())
            text = text.replace(b"sip:2000@", b"sip:%b@" % caller.encode())
            stamp = round(self.clock.time() * 1_000_000)
            self.agent.receive(hepbuild.hep3(text, time_us=stamp), "udp", sender)

    @precondition(lambda self: len(self.calls) < 3)
    @rule(parties=st.sampled_from(CALLS))
    def answer(self, parties: tuple[str, str]) -> None:
        number = len(self.calls) + 1
        self.calls[f"call-{number}@host"] = parties
        self.talking.append(number)
        self.feed(number, invite(), reply(200), ack())
        # What a kill takes of the last milliseconds is another promise.
        self.commit()

    @precondition(lambda self: self.talking)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.talking)))

    def end(self, number: int) -> None:
        self.talking.remove(number)
        self.feed(number, bye(), bye_reply())
        self.commit()

    def commit(self) -> None:
        self.agent.commit()

    def load(self) -> Any:
        """The API's lane, with what was on disk only."""
        lane = self.agent.delivery._lane(URL)
        self.agent.tick()
        # A loop of `sleep(0)` keeps the interpreter's lock from the thread that reads.
        if lane.loader:
            lane.loader.join(harness.DEADLINE)
        assert not lane.loader
        return lane

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        if not self.api.alive and self.clock.now - self.died > 30:
            self.api.alive = True

    def deliver(self, fate: str) -> None:
        """The next request, as soon as one may go."""
        lane = self.load()
        each = lane.outbox.take(self.clock.now)
        # What waits for a commit never may.
        while each is None and lane.outbox._delayed:
            self.pass_time(0.25)
            each = lane.outbox.take(self.clock.now)
        if each is not None:
            self.pass_time(0.05)
            self.fate = fate
            self.agent.delivery._deliver(lane, each)

    @precondition(lambda self: self.agent.waiting)
    @rule(steps=st.lists(st.tuples(STORAGE, FATES, BEHIND), min_size=1, max_size=20))
    def request(self, steps: list[tuple[str, str, str]]) -> None:
        """Requests, the storage service as it is or not, and what comes behind each answer."""
        for storage, fate, behind in steps:
            if storage == "away" and self.api.alive and self.deaths < 2:
                self.api.alive, self.died = False, self.clock.now
                self.deaths += 1
            if storage == "back" and self.clock.now - self.died >= 1:
                self.api.alive = True
            self.deliver(fate)
            if behind:
                getattr(self, behind)()

    @rule(seconds=st.sampled_from([0.05, 1.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @rule()
    def kill(self) -> None:
        self.agent.delivery.kill()
        self.store.close(harness.DEADLINE)
        self.start()

    def teardown(self) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.finish()
        finally:
            self.store.close(harness.DEADLINE)
            self.folder.cleanup()
            self.patches.undo()

    def finish(self) -> None:
        """All calls end, the API is good: every leg that was begun is ended, by its own tags."""
        self.api.alive = True
        for number in self.talking:
            self.feed(number, bye(), bye_reply())
        for _ in range(1000):
            self.commit()
            if not self.agent.waiting:
                break
            self.deliver("answered")
        assert self.agent.waiting == 0
        assert self.api.faults == []
        rejected = {each[3] for each in self.rejected() if each[0] == "begin"}
        assert {each[3] for each in self.rejected()} <= rejected
        for tag, parties in self.calls.items():
            if tag in rejected:
                continue
            assert not self.api.running.get(tag), f"{tag} runs for ever"
            charged = {account for _, account in self.api.records[tag]}
            assert charged, f"{tag} is not charged"
            if not self.deaths:
                assert charged == set(parties) & self.api.known

    def rejected(self) -> list[list[Any]]:
        path = Path(self.folder.name) / agent.JOURNAL_FILE
        with agent.closing(agent._connect(str(path), "ro")) as db:
            return [json.loads(text) for (text,) in db.execute("SELECT event FROM rejected")]


TestAgentMachine = AgentMachine.TestCase
TestAgentMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("parties", AgentMachine.CALLS)
def test_a_kill_behind_any_request(parties: tuple[str, str], committed: bool) -> None:
    """Each request in turn is the last of a process: the next one ends the call as it began."""
    for killed in range(12):
        machine = AgentMachine()
        machine.answer(parties)
        for number in range(killed + 1):
            if number == killed - 3:
                machine.end(1)
            machine.deliver("answered")
            if number < killed or committed:
                machine.commit()
        machine.kill()
        machine.close()


# The whole, with workers, a journal and HTTP


def known(*accounts: str) -> Any:
    """An answer of a `RatingServer` by the accounts that a request names."""
    names = ("account_tag", "destination_account_tag")
    return lambda _, body: (
        "200 OK",
        {"ok": all(body[name] in accounts for name in names if name in body)},
    )


def asked(api: harness.RatingServer, kind: str) -> list[list[str]]:
    """Whom the requests of a kind named, in order."""
    return [
        parties(json.dumps(body).encode())
        for path, body in api.requests
        if path == f"/v1/{kind}_transaction"
    ]


def test_what_is_logged_and_counted(deliveries: Any, log: Any, api: harness.RatingServer) -> None:
    api.answer = known("2000")
    delivery = deliveries()
    for call in "abc":
        delivery.put(event("begin", call, url=api.url))
    work(delivery, lambda: len(delivery) == 0, "all are begun")
    delivery.put(event("begin", "d", url=api.url))
    for call in "abcd":
        delivery.put(event("end", call, url=api.url))
    work(delivery, lambda: len(delivery) == 0, "all are ended")
    begins = asked(api, "begin")
    # Where two refusals are less than a second apart there is a third.
    assert begins.count(CALLER) == 4 and 6 <= begins.count(BOTH) == len(begins) - 4 <= 9
    assert asked(api, "end") == [CALLER] * 4
    (line,) = [line for line in log() if line["event"] == "unknown_party"]
    assert line["level"] == "WARNING" and "account 39" in line["message"]
    assert (line["api"], line["tenant"]) == (api.url, "default")
    assert delivery._metrics.totals["events.unknown_party"] == 4
    begun = [line for line in log() if line["event"] == "call_begin"]
    assert [line["destination_account_tag"] for line in begun] == [""] * 4
    assert not [line for line in log() if line["event"] == "event_rejected"]


def test_an_end_for_replay_names_whom_its_begin_was_taken_with(
    deliveries: Any, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind events that are on disk only, while the journal fails."""
    delivery = deliveries()
    lane = delivery._lane(URL)
    lane.backlogs[None].count = 1
    monkeypatch.setattr(agent, "MAX_WAITING_EVENTS", 1)
    for call in "ab":
        each = event("end", call)
        lane.outbox.begun(each.key, agent.CALLER)
        delivery.put(each)
    delivery.stop()
    replays = {line["event"]: line["replay"]["body"] for line in log() if "replay" in line}
    assert replays["event_lost"]["transaction_tag"] == "a"
    assert replays["event_undelivered"]["transaction_tag"] == "b"
    for body in replays.values():
        assert parties(json.dumps(body).encode()) == CALLER


def test_with_reject_nobody_is_dropped(
    deliveries: Any, log: Any, api: harness.RatingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "RETRY_LAST", 0.01)
    api.answer = known("2000")
    delivery = deliveries(unknown_party="reject")
    delivery.put(event("begin", url=api.url))
    work(delivery, lambda: len(delivery) == 0, "it is rejected")
    assert asked(api, "begin") == [BOTH] * agent.MAX_REFUSALS


@pytest.mark.parametrize("at", ["both", "alone", "running", "end"])
def test_kill_9_of_the_process(at: str, api: harness.RatingServer, tmp_path: Path) -> None:
    """The process dies while the API holds a request, or while the call runs; the next goes on."""
    options = [f"--rating-api-url={api.url}", f"--state-dir={tmp_path / 'state'}", LOCAL]
    options += ["--rating-api-concurrency=1", "--rating-api-timeout=60"]
    canyan = Canyan({"2000"})
    released = gevent.event.Event()
    holding = {"both": ("begin", 2), "alone": ("begin", 3), "end": ("end", 1)}.get(at)

    def behave(path: str, body: dict[str, Any]) -> tuple[str, Any]:
        kind = path.removeprefix("/v1/").removesuffix("_transaction")
        ok = canyan.carry_out(kind, json.dumps(body).encode())
        if holding == (kind, len(asked(api, kind))) and not released.is_set():
            held.set()
            released.wait()
        return "200 OK", {"ok": ok}

    held = gevent.event.Event()
    api.answer = behave
    head, tail = [invite(), reply(200), ack()], [bye(), bye_reply()]
    stamps = iter(range(1_790_000_000_000_000, 1_790_000_100_000_000, 1_000_000))
    frames = [hepbuild.hep3(payload, time_us=next(stamps)) for payload in head + tail]
    with harness.AgentProcess(*options) as process:
        harness.send_tcp(process.tcp, frames[:3])
        if at in ("running", "end"):
            harness.wait_until(lambda: process.events("call_begin"), "it is begun")
        if at == "end":
            harness.send_tcp(process.tcp, frames[3:])
        if at != "running":
            assert held.wait(harness.DEADLINE)
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    released.set()
    with harness.AgentProcess(*options) as process:
        if at != "end":
            harness.send_tcp(process.tcp, frames[3:])
        # Others are answered meanwhile, so that both are soon believed to be refused.
        for number in range(2, 30):
            if canyan.records["call-1@host"]:
                break
            payloads = [invite(), reply(200), *tail]
            other = [numbered(x, number).replace(b"2001@", b"2000@") for x in payloads]
            harness.send_tcp(process.tcp, [hepbuild.hep3(x) for x in other])
            gevent.sleep(0.5)
        assert process.stop() == 0
    assert canyan.faults == []
    assert canyan.running["call-1@host"] == {}
    assert canyan.records["call-1@host"] == {("account_tag", "2000")}
    assert set(map(tuple, asked(api, "end"))) <= {("2000",), ("2000", "2000")}
