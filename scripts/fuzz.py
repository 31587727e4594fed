#!/usr/bin/env python3
"""Feed the agent what no server would send, and check that nothing breaks.

    fuzz.py --seconds 10                          all targets, two seconds each
    fuzz.py --target sip --inputs 1000000 --seed 7
    fuzz.py --replay tests/fuzz-corpus/*          saved inputs once more

A seeded mutator that knows the formats works on recorded packets (tests/captures), on the torture
messages of RFC 4475 (tests/torture.py) and on built ones. Targets: `hep` (decoder), `splitter` (TCP
streams, cut at random), `sip` (parser and all that reads a message), `table` (call table over
virtual time, put away and taken back as by the journal), `agent` (the whole of it in process, with
a delivery that only keeps a ledger). What each checks is said there. An input that fails is written
to tests/fuzz-corpus, which tests/test_fuzz.py replays. Exit status: 0 well, 1 a fault, 2 usage.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import random
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import hepbuild
import rating_agent_hep as agent
import torture
from hep_replay import frames, read_capture

CORPUS = ROOT / "tests" / "fuzz-corpus"
# Milliseconds. An ordinary packet takes 0.05; 64 kB of the worst that is known take 40.
MAX_MILLISECONDS = 100.0
# Runs of an input that was slow, of which the best counts: a busy machine is no fault.
RETRIES = 4
# Octets that the process may grow by after its first inputs.
MAX_GROWTH = 64 * 1024 * 1024
WARM_UP, LOOK_EACH = 2_000, 2_000  # inputs
# After so many faults a run ends: they are mostly the same one.
MAX_FAULTS = 5
# Octets of a request to the API, and of a log line: seven texts of MAX_TEXT, each octet escaped.
MAX_BODY = 7 * 6 * agent.MAX_TEXT
MAX_LINE = 16 * agent.MAX_TEXT
ARRIVAL = 1_790_000_000_000_000  # microseconds
INNOCENT = "innocent-"  # how the Call-IDs of calls begin that must come out whole

ROUTES = r"""
- name: matched
  match: {header: {X-Kind: "^(a+)+$"}, from_domain: "*.example"}
  tenant: matched
  account: [header:X-Account, p-asserted-identity, history-info, diversion, from]
  account_match: "^0*([1-9].*)$"
- name: tied
  match: {capture_id: [7, 2001]}
  tenant: tied
  account: [remote-party-id, request-uri, from]
  destination: request-uri
  transaction_tag: correlation-id
