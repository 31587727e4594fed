"""`rate`: recordings in every format give the live ledger; hostile ones cost a line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pcapbuild
import pktcap
import pytest
import scenes
from hypothesis import given, settings, strategies
from pcapbuild import Connection, Packet

import harness
import hep_replay
import hepbuild
import rating_agent_hep as agent
import run_scenario
import sipservers

PROGRAM = str(harness.ROOT / "rating_agent_hep.py")
LOCAL = "--sip-local-domains=sip.canyan.io"
SETTINGS = agent.Settings(sip_local_domains=("sip.canyan.io",))
FOLDER = harness.captures_folder()
EXPECTED = harness.expected(FOLDER)
SENDER, COLLECTOR = ("10.1.1.1", 6000), ("10.1.1.2", 9060)


class Played:
    """What came of recordings: events, records of all calls, faults of files, what was counted."""

    def __init__(self, *files: bytes, rules: str = "", **options: Any) -> None:
        chosen = agent.Settings(**{"sip_local_domains": ("sip.canyan.io",), **options})
        self.faults: list[str] = []
        streams = [
            (str(place), io.BufferedReader(io.BytesIO(data))) for place, data in enumerate(files)
        ]
        recordings = agent.Recordings(streams, lambda name, text: self.faults.append(text))
        self.counts = recordings.counts
        self.playback = agent.Playback(
            chosen, agent.parse_routes(rules, "routes.yaml", chosen), self.counts
        )
        self.events: list[agent.RatingEvent] = []
        for recorded in recordings:
            self.events += self.playback.take(recorded)
        self.events += self.playback.finish()
        table = self.playback.table
        self.records = [*table.take_records(), *table.unfinished()]

    def ledger(self) -> list[tuple[str, dict[str, Any]]]:
        """What the API would be told, as `harness.ledger_faults` takes it."""
        return [(f"/v1/{x.kind}_transaction", json.loads(x.body)) for x in self.events]

    def outcomes(self) -> list[tuple[str, int]]:
        return [(record.outcome, record.status) for record in self.records]


@cache
def packets(name: str) -> tuple[agent.HepPacket, ...]:
    return tuple(agent.decode_hep(frame, 0) for frame in frames(name))


@cache
def frames(name: str) -> tuple[bytes, ...]:
    events = hep_replay.read_capture(str(FOLDER / name))
    return tuple(frame for _, frame in hep_replay.frames(events))


def ends(packet: agent.HepPacket) -> tuple[pcapbuild.Address, pcapbuild.Address]:
    source = (packet.source_ip, packet.source_port)
    return source, (packet.destination_ip, packet.destination_port)


def on_the_wire(name: str, mtu: int = 0) -> Iterator[Packet]:
    """The SIP messages of a capture as datagrams, those that are long in fragments."""
    for number, packet in enumerate(packets(name)):
        if packet.protocol_type == agent.SIP_PROTOCOL_TYPE:
            size = mtu if len(packet.payload) > mtu else 0
            for part in pcapbuild.udp(*ends(packet), packet.payload, mtu=size, number=number):
                yield packet.time, part


def mirrored(name: str) -> Iterator[Packet]:
    """The HEP packets of a capture as datagrams from a SIP server to a collector."""
    for number, (packet, frame) in enumerate(zip(packets(name), frames(name), strict=True)):
        for part in pcapbuild.udp(SENDER, COLLECTOR, frame, number=number, mtu=1480):
            yield packet.time, part


def over_tcp(name: str, mss: int = 1_460, hep: bool = False) -> list[Packet]:
    """The same in TCP connections, one for each pair of ends, or all HEP in one."""
    connections: dict[Any, Connection] = {}
    found: list[Packet] = []
    last = 0
    for packet, frame in zip(packets(name), frames(name), strict=True):
        if packet.protocol_type != agent.SIP_PROTOCOL_TYPE and not hep:
            continue
        source, other = (SENDER, COLLECTOR) if hep else ends(packet)
        key = tuple(sorted((source, other)))
        if key not in connections:
            connections[key] = Connection(source, other, mss=mss)
            found += connections[key].open(packet.time - 100_000)
        last = max(last, packet.time)
        found += connections[key].send(packet.time, source, frame if hep else packet.payload)
    for connection in connections.values():
        found += connection.close(last + 100_000)
    return sorted(found, key=lambda x: x[0])


def all_faults(build: Callable[[str], bytes]) -> list[str]:
    """Where the ledgers of all captures differ from what is expected of them."""
    found = []
    for name, entry in EXPECTED.items():
        played = Played(build(name))
        found += harness.ledger_faults(played.ledger(), {name: entry})
        found += [f"{name}: {fault}" for fault in played.faults]
    return found


# The same ledger from every format


def test_captures_as_they_are() -> None:
    assert all_faults(lambda name: (FOLDER / name).read_bytes()) == []


def test_frames_one_behind_another() -> None:
    """HEP1 and HEP2 have no framing: a file holds one packet of them."""
    old = {name for name in EXPECTED if any(frame[:1] != b"H" for frame in frames(name))}
    assert len(old) < len(EXPECTED)
    faults = all_faults(lambda name: b"" if name in old else b"".join(frames(name)))
    assert [fault for fault in faults if fault.split()[0] not in old] == []


@pytest.mark.parametrize("link", pcapbuild.LINKS)
def test_every_link_layer(link: str) -> None:
    assert all_faults(lambda name: pcapbuild.pcap(on_the_wire(name, 1480), link)) == []


@pytest.mark.parametrize("form", ["pcapng", "other end", "nanoseconds", "gzip of its own"])
def test_every_container(form: str) -> None:
    def build(name: str) -> bytes:
        found = on_the_wire(name, 1480)
        if form == "pcapng":
            return pcapbuild.pcapng(found, order=">")
        if form == "nanoseconds":
            return pcapbuild.pcap(found, nano=True)
        return pcapbuild.pcap(found, order=">")

    assert all_faults(build) == []


def test_hep_inside_a_pcap() -> None:
    """Also in fragments, and HEP1 and HEP2, which have no magic."""
    assert all_faults(lambda name: pcapbuild.pcap(mirrored(name))) == []


@pytest.mark.parametrize("mss", [1_460, 113])
@pytest.mark.parametrize("hep", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_tcp(mss: int, hep: bool, seed: int) -> None:
    """In order, and with segments and acknowledgments that overtake each other."""

    def build(name: str) -> bytes:
        if hep and any(frame[:1] != b"H" for frame in frames(name)):
            return pcapbuild.pcap(mirrored(name))
        found = over_tcp(name, mss, hep)
        return pcapbuild.pcap(pcapbuild.out_of_order(found, seed) if seed else found, "cooked2")

    assert all_faults(build) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_datagrams_and_fragments_out_of_order(seed: int) -> None:
    assert (
        all_faults(
            lambda name: pcapbuild.pcap(
                pcapbuild.out_of_order(on_the_wire(name, 512), seed, within=5_000), "vlan"
            )
        )
        == []
    )


# A call of our own in many shapes

CALL = "0 INVITE\n0.2 180\n1 200\n1.05 ACK\n61 BYE callee\n61.02 200:BYE callee"
UNIX = scenes.UNIX * 1_000_000


def datagrams(text: str, six: bool = False, **options: int) -> list[Packet]:
    """The messages of a scene as datagrams between the caller and the proxy."""
    found = []
    for number, line in enumerate(scenes.messages(text)):
        to_callee = bool(line.status) == line.callee
        pair = [scenes.CALLER, scenes.PROXY]
        if six:
            pair = [("2001:db8::" + host.rpartition(".")[2], port) for host, port in pair]
        source, other = pair if to_callee else reversed(pair)
        for part in pcapbuild.udp(source, other, line.payload(), number=number, **options):
            found.append((line.stamp, part))
    return found


def stream(text: str, mss: int = 400) -> list[Packet]:
    """The messages of a scene over one TCP connection."""
    connection = Connection(scenes.CALLER, scenes.PROXY, mss=mss)
    found = list(connection.open(UNIX - 100_000))
    for line in scenes.messages(text):
        to_callee = bool(line.status) == line.callee
        found += connection.send(
            line.stamp, scenes.CALLER if to_callee else scenes.PROXY, line.payload()
        )
    return found


def span(played: Played) -> list[tuple[str, float]]:
    """Kind and second of the scene of each event."""
    return [(event.kind, (event.time - UNIX) / 1_000_000) for event in played.events]


RIGHT = [("begin", 1.0), ("end", 61.0)]


def test_ipv6_with_extensions_and_fragments() -> None:
    for options in ({}, {"extension": True}, {"mtu": 200}, {"mtu": 200, "extension": True}):
        played = Played(pcapbuild.pcap(datagrams(CALL, six=True, **options)))
        assert span(played) == RIGHT, options
        assert played.records[0].source_ip == "2001:db8::20"


def test_several_interfaces_with_clocks_of_their_own() -> None:
    """The link type, the resolution and the offset are those of each packet's interface."""
    found = datagrams(CALL)
    blocks = [pcapbuild.section(), pcapbuild.interface("ethernet")]
    blocks += [pcapbuild.interface("cooked2", resolution=9), pcapbuild.interface("raw", 0x94, 1000)]
    for place, (stamp, packet) in enumerate(found):
        units = [stamp, stamp * 1000, round((stamp / 1e6 - 1000) * 2**20)][place % 3]
        link = ["ethernet", "cooked2", "raw"][place % 3]
        blocks.append(pcapbuild.enhanced(packet, link, units, place % 3))
    played = Played(b"".join(blocks))
    rounded = [(kind, round(second, 3)) for kind, second in span(played)]
    assert (rounded, played.faults) == (RIGHT, [])


