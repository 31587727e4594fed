"""scripts/hep_replay.py: what arrives on real sockets, and how calls get a new identity."""

from __future__ import annotations

import base64
import json
import math
import os
import queue
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "scripts"))
sys.path.insert(0, str(REPO / "tests"))

import hep_replay
import hepbuild
from hep_replay import Event, Plan, ReplayError, Rewriter, Step, Totals

WAIT = 5.0  # seconds until a test gives up on a socket


def captures_root() -> Path | None:
    named = os.environ.get("HEP_CAPTURES")
    places = [REPO / "tests/captures", *([Path(named)] if named else [])]
    places.append(REPO.parent / "shared/captures")
    return next((place for place in places if place.is_dir()), None)


ROOT = captures_root()
CAPTURES = sorted(ROOT.rglob("*.hepl")) if ROOT else []
each_capture = pytest.mark.parametrize(
    "path", CAPTURES, ids=[str(path.relative_to(ROOT)) for path in CAPTURES if ROOT]
)


# An own decoder, so that a mistake in the script's cannot hide itself.


def decode(frame: bytes) -> list[tuple[int, int, bytes]]:
    assert frame[:4] in (b"HEP3", b"EEP3")
    assert struct.unpack("!H", frame[4:6])[0] == len(frame)
    chunks, rest = [], frame[6:]
    while rest:
        vendor, kind, length = struct.unpack("!HHH", rest[:6])
        assert 6 <= length <= len(rest)
        chunks.append((vendor, kind, rest[6:length]))
        rest = rest[length:]
    return chunks


def value(frame: bytes, kind: int) -> bytes:
    return next(v for vendor, k, v in decode(frame) if vendor == 0 and k == kind)


def stamp_us(frame: bytes) -> int:
    return int.from_bytes(value(frame, 9), "big") * 10**6 + int.from_bytes(value(frame, 10), "big")


def identity(message: bytes) -> tuple[str, list[str], list[str]]:
    """Call-ID, tags and Via branches of a message without folded lines or tricky quoting."""
    head = message.decode("latin-1").partition("\r\n\r\n")[0]
    call_id, tags, branches = "", [], []
    for line in head.split("\r\n")[1:]:
        name, _, text = line.partition(":")
        name = name.strip().lower()
        if name in ("call-id", "i"):
            call_id = text.strip()
        elif name in ("from", "f", "to", "t"):
            tags += re.findall(r";tag=([^;\s]+)", text.rpartition(">")[2])
        elif name in ("via", "v"):
            branches += re.findall(r";branch=([^;,\s]+)", text)
    return call_id, tags, branches


def call(number: int = 1, start_us: int = hepbuild.TIME_US) -> list[bytes]:
    """The SIP messages of an answered call in six HEP3 frames, 100 ms apart."""
    common: dict[str, Any] = {"call_id": f"call-{number}@10.0.0.1", "from_tag": f"from{number}"}
    two = [("10.0.0.9:5060", f"z9hG4bKp{number}"), ("10.0.0.1:5060", f"z9hG4bKa{number}")]
    body = b"v=0\r\nCall-ID: not-a-header\r\ni=;tag=also-none\r\n"
    messages = [
        hepbuild.sip_request(
            "INVITE", "sip:2001@b", cseq=1, branch="", vias=two, body=body, **common
        ),
        hepbuild.sip_reply(180, to_tag="to", cseq=1, branch="", vias=two, **common),
        hepbuild.sip_reply(200, to_tag="to", cseq=1, branch="", vias=two, body=body, **common),
        hepbuild.sip_request("ACK", "sip:b", to_tag="to", cseq=1, branch="z9hG4bKb", **common),
        hepbuild.sip_request("BYE", "sip:b", to_tag="to", cseq=2, branch="z9hG4bKc", **common),
        hepbuild.sip_reply(
            200, to_tag="to", cseq=2, cseq_method="BYE", branch="z9hG4bKc", **common
        ),
    ]
    return [
        hepbuild.hep3(message, time_us=start_us + 100_000 * index, correlation_id=common["call_id"])
        for index, message in enumerate(messages)
    ]


