"""`rate`: recordings in every format give the live ledger; hostile ones cost a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pcapbuild
import pktcap
import pytest
import scenes
import sipservers
from hypothesis import given, settings, strategies
from pcapbuild import Connection, Packet

import harness
import hep_replay
import hepbuild
import rating_agent_hep as agent

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
