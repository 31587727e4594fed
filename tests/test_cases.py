"""Captures after public reports, and recordings of live servers: every call is charged right.

`tests/cases` and `tests/field` say where they come from and what is right. The pure core is driven
by their own times, so that a time-out of 32 s takes none; a selection goes through real sockets
with its real gaps. Then the same as a property, over these and all captures: the order of the
messages, copies, and a restart after any of them change nothing.

`CASES=10` makes ten times as many shuffles and losses.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gevent
import pure
import pytest
from pure import Arrival, kind_of

import harness
import rating_agent_hep as agent
from hep_replay import Event, frames, read_capture

TESTS = harness.ROOT / "tests"
TIMES = int(os.environ.get("CASES", "1"))
# Seconds by which a packet may be late: less than the reorder window.
LATE = 1.9
# Seconds. What a re-ordered message may change in a time that is right otherwise.
TOLERANCE = 0.050
# Seconds between the answers of tied legs.
LEGS = 0.15
# The routes that `expected.json` gives in words.
ROUTES = {
    "destination: request-uri, account: [from], destination_account: [request-uri]": (
        "- destination: request-uri\n  account: [from]\n  destination_account: [request-uri]\n"
    ),
    "transaction_tag: header:X-CID, account: [from], destination_account: [to]": (
        "- transaction_tag: header:X-CID\n  account: [from]\n  destination_account: [to]\n"
    ),
    "transaction_tag: correlation-id": "- transaction_tag: correlation-id\n",
}


class Case:
    """One file: where it is, what is right, and the settings and routes that it needs."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path = path
        self.calls: list[dict[str, Any]] = entry["calls"]
        self.times = entry.get("times", True)
        self.routes = ""
        options: dict[str, float] = {}
        for option in entry.get("settings", []):
            name, _, value = option.removeprefix("--").partition(" ")
            if name == "routes:":
                self.routes = ROUTES[value]
            elif name != "sip-local-domains":
                options[name.replace("-", "_")] = float(value)
            else:
                assert value == "sip.canyan.io"
        self.settings = pure.settings(**options)
        self.plain = not options and not self.routes

    def __repr__(self) -> str:
        return self.path.name

    @property
    def tied(self) -> bool:
        return "transaction_tag" in self.routes

    def core(self, restart: int = 0) -> pure.Core:
        begin = min((harness.seconds(x["begin"]) for x in self.calls if x["begin"]), default=1.8e9)
        return pure.Core(self.settings, self.routes, begin - 1.0, restart)


def read_folder(folder: Path, below: str = "") -> list[Case]:
    return [Case(folder / below / x, entry) for x, entry in harness.expected(folder).items()]


CASES = read_folder(TESTS / "cases", "captures")
FIELD = read_folder(TESTS / "field")
CAPTURES = read_folder(harness.captures_folder())
ALL = CASES + FIELD + CAPTURES


@cache
def events_of(path: Path) -> list[Event]:
    return read_capture(str(path))


def arrivals(case: Case) -> list[Arrival]:
    """The packets of a file. Those of another sniffer than the agent knows come as they are."""
    return [Arrival(t, frame) for t, frame in frames(events_of(case.path))]


def stamps(case: Case, starts: bytes) -> set[int]:
    """HEP times, in microseconds, of the messages that begin so."""
    found = set()
    for arrival in arrivals(case):
        packet = agent.decode_hep(arrival.frame, 0)
        if any(payload.startswith(starts) for payload in agent.split_messages(packet)):
            found.add(packet.time)
    return found


def found_calls(
    case: Case, events: Iterable[agent.RatingEvent]
) -> dict[str, list[list[agent.RatingEvent]]]:
    """The events of each Call-ID, one list for each call that has it, by begin."""
    calls: dict[str, list[list[agent.RatingEvent]]] = {}
    for tag, told in pure.by_tag(events).items():
        plain = tag.partition("#")[0]
        for call in case.calls:
            # A long Call-ID stands there as its beginning and a digest.
            if len(call["call_id"]) > agent.MAX_TEXT and tag[:40] == call["call_id"][:40]:
                plain = call["call_id"]
        calls.setdefault(plain, []).append(told)
    for group in calls.values():
        group.sort(key=lambda told: told[0].time)
    return calls


def faults(
    case: Case, events: Iterable[agent.RatingEvent], overtaking: frozenset[int] | None = None
) -> list[str]:
    """What is wrong; where packets are late, `overtaking` are times of ACKs that may give a begin.

    An ACK that comes before every reply of its call begins it at once, at its own time (rule 7).
    """
    wrong = []
    found = found_calls(case, events)
    for call_id in dict.fromkeys(call["call_id"] for call in case.calls):
        right = [x for x in case.calls if x["call_id"] == call_id and x["begin"]]
        right.sort(key=lambda call: call["begin"])
        got = found.pop(call_id, [])
        if len(got) != len(right):
            wrong.append(f"{call_id}: {got}, expected {right}")
            continue
        for told, call in zip(got, right, strict=True):
            wrong += call_faults(case, told, call, overtaking)
    return wrong + [f"not expected: {call_id}: {got}" for call_id, got in found.items()]