def write(path: Path, events: list[dict[str, Any]]) -> str:
    lines = []
    for event in events:
        data = {"data": base64.b64encode(event["data"]).decode()} if "data" in event else {}
        lines.append(json.dumps({**event, **data}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def udp_capture(path: Path, packets: list[bytes]) -> str:
    return write(
        path,
        [
            {"t": 0.1 * index, "ev": "data", "transport": "udp", "data": packet}
            for index, packet in enumerate(packets)
        ],
    )


def tcp_capture(path: Path) -> str:
    """One call over two connections: frames cut in two, two frames in one chunk, a "stop"."""
    f = call()
    parts = [
        (1, f[0][:3]), (1, f[0][3:] + f[1][:100]), (2, f[2] + f[3]), (1, f[1][100:]), (2, f[4]),
        (1, f[5]),
    ]  # fmt: skip
    tcp = {"transport": "tcp"}
    events: list[dict[str, Any]] = [{"t": 0.0, "ev": "open", "conn": c, **tcp} for c in (1, 2)]
    events += [
        {"t": 0.1 * index, "ev": "data", "conn": conn, "data": data, **tcp}
        for index, (conn, data) in enumerate(parts)
    ]
    events += [
        {"t": 0.7, "ev": "close", "conn": 2, **tcp},
        {"t": 0.8, "ev": "stop", "transport": None},
    ]
    return write(path, events)


class TcpReceiver:
    """Accepts connections and keeps what each sent, in order of accept, until its end."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.to = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._ended: queue.Queue[tuple[int, bytes]] = queue.Queue()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(number, connection), daemon=True).start()
            number += 1

    def _read(self, number: int, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(WAIT)
            data = b"".join(iter(lambda: connection.recv(65_536), b""))
        self._ended.put((number, data))

    def streams(self, count: int) -> list[bytes]:
        found = dict(self._ended.get(timeout=WAIT) for _ in range(count))
        assert self._ended.empty()
        return [found[number] for number in range(count)]


class UdpReceiver:
    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(WAIT)
        self.to = f"127.0.0.1:{self.socket.getsockname()[1]}"

    def datagrams(self, count: int) -> list[bytes]:
        found = [self.socket.recv(65_536) for _ in range(count)]
        # Loopback delivers before send() returns: what is not there now was not sent.
        self.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.socket.recv(65_536)
        self.socket.settimeout(WAIT)
        return found


@pytest.fixture
def tcp() -> Iterator[TcpReceiver]:
    receiver = TcpReceiver()
    yield receiver
    receiver.listener.shutdown(socket.SHUT_RDWR)
    receiver.listener.close()


@pytest.fixture
def udp() -> Iterator[UdpReceiver]:
    receiver = UdpReceiver()
    yield receiver
    receiver.socket.close()


def replay(*arguments: str) -> int:
    return hep_replay.main(["--fast", *arguments])


# On the wire.


def test_tcp_as_recorded(tmp_path: Path, tcp: TcpReceiver) -> None:
    f = call()
    assert replay("--to", tcp.to, tcp_capture(tmp_path / "c.hepl")) == 0
    assert tcp.streams(2) == [f[0] + f[1] + f[5], f[2] + f[3] + f[4]]


def test_tcp_chunks_are_sent_as_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def handle(sender: hep_replay.Sender, step: Step) -> int:
        sent.append(step.event.data)
        return 0

    monkeypatch.setattr(hep_replay.Sender, "handle", handle)
    path = tcp_capture(tmp_path / "c.hepl")
    assert replay(path) == 0
    recorded = [json.loads(line).get("data") for line in Path(path).read_text().splitlines()]
    assert [data for data in sent if data] == [base64.b64decode(data) for data in recorded if data]


def test_udp_as_recorded(tmp_path: Path, udp: UdpReceiver) -> None:
    packets = [*call(), hepbuild.hep1(b"x"), hepbuild.hep2(b"y"), b"no HEP at all"]
    assert replay("--to", udp.to, udp_capture(tmp_path / "c.hepl", packets)) == 0
    assert udp.datagrams(len(packets)) == packets


def test_tcp_over_udp(tmp_path: Path, udp: UdpReceiver) -> None:
    f = call()
    assert replay("--to", udp.to, "--transport", "udp", tcp_capture(tmp_path / "c.hepl")) == 0
    assert udp.datagrams(6) == [f[0], f[2], f[3], f[1], f[4], f[5]]


def test_udp_over_tcp(tmp_path: Path, tcp: TcpReceiver) -> None:
    path = udp_capture(tmp_path / "c.hepl", call())
    assert replay("--to", tcp.to, "--transport", "tcp", path) == 0
    assert tcp.streams(1) == [b"".join(call())]


def test_plain_file_and_several_files(tmp_path: Path, tcp: TcpReceiver) -> None:
    plain = tmp_path / "frames"
    plain.write_bytes(b"".join(call(7)))
    assert replay("--to", tcp.to, str(plain), tcp_capture(tmp_path / "c.hepl"), str(plain)) == 0
    streams = tcp.streams(4)
    assert streams[0] == streams[3] == plain.read_bytes()


@pytest.mark.skipif(not CAPTURES, reason="no captures")
def test_every_recorded_tcp_connection_arrives(tcp: TcpReceiver) -> None:
    paths: list[str] = []
    recorded: list[bytes] = []
    for path in CAPTURES:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        if not any(entry["transport"] == "tcp" for entry in entries):
            continue
        paths.append(str(path))
        numbers: dict[int, int] = {}
        for entry in entries:
            if entry["ev"] == "open":
                numbers[entry["conn"]] = len(recorded)
                recorded.append(b"")
            elif entry["ev"] == "data":
                recorded[numbers[entry["conn"]]] += base64.b64decode(entry["data"])
    assert replay("--to", tcp.to, *paths) == 0
    assert tcp.streams(len(recorded)) == recorded


# New identities.


def test_repeat_over_udp(tmp_path: Path, udp: UdpReceiver) -> None:
    path = udp_capture(tmp_path / "c.hepl", call(1) + call(2))
    assert replay("--to", udp.to, "--repeat", "3", path) == 0
    got = udp.datagrams(36)
    assert got[:12] == call(1) + call(2)
    suffixes = set()
    for turn in range(3):
        for number in range(2):
            frames = got[12 * turn + 6 * number :][:6]
            call_id = identity(value(frames[0], 15))[0]
            suffix = call_id.removeprefix(f"call-{number + 1}@10.0.0.1")
            suffixes.add(suffix)
            for frame, original in zip(frames, call(number + 1), strict=True):
                check_rewritten(frame, original, suffix)
    assert len(suffixes) == 3


def test_fresh_and_two_runs_differ(tmp_path: Path, udp: UdpReceiver) -> None:
    path = udp_capture(tmp_path / "c.hepl", call())
    for _ in range(2):
        assert replay("--to", udp.to, "--fresh", "--repeat", "2", path) == 0
    got = {identity(value(frame, 15))[0] for frame in udp.datagrams(24)}
    assert len(got) == 4 and "call-1@10.0.0.1" not in got


def test_repeat_over_tcp_reassembles(tmp_path: Path, tcp: TcpReceiver) -> None:
    path = tcp_capture(tmp_path / "c.hepl")
    assert replay("--to", tcp.to, "--repeat", "2", path) == 0
    streams = tcp.streams(4)
    f = call()
    call_ids = set()
    for stream, originals in (streams[2], [f[0], f[1], f[5]]), (streams[3], f[2:5]):
        for original in originals:
            length = int.from_bytes(stream[4:6], "big")
            frame, stream = stream[:length], stream[length:]
            call_ids.add(identity(value(frame, 15))[0])
            suffix = value(frame, 17).decode().removeprefix("call-1@10.0.0.1")
            check_rewritten(frame, original, suffix)
        assert not stream
    assert len(call_ids) == 1 and streams[0] + streams[1] == b"".join(
        [f[0], f[1], f[5], f[2], f[3], f[4]]
    )


def check_rewritten(frame: bytes, original: bytes, suffix: str, shift_us: int = 0) -> None:
    """The suffix is where it belongs and nowhere else, the time is moved, all else is the same."""
    after, before = decode(frame), decode(original)
    assert [chunk[:2] for chunk in after] == [chunk[:2] for chunk in before]
    for (vendor, kind, new), (_, _, old) in zip(after, before, strict=True):
        if (vendor, kind) == (0, 15):
            assert new.replace(suffix.encode(), b"") == old
            if not re.match(rb"SIP/2.0 |[A-Z]+ [^\r\n]* SIP/2.0\r\n", old):
                assert new == old
                continue
            (call_id, tags, branches), (old_id, old_tags, old_branches) = (
                identity(new),
                identity(old),
            )
            assert call_id == old_id + suffix
            assert tags == [tag + suffix for tag in old_tags]
            assert branches == [branch + suffix for branch in old_branches]
            if suffix:
                assert new.count(suffix.encode()) == 1 + len(tags) + len(branches)
            assert new.partition(b"\r\n\r\n")[2] == old.partition(b"\r\n\r\n")[2]
        elif (vendor, kind) == (0, 17):
            assert new == old + suffix.encode()
        elif (vendor, kind) not in ((0, 9), (0, 10)) or not shift_us:
            assert new == old
    assert stamp_us(frame) == stamp_us(original) + shift_us


@each_capture
def test_every_capture_through_the_rewriter(path: Path) -> None:
    events = hep_replay.read_capture(str(path))
    rewriter = Rewriter("~8d1e-77", shift_us=86_400_123_457)
    packets = [packet for _, packet in hep_replay.frames(events)]
    assert packets
    for packet in packets:
        assert Rewriter().packet(packet) == packet
        rewritten = rewriter.packet(packet)
        if packet[:4] == b"HEP3":
            check_rewritten(rewritten, packet, "~8d1e-77", 86_400_123_457)
        else:
            assert Rewriter("~8d1e-77").packet(packet).replace(b"~8d1e-77", b"") == packet


@pytest.mark.parametrize(
    ("header", "rewritten"),
    [
        ("i: a@b", "i: a@b+"),
        ("CALL-ID :a@b  ", "CALL-ID :a@b+  "),
        ("Call-ID:\r\n a@b", "Call-ID:\r\n a@b+"),
        ("Call-ID: ", "Call-ID: "),
        ("f: <sip:a@b;tag=in>;tag=1", "f: <sip:a@b;tag=in>;tag=1+"),
        ('From: "x;tag=0\\";tag=1" <sip:a>;tag=2', 'From: "x;tag=0\\";tag=1" <sip:a>;tag=2+'),
        ("To: sip:a@b ; TAG = 1;x=2", "To: sip:a@b ; TAG = 1+;x=2"),
        ("t: <sip:a@b>", "t: <sip:a@b>"),
        ("To: <sip:a>\r\n\t;tag=1\r\n ;x", "To: <sip:a>\r\n\t;tag=1+\r\n ;x"),
        ("v: SIP/2.0/UDP h;branch=1;rport", "v: SIP/2.0/UDP h;branch=1+;rport"),
        ("Via: a h;branch=1, b [::1]:5060;branch=2", "Via: a h;branch=1+, b [::1]:5060;branch=2+"),
        ("Via: SIP/2.0/UDP h", "Via: SIP/2.0/UDP h"),
        ("Record-Route: <sip:h;lr;ftag=1>", "Record-Route: <sip:h;lr;ftag=1>"),
        ("X-Call-ID: a;tag=1;branch=2", "X-Call-ID: a;tag=1;branch=2"),
        ("Refer-To: <sip:a>;tag=1", "Refer-To: <sip:a>;tag=1"),
    ],
)
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_sip_headers(header: str, rewritten: str, line_end: str) -> None:
    start, end = "\r\n\r\nINVITE sip:i:t SIP/2.0\r\n", "\r\n\r\nCall-ID: body\r\nt: <a>;tag=1"
    message = (start + header + end).replace("\r\n", line_end).encode()
    expected = (start + rewritten + end).replace("\r\n", line_end).encode()
    assert Rewriter("+").sip(message) == expected
    # Cut off by the mirror, before the body.
    cut = len(end.replace("\r\n", line_end))
    assert Rewriter("+").sip(message[:-cut]) == expected[:-cut]


@pytest.mark.parametrize(
    "text", [b"", b"\r\n\r\n", b"NOTICE:method INVITE\nCall-ID: a\n", b"\0\xff"]
)
def test_other_text_is_kept(text: bytes) -> None:
    assert Rewriter("+").sip(text) == text
    frame = hepbuild.hep3(text, protocol_type=100, correlation_id="a@b")
    changed = Rewriter("+").packet(frame)
    assert (value(changed, 15), value(changed, 17)) == (text, b"a@b+")


def test_foreign_chunks_and_order_are_kept() -> None:
    message = hepbuild.sip_reply(200, call_id="a", from_tag="1", cseq=1, branch="b")
    extra = [
        (3, 15, b"INVITE x SIP/2.0\r\ni: a\r\n"),
        (3, 17, b"a"),
        (0, 0x29, b""),
        (5, 9, b"1234"),
    ]
    rng = random.Random(4)
    for _ in range(20):
        frame = hepbuild.hep3(
            message, extra_chunks=extra, order=rng, correlation_id="a", magic=b"EEP3",
            src=("2001:db8::1", 5060), dst=("2001:db8::2", 5062), capture_name="n", auth_key="k",
        )  # fmt: skip
        check_rewritten(Rewriter("-~", 5).packet(frame), frame, "-~", 5)


@pytest.mark.parametrize("how", ["zlib", "gzip"])
def test_compressed_payload_becomes_plain(how: Any) -> None:
    message = hepbuild.sip_reply(200, call_id="a@b", from_tag="1", cseq=1, branch="b")
    frame = hepbuild.hep3(message, compress=how)
    chunks = decode(Rewriter("-7").packet(frame))
    assert [kind for _, kind, _ in chunks if kind in (15, 16)] == [15]
    assert identity(next(v for _, k, v in chunks if k == 15)) == ("a@b-7", ["1-7"], ["b-7"])
    assert value(Rewriter("", 10).packet(frame), 16) == value(frame, 16)
    damaged = hepbuild.hep3(b"", omit=[15], extra_chunks=[(0, 16, value(frame, 16)[:-9])])
    assert Rewriter("-7").packet(damaged) == damaged


def test_too_long_for_hep() -> None:
    message = hepbuild.sip_reply(200, call_id="a", from_tag="1", cseq=1, branch="b", body=b"")
    frame = hepbuild.hep3(message + b"x" * (65_535 - len(hepbuild.hep3(message))))
    assert len(frame) == 65_535
    with pytest.raises(ReplayError, match="too long"):
        Rewriter("-1").packet(frame)
    with pytest.raises(ReplayError, match="too long"):
        Rewriter("-1").packet(hepbuild.hep3(message.ljust(65_520, b"x"), compress="gzip"))
    # The agent does not read this one either, so there is no call to give another identity.
    inflated = hepbuild.hep3(b"x" * 70_000, compress="gzip")
    assert Rewriter("-1").packet(inflated) == inflated


def test_damaged_packets_are_sent_as_they_are() -> None:
    rng = random.Random(1)
    frames, rewriter = call(), Rewriter("-1", 1_000)
    assert rewriter.packet(frames[0] + b"x") == frames[0] + b"x"
    for _ in range(3_000):
        packet = bytearray(rng.choice([*frames, hepbuild.hep2(value(frames[0], 15))]))
        for _ in range(rng.randrange(1, 6)):
            packet[rng.randrange(min(len(packet), 120))] = rng.randrange(256)
        rewriter.packet(bytes(packet[: rng.randrange(len(packet) + 1)]))


@pytest.mark.parametrize("addresses", [("10.0.0.1", "10.0.0.2"), ("2001:db8::1", "2001:db8::2")])
@pytest.mark.parametrize("length", [None, 0, 16])
def test_hep1_and_hep2(addresses: tuple[str, str], length: int | None) -> None:
    ends: dict[str, Any] = {"src": (addresses[0], 5060), "dst": (addresses[1], 5061)}
    sip = [value(frame, 15) for frame in call()]
    rewriter, us = Rewriter("-9", 1_700_000), hepbuild.TIME_US
    for message in sip:
        new = Rewriter("-9").sip(message)
        assert new != message
        packet = hepbuild.hep1(message, header_length=length, **ends)
        assert rewriter.packet(packet) == packet[: -len(message)] + new
        for padded in True, False:
            for byteorder in "little", "big":
                kind: dict[str, Any] = {"padded": padded, "byteorder": byteorder, **ends}
                kind |= {"header_length": length or 40, "capture_id": 2001}
                packet = hepbuild.hep2(message, time_us=us, **kind)
                assert hep_replay.time_of(packet) == us
                assert rewriter.packet(packet) == hepbuild.hep2(new, time_us=us + 1_700_000, **kind)


# Time.


def test_now_moves_stamps_and_keeps_differences(tmp_path: Path, udp: UdpReceiver) -> None:
    stampless = hepbuild.hep3(b"x", time_us=None)
    packets = [stampless, *call(), hepbuild.hep2(b"y", time_us=hepbuild.TIME_US + 900_000)]
    before = time.time_ns() // 1000
    assert replay("--to", udp.to, "--now", udp_capture(tmp_path / "c.hepl", packets)) == 0
    after = time.time_ns() // 1000
    got = udp.datagrams(len(packets))
    assert got[0] == stampless
    stamps = [hep_replay.time_of(packet) or 0 for packet in got[1:]]
    assert before - 1 <= stamps[0] <= after
    assert [stamp - stamps[0] for stamp in stamps] == [100_000 * i for i in range(6)] + [900_000]
    for frame, original in zip(got[1:7], call(), strict=True):
        check_rewritten(frame, original, "", stamps[0] - hepbuild.TIME_US)


def udp_events(*times: float) -> list[Event]:
    return [Event(t, "udp", 0, "data", call()[0]) for t in times]


def dues(plan: Plan, **more: Any) -> list[float]:
    return [round(step.due, 6) for step in plan.steps(**more)]


def test_schedule() -> None:
    a, b = udp_events(0.0, 0.5, 2.0), udp_events(0.0, 1.0)
    assert dues(Plan([a, b])) == [0.0, 0.5, 2.0, 2.0, 3.0]
    assert dues(Plan([a, b], speed=10)) == [0.0, 0.05, 0.2, 0.2, 0.3]
    assert dues(Plan([a, b], speed=math.inf, repeat=2)) == [0.0] * 10
    assert dues(Plan([b], repeat=3)) == [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    assert dues(Plan([])) == []


def test_schedule_of_calls_per_second() -> None:
    two_calls = [Event(t, "udp", 0, "data", call(n)[0]) for t, n in ((0.0, 1), (1.0, 2), (1.0, 2))]
    plan = Plan([two_calls], repeat=3, calls_per_second=4)
    assert plan.calls() == 2
    assert dues(plan) == [0.0, 0.5, 1.0, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0]


def test_schedule_with_now_follows_the_plan() -> None:
    plan = Plan([udp_events(0.0, 3.0), udp_events(0.0)], speed=2, repeat=2, now=True)
    stamps = [stamp_us(step.event.data) for step in plan.steps(clock=lambda: 1_800_000_000.0)]
    starts = [0, 0, 1_500_000, 1_500_000, 1_500_000, 3_000_000]
    assert stamps == [1_800_000_000_000_000 + start for start in starts]


def test_limit() -> None:
    events = [Event(0.0, "tcp", 1, "open"), *udp_events(0.0, 0.0, 0.0, 5.0, 5.0)]
    steps = [Step(event.t, (0, 0, 0), event) for event in events]
    assert [step.due for step in hep_replay.limit(steps, 4)] == [0, 0, 0.25, 0.5, 5, 5.25]


def test_play_sleeps_until_each_step_is_due(udp: UdpReceiver) -> None:
    clock, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        clock[0] += seconds

    host, port = udp.to.split(":")
    totals = Totals()
    events = udp_events(0.0, 1.0, 1.0, 4.0)
    steps = Plan([events], speed=2).steps()
    sender = hep_replay.Sender(host, int(port))
    hep_replay.play(steps, sender, totals, clock=lambda: clock[0], sleep=sleep)
    assert slept == [0.5, 1.5]
    assert totals == Totals(packets=4, octets=4 * len(call()[0]), seconds=2.0)
    udp.datagrams(4)


def test_plain_file_is_paced_by_its_stamps(tmp_path: Path) -> None:
    f = call()
    path = tmp_path / "frames"
    path.write_bytes(f[1] + f[0] + hepbuild.hep3(b"", time_us=None) + f[4])
    data = [e for e in hep_replay.read_capture(str(path)) if e.kind == "data"]
    assert [round(e.t, 3) for e in data] == [0.0, 0.0, 0.0, 0.3]


# Reading.


def test_connections_are_balanced(tmp_path: Path) -> None:
    def kinds(*events: dict[str, Any]) -> list[tuple[int, str]]:
        path = write(tmp_path / "x.hepl", [{"t": 0, "transport": "tcp", **e} for e in events])
        return [(e.conn, e.kind) for e in hep_replay.read_capture(path)]

    opened, data = {"ev": "open", "conn": 1}, {"ev": "data", "conn": 1, "data": b"x"}
    closed, stop = {"ev": "close", "conn": 1}, {"ev": "stop", "transport": None}
    one = [(1, "open"), (1, "data"), (1, "close")]
    assert kinds(opened, data, closed) == one
    assert kinds(data) == one
    assert kinds(data, closed, closed) == one
    assert kinds(opened, data, stop, opened, data, closed, stop) == one + one
    assert kinds(opened, data, opened, data, stop) == one + one
    other = {"ev": "open", "conn": 2}
    assert kinds(opened, data, stop, other) == [*one, (2, "open"), (2, "close")]


def test_unfinished_frame_is_left_out() -> None:
    f = call()
    events = [Event(0, "tcp", 1, "open"), Event(1, "tcp", 1, "data", f[0] + f[1][:50])]
    events += [Event(2, "tcp", 1, kind) for kind in ("close", "open")]
    events += [Event(3, "tcp", 1, "data", f[2])]
    assert list(hep_replay.frames(events)) == [(1, f[0]), (3, f[2])]


# Errors.

DATA = '{"t":0,"ev":"data","transport":"udp","data":"SEVQMw=="}'


@pytest.mark.parametrize(
    "line",
    [
        "{", "5", "[]", "\x00", '"ev"', '{"ev":"data"}', '{"t":0}', '{"t":-1,"ev":"stop"}',
        '{"t":NaN,"ev":"stop"}', '{"t":"x","ev":"stop"}', '{"t":0,"ev":"dance","transport":"udp"}',
        '{"t":0,"ev":"data","transport":"udp"}', '{"t":0,"ev":"open","transport":"tcp"}',
        '{"t":0,"ev":"open","transport":"sctp","conn":1}', '{"t":0,"ev":"data","transport":null}',
        '{"t":0,"ev":"open","transport":"tcp","conn":null}',
        '{"t":0,"ev":"data","transport":"udp","data":"SEVQ*w=="}',
        '{"t":0,"ev":"data","transport":"udp","data":"SEV"}',
        '{"t":0,"ev":"data","transport":"udp","data":7}',
    ],
)  # fmt: skip
def test_damaged_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.hepl"
    path.write_text(f"{DATA}\n\n{line}\n{DATA}\n")
    assert replay("--to", "127.0.0.1:1", str(path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hep_replay.py: {path}:3: damaged line: ") and error.count("\n") == 1


FIRST = len(call()[0])


def broken(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "frames"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda d: str(d / "none.hepl"), [], "none.hepl: No such file"),
        (lambda d: str(d), [], "Is a directory"),
        (lambda d: broken(d, call()[0][:-1]), [], "frame at octet 0 is cut short"),
        (lambda d: broken(d, call()[0] + b"garbage"), [], f"no HEP3 frame at octet {FIRST}"),
        (lambda d: broken(d, b"HEP3\0\5"), [], "no HEP3 frame at octet 0"),
        (lambda d: udp_capture(d / "1", [hepbuild.hep1(b"")]), ["--transport=tcp"], "not HEP3"),
        (lambda d: udp_capture(d / "2", [hepbuild.hep2(b"")]), ["--transport=tcp"], "not HEP3"),
        (lambda d: udp_capture(d / "3", [b"HEP3\0\7"]), ["--transport=tcp"], "not HEP3"),
        (lambda d: broken(d, hepbuild.hep3(b"x" * 65_430)), ["--transport=udp"], "does not fit"),
    ],
)  # fmt: skip
def test_file_errors(
    make: Callable[[Path], str],
    options: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Port 1 is closed: were anything sent before the files are checked, status 1 would tell.
    path = make(tmp_path)
    assert replay("--to", "127.0.0.1:1", *options, path) == 2
    error = capsys.readouterr().err
    assert says in error and path in error and error.count("\n") == 1


def test_damaged_stream(
    tmp_path: Path, tcp: TcpReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"t": 0, "ev": "data", "transport": "tcp", "conn": 4, "data": call()[0] + b"garbage"}
    path = write(tmp_path / "x.hepl", [line])
    assert replay("--to", tcp.to, "--repeat", "2", path) == 2
    where = f"{path}: connection 4: no HEP3 frame at octet {len(call()[0])}"
    assert where in capsys.readouterr().err
    # As recorded it needs no frames, so the damage is replayed.
    assert replay("--to", tcp.to, path) == 0
    assert tcp.streams(1) == [call()[0] + b"garbage"]


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_nobody_listens(transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = udp_capture(tmp_path / "x.hepl", call()[:1])
    with socket.socket(
        type=getattr(socket, {"tcp": "SOCK_STREAM", "udp": "SOCK_DGRAM"}[transport])
    ) as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    assert replay("--to", address, "--transport", transport, path) == 1
    assert capsys.readouterr().err == f"hep_replay.py: {address}: Connection refused\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--to", "host", "x"], ["--to", "h:0", "x"], ["--to", "h:70000", "x"],
        ["--speed", "0", "x"], ["--speed", "nan", "x"], ["--speed", "-1", "x"],
        ["--speed", "2", "--fast", "x"], ["--repeat", "0", "x"], ["--repeat", "1.5", "x"],
        ["--rate", "x", "x"], ["--transport", "sctp", "x"], ["--calls-per-second", "0", "x"],
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        hep_replay.main(arguments)
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# The terminal.


def test_summary_and_quiet(
    tmp_path: Path, tcp: TcpReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tcp_capture(tmp_path / "c.hepl")
    assert replay("--to", tcp.to, path) == 0
    octets = sum(map(len, call()))
    says = rf"1 file, 6 packets, {octets} octets in \d\.\d{{3}} s, \d+ packets/s\n"
    assert re.fullmatch(says, capsys.readouterr().err)
    assert replay("--to", tcp.to, "--quiet", path) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("installed", [True, False])
def test_progress_bar(
    installed: bool, tmp_path: Path, udp: UdpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {"sent": 0, "closed": 0}

    class Bar:
        def __init__(self, total: int, **options: Any) -> None:
            seen["total"] = total

        def update(self, count: int) -> None:
            seen["sent"] += count

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            seen["closed"] += 1

    module = types.ModuleType("tqdm")
    monkeypatch.setattr(module, "tqdm", Bar, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", module if installed else None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = udp_capture(tmp_path / "c.hepl", call())
    assert replay("--to", udp.to, "--repeat", "2", path) == 0
    udp.datagrams(12)
    expected = {"sent": 12, "closed": 1, "total": 12} if installed else {"sent": 0, "closed": 0}
    assert seen == expected


def test_interrupt(tmp_path: Path, udp: UdpReceiver) -> None:
    events = [{"t": t, "ev": "data", "transport": "udp", "data": b"x"} for t in (0, 3600)]
    path = write(tmp_path / "c.hepl", events)
    program = subprocess.Popen(
        [sys.executable, hep_replay.__file__, "--to", udp.to, path],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        udp.datagrams(1)
        program.send_signal(signal.SIGINT)
        error = program.communicate(timeout=WAIT)[1]
    finally:
        program.kill()
    assert program.returncode == 130
    # The packet may have come here before the sender has counted it.
    assert re.fullmatch(r"1 file, ([01]) packets, \1 octets .*, interrupted\n", error)