- {name: internal, match: {source_network: 10.9.0.0/16}, action: ignore}
"""
DOMAINS = ("sip.canyan.io", "*.example")
SETTINGS = (
    agent.Settings(sip_local_domains=DOMAINS),
    agent.Settings(begin_on="ack", sip_header_caller="X-Account", max_calls=3),
    agent.Settings(
        account_tag_match_regexp="^(?:.*;)*([^;]*)$",
        expired_call_end="last-seen",
        max_calls=40,
        sip_local_domains=DOMAINS,
    ),
)
RULES = tuple(agent.parse_routes(ROUTES, "routes.yaml", settings) for settings in SETTINGS)


def require(holds: object, what: str) -> None:
    """Raise AssertionError where an invariant does not hold."""
    if not holds:
        raise AssertionError(what)


# Inputs


class Mutator:
    """Makes inputs out of seeds; all its choices come from one random.Random."""

    TOKENS = (
        *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\x85", b'"', b"<", b">", b";", b",", b"=", b":"),
        *(b" ", b"\t", b"\r\n ", b"\\", b"%", b"%00", b"%f0", b"@", b"[", b"]", b"sip:", b"tel:"),
        *(b"SIP/2.0", b"INVITE", b"ACK", b"BYE", b"CANCEL", b"UPDATE", b"Via", b"v: ", b";tag="),
        *(b";branch=", b";branch=z9hG4bK-a", b"0", b"2147483648", b"-1", b"\xc3\xa9", b'"\\"'),
        *(b"Session-Expires: 90;refresher=uac\r\n", b"Max-Forwards: 0\r\n", b"l: 0\r\n\r\n"),
        *(b"X-Kind: aaaa\r\n", b"X-Account: 42\r\n", b"\r\n\r\n"),
        *(b"History-Info: <sip:7@h>,<sip:8@h>;index=1\r\n", b"P-Asserted-Identity: <tel:+1-2>\r\n"),
    )
    SIZES = (2, 3, 8, 70, 300, 2_000, 20_000)

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.packets = list(recorded())
        self.messages = [agent.decode_hep(packet, ARRIVAL).payload for packet in self.packets]
        self.messages += [payload for _, payload, _ in torture.rows()]

    def octets(self, data: bytes) -> bytes:
        """A few octets changed, put in, taken out or repeated."""
        draw = self.random
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            at = draw.randrange(len(data) + 1)
            kind = draw.randrange(6)
            if kind == 0:
                data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
            elif kind == 1:
                data = data[:at] + draw.choice(self.TOKENS) + data[at:]
            elif kind == 2:
                data = data[:at] + data[at + draw.choice((1, 2, 10, 100)) :]
            elif kind == 3:
                piece = data[at : at + draw.choice((1, 4, 30))]
                data = data[:at] + piece * self.size(draw, len(piece)) + data[at:]
            elif kind == 4:
                token = draw.choice(self.TOKENS)
                data = data[:at] + token * self.size(draw, len(token)) + data[at:]
            else:
                data = data[:at]
        return data[:65_507]

    def size(self, draw: random.Random, width: int) -> int:
        # Long ones are rare: they are for the time that an input takes.
        count = self.SIZES[min(int(draw.expovariate(0.9)), len(self.SIZES) - 1)]
        return max(1, min(count, 60_000 // max(width, 1)))

    def message(self, data: bytes | None = None) -> bytes:
        """A SIP message with its header lines shuffled, doubled, left out, folded or exchanged."""
        draw = self.random
        data = data if data is not None else draw.choice(self.messages)
        if draw.random() < 0.7:
            head, blank, body = data.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            for _ in range(draw.choice((1, 1, 2))):
                at = draw.randrange(len(lines))
                kind = draw.randrange(7)
                name, colon, value = lines[at].partition(b":")
                if kind == 0:
                    lines.insert(draw.randrange(len(lines)), lines[at])
                elif kind == 1 and len(lines) > 1:
                    del lines[at]
                elif kind == 2:
                    other = draw.choice(self.messages).split(b"\r\n")
                    lines.insert(at, draw.choice(other))
                elif kind == 3 and colon:
                    lines[at] = name + b":" + self.octets(value)
                elif kind == 4:
                    place = draw.randrange(len(lines[at]) + 1)
                    lines[at] = lines[at][:place] + b"\r\n " + lines[at][place:]
                elif kind == 5 and colon:
                    many = draw.choice((2, 80, 300))
                    lines[at] = name + b":" + b",".join([value] * many)
                else:
                    draw.shuffle(lines)
            data = b"\r\n".join(lines) + blank + body
        return (self.octets(data) if draw.random() < 0.4 else data)[:65_000]

    def packet(self, data: bytes | None = None) -> bytes:
        """A HEP packet with chunks shuffled, doubled, left out, resized, or its octets changed."""
        draw = self.random
        if data is None:
            data = draw.choice(self.packets) if draw.random() < 0.8 else self.old_packet()
        if data[:4] == b"HEP3" and draw.random() < 0.7:
            chunks = list(split_chunks(data))
            for _ in range(draw.choice((1, 1, 2))):
                at = draw.randrange(len(chunks)) if chunks else 0
                kind = draw.randrange(6)
                if kind == 0 or not chunks:
                    number = draw.choice((draw.randrange(0x30), draw.randrange(65_536)))
                    value = draw.randbytes(draw.choice((0, 1, 2, 3, 4, 5, 16, 40)))
                    vendor = draw.choice((0, 0, 0, 3, 65_535))
                    chunks.insert(at, hepbuild.chunk(vendor, number, value))
                elif kind == 1:
                    chunks.insert(draw.randrange(len(chunks)), chunks[at])
                elif kind == 2:
                    del chunks[at]
                elif kind == 3:
                    length = struct.pack(
                        ">H", draw.choice((0, 5, 6, 7, 65_535, draw.randrange(99)))
                    )
                    chunks[at] = chunks[at][:4] + length + chunks[at][6:]
                elif kind == 4:
                    chunks[at] = chunks[at][:6] + self.octets(chunks[at][6:])[:20_000]
                else:
                    draw.shuffle(chunks)
            body = b"".join(chunks)[:65_000]
            return b"HEP3" + struct.pack(">H", len(body) + 6) + body
        return self.octets(data)

    def old_packet(self) -> bytes:
        """A HEP1 or HEP2 packet."""
        payload = self.random.choice(self.messages)
        if self.random.random() < 0.5:
            return hepbuild.hep1(payload)
        padded, little = self.random.random() < 0.5, self.random.random() < 0.5
        return hepbuild.hep2(payload, padded=padded, byteorder="little" if little else "big")

    def steps(self) -> bytes:
        """HEP packets of several calls, mutated and shuffled, among them those of whole calls."""
        draw = self.random
        calls = []
        for number in range(draw.randint(1, 4)):
            name = f"{draw.randrange(3)}@call" if draw.random() < 0.5 else f"{number}@call"
            payloads = [*call_messages(draw, name)]
            if draw.random() < 0.5:
                # Neighbours change places, as over several connections.
                payloads = [
                    payload
                    for _, payload in sorted(
                        (place + draw.uniform(0, 3), payload)
                        for place, payload in enumerate(payloads)
                    )
                ]
            calls.append([self.step(payload) for payload in payloads if draw.random() < 0.95])
        settings = draw.randrange(len(SETTINGS))
        longest = draw.choice((50, 300, 300, 80_000, 3_000_000))
        whole = SETTINGS[settings].max_calls > 20 and longest <= 300
        if whole:
            name = INNOCENT + f"{draw.getrandbits(64):x}"
            payloads = [*call_messages(draw, name, whole=True)]
            calls.append([hepbuild.hep3(payload, time_us=ARRIVAL + 7) for payload in payloads])
        result = [bytes([settings])]
        while calls := [call for call in calls if call]:
            packet = draw.choice(calls).pop(0)
            gap = draw.randrange(longest) if draw.random() < 0.3 else draw.randrange(5)
            result.append(struct.pack(">II", gap, len(packet)) + packet)
        return b"".join(result)

    def step(self, payload: bytes) -> bytes:
        draw = self.random
        if draw.random() < 0.4:
            payload = self.message(payload)
        packet = hepbuild.hep3(
            payload[:60_000],
            time_us=ARRIVAL + draw.randrange(10_000_000),
            capture_id=draw.choice((1, 1, 7, 2001)),
            correlation_id=draw.choice((None, "leg", "leg" * 500)),
            src=(draw.choice(("10.0.0.1", "10.0.0.1", "10.9.0.1")), 5060),
        )
        return self.packet(packet) if draw.random() < 0.1 else packet


def recorded() -> Iterator[bytes]:
    """The packets of tests/captures that can matter to a call, HEP3 as they are."""
    for path in sorted((ROOT / "tests" / "captures").rglob("*.hepl")):
        for _, packet in frames(read_capture(str(path))):
            with_payload = agent.decode_hep(packet, ARRIVAL)
            if with_payload.protocol_type == agent.SIP_PROTOCOL_TYPE:
                yield packet


def split_chunks(packet: bytes) -> Iterator[bytes]:
    """The chunks of a sound HEP3 packet."""
    at = 6
    while at < len(packet):
        length = int.from_bytes(packet[at + 4 : at + 6], "big")
        yield packet[at : at + length]
        at += length


def call_messages(draw: random.Random, name: str, whole: bool = False) -> Iterator[bytes]:
    """The messages of a call as two hops mirror them; a ``whole`` one is answered and ended."""
    near, far = ("10.0.0.1:5060", "z9hG4bK-a"), ("10.0.0.2:5060", "z9hG4bK-p")
    tag = "c" if whole else draw.choice("ccd")
    same: dict[str, Any] = {"call_id": name, "from_tag": tag, "branch": ""}
    contact = "sip:2001@10.0.0.3:5060"

    def request(
        method: str, uri: str, cseq: int, vias: list[tuple[str, str]], to: str | None
    ) -> bytes:
        more = [("Session-Expires", "1800")] if draw.random() < 0.1 and not whole else []
        return hepbuild.sip_request(
            method, uri, **same, to_tag=to, cseq=cseq, vias=vias, headers=more
        )

    def reply(
        status: int, cseq: int = 1, method: str = "INVITE", hop: tuple[str, str] | None = None
    ) -> bytes:
        session = ("Session-Expires", draw.choice(("90;refresher=uac", "90;refresher=uas", "90")))
        more = [session] if draw.random() < 0.1 and not whole else []
        return hepbuild.sip_reply(
            status,
            **same,
            to_tag="s",
            cseq=cseq,
            cseq_method=method,
            vias=[hop or near],
            headers=more,
        )

    forwarded = [far, near]
    yield request("INVITE", "sip:2001@h", 1, [near], None)
    if draw.random() < 0.5:
        yield request("INVITE", contact, 1, forwarded, None)
    yield reply(180)
    outcome = "answered" if whole else draw.choice(("answered", "answered", "busy", "retry"))
    if outcome == "busy":
        yield reply(draw.choice((302, 404, 486, 603)))
        yield request("ACK", "sip:2001@h", 1, [near], "s")
        return
    cseq = 1
    if outcome == "retry":
        yield reply(407)
        yield request("ACK", "sip:2001@h", 1, [near], "s")
        cseq, near = 2, ("10.0.0.1:5060", "z9hG4bK-b")
        yield request("INVITE", "sip:2001@h", 2, [near], None)
    yield reply(200, cseq)
    yield request("ACK", contact, cseq, [("10.0.0.1:5060", "z9hG4bK-k")], "s")
    if draw.random() < 0.3:
        method = draw.choice(("INVITE", "UPDATE"))
        yield request(method, contact, cseq + 1, [("10.0.0.1:5060", "z9hG4bK-r")], "s")
        yield reply(200, cseq + 1, method)
    ending = "200" if whole else draw.choice(("200", "200", "200", "challenge", "500", "none"))
    hop = [("10.0.0.1:5060", "z9hG4bK-e")]
    if ending == "challenge":
        yield request("BYE", contact, cseq + 2, [("10.0.0.1:5060", "z9hG4bK-f")], "s")
        yield reply(407, cseq + 2, "BYE", hop=("10.0.0.1:5060", "z9hG4bK-f"))
    for _ in range(draw.choice((1, 1, 2))):
        yield request("BYE", contact, cseq + 3, hop, "s")
    if ending != "none":
        yield reply(500 if ending == "500" else 200, cseq + 3, "BYE", hop=hop[0])


def read_steps(data: bytes) -> tuple[int, list[tuple[float, bytes]]]:
    """The number of the settings and (seconds since the step before, packet) of `steps`."""
    found, at = [], 1
    while at + 8 <= len(data):
        gap, length = struct.unpack_from(">II", data, at)
        found.append((gap / 1000, data[at + 8 : at + 8 + length]))
        at += 8 + length
    return data[0] % len(SETTINGS), found


# Targets: each takes an input and returns how many messages it was and the longest time of one,
# in seconds. They raise AssertionError for an invariant, or whatever the agent raised.


def timed(work: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, float]:
    """Result (or the error, if it is one of these) and seconds."""
    start = time.perf_counter()
    try:
        result = work()
    except errors as error:
        result = error
    return result, time.perf_counter() - start


def check_hep(data: bytes) -> tuple[int, float]:
    """Only HepError; what is decoded is in the ranges that the type promises."""
    packet, seconds = timed(partial(agent.decode_hep, data, ARRIVAL), agent.HepError)
    if isinstance(packet, agent.HepPacket):
        require(len(packet.payload) <= max(len(data), agent.MAX_INFLATED), "payload's length")
        require(0 < packet.time < 2**32 * 1_000_000, "time")
        require(len(packet.source) in (0, 4, 16) and len(packet.destination) in (0, 4, 16), "size")
        require(packet.source_ip is not None and packet.destination_ip is not None, "address")
        require(0 <= packet.capture_id < 2**32, "capture id")
        repr(packet)
    return 1, seconds


def check_splitter(data: bytes) -> tuple[int, float]:
    """The same frames and the same error however the stream is cut; the buffer is bounded."""
    draw = random.Random(data[:8])
    stream, worst = data[8:], 0.0

    def split(cut: Callable[[int], int]) -> tuple[list[bytes], str]:
        nonlocal worst
        got: list[bytes] = []
        splitter, at = agent.HepSplitter(), 0
        try:
            while at < len(stream):
                require(1 <= splitter.room <= agent.MAX_HEP_FRAME, "room")
                size = max(1, min(cut(splitter.room), splitter.room))
                start = time.perf_counter()
                got += splitter.feed(stream[at : at + size])
                worst = max(worst, time.perf_counter() - start)
                at += size
        except agent.HepError as error:
            return got, error.kind
        return got, ""

    whole = split(lambda room: room)
    # Octet by octet is slow, so it is rare.
    widest = 1 if draw.random() < 0.02 else draw.choice((20, 300, 1_500, 65_535))
    cut = split(lambda _: int(draw.random() * widest) + 1)
    require(whole == cut, "other frames or another error when cut")
    for frame in whole[0]:
        require(int.from_bytes(frame[4:6], "big") == len(frame), "a frame's length")
    return 1, worst


def identity(message: agent.SipMessage) -> tuple[Any, ...]:
    """What decides which call a message belongs to and what it says of it."""
    return (
        *(message.method, message.status, message.call_id, message.from_tag, message.to_tag),
        *(message.cseq, message.cseq_method),
    )


def check_sip(data: bytes) -> tuple[int, float]:
    """Only SipError; all that reads a message stands it; cut anywhere it is never another one."""
    message, seconds = timed(partial(agent.parse_sip, data, ARRIVAL), agent.SipError)
    if not isinstance(message, agent.SipMessage):
        return 1, seconds
    _, using = timed(partial(use_message, message))
    place = int.from_bytes(sha256(data).digest()[:4], "big") % len(data)
    for end in (place, data.find(b"\n", place) + 1):
        cut, _ = timed(partial(agent.parse_sip, data[:end], ARRIVAL), agent.SipError)
        if isinstance(cut, agent.SipMessage):
            require(identity(cut) == identity(message), f"another message when cut at {end}")
    return 1, max(seconds, using)


def use_message(message: agent.SipMessage) -> None:
    """What the table reads of a message, and the bounds of what it keeps."""
    require(bool(message.method) != bool(message.status), "method and status")
    names = (message.call_id, message.from_tag, message.to_tag)
    require(max(map(len, names)) <= agent.MAX_TEXT, "the length of a name")
    require(1 <= len(message.vias) <= agent.MAX_VIAS, "the number of hops")
    require(len(agent.printable_id(message.call_id)) <= 3 * agent.MAX_TEXT, "the printed Call-ID")
    sighting = agent.Sighting(agent.HepPacket(3, ARRIVAL, correlation_id="x" * 2_000), message)
    number = len(message.call_id) % len(SETTINGS)
    settings, rules = SETTINGS[number], RULES[number]
    for route in (agent.choose_route(rules, sighting), rules[0].route):
        tag = agent.transaction_tag(route, sighting)
        require(tag and tag.isascii() and tag.isprintable(), "transaction tag")
        for callee in (False, True):
            account = agent.resolve_account(route, settings, message, callee)
            require(len(account) <= agent.MAX_TEXT and account.isprintable(), "account")
            account.encode()


class Ledger:
    """What the table reported and what it saw, as far as they must agree."""

    def __init__(self) -> None:
        self.rows: dict[int, list[str]] = {}
        self.times: dict[tuple[str, str], set[int]] = {}
        self.innocent: dict[str, list[str]] = {}
        self.told: Told = {}
        # Calls with a message that has no time of its own: the agent gives it the clock's.
        self.timeless: set[str] = set()

    def see(self, message: agent.SipMessage) -> None:
        """Note a message that may begin or end a call."""
        name = agent.printable_id(message.call_id)
        if name.startswith(INNOCENT):
            self.innocent.setdefault(name, [])
        if message.time == ARRIVAL:
            self.timeless.add(name)
        if 200 <= message.status < 300 or message.method == "ACK":
            self.times.setdefault((name, "begin"), set()).add(message.time)
        if message.method == "BYE" or message.cseq_method == "BYE":
            self.times.setdefault((name, "end"), set()).add(message.time)

    def note(self, event: agent.RatingEvent) -> None:
        """Check an event against all that was before it."""
        self.told[event.row, event.kind] = (event.time, event.reason, event.body)
        kinds = self.rows.setdefault(event.row, [])
        kinds.append(event.kind)
        require(kinds in (["begin"], ["begin", "end"]), f"{kinds} of one call")
        if event.kind == "begin" or event.reason in ("bye", "bye_unanswered", "bye_reply"):
            seen = self.times.get((event.call_id, event.kind), set())
            known = event.time in seen or (seen and event.call_id in self.timeless)
            # Rule 18: no end before its begin.
            known = known or (seen and event.time == self.told[event.row, "begin"][0])
            require(known, f"{event.kind} at a time of no message")
        if event.call_id in self.innocent:
            self.innocent[event.call_id].append(event.kind)
        require(len(event.body) <= MAX_BODY, f"a request of {len(event.body)} octets")
        body = json.loads(event.body)
        require(body[f"timestamp_{event.kind}"] == agent.rfc3339(event.time), "time stamp")
        require(body.get("account_tag") or body.get("destination_account_tag"), "no account")
        text = json.dumps(event.pack())
        back = agent.unpack_event(json.loads(text), event.api_url, event.row, event.serial)
        require(back.body == event.body and back.key == event.key, "an event through the journal")

    def close(self) -> None:
        """At the end of time: calls that were whole and untouched were begun and ended."""
        for name, kinds in self.innocent.items():
            require(kinds == ["begin", "end"], f"{name}: {kinds}")


def check_table(data: bytes) -> tuple[int, float]:
    """At most a begin, then at most an end; none without its message; nothing is left behind.

    Twice: as it is, and put away and taken back, as by a restart, at some of the steps.
    """
    number, steps = read_steps(data)
    # A session and a call that rings get a whole new interval by a restart, and it does not keep
    # the order of calls that make room.
    calm = sum(gap for gap, _ in steps) < agent.LINGER
    draw = random.Random(data[:200])
    plain, worst = run_table(number, steps, lambda: False)
    often = draw.choice((0.2, 1.0))
    told, took = run_table(number, steps, lambda: draw.random() < often)
    if calm and SETTINGS[number].max_calls > 20:
        require(untied(told) == untied(plain), "other events with a restart than without")
    return 2 * len(steps), max(worst, took)


Told = dict[tuple[int, str], tuple[int, str, bytes]]  # row and kind to time, reason, body


def untied(told: Told) -> Told:
    """What was told of calls that stand alone: of legs due in one moment either may be first."""
    return {key: event for key, event in told.items() if b'"tenant":"tied"' not in event[2]}


def run_table(
    number: int, steps: list[tuple[float, bytes]], restarts: Callable[[], bool]
) -> tuple[Told, float]:
    """What a table reports of these steps, and the longest time of one, in seconds."""
    settings, worst = SETTINGS[number], 0.0
    table, ledger, now = agent.CallTable(settings, RULES[number]), Ledger(), 1_000.0
    for gap, packet in steps:
        now += gap
        events, seconds = timed(partial(table.expire, now))
        for sighting in sightings(packet):
            ledger.see(sighting.message)
            more, took = timed(partial(table.handle, sighting, now))
            events, seconds = events + more, max(seconds, took)
        worst = max(worst, seconds)
        for event in events:
            ledger.note(event)
        check_sizes(table, settings)
        if restarts():
            table = taken_back(table, now)
    # In steps, as ticks would do it: of two ends the one that is due first is told.
    for step in (1.0, 2.0, 4.0, 30.0, 35.0, 65.0, 300.0, 700.0, 22_000.0, *[90_000.0] * 4):
        now += step
        for event in table.expire(now):
            ledger.note(event)
    check_sizes(table, settings)
    require(len(table) == 0, "calls are left")
    kept: tuple[Any, ...] = (table._calls, table._slots, table._order, table._due, table._legs)
    kept += (table._from_tags, table._unanswered, table._answered)
    kept += (*table._finished.values(), table._tags)
    require(not any(kept), "something is left behind")
    require(len(table.notices) <= agent.MAX_NOTICES, "notices")
    ledger.close()
    return ledger.told, worst


def sightings(packet: bytes) -> Iterator[agent.Sighting]:
    """The messages of a packet that can matter to a call, as the agent takes them in."""
    decoded, _ = timed(partial(agent.decode_hep, packet, ARRIVAL), agent.HepError)
    if isinstance(decoded, agent.HepPacket):
        for payload in agent.split_messages(decoded):
            message, _ = timed(partial(agent.parse_sip, payload, decoded.time), agent.SipError)
            if isinstance(message, agent.SipMessage):
                yield agent.Sighting(decoded, message)


def all_calls(table: agent.CallTable) -> list[agent.Call]:
    """The calls of the table, by Call-ID."""
    return [call for group in table._calls.values() for call in group]


def check_sizes(table: agent.CallTable, settings: agent.Settings) -> None:
    """The limits of the call and of the call table, and that what is counted is there."""
    calls = all_calls(table)
    require(len(table) == len(calls), "the number of calls")
    # An attempt that outlives its call may be one too many until the next call comes.
    require(len(calls) <= 2 * settings.max_calls, "more calls than max_calls")
    sizes = {state: sum(call.state == state for call in calls) for state in agent.STATES}
    require(table.sizes() == sizes, "the sizes of the states")
    begun = sum(bool(call.begun_at) for call in calls)
    counted = sum(table._unanswered.values()), sum(table._answered.values())
    require(counted == (len(calls) - begun, begun), "the senders' counts")
    over = {call.row for waiting in table._finished.values() for call in waiting}
    require(over == {x.row for x in calls if x.state in table._finished}, "what makes room first")
    require(set(table._order) == set(table._slots), "the slots of the wheel")
    waiting = [call.row for _, calls in table._slots.values() for call in calls] + [
        call.row for call in table._due
    ]
    require({call.row for call in calls} <= set(waiting), "a call that nobody will look at")
    require(len(waiting) < 64 * (len(calls) + 64), "entries of the wheel")
    tags = list(table._tags.values())
    legs = [call for known in table._legs.values() for call in known]
    rows = {call.row for call in calls}
    require({call.row for call in (*tags, *legs)} <= rows, "a call that is gone is pointed at")
    for group in table._calls.values():
        require(len(group) <= agent.MAX_CALLS_PER_ID, "calls of one Call-ID")
    for call in calls:
        check_call(call)


def check_call(call: agent.Call) -> None:
    """The limits of what is known of one call."""
    require(len(call.attempts) <= agent.MAX_ATTEMPTS, "attempts")
    require(len(call.dialogs) <= agent.MAX_DIALOGS, "dialogs")
    for dialog in call.dialogs:
        require(len(dialog.acks) <= agent.MAX_REQUESTS, "ACKs")
        require(len(dialog.byes) <= 2 * agent.MAX_REQUESTS, "BYEs")
        require(all(len(x.seen) <= agent.MAX_REQUESTS for x in dialog.byes), "ways of a BYE")
    for attempt in call.attempts:
        values = sum(len(x.uris) + len(x.below) for x in attempt.copies)
        require(values < agent.MAX_COPY_VALUES + agent.MAX_VIAS, "values of copies")
        require(len(attempt.copies) <= agent.MAX_INVITE_COPIES, "copies")
        require(len(attempt.refusals) <= agent.MAX_INVITE_COPIES, "branches that were refused")
        require(len(attempt.further) <= agent.MAX_FURTHER, "copies further on")


def taken_back(table: agent.CallTable, now: float) -> agent.CallTable:
    """The table as a restart finds it in a journal; what it packs it unpacks."""
    kept: list[tuple[int, str]] = []
    for call in all_calls(table):
        text = agent.pack_call(call, 5.0)
        back = agent.unpack_call(call.row, text, 5.0, {})
        again = agent.pack_call(back, 5.0)
        require(
            settled(json.loads(again)) == settled(json.loads(text)), "a call through the journal"
        )
        kept.append((call.row, text))
    fresh = agent.CallTable(table.settings, table.rules)
    fresh.restore(sorted(kept), table._serial, now, 5.0)
    return fresh


def settled(value: Any) -> Any:
    """JSON with its sets in one order."""
    if isinstance(value, dict):
        return {x: sorted(y) if x == "set" else settled(y) for x, y in value.items()}
    return list(map(settled, value)) if isinstance(value, list) else value


class NullDelivery:
    """In the place of the agent's: it takes events and tells the ledger."""

    busy = False

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def put(self, event: agent.RatingEvent) -> None:
        """As `Delivery.put`."""
        self._ledger.note(event)

    def tick(self) -> None:
        """As `Delivery.tick`."""

    def __len__(self) -> int:
        return 0