def call_faults(
    case: Case,
    told: list[agent.RatingEvent],
    call: dict[str, Any],
    overtaking: frozenset[int] | None,
) -> Iterator[str]:
    kinds = [kind for kind in ("begin", "end") if call[kind]]
    where = f"{call['call_id']}: {[(x.kind, agent.rfc3339(x.time), x.reason) for x in told]}"
    if [event.kind for event in told] != kinds:
        yield f"{where}, expected {kinds}"
        return
    late = told[0].time if told[0].reason == "ack" and told[0].time in (overtaking or ()) else 0
    for event in told:
        for field in ("account_tag", "destination_account_tag"):
            if (getattr(event, field) or None) != call[field]:
                yield f"{where}: {field} {getattr(event, field)}, expected {call[field]}"
        drift = event.time / 1_000_000 - harness.seconds(call[event.kind])
        # Where nobody acknowledges, the end is at the begin, whenever that is.
        moved = event.time == late and (event.kind == "begin" or call["end"] == call["begin"])
        # Of tied legs the one begins whose INVITE and answer were there first.
        tolerance = LEGS if case.tied and overtaking is not None else TOLERANCE
        if case.times is True and abs(drift) > tolerance and not moved:
            yield f"{where}: {event.kind} is {drift:+.3f} s off"
    body = json.loads(told[0].body)
    for field in ("source", "destination"):
        if body.get(field) != call[field]:
            yield f"{where}: {field} {body.get(field)}, expected {call[field]}"
    if case.times is not True and kinds == ["begin", "end"]:
        lasted = (told[1].time - told[0].time) / 1_000_000
        right = harness.seconds(call["end"]) - harness.seconds(call["begin"])
        if abs(lasted - right) > TOLERANCE and overtaking is None:
            yield f"{where}: lasted {lasted:.3f} s, expected {right:.3f}"


def named(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=case.path.stem) for case in cases]


# As they are


def test_all_files_are_there_and_known() -> None:
    listed = [json.loads(line) for line in (TESTS / "cases" / "cases.jsonl").open()]
    assert {line["id"] for line in listed} == {case.path.stem for case in CASES}
    assert {case.path for case in CASES} == set((TESTS / "cases" / "captures").iterdir())
    assert {case.path for case in FIELD} == set((TESTS / "field").glob("*.hepl"))
    assert sum(path.stat().st_size for path in TESTS.glob("[cf]*/**/*.hepl")) < 3_000_000


@pytest.mark.parametrize("case", named(CASES + FIELD))
def test_case(case: Case) -> None:
    core = case.core()
    assert faults(case, core.play(arrivals(case))) == []


@pytest.mark.parametrize("case", named(CASES + FIELD))
def test_case_with_every_packet_twice(case: Case) -> None:
    core = case.core()
    doubled = [arrival for arrival in arrivals(case) for _ in (1, 2)]
    assert faults(case, core.play(doubled)) == []


@pytest.mark.parametrize("case", named(CASES + FIELD))
def test_case_with_a_restart_after_every_message(case: Case) -> None:
    assert faults(case, case.core(restart=1).play(arrivals(case))) == []


def as_recorded(process: harness.AgentProcess, events: list[Event]) -> None:
    """The packets at their own times, through real sockets."""
    begun = gevent.get_hub().loop.now()
    connections: dict[int | None, socket.socket] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for event in events:
            gevent.sleep(max(begun + event.t - gevent.get_hub().loop.now(), 0))
            if event.transport == "udp":
                if event.kind == "data":
                    datagrams.sendto(event.data, process.udp)
            elif event.kind == "open":
                connections[event.conn] = socket.create_connection(process.tcp)
            elif event.kind == "close":
                connections.pop(event.conn).close()
            else:
                connections[event.conn].sendall(event.data)
    for connection in connections.values():
        connection.close()


def told_of(requests: list[tuple[str, dict[str, Any]]]) -> dict[str, list[agent.RatingEvent]]:
    """What the rating API was told, by the beginning of the Call-ID."""
    told: dict[str, list[agent.RatingEvent]] = {}
    for path, body in requests:
        kind = path.removeprefix("/v1/").removesuffix("_transaction")
        event = agent.RatingEvent(
            kind=kind, call_id="", tenant="", transaction_tag=body["transaction_tag"],
            account_tag=body.get("account_tag", ""),
            destination_account_tag=body.get("destination_account_tag", ""),
            time=round(harness.seconds(body[f"timestamp_{kind}"]) * 1_000_000),
            reason="", api_url="", body=json.dumps(body).encode(),
        )  # fmt: skip
        told.setdefault(body["transaction_tag"].partition("#")[0][:60], []).append(event)
    return told