def test_sections_of_either_byte_order_one_behind_another() -> None:
    found = datagrams(CALL)
    data = pcapbuild.pcapng(found[:3]) + pcapbuild.pcapng(found[3:], "raw", order=">")
    assert span(Played(data)) == RIGHT


def test_blocks_that_hold_no_packet_are_skipped_and_simple_ones_have_no_time() -> None:
    stamp, packet = datagrams(CALL)[0]
    octets = pcapbuild.LINKS["raw"][1](packet)
    simple = pcapbuild.block(3, len(octets).to_bytes(4, "little") + octets)
    head = pcapbuild.section() + pcapbuild.interface("raw")
    other = pcapbuild.block(0x0BAD, b"x" * 300_000)
    rest = b"".join(pcapbuild.enhanced(p, "raw", t) for t, p in datagrams(CALL))
    played = Played(head + other + rest + simple)
    assert (span(played), played.faults, played.playback.packets) == (RIGHT, [], 7)


def test_several_files_are_read_in_order_of_time() -> None:
    """Also a TCP stream that goes on in the next file."""
    found = stream(CALL, mss=100)
    for cut in range(1, len(found), 7):
        files = pcapbuild.pcap(found[cut:]), pcapbuild.pcapng(found[:cut])
        assert span(Played(*files)) == RIGHT, cut


def test_a_stream_that_is_met_half_way() -> None:
    """The message that was under way is lost, all behind it count."""
    before = "-60 INVITE id=other tag=first\n"
    whole = stream(before + CALL, mss=100)
    played = Played(pcapbuild.pcap(whole[5:]))
    assert span(played) == RIGHT


@pytest.mark.parametrize("both", [True, False])
def test_a_lost_segment_costs_the_messages_in_it(both: bool) -> None:
    """Whichever it is; without the other direction nothing acknowledges what is missing."""
    found = stream(CALL, mss=150)
    data = [place for place, (_, packet) in enumerate(found) if len(packet) > 44]
    # Behind the last of a direction nothing says that it is missing.
    last = {packet[12:20]: place for place, (_, packet) in enumerate(found) if len(packet) > 44}
    runs = 0
    for lost in data:
        kept = [p for place, p in enumerate(found) if place != lost]
        if not both:
            kept = [(t, p) for t, p in kept if len(p) > 44 or t < UNIX]
        played = Played(pcapbuild.pcap(kept))
        runs += 1
        assert ("octets.missing" in played.counts) == (lost not in last.values()), lost
        assert played.playback.messages in (5, 6), lost
        for kind, second in span(played):
            expected = {"begin": (1.0, 1.05), "end": (61.0, 61.02)}[kind]
            assert min(abs(second - x) for x in expected) <= 0.001, (lost, span(played))
        begins = [event for event in played.events if event.kind == "begin"]
        assert len(begins) <= 1 and len(played.events) <= 2
    assert runs == len(data) > 10