def check_agent(data: bytes) -> tuple[int, float]:
    """Nothing is raised, no internal error, log lines are JSON and bounded, the ledger holds."""
    number, steps = read_steps(data)
    ledger, lines = Ledger(), io.StringIO()
    limiter = agent.set_up_logging(SETTINGS[number], lines)
    subject = agent.Agent(SETTINGS[number], RULES[number], limiter)
    subject.delivery = subject.shards[0].delivery = NullDelivery(ledger)  # type: ignore[assignment]
    worst, ahead = 0.0, 0.0
    sender = agent.Sender("192.0.2.1", True)
    for gap, packet in steps:
        ahead += gap
        for sighting in sightings(packet):
            ledger.see(sighting.message)
        _, seconds = timed(partial(subject.receive, packet, "udp", sender))
        worst = max(worst, seconds)
        # The table's clock is the machine's; a tick can be told to look ahead.
        if gap > 100:
            subject.shards[0].expire(time.monotonic() + gap)
    for _ in range(4):
        ahead += 400_000.0
        subject.shards[0].expire(time.monotonic() + ahead)
    subject.tick()
    subject.flush(0.0)
    require("packets.internal_error" not in subject.metrics.totals, lines.getvalue()[-3_000:])
    require(len(subject.shards[0].table) == 0, "calls are left")
    for line in lines.getvalue().splitlines():
        require(len(line) <= MAX_LINE, f"a log line of {len(line)} characters")
        json.loads(line)
    ledger.close()
    return len(steps), worst