def test_real_sockets_and_gaps(api: harness.RatingServer) -> None:
    """All that need no options and no more than 12 s, at one time; SIGTERM decides the rest."""
    chosen = [x for x in CASES + FIELD if x.plain and arrivals(x)[-1].time <= 12.0]
    assert len(chosen) > 40
    options = (f"--rating-api-url={api.url}", "--sip-local-domains=sip.canyan.io")
    with harness.AgentProcess(*options) as process:
        gevent.joinall(
            [gevent.spawn(as_recorded, process, events_of(case.path)) for case in chosen],
            raise_error=True,
        )
        gevent.sleep(0.5)
        assert process.stop(signal.SIGTERM) == 0
        assert process.events("internal_error") == []
    told = told_of(api.requests)
    wrong = []
    for case in chosen:
        own = {call["call_id"][:60] for call in case.calls}
        wrong += faults(case, [event for name in own for event in told.pop(name, [])])
    assert wrong == [] and told == {}


# Order, copies and restarts


def shuffled(case: Case, chance: random.Random) -> list[Arrival]:
    """The packets with delays within the reorder window.

    A retransmission, a copy and the answer of another fork do not overtake the first one: begin is
    reported at once at the one that comes first, so its time would be another one.
    """
    queues: dict[bytes, list[Arrival]] = {}
    for arrival in arrivals(case):
        kind = kind_of(arrival.frame)
        # Of tied calls the one is charged whose answer comes first.
        queues.setdefault(kind.partition(b"|")[2] if case.tied else kind, []).append(arrival)
    late = []
    for alike in queues.values():
        times = sorted(arrival.time + chance.uniform(0, LATE) for arrival in alike)
        late += [Arrival(at, x.frame) for at, x in zip(times, alike, strict=True)]
    return sorted(late, key=lambda arrival: arrival.time)


# Two clocks (rule 18): which of them the begin is read from is a matter of what comes first.
CLOCKS = ("R33b_two_clocks",)


@pytest.mark.parametrize("case", named(x for x in ALL if x.path.stem not in CLOCKS))
def test_any_order_and_any_restart(case: Case) -> None:
    """Every packet late by its own delay, some twice, with restarts: the same ledger."""
    small = len(case.calls) < 10
    acks = frozenset(stamps(case, b"ACK"))
    for seed in range((8 if case in CASES else 3) * TIMES):
        chance = random.Random(f"{case.path.stem} {seed}")
        late = [x for x in shuffled(case, chance) for _ in range(chance.choice((1, 1, 2)))]
        core = case.core(restart=chance.choice((0, 1)) if small else chance.choice((0, 97)))
        assert faults(case, core.play(late), acks) == [], seed


@pytest.mark.parametrize("case", named(CASES + FIELD))
def test_judge_is_a_function_of_facts_and_now(case: Case) -> None:
    """Asked twice it says the same and changes nothing; later it takes back no begin and no end."""
    core = case.core()
    looks = 0
    for arrival in arrivals(case):
        core.advance(pure.START + arrival.time)
        core.take(arrival.frame)
        for call in core.calls():
            if call.heard < core.now and looks > 1_000:
                continue
            looks += 1
            facts = agent.pack_call(call, 0.0)
            assert agent.judge(call, core.now, core.settings) == agent.judge(
                call, core.now, core.settings
            )
            verdicts = [
                agent.judge(call, core.now + later, core.settings)
                for later in (0, 0.5, 1.9, 2.1, 5, 16, 33, 95, 599, 700, 22_000)
            ]
            for earlier, later in zip(verdicts, verdicts[1:], strict=False):
                assert earlier.begin is None or later.begin == earlier.begin
                assert earlier.end is None or later.end == earlier.end
                assert later.over or not earlier.over
            assert agent.pack_call(call, 0.0) == facts
    assert looks or len(arrivals(case)) == 1


def test_loss_never_charges_a_refused_call() -> None:
    """Up to half of the packets lost, others doubled, in any order: too little may be charged.

    But never a call that nobody picked up, and never twice.
    """
    runs = 0
    for case in CASES + FIELD + [x for x in CAPTURES if len(x.calls) <= 3]:
        packets = [arrival.frame for arrival in arrivals(case)]
        if len(packets) > 500:
            continue
        most = len([call for call in case.calls if call["begin"]])
        refused = {call["call_id"] for call in case.calls} - {
            call["call_id"] for call in case.calls if call["begin"]
        }
        for seed in range(20 * TIMES):
            chance = random.Random(f"{case.path.stem} {seed}")
            loss = chance.choice((0.05, 0.2, 0.5))
            some = [x for x in packets for _ in range(chance.choice((1, 1, 2)))]
            some = [x for x in some if chance.random() > loss]
            chance.shuffle(some)
            core = case.core()
            core.play([Arrival(0.0, frame) for frame in some], wait=5.0)
            told = pure.by_tag(core.events)
            runs += 1
            assert all(
                [x.kind for x in events] in (["begin"], ["begin", "end"])
                for events in told.values()
            ), (case, seed)
            assert len(told) <= most and not refused & set(told), (case, seed)
    assert runs > 3_000
