"""Real traffic through real sockets to a real HTTP server: every call right, nothing else.

With `../shared/captures` beside the repository all of it is run, else the selection in
`tests/captures`.
"""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import gevent
import gevent.pool
import pytest
from pure import kind_of

import harness
import rating_agent_hep as agent
from hep_replay import Event, frames, read_capture

FOLDER = harness.captures_folder()
EXPECTED = harness.expected(FOLDER)
REPORTS = sum(bool(call[kind]) for entry in EXPECTED.values() for call in entry["calls"]
              for kind in ("begin", "end"))  # fmt: skip
# Reports that need no more than the reorder window; the others are ends by unanswered BYEs.
CERTAIN = REPORTS - 82 if FOLDER == harness.ALL else REPORTS * 3 // 4
# Seconds. T1 of RFC 3261: a retransmission leaves at least that long after its original.
T1 = 0.5


def judge(send: Callable[[harness.AgentProcess], None], *options: str) -> None:
    """Run the agent, send, stop it, and compare what the API was told with `expected.json`."""
    with harness.RatingServer() as api:
        more = ("--rating-api-url", api.url, "--sip-local-domains=sip.canyan.io", *options)
        with harness.AgentProcess(*more) as agent:
            send(agent)
            # A BYE that nobody answered is believed after 32 s, or on SIGTERM: after that the
            # ledger is final.
            harness.wait_until(lambda: len(api.requests) >= CERTAIN, "most calls are reported")
            assert agent.stop(signal.SIGTERM) == 0
            faults = [line for line in agent.lines if "internal_error" in line.get("event", "")]
        assert faults == []
        assert harness.ledger_faults(api.requests, EXPECTED) == []


def as_recorded(agent: harness.AgentProcess, events: list[Event]) -> None:
    """The datagrams, or the chunks of each connection at its own pace, in order of arrival."""
    if events[0].transport == "udp":
        harness.send_udp(agent.udp, [event.data for event in events if event.kind == "data"])
        return
    connections: dict[int | None, socket.socket] = {}
    for event in events:
        if event.kind == "open":
            connections[event.conn] = socket.create_connection(agent.tcp)
        elif event.kind == "close":
            connections.pop(event.conn).close()
        else:
            connections[event.conn].sendall(event.data)
    for sock in connections.values():
        sock.close()


def packets(events: list[Event]) -> list[tuple[float, bytes]]:
    return [(t, frame) for t, frame in frames(events)]


def shuffled(events: list[Event], seed: int) -> list[bytes]:
    """All messages of a capture in any order, as if all came within the reorder window.

    Only a retransmission does not overtake its original: it leaves T1 later at least, and where it
    came first its time would be the only one there is.
    """
    chance = random.Random(seed)
    kinds: dict[bytes, list[tuple[float, bytes]]] = {}
    for t, frame in packets(events):
        kinds.setdefault(kind_of(frame), []).append((t + chance.uniform(0, T1 / 2), frame))
    order = [(chance.random(), kind) for kind, copies in kinds.items() for _ in copies]
    queues = {kind: iter(sorted(copies)) for kind, copies in kinds.items()}
    return [next(queues[kind])[1] for _, kind in sorted(order)]


def read_all() -> dict[str, list[Event]]:
    return {name: read_capture(str(FOLDER / name)) for name in EXPECTED}


@pytest.fixture(scope="module")
def captures() -> dict[str, list[Event]]:
    return read_all()


def test_every_scenario_is_in_the_selection() -> None:
    selection = harness.expected(harness.SELECTION)
    assert {entry["scenario"] for entry in selection.values()} >= {
        entry["scenario"] for entry in EXPECTED.values()
    }
    files = [path for path in harness.SELECTION.rglob("*") if path.is_file()]
    assert {str(Path(p).relative_to(harness.SELECTION)) for p in files if p.suffix == ".hepl"} == (
        set(selection)
    )
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_as_recorded(captures: dict[str, list[Event]]) -> None:
    def send(agent: harness.AgentProcess) -> None:
        for events in captures.values():
            as_recorded(agent, events)

    judge(send)


def test_every_packet_twice(captures: dict[str, list[Event]]) -> None:
    def send(agent: harness.AgentProcess) -> None:
        for events in captures.values():
            doubled = [frame for _, frame in packets(events) for _ in (1, 2)]
            if events[0].transport == "udp":
                harness.send_udp(agent.udp, doubled)
            else:
                harness.send_tcp(agent.tcp, doubled)

    judge(send)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_in_any_order(captures: dict[str, list[Event]], seed: int) -> None:
    def send(agent: harness.AgentProcess) -> None:
        for events in captures.values():
            if events[0].transport == "udp":
                harness.send_udp(agent.udp, shuffled(events, seed))
            else:
                harness.send_tcp(agent.tcp, shuffled(events, seed))

    judge(send)


@pytest.mark.parametrize("size", [7, 113, 1460])
def test_streams_cut_in_small_pieces(captures: dict[str, list[Event]], size: int) -> None:
    """UDP captures go down a stream as well; HEP1 and HEP2 could not, but none is recorded."""

    def send(agent: harness.AgentProcess) -> None:
        def one(events: list[Event]) -> None:
            stream = b"".join(frame for _, frame in packets(events))
            pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
            harness.send_tcp(agent.tcp, pieces)

        small = [events for events in captures.values() if len(events) < 100]
        large = [events for events in captures.values() if len(events) >= 100]
        pool = gevent.pool.Pool(16)
        pool.map(one, small)
        for events in large:
            harness.send_tcp(agent.tcp, [frame for _, frame in packets(events)])

    judge(send)


def test_loss_never_charges_a_refused_call(captures: dict[str, list[Event]]) -> None:
    """Up to half of the packets lost, others doubled, in any order: too little may be charged.

    But never a call that nobody picked up, and never twice. Straight into the call table, with a
    fixed seed: a few thousand runs.
    """
    settings = agent.Settings(sip_local_domains=("sip.canyan.io",))
    chance = random.Random(3261)
    runs = 0
    for name, events in captures.items():
        calls = {call["call_id"]: call for call in EXPECTED[name]["calls"]}
        if len(calls) > 3:
            continue
        seen = [agent.decode_hep(frame, 0) for _, frame in packets(events)]
        seen = [packet for packet in seen if packet.protocol_type == agent.SIP_PROTOCOL_TYPE]
        for _ in range(30):
            loss = chance.choice((0.05, 0.2, 0.5))
            some = [
                p for p in seen for _ in range(chance.choice((1, 1, 2))) if chance.random() > loss
            ]
            chance.shuffle(some)
            table = agent.CallTable(settings, agent.load_rules(settings))
            reported = []
            for packet in some:
                message = agent.parse_sip(packet.payload, packet.time)
                if message is not None:
                    reported += table.handle(agent.Sighting(packet, message), 1000.0)
            reported += table.expire(1003.0) + table.expire(1006.0)
            runs += 1
            for call_id in {event.call_id for event in reported}:
                kinds = [event.kind for event in reported if event.call_id == call_id]
                assert calls[call_id]["answered"] and kinds in (["begin"], ["begin", "end"]), (
                    name,
                    [packet.payload.partition(b"\r\n")[0] for packet in some],
                )
    assert runs > 1_000