@dataclass(frozen=True)
class Target:
    """What is fuzzed: how an input is made, and what takes it."""

    make: Callable[[Mutator], bytes]
    check: Callable[[bytes], tuple[int, float]]


def make_stream(mutator: Mutator) -> bytes:
    """Eight octets that seed the cuts, then whole frames and, at times, a broken one."""
    draw = mutator.random
    packets = [draw.choice(mutator.packets) for _ in range(draw.choice((1, 2, 3, 5)))]
    if draw.random() < 0.5:
        packets.insert(draw.randrange(len(packets) + 1), mutator.packet())
    return draw.randbytes(8) + b"".join(packets)


TARGETS = {
    "hep": Target(lambda mutator: mutator.packet(), check_hep),
    "splitter": Target(make_stream, check_splitter),
    "sip": Target(lambda mutator: mutator.message(), check_sip),
    "table": Target(lambda mutator: mutator.steps(), check_table),
    "agent": Target(lambda mutator: mutator.steps(), check_agent),
}


# Runs


@dataclass
class Report:
    """What a run of one target came to; ``faults`` are texts, ``worst`` is in milliseconds."""

    target: str
    inputs: int = 0
    messages: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        """Add another process' report of the same target, which ran beside this one."""
        self.inputs += other["inputs"]
        self.messages += other["messages"]
        self.seconds = max(self.seconds, other["seconds"])
        self.worst = max(self.worst, other["worst"])
        self.faults += other["faults"]