def test_a_lost_180_changes_nothing() -> None:
    """Each message behind the hole has its own time, though nothing comes for a minute."""
    found = stream(CALL, mss=5_000)
    ringing = next(place for place, (_, p) in enumerate(found) if b"SIP/2.0 180" in p)
    del found[ringing : ringing + 2]
    for kept in (found, [(t, p) for t, p in found if len(p) > 44 or t < UNIX]):
        assert span(Played(pcapbuild.pcap(kept))) == RIGHT


@pytest.mark.parametrize("seed", range(6))
def test_segments_that_are_lost_and_late_move_no_time(seed: int) -> None:
    """Some never come, some half a second late: no message gets another one's time."""
    chance = random.Random(seed)
    text = "\n".join(f"{n / 10:.1f} INVITE id=c{n} tag=t{n}" for n in range(100))
    found, lost = [], 0
    for stamp, packet in stream(text, mss=200):
        late = 0
        if len(packet) > 44:
            kind = chance.choice(["lost", "late"] + ["well"] * 20)
            late = chance.randrange(500_000) if kind == "late" else 0
            lost += kind == "lost"
            if kind == "lost":
                continue
        found.append((stamp + late, packet))
    played = Played(pcapbuild.pcap(sorted(found, key=lambda x: x[0])))
    # A segment may hold the end of one message and the beginning of the next.
    assert lost > 3 and 100 - 2 * lost <= len(played.records) < 100
    for record in played.records:
        due = UNIX + int(record.call_id.removeprefix("c")) * 100_000
        # A message is there when what was late before it is.
        assert due <= record.invited <= due + 500_000, record
    exact = [x.invited == UNIX + int(x.call_id[1:]) * 100_000 for x in played.records]
    assert sum(exact) > 50


def test_retransmitted_segments_are_one() -> None:
    found = [packet for packet in stream(CALL, mss=100) for _ in (1, 2)]
    played = Played(pcapbuild.pcap(found))
    assert (span(played), played.playback.messages) == (RIGHT, 6)


def test_what_is_no_sip_is_counted() -> None:
    rtp = pcapbuild.udp(("10.0.0.1", 4000), ("10.0.0.2", 4002), b"\x80\x00" + bytes(170))
    dns = pcapbuild.udp(("10.0.0.1", 4000), ("10.0.0.2", 53), b"\x01\x02\x01\x00" + bytes(40))
    web = Connection(("10.0.0.1", 4000), ("10.0.0.2", 80))
    more = [*web.open(UNIX), *web.send(UNIX, web.client, b"GET / HTTP/1.1\r\n\r\n" + bytes(9_000))]
    arp = [(UNIX, b"\x00" * 40)]
    mixed = [*datagrams(CALL), *((UNIX + 5, p) for p in (*rtp, *dns)), *more, *arp]
    played = Played(pcapbuild.pcap(sorted(mixed, key=lambda x: x[0])))
    assert span(played) == RIGHT
    assert played.counts["datagrams.other"] == 2
    assert played.playback.packets == 6


def test_hep_allow_and_keys_hold_for_hep_in_a_pcap() -> None:
    lines = scenes.messages(CALL)
    found = [
        (line.stamp, part)
        for line in lines
        for part in pcapbuild.udp(SENDER, COLLECTOR, line.arrival(auth_key="key").frame)
    ]
    data = pcapbuild.pcap(found)
    assert span(Played(data, hep_allow=("10.1.1.0/24",), hep_auth_key=("key",))) == RIGHT
    other = Played(data, hep_allow=("10.2.0.0/16",))
    assert (other.events, other.counts) == ([], {"refused.not_allowed": 6})
    assert Played(data, hep_auth_key=("other",)).counts == {"refused.key": 6}


def test_routes_by_network_and_by_sender() -> None:
    rules = """
- {name: far, match: {source_network: 127.0.0.20/32}, tenant: far}
- {name: mirror, match: {sender: 10.1.1.1/32}, tenant: mirror}
"""
    wire = Played(pcapbuild.pcap(datagrams(CALL)), rules=rules)
    assert [record.route for record in wire.records] == ["far"]
    lines = [line for line in scenes.messages(CALL) if line.what != "INVITE"]
    invite = scenes.messages("0 INVITE")[0].arrival(src=("192.0.2.9", 5060)).frame
    hep = [(UNIX, invite), *((line.stamp, line.arrival().frame) for line in lines)]
    found = [(t, p) for t, frame in hep for p in pcapbuild.udp(SENDER, COLLECTOR, frame)]
    assert [x.tenant for x in Played(pcapbuild.pcap(found), rules=rules).records] == ["mirror"]


# Time is the recording's


def test_deadlines_are_those_of_the_recording() -> None:
    text = "0 INVITE\n1 200\n1.05 ACK\n50000 OPTIONS id=x\n50001 OPTIONS id=x"
    played = Played(pcapbuild.pcap(datagrams(text)), max_call_duration=600.0)
    assert span(played) == [("begin", 1.0), ("end", 601.0)]
    assert played.records[0].ended_by == "deadline"
    assert played.playback.gap == (pytest.approx(49_998.95), pytest.approx(scenes.UNIX + 1.05))


def test_a_call_behind_a_long_gap_rings_for_its_own_time() -> None:
    """Its INVITE is the first packet after hours: the clock must not leap past it later."""
    text = "0 OPTIONS id=x\n1 OPTIONS id=x\n40000 INVITE\n40001 200\n40001.1 ACK\n40009 BYE"
    text += "\n40009.1 200:BYE"
    assert span(Played(pcapbuild.pcap(datagrams(text)))) == [("begin", 40_001.0), ("end", 40_009.0)]