def judge(name: str, data: bytes, report: Report) -> str:
    """Run one input; returns what is wrong with it, "" for nothing."""
    target = TARGETS[name]
    try:
        messages, seconds = target.check(data)
        for _ in range(RETRIES if seconds * 1000 > MAX_MILLISECONDS else 0):
            seconds = min(seconds, target.check(data)[1])
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    report.messages += messages
    report.worst = max(report.worst, seconds * 1000)
    if seconds * 1000 > MAX_MILLISECONDS:
        return f"{seconds * 1000:.0f} ms, over {MAX_MILLISECONDS:g}"
    return ""


def fuzz(name: str, seed: int, inputs: int, seconds: float, corpus: Path) -> Report:
    """Run a target for so many inputs or seconds, whichever is over first."""
    mutator, report = Mutator(f"{seed}:{name}"), Report(name)
    started, first = time.monotonic(), 0
    while report.inputs < inputs and len(report.faults) < MAX_FAULTS:
        if time.monotonic() - started >= seconds:
            break
        data = TARGETS[name].make(mutator)
        fault = judge(name, data, report)
        report.inputs += 1
        if fault:
            report.faults.append(f"{save(corpus, name, data)}: {fault}")
        if report.inputs == WARM_UP:
            gc.collect()
            first = resident()
        elif report.inputs % LOOK_EACH == 0 and resident() - first > MAX_GROWTH:
            report.faults.append(f"{name}: {resident() - first} octets more than at first")
            break
    report.seconds = time.monotonic() - started
    return report