@pytest.mark.parametrize("wrong", [0, 1, 2_000_000_000, 4_294_967_295, UNIX // 10**6 + 90_000])
def test_one_wrong_time_stamp_ends_no_call(wrong: int) -> None:
    for place in range(7):
        found = datagrams(CALL)
        found.insert(place, (wrong * 1_000_000, datagrams("0 OPTIONS id=x")[0][1]))
        assert span(Played(pcapbuild.pcap(found))) == RIGHT, place


def test_what_still_runs_and_rings_at_the_end_is_shown() -> None:
    text = "0 INVITE\n1 200\n1.05 ACK\n2 INVITE id=b tag=bb\n2.1 180 id=b tag=bb"
    played = Played(pcapbuild.pcap(datagrams(text)))
    assert [(x.outcome, x.begun > 0, x.ended) for x in played.records] == [
        ("charged", True, 0),
        ("not answered", False, 0),
    ]
    assert [x.kind for x in played.events] == ["begin"]


# What became of a call

OUTCOMES = {
    "charged": (CALL, {}, ("charged", 200)),
    "hung up by the caller": (
        CALL.replace(" callee", ""),
        {},
        ("charged", 200),
    ),
    "refused": ("0 INVITE\n0.1 486\n0.2 NACK", {}, ("refused", 486)),
    "refused, requests only": ("0 INVITE\n0.2 NACK", {}, ("refused", 0)),
    "challenged, then refused": (
        "0 INVITE\n0.1 407\n0.2 NACK\n0.3 INVITE c=2\n0.4 403 c=2\n0.5 NACK c=2",
        {},
        ("refused", 403),
    ),
    "cancelled": (
        "0 INVITE\n1 CANCEL\n1.01 200:CANCEL\n1.02 487\n1.03 NACK",
        {},
        ("cancelled", 487),
    ),
    "cancelled, requests only": ("0 INVITE\n1 CANCEL\n1.03 NACK", {}, ("cancelled", 0)),
    "hung up before the answer": (
        "0 INVITE\n0.1 180\n0.5 BYE\n0.52 200:BYE\n0.6 200\n0.7 ACK",
        {},
        ("cancelled", 200),
    ),
    "408": ("0 INVITE\n32 408\n32.1 NACK", {}, ("not answered", 408)),
    "nothing": ("0 INVITE\n0.1 180", {}, ("not answered", 0)),
    "no account": (
        CALL.replace("INVITE", "INVITE from=sip:a@x.example dest=sip:b@y.example"),
        {},
        ("no account", 200),
    ),  # fmt: skip
    "no INVITE": ("1.05 ACK\n61 BYE\n61.02 200:BYE", {}, ("evidence missing", 0)),
    "no 200": ("0 INVITE\n0.2 180\n1.05 ACK", {}, ("evidence missing", 0)),
    "no ACK where it counts": ("0 INVITE\n1 200", {"begin_on": "ack"}, ("evidence missing", 200)),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_why_a_call_is_charged_or_not(name: str) -> None:
    """At the end of the recording, and where it goes on for long enough to forget the call."""
    text, options, expected = OUTCOMES[name]
    later = "\n2000 OPTIONS id=x\n4000 OPTIONS id=x\n6000 OPTIONS id=x"
    for more in ("", later):
        played = Played(pcapbuild.pcap(datagrams(text + more)), **options)
        assert played.outcomes() == [expected], more
        record = played.records[0]
        assert record.charged == bool(played.events)
        assert record.outcome in agent.OUTCOMES


def test_ignored_and_tied_calls() -> None:
    ignore = "- {name: none, action: ignore}"
    played = Played(pcapbuild.pcap(datagrams(CALL)), rules=ignore)
    assert (played.outcomes(), played.events) == ([("ignored by route", 200)], [])
    tie = '- {name: legs, transaction_tag: "header:X-Cid"}'
    legs = CALL.replace("INVITE", 'INVITE h="X-Cid: one"')
    other = "\n".join(line + " id=leg tag=legtag" for line in legs.splitlines())
    played = Played(pcapbuild.pcap(datagrams(legs + "\n" + other)), rules=tie)
    assert sorted(x.outcome for x in played.records) == ["charged", "tied"]


def test_a_record_says_all_that_is_known_of_a_call() -> None:
    (record,) = Played(pcapbuild.pcap(datagrams(CALL))).records
    assert record._replace(row=0) == agent.CallRecord(
        call_id="call-1@host",
        from_tag="c",
        to_tag="s",
        tenant="default",
        route="main",
        transaction_tag="call-1@host",
        account_tag="2000",
        destination_account_tag="2001",
        source="sip:2000@sip.canyan.io",
        source_ip="127.0.0.20",
        destination="sip:2001@sip.canyan.io",
        sender="",
        capture_id=0,
        invited=UNIX,
        ringing=UNIX + 200_000,
        begun=UNIX + 1_000_000,
        ended=UNIX + 61_000_000,
        begun_by="answer",
        ended_by="bye",
        hung_up=agent.CALLEE,
        status=200,
        phrase="OK",
        outcome=agent.CHARGED,
        row=0,
    )
    assert record.seconds == 60.0


def test_records_change_no_event_and_leave_nothing_behind() -> None:
    """The table that keeps records reports what the plain one does, for every capture."""
    for name in EXPECTED:
        plain = agent.CallTable(SETTINGS, agent.load_rules(SETTINGS))
        kept = agent.RecordedTable(SETTINGS, agent.load_rules(SETTINGS))
        told: list[list[bytes]] = [[], []]
        now = 0.0
        for packet in packets(name):
            if packet.protocol_type != agent.SIP_PROTOCOL_TYPE:
                continue
            now = max(now, packet.time / 1_000_000)
            for payload in agent.split_messages(packet):
                message = agent.parse_sip(payload, packet.time)
                if message is not None:
                    for table, bodies in zip((plain, kept), told, strict=True):
                        found = table.handle(agent.Sighting(packet, message), now)
                        bodies += [event.body for event in found + table.expire(now)]
        for table, bodies in zip((plain, kept), told, strict=True):
            for step in range(1, 250):
                bodies += [event.body for event in table.expire(now + step * 100.0)]
        assert told[0] == told[1], name
        assert len(kept) == 0 and kept._heard == {} and kept._told == {}, name
        rows = [record.row for record in kept.take_records()]
        assert len(rows) == len(set(rows))


def test_replies_of_one_call_id_are_bounded() -> None:
    lines = [f"{n} 180 c={n}" for n in range(1, 200)]
    table = Played(pcapbuild.pcap(datagrams("0 INVITE\n" + "\n".join(lines)))).playback.table
    assert [len(replies) for replies in table._heard.values()] == [agent.MAX_HEARD]


# The command


def command(*words: str, data: bytes | None = None, env: dict[str, str] | None = None) -> Any:
    """`rate` with these words as a process."""
    return subprocess.run(
        [sys.executable, PROGRAM, "rate", LOCAL, *words],
        input=data,
        capture_output=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "call.pcap"
    busy = "\n70 INVITE id=b tag=bb\n70.1 486 id=b tag=bb\n70.2 NACK id=b tag=bb"
    path.write_bytes(pcapbuild.pcap(datagrams(CALL + busy)))
    return path


BEGIN, END = "2026-11-25T10:00:01.000Z", "2026-11-25T10:01:01.000Z"


def test_json_csv_and_table(recording: Path) -> None:
    done = command("--format=json", str(recording))
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "call_id": "call-1@host",
        "tenant": "default",
        "route": "main",
        "transaction_tag": "call-1@host",
        "account_tag": "2000",
        "destination_account_tag": "2001",
        "source": "sip:2000@sip.canyan.io",
        "destination": "sip:2001@sip.canyan.io",
        "begin": BEGIN,
        "end": END,
        "duration": 60.0,
        "charged": True,
        "reason": "charged",
        "begin_by": "answer",
        "end_by": "bye",
    }
    assert (second["charged"], second["begin"], second["reason"]) == (False, "", "refused: 486 OK")
    rows = list(
        csv.DictReader(command("--format", "csv", str(recording)).stdout.decode().split("\n"))
    )
    assert [row["reason"] for row in rows] == ["charged", "refused: 486 OK"]
    assert list(rows[0]) == list(first)
    table = command("--format=table", str(recording)).stdout.decode().splitlines()
    assert len(table) == 3 and table[0].split() == list(first)
    assert BEGIN in table[1] and " yes " in table[1] and " no " in table[2]
    # Into a pipe it is CSV.
    assert command(str(recording)).stdout == command("--format=csv", str(recording)).stdout


def test_the_summary(recording: Path) -> None:
    lines = command(str(recording)).stderr.decode().splitlines()
    assert lines == [
        "2 calls: 1 charged, 1 refused",
        "60.000 seconds charged; 0 calls run on behind the end",
        "largest gap in the recording: 60.0 s, behind 2026-11-25T10:00:01.050Z",
        "9 packets, 9 messages of calls",
        "cut or lost: nothing",
    ]


def test_gzip_and_standard_input(recording: Path, tmp_path: Path) -> None:
    plain = command(str(recording)).stdout
    packed = tmp_path / "call.pcap.gz"
    packed.write_bytes(gzip.compress(recording.read_bytes()))
    assert command(str(packed)).stdout == plain
    assert command("-", data=recording.read_bytes()).stdout == plain
    assert command("-", data=packed.read_bytes()).stdout == plain
    cut = command("-", data=packed.read_bytes()[:-20])
    assert cut.returncode == 1 and b"-: " in cut.stderr and b"Traceback" not in cut.stderr


def test_decode_shows_pcaps(recording: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "decode", str(recording)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    head = (
        f"{recording}:1: UDP 2026-11-25T10:00:00.000Z 127.0.0.20 port 5070 > 127.0.0.10 port 5060"
    )
    assert done.stdout.splitlines()[0] == head
    assert done.stdout.count("    INVITE sip:2001@sip.canyan.io SIP/2.0\n") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "rate: 0 files; allowed"),
        (("--format=xml", "x"), "--format: 'xml'; allowed: table, csv, json"),
        (("--unknown", "x"), "--unknown: unknown; allowed: --format, --deliver, --journal"),
        (("--deliver", "x"), "--deliver: cannot be resumed; allowed: with --journal FOLDER"),
        (("--deliver", "--journal=j", "-"), "--deliver: cannot be resumed"),
        (("x",) * 501, "rate: 501 files; allowed"),
    ],
)
def test_wrong_words(words: Sequence[str], told: str) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert told in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_without_the_library_it_says_what_to_install(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "pktcap.py").write_text("raise ImportError")
    done = command(str(recording), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.decode().endswith("need a library: pip install 'rating-agent-hep[rate]'\n")
    hep = tmp_path / "call.hep"
    hep.write_bytes(b"".join(line.arrival().frame for line in scenes.messages(CALL)))
    assert BEGIN.encode() in command(str(hep), env={"PYTHONPATH": str(tmp_path)}).stdout


def test_a_file_that_is_missing_or_no_recording_costs_a_line(recording: Path) -> None:
    junk = recording.parent / "junk"
    junk.write_bytes(b"no recording")
    done = command("--format=json", str(junk), str(recording), "/nowhere", str(junk.parent))
    assert done.returncode == 1 and done.stdout.count(b"\n") == 2
    told = [line for line in done.stderr.decode().splitlines() if "rating_agent_hep.py" in line]
    assert [line.split(": ")[1] for line in told] == ["/nowhere", str(junk.parent), str(junk)]


def test_what_a_peer_wrote_moves_no_cursor(tmp_path: Path) -> None:
    path = tmp_path / "evil.pcap"
    evil = [(t, p.replace(b"call-1@host", b"\x1b[31m\x07evil")) for t, p in datagrams(CALL)]
    path.write_bytes(pcapbuild.pcap(evil))
    for form in ("table", "csv", "json"):
        text = command(f"--format={form}", str(path)).stdout.decode()
        assert all(c.isprintable() or c == "\n" for c in text) and "evil" in text


# --deliver


def many(count: int) -> bytes:
    """So many calls of a minute, one after another, as HEP."""
    found = []
    for number in range(count):
        for line in scenes.messages("0 INVITE\n1 200\n1.05 ACK\n61 BYE\n61.02 200:BYE"):
            stamp = line.stamp + number * 100_000_000
            payload = line.payload().replace(b"call-1@", b"call-%d@" % number)
            found.append((stamp, hepbuild.hep3(payload, time_us=stamp)))
    return b"".join(frame for _, frame in sorted(found))


def test_deliver_sends_each_call_in_order_and_once(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    path, folder = tmp_path / "calls.hep", tmp_path / "journal"
    path.write_bytes(many(30))
    words = ("--deliver", f"--journal={folder}", f"--rating-api-url={api.url}", str(path))
    done = run_beside(command_line(*words))
    assert done == (0, b"30 calls sent, 0 events wait, 0 rejected")
    assert len(api.requests) == 60
    for number in range(30):
        ours = [x for x in api.requests if x[1]["transaction_tag"] == f"call-{number}@host"]
        assert [path for path, _ in ours] == ["/v1/begin_transaction", "/v1/end_transaction"]
        begin = scenes.UNIX + number * 100 + 1
        assert harness.seconds(ours[0][1]["timestamp_begin"]) == begin
        assert harness.seconds(ours[1][1]["timestamp_end"]) == begin + 60
    # The same again does nothing; another recording, or other options, are refused.
    assert run_beside(command_line(*words))[0] == 0
    assert len(api.requests) == 60
    for other in (("--tenant=other", *words), (*words[:-1], str(tmp_path / "other.hep"))):
        (tmp_path / "other.hep").write_bytes(many(31))
        status, told = run_beside(command_line(*other))
        assert status == 2 and b"of another recording or configuration; allowed" in told
    assert len(api.requests) == 60


def test_the_bytes_are_those_of_the_live_agent(api: harness.RatingServer, tmp_path: Path) -> None:
    lines = scenes.messages(CALL)
    live = agent.CallTable(SETTINGS, agent.load_rules(SETTINGS))
    bodies = []
    for line in lines:
        packet = agent.decode_hep(line.arrival().frame, 0)
        message = agent.parse_sip(packet.payload, packet.time)
        assert message is not None
        for event in live.handle(agent.Sighting(packet, message), line.time):
            bodies.append(event.body)
    bodies += [event.body for event in live.expire(70.0)]
    assert len(bodies) == 2
    played = Played(b"".join(line.arrival().frame for line in lines))
    assert [event.body for event in played.events] == bodies
    # Also from a pcap whose clock is that of the mirror.
    wire = Played(pcapbuild.pcap(datagrams(CALL)))
    assert [event.body for event in wire.events] == bodies


def test_a_call_that_runs_on_is_not_sent(api: harness.RatingServer, tmp_path: Path) -> None:
    path = tmp_path / "calls.hep"
    path.write_bytes(
        b"".join(x.arrival().frame for x in scenes.messages("0 INVITE\n1 200\n1.05 ACK"))
    )
    line = command_line(
        "--deliver", "--journal", str(tmp_path / "j"), f"--rating-api-url={api.url}", str(path)
    )
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        told = gevent_read(process)
    assert b"1 calls run on behind the end: not sent\n" in told
    assert (process.returncode, api.requests) == (0, [])


def test_deliver_goes_on_after_kill_9(api: harness.RatingServer, tmp_path: Path) -> None:
    path, folder = tmp_path / "calls.hep", tmp_path / "journal"
    path.write_bytes(many(300))
    line = command_line(
        "--deliver", f"--journal={folder}", f"--rating-api-url={api.url}", str(path)
    )
    for turn in (1, 2):
        with subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            harness.wait_until(
                lambda turn=turn: len(api.requests) >= turn * 150 or process.poll() is not None,
                "some were sent",
            )
            process.send_signal(signal.SIGKILL)
            harness.wait_until(lambda: process.poll() is not None, "it is gone")
    assert run_beside(line)[0] == 0
    bodies: dict[tuple[str, str], set[str]] = {}
    last: dict[str, str] = {}
    for kind, body in api.requests:
        tag = body["transaction_tag"]
        bodies.setdefault((tag, kind), set()).add(json.dumps(body))
        # No begin behind the end: it would be charged again.
        assert not (kind.startswith("/v1/begin") and last.get(tag, "").startswith("/v1/end")), tag
        last[tag] = kind
    assert len(bodies) == 600 and all(len(versions) == 1 for versions in bodies.values())


def command_line(*words: str) -> list[str]:
    return [sys.executable, PROGRAM, "rate", LOCAL, *words]


def gevent_read(process: subprocess.Popen[bytes]) -> bytes:
    """What a process says on its error stream until it ends; the API of the test answers it."""
    assert process.stderr is not None
    told = process.stderr.read()
    process.wait(timeout=harness.DEADLINE)
    return told


def run_beside(line: Sequence[str]) -> tuple[int, bytes]:
    """Exit status and last line of a process, while this one serves the API."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        told = gevent_read(process)
    return process.returncode, told.strip().rpartition(b"\n")[2]


# Hostile files


def survives(data: bytes) -> Played:
    """It is read to an end, with at most a line about the file and no error of ours."""
    played = Played(data)
    assert len(played.faults) <= 1
    assert "internal_error" not in played.counts
    return played


def test_every_truncation() -> None:
    text = "0 INVITE\n1 200\n1.05 ACK\n4 BYE\n4.02 200:BYE"
    whole = {
        "pcap": pcapbuild.pcap(datagrams(text, mtu=256)),
        "pcapng": pcapbuild.pcapng(stream(text)),
        "hep": b"".join(line.arrival().frame for line in scenes.messages(text)),
    }
    for form, data in whole.items():
        expected = [event.kind for event in survives(data).events]
        assert expected == ["begin", "end"]
        for end in range(0, len(data), 3):
            played = survives(data[:end])
            kinds = [event.kind for event in played.events]
            assert kinds == expected[: len(kinds)], (form, end)


def test_lengths_that_lie_take_no_memory() -> None:
    """A record, a block, an option, an IP, UDP or TCP length that says more than there is."""
    stamp, packet = datagrams(CALL)[0]
    huge = b"\xff\xff\xff\x7f"
    head = pcapbuild.pcap([])
    section = pcapbuild.section() + pcapbuild.interface("raw")
    files = [
        head + bytes(8) + huge + huge,
        section + b"\x06\0\0\0" + huge,
        section + b"\x06\0\0\0\0\0\0\0" * 100,
        pcapbuild.section() + pcapbuild.block(1, bytes(8) + b"\x09\0\xff\xff" * 50),
        pcapbuild.section() + pcapbuild.block(1, bytes(8) + b"\x09\0\0\0" * 10_000),
        section + pcapbuild.enhanced(packet, "raw", stamp, number=4_000),
        *(
            pcapbuild.pcap([(stamp, packet[:at] + b"\xff\xff" + packet[at + 2 :])], "raw")
            for at in range(0, 40)
        ),
        b"HEP3\xff\xff" + bytes(60_000),
        b'{"ev": "data", "transport": "udp", "data": "' + b"A" * 500_000,
    ]
    tracemalloc.start()
    for data in files:
        survives(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_loops_of_headers() -> None:
    """Tags and extension headers without end, IP in IP, fragments that overlap."""
    stamp, packet = datagrams(CALL)[0]
    six = datagrams(CALL, six=True)[0][1]
    tags = pcapbuild.MACS + b"\x81\x00\x00\x07" * 10_000 + b"\x08\x00" + packet
    extensions = six[:6] + b"\0" + six[7:40] + b"\0\0\0\0\0\0\0\0" * 5_000 + six[40:]
    inner = packet
    for _ in range(50):
        inner = pcapbuild.ip(4, "127.0.0.1", "127.0.0.2", inner)[0]
    parts = [p for _, p in datagrams(CALL, mtu=64)]
    overlap = [parts[0], parts[1][:6] + b"\x20\x01" + parts[1][8:], *parts[1:]]
    raw = [extensions, inner, *overlap]
    played = survives(pcapbuild.pcap([(stamp, p) for p in raw], "raw"))
    assert played.counts.get("frames.malformed", 0) >= 1
    record = struct.pack("<IIII", stamp // 10**6, 0, len(tags), len(tags)) + tags
    assert survives(pcapbuild.pcap([]) + record).counts == {"frames.malformed": 1}


@settings(max_examples=300, deadline=None)
@given(strategies.data())
def test_any_octets_changed(data: strategies.DataObject) -> None:
    form = data.draw(strategies.sampled_from(sorted(SEEDS)))
    octets = bytearray(SEEDS[form])
    for _ in range(data.draw(strategies.integers(1, 8))):
        octets[data.draw(strategies.integers(0, len(octets) - 1))] = data.draw(
            strategies.integers(0, 255)
        )
    survives(bytes(octets))


@settings(max_examples=150, deadline=None)
@given(strategies.sampled_from(["pcap", "pcapng", "hep"]), strategies.binary(max_size=400))
def test_any_octets_at_all(form: str, octets: bytes) -> None:
    survives(
        {"pcap": pcapbuild.pcap([]), "pcapng": pcapbuild.section(), "hep": b"HEP3"}[form] + octets
    )


@settings(max_examples=200, deadline=None)
@given(strategies.data())
def test_the_usual_frame_is_what_the_library_says(data: strategies.DataObject) -> None:
    """The look that saves time finds the library's ends, payload and cut, or nothing."""
    link = data.draw(strategies.sampled_from(["ethernet", "cooked", "cooked2", "raw"]))
    number, frame = pcapbuild.LINKS[link]
    payload = data.draw(strategies.binary(max_size=40))
    packet = bytearray(pcapbuild.udp(("10.0.0.1", 5060), ("10.0.0.2", 5061), payload)[0])
    octets = bytearray(frame(bytes(packet)))
    for _ in range(data.draw(strategies.integers(0, 3))):
        octets[data.draw(strategies.integers(0, len(octets) - 1))] = data.draw(
            strategies.integers(0, 255)
        )
    octets = octets[: data.draw(strategies.integers(0, len(octets)))] + bytes(
        data.draw(strategies.integers(0, 6))
    )
    usual = agent.usual_datagram(pktcap.CapturedFrame(1.0, number, bytes(octets)))
    if usual is None:
        return
    found = pktcap.FrameDissector().dissect(pktcap.CapturedFrame(1.0, number, bytes(octets)))
    datagram = found.datagram()
    assert datagram is not None
    source, destination, payload, cut = usual
    assert (agent._packed_end(datagram.source), agent._packed_end(datagram.destination)) == (
        source,
        destination,
    )
    assert (datagram.payload, datagram.truncated) == (payload, cut)


@settings(max_examples=100, deadline=None)
@given(strategies.data())
def test_a_stream_is_split_the_same_however_it_is_cut(data: strategies.DataObject) -> None:
    lines = [line.payload() for line in scenes.messages(CALL)]
    body = b"SIP/2.0 200 OK\r\n\r\nINVITE sip:x SIP/2.0\r\n\r\n"
    lines[2] = lines[2].replace(b"Content-Length: 0", b"l: %d" % len(body)) + body
    octets = b"\r\n\r\n".join(lines)
    splitter = agent.SipSplitter()
    found: list[bytes] = []
    while octets:
        size = data.draw(strategies.integers(1, 400))
        found += splitter.feed(octets[:size])
        octets = octets[size:]
    assert found == lines


def test_the_bounds_of_streams() -> None:
    """Headers without end, a body that is too long, a line without end, any number of streams."""
    splitter = agent.SipSplitter()
    good = scenes.messages(CALL)[0].payload()
    endless = b"INVITE sip:x SIP/2.0\r\n" + b"X: y\r\n" * (agent.MAX_STREAM_MESSAGE // 6)
    assert list(splitter.feed(endless)) == []
    assert list(splitter.feed(b"X: z\r\n" + good)) == [good]
    long = good.replace(b"Content-Length: 0", b"Content-Length: 99999999999")
    assert [*splitter.feed(long), *splitter.feed(b"x\r\n" + good)] == [long, good]
    assert list(splitter.feed(b"GET " + b"x" * 100_000)) == []
    assert len(splitter._buffer) <= agent.MAX_START_LINE
    assert list(splitter.feed(b"\n" + good)) == [good]


def test_the_tables_are_bounded() -> None:
    """More connections, holes, fragments and late packets than are followed at one time."""
    counts: dict[str, int] = {}
    network = agent.Network(counts)

    def take(time: int, packet: bytes) -> list[agent.Recorded]:
        content = pktcap.CapturedFrame(time / 1e6, 101, packet)
        return list(network.take(agent.Unit(time, "x", 1, content)))

    for number in range(agent.MAX_STREAMS * 2 + 100):
        ends = (f"10.{number // 250}.{number % 250}.1", 5060), ("10.0.0.2", 5060)
        take(UNIX, pcapbuild.segment(*ends, 1, 1, pcapbuild.SYN, b""))
        take(UNIX, pcapbuild.segment(*ends, 2, 1, pcapbuild.PSH | pcapbuild.ACK, b"INVITE"))
        take(UNIX, pcapbuild.segment(*ends, 200, 1, pcapbuild.PSH | pcapbuild.ACK, b"x"))
        assert len(network._holes) <= agent.MAX_HOLES + 1
    assert len(network._streams) <= 2 * agent.MAX_STREAMS
    for number in range(agent.MAX_DATAGRAMS + 50):
        parts = pcapbuild.udp(SENDER, COLLECTOR, bytes(100), mtu=64, number=number)
        take(UNIX, parts[0])
    list(network.finish(agent.Unit(UNIX, "x", 1, None)))
    assert counts["datagrams.incomplete"] == agent.MAX_DATAGRAMS + 50
    hole = agent._Hole(1.0, None)
    for number in range(agent.MAX_SEGMENTS + 10):
        frame = pktcap.FrameDissector().dissect(
            pktcap.CapturedFrame(
                1.0, 101, pcapbuild.segment(SENDER, COLLECTOR, number, 1, 16, b"x")
            )
        )
        hole.note(1.0, frame)
    assert len(hole._waiting) == agent.MAX_SEGMENTS


def test_no_more_than_so_many_packets_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_LATE", 3)
    found = stream("0 INVITE id=a tag=aa\n0.1 INVITE id=b tag=bb\n0.2 INVITE id=c tag=cc", mss=200)
    del found[5]
    more = datagrams("\n".join(f"0.3{n} INVITE id=d{n} tag=d{n}" for n in range(8)))
    played = Played(pcapbuild.pcap([*found, *more]))
    assert len(played.records) >= 9


def test_a_line_of_a_capture_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_LINE", 100)
    assert Played((FOLDER / next(iter(EXPECTED))).read_bytes()).faults == [
        "line 1 is no event of a capture"
    ]


def test_a_frame_longer_than_any() -> None:
    octets = bytes(agent.MAX_FRAME + 1)
    record = struct.pack("<IIII", scenes.UNIX, 0, len(octets), len(octets)) + octets
    (fault,) = Played(pcapbuild.pcap([]) + record).faults
    assert "over the limit" in fault


def test_memory_is_flat() -> None:
    """Ten times as many calls one after another take no more."""
    peaks = []
    for count in (40, 400):
        data = io.BytesIO(many(count))
        tracemalloc.start()
        recordings = agent.Recordings([("x", io.BufferedReader(data))], print)
        playback = agent.Playback(SETTINGS, agent.load_rules(SETTINGS), recordings.counts)
        for recorded in recordings:
            playback.take(recorded)
            playback.table.take_records()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000


SEEDS = {
    "pcap": pcapbuild.pcap(datagrams("0 INVITE\n1 200\n1.05 ACK\n4 BYE", mtu=256)),
    "pcapng": pcapbuild.pcapng(stream("0 INVITE\n1 200\n1.05 ACK\n4 BYE")),
    "pcap of IPv6": pcapbuild.pcap(datagrams("0 INVITE\n1 200", six=True, extension=True), "qinq"),
    "pcap of HEP": pcapbuild.pcap(
        [
            (line.stamp, part)
            for line in scenes.messages("0 INVITE\n1 200")
            for part in pcapbuild.udp(SENDER, COLLECTOR, line.arrival().frame)
        ]
    ),
    "hep": b"".join(line.arrival().frame for line in scenes.messages("0 INVITE\n1 200")),
    "hepl": (FOLDER / min(EXPECTED)).read_bytes(),
}


# Live


def test_what_tcpdump_wrote_of_a_live_kamailio(api: harness.RatingServer, tmp_path: Path) -> None:
    """Its mirror and its SIP: each alone gives the ledger of the agent that listened."""
    tcpdump = sipservers.program("tcpdump")
    scenario = run_scenario.load(sipservers.SCENARIOS / "test_kamailio_call.yaml", "1")
    sipp = sipservers.program("sipp")
    options = [f"--rating-api-url={api.url}", LOCAL]
    with (
        harness.AgentProcess(*options) as live,
        sipservers.proxy(live.udp, tmp_path) as target,
    ):
        filters = {"mirror": f"udp port {live.udp[1]}", "wire": f"udp port {target.split(':')[1]}"}
        files = {name: tmp_path / f"{name}.pcap" for name in filters}
        with contextlib.ExitStack() as running:
            for name, filter_ in filters.items():
                line = [tcpdump, "-i", "any" if name == "wire" else "lo", "-U", "-Z", "root"]
                line += ["--immediate-mode", "-w", str(files[name]), *filter_.split()]
                log = tmp_path / f"{name}.log"
                running.enter_context(sipservers.running(line, log, tmp_path))
                harness.wait_until(
                    lambda log=log: "listening on" in log.read_text(errors="replace"),
                    "tcpdump listens",
                )
            run_scenario.run_worker(scenario.workers[0], target, sipp)
            harness.wait_until(lambda: len(api.requests) >= 2, "the call is charged")
    told = [json.dumps(body) for _, body in api.requests]
    mirror = Played(files["mirror"].read_bytes())
    assert [event.body.decode() for event in mirror.events] == [
        json.dumps(json.loads(body), separators=(",", ":")) for body in told
    ]
    wire = Played(files["wire"].read_bytes())
    assert [event.kind for event in wire.events] == ["begin", "end"]
    for event, body in zip(wire.events, told, strict=True):
        ours, theirs = json.loads(event.body), json.loads(body)
        stamp = f"timestamp_{event.kind}"
        drift = harness.seconds(ours.pop(stamp)) - harness.seconds(theirs.pop(stamp))
        assert abs(drift) <= harness.TOLERANCE
        assert ours == theirs