def save(corpus: Path, name: str, data: bytes) -> Path:
    """Keep an input that failed, under the name of its target."""
    corpus.mkdir(parents=True, exist_ok=True)
    path = corpus / f"{name}-{sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def resident() -> int:
    """Octets of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def replay(paths: Sequence[Path]) -> list[str]:
    """Run saved inputs; returns what is wrong, a text for each."""
    faults = []
    for path in paths:
        name = path.name.partition("-")[0]
        fault = judge(name, path.read_bytes(), Report(name))
        if fault:
            faults.append(f"{path}: {fault}")
    return faults


def run_beside(arguments: argparse.Namespace, names: Sequence[str]) -> list[Report]:
    """The same with another seed in a process of its own, beside this one."""
    command = [sys.executable, __file__, "--json", "--processes=1"]
    command += [f"--seed={arguments.seed + 1_000_000}", f"--inputs={arguments.inputs}"]
    command += [f"--seconds={arguments.seconds}", f"--corpus={arguments.corpus}"]
    command += [f"--target={name}" for name in names]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    reports = run_here(arguments, names)
    text, _ = other.communicate()
    for report, more in zip(reports, json.loads(text), strict=True):
        report.add(more)
    return reports


def run_here(arguments: argparse.Namespace, names: Sequence[str]) -> list[Report]:
    """Each target in turn, with its share of the time."""
    share = arguments.seconds / len(names)
    return [fuzz(name, arguments.seed, arguments.inputs, share, arguments.corpus) for name in names]


def show(reports: Sequence[Report]) -> None:
    """The table of what was run, then the faults."""
    print(
        f"{'target':10}{'inputs':>12}{'messages':>12}{'inputs/s':>11}{'worst ms':>10}{'faults':>8}"
    )
    for report in reports:
        rate = report.inputs / max(report.seconds, 0.001)
        print(
            f"{report.target:10}{report.inputs:12,}{report.messages:12,}{rate:11,.0f}"
            f"{report.worst:10.1f}{len(report.faults):8}"
        )
    for report in reports:
        for fault in report.faults:
            print(fault)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Feed the agent what no server would send.")
    parser.add_argument("--seed", type=int, default=1, help="the same inputs for the same number")
    parser.add_argument("--inputs", type=int, default=10**12, help="at most so many a target")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder for inputs that fail")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="run saved inputs")
    arguments = parser.parse_args(argv)
    if arguments.replay:
        faults = replay(arguments.replay)
        print("\n".join(faults) or f"{len(arguments.replay)} inputs, no fault")
        return 1 if faults else 0
    names = arguments.target or list(TARGETS)
    reports = (run_beside if arguments.processes == 2 else run_here)(arguments, names)
    if arguments.json:
        print(json.dumps([vars(report) for report in reports]))
    else:
        show(reports)
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
