#!/usr/bin/env python3
"""Send recorded HEP traffic to a running rating agent, over UDP or TCP.

Reads `.hepl` captures (one JSON object a line: `t`, `ev`, `transport`, `conn`, base64 `data`) and
plain files of concatenated HEP3 frames. Several files are played one after the other.

    hep_replay.py capture.hepl                           as it was recorded
    hep_replay.py --speed 10 --transport udp a.hepl      ten times faster, as datagrams
    hep_replay.py --fast --repeat 100 --now a.hepl       as load: 100 times, with fresh calls

A call that is played again needs a new identity, or the agent rightly takes it for a copy. So from
the second repetition on (`--fresh`: from the first) Call-ID, tags, Via branches and HEP correlation
ids get a suffix. Other headers that may quote them (Replaces, Record-Route's `ftag`) stay as
recorded. HEP is read by the agent's own decoder, so the agent's module and libraries are needed.
Exit status: 0 sent, 1 network, 2 usage or file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import heapq
import itertools
import json
import math
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gevent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rating_agent_hep import MAX_HEP_FRAME, HepError, HepPacket, HepSplitter, decode_hep

MAGICS = (b"HEP3", b"EEP3")
MAX_DATAGRAM = 65_507  # IPv4: 65,535 less the IP and UDP headers

START_LINE = re.compile(rb"(?:\r?\n)*(?:SIP/2\.0 \d{3}|[A-Za-z0-9.!%*_+`'~-]+ \S+ SIP/2\.0)")
END_OF_HEAD = re.compile(rb"\n\r?\n")
# Name, colon, value with its folded lines (RFC 3261 section 7.3.1); compact names as in 7.3.3.
IDENTITY_HEADER = re.compile(
    rb"^(call-id|i|from|f|to|t|via|v)([ \t]*:)([^\n]*(?:\n[ \t][^\n]*)*)", re.I | re.M
)
# Quoted strings and <URIs> come first, as a "tag=" or "branch=" inside them is no parameter.
QUOTED = rb'"(?:[^"\\]|\\.)*"|<[^>]*>|'
MARKED_CALL_ID = re.compile(rb"^(?:call-id|i)[ \t]*:\s*([^\n]*)\0", re.I | re.M)
TAG = re.compile(QUOTED + rb"(;\s*tag\s*=\s*[^\s;,]+)", re.I | re.S)
BRANCH = re.compile(QUOTED + rb"(;\s*branch\s*=\s*[^\s;,]+)", re.I | re.S)


class ReplayError(Exception):
    """A usage or file error, told in one line."""

    status = 2


class NetworkError(ReplayError):
    """The agent could not be reached, or hung up."""

    status = 1


class Event(NamedTuple):
    """One event of a capture."""

    t: float  # seconds since the first event
    transport: str  # "udp" or "tcp"
    conn: int  # TCP connection as numbered by the recorder; 0 for UDP
    kind: str  # "open", "data" or "close"
    data: bytes = b""


class Step(NamedTuple):
    """One event with its moment in the replay."""

    due: float  # seconds since the replay began
    key: tuple[int, int, int]  # repetition, file, connection
    event: Event


@dataclass
class Totals:
    """What was sent so far; packets are datagrams and HEP3 frames, not TCP chunks."""

    packets: int = 0
    octets: int = 0
    seconds: float = 0.0


class Framer:
    """Cuts one TCP stream into HEP3 frames, and knows where in the stream the next one begins."""

    def __init__(self) -> None:
        self._splitter = HepSplitter()
        self.octet = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that `data` completes; ReplayError if the stream is not HEP3."""
        found = []
        try:
            for frame in self._splitter.feed(data):
                found.append(frame)
                self.octet += len(frame)
        except HepError:
            raise ReplayError(f"no HEP3 frame at octet {self.octet}") from None
        return found

    @property
    def unfinished(self) -> bool:
        """Whether some octets of the next frame are there."""
        return self._splitter.room < MAX_HEP_FRAME


def read_capture(path: str) -> list[Event]:
    """Read a `.hepl` capture or a plain file of HEP3 frames, told apart by the first octets.

    In the result every TCP connection is opened before its data and closed at the end, also where
    the recorder was stopped (`"ev": "stop"`) with connections open. Raises ReplayError naming the
    file, and the line or octet.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ReplayError(f"{path}: {error.strerror}") from None
    return _read_plain(path, content) if content[:4] in MAGICS else _read_hepl(path, content)


def _read_hepl(path: str, content: bytes) -> list[Event]:
    events: list[Event] = []
    conns: set[int] = set()
    last = 0.0
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            event = _hepl_event(json.loads(line))
        except KeyError as error:
            raise ReplayError(f"{path}:{number}: damaged line: no {error}") from None
        except (ValueError, TypeError) as error:
            reason = " ".join(str(getattr(error, "msg", error)).split())
            raise ReplayError(f"{path}:{number}: damaged line: {reason}") from None
        last = max(last, event.t)
        if event.transport == "udp":
            events.append(event)
            continue
        # The agent's stop ended all its connections; a second open can only follow a lost close.
        ended = conns if event.kind == "stop" else conns & {event.conn}
        if event.kind != "data":
            events += [Event(event.t, "tcp", conn, "close") for conn in sorted(ended)]
            conns = conns - ended
        if event.kind in ("open", "data") and event.conn not in conns:
            events.append(Event(event.t, "tcp", event.conn, "open"))
            conns = conns | {event.conn}
        if event.kind == "data":
            events.append(event)
    return events + [Event(last, "tcp", conn, "close") for conn in sorted(conns)]


def _hepl_event(entry: dict[str, Any]) -> Event:
    """One line of a `.hepl` file; KeyError, TypeError or ValueError says what is wrong with it."""
    kind, t = entry["ev"], float(entry["t"])
    if not 0 <= t < math.inf:
        raise ValueError("t is no time")
    if kind == "stop":
        return Event(t, "tcp", 0, kind)
    if kind not in ("open", "data", "close"):
        raise ValueError(f"unknown ev {kind!r}")
    transport = entry["transport"]
    if transport not in ("udp", "tcp"):
        raise ValueError(f"unknown transport {transport!r}")
    data = base64.b64decode(entry["data"], validate=True) if kind == "data" else b""
    return Event(t, transport, int(entry["conn"]) if transport == "tcp" else 0, kind, data)


def _read_plain(path: str, content: bytes) -> list[Event]:
    framer = Framer()
    try:
        found = framer.feed(content)
    except ReplayError as error:
        raise ReplayError(f"{path}: {error}") from None
    if framer.unfinished:
        raise ReplayError(f"{path}: the frame at octet {framer.octet} is cut short")
    # A plain file has no times of arrival; the frames' own stamps are the next best.
    stamps = [time_of(frame) for frame in found]
    first = next((stamp for stamp in stamps if stamp is not None), 0)
    times = [0.0 if stamp is None else (stamp - first) / 1e6 for stamp in stamps]
    times = list(itertools.accumulate([0.0, *times], max))
    body = [Event(t, "tcp", 1, "data", frame) for t, frame in zip(times[1:], found, strict=True)]
    return [Event(0.0, "tcp", 1, "open"), *body, Event(times[-1], "tcp", 1, "close")]


def reframe(events: Iterable[Event]) -> list[Event]:
    """Give each TCP data event exactly one HEP3 frame, at the time its last octet came.

    A frame that its connection never finished is left out. Raises ReplayError if a stream is not
    HEP3. UDP events stay as they are.
    """
    result: list[Event] = []
    framers: dict[int, Framer] = {}
    for event in events:
        if event.transport == "udp" or event.kind != "data":
            framers.pop(event.conn, None)
            result.append(event)
            continue
        try:
            found = framers.setdefault(event.conn, Framer()).feed(event.data)
        except ReplayError as error:
            raise ReplayError(f"connection {event.conn}: {error}") from None
        result += [event._replace(data=frame) for frame in found]
    return result


def frames(events: Iterable[Event]) -> Iterator[tuple[float, bytes]]:
    """Yield (seconds, HEP packet) in order of arrival, whatever the transport; see reframe."""
    return ((event.t, event.data) for event in reframe(events) if event.kind == "data")


def arrange(events: list[Event], transport: str) -> list[Event]:
    """Convert a capture to `transport`: "udp", "tcp" or "as-recorded".

    Raises ReplayError where that cannot be: HEP1, HEP2 and damaged datagrams have no length that
    could frame them in a TCP stream, and a frame may be too long for a datagram.
    """
    if transport == "as-recorded" or all(event.transport == transport for event in events):
        return events
    if transport == "udp":
        packets = [Event(t, "udp", 0, "data", data) for t, data in frames(events)]
        longest = max((len(packet.data) for packet in packets), default=0)
        if longest > MAX_DATAGRAM:
            raise ReplayError(f"a frame of {longest} octets does not fit in a datagram")
        return packets
    result = []
    for event in events:
        if event.transport == "udp":
            packet = decoded(event.data)
            if packet is None or packet.version != 3:
                raise ReplayError("has datagrams that are not HEP3, these cannot go over TCP")
            event = event._replace(transport="tcp", conn=-1)
        result.append(event)
    return [Event(0.0, "tcp", -1, "open"), *result, Event(result[-1].t, "tcp", -1, "close")]


def decoded(data: bytes) -> HepPacket | None:
    """A packet as the agent reads it, with time 0 where it has none; None if it is damaged."""
    try:
        return decode_hep(data, 0)
    except HepError:
        return None


def time_of(data: bytes) -> int | None:
    """The time stamp of a HEP packet in microseconds since 1970, None if it has none."""
    packet = decoded(data)
    return packet.time or None if packet else None


def _chunks(frame: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Vendor, type and value of each chunk of a HEP3 frame that the agent can read."""
    at = 6
    while at < len(frame):
        vendor, kind, length = struct.unpack_from("!HHH", frame, at)
        yield vendor, kind, frame[at + 6 : at + length]
        at += length


@dataclass(frozen=True)
class Rewriter:
    """Gives calls a new identity and packets a new time.

    `suffix` (ASCII, token characters of RFC 3261 section 25.1) goes behind Call-IDs, tags, Via
    branches and HEP correlation ids; `shift_us` (microseconds) is added to time stamps. Since the
    suffix is the same everywhere, messages that belonged together still do.
    """

    suffix: str = ""
    shift_us: int = 0

    def packet(self, data: bytes) -> bytes:
        """Rewrite one HEP1, HEP2 or HEP3 packet; what cannot be decoded is returned as it is.

        Raises ReplayError if the result does not fit in the u16 length of HEP3.
        """
        packet = decoded(data)
        if packet is None:
            return data
        return self._hep3(data, packet) if packet.version == 3 else self._hep12(data, packet)

    def sip(self, message: bytes) -> bytes:
        """Rewrite one SIP message; everything but the suffixes, and any other text, is kept."""
        if not self.suffix or not (start := START_LINE.match(message)):
            return message
        end = END_OF_HEAD.search(message, start.end())
        at = end.start() if end else len(message)
        return IDENTITY_HEADER.sub(self._header, message[:at]) + message[at:]

    def _header(self, match: re.Match[bytes]) -> bytes:
        name, colon, value = match.groups()
        if name.lower() in (b"call-id", b"i"):
            call_id = value.rstrip()
            if call_id.strip():
                value = call_id + self.suffix.encode() + value[len(call_id) :]
        else:
            pattern = BRANCH if name.lower() in (b"via", b"v") else TAG
            value = pattern.sub(
                lambda found: found[0] + (self.suffix.encode() if found[1] else b""), value
            )
        return name + colon + value

    def _hep3(self, frame: bytes, packet: HepPacket) -> bytes:
        shift = self.shift_us if packet.time else 0
        moved = divmod(packet.time + shift, 1_000_000)
        out = [frame[:4], b"\0\0"]
        for vendor, kind, value in _chunks(frame):
            if vendor == 0 and self.suffix:
                if kind == 0x10:  # compressed
                    kind, value = 0x0F, packet.payload
                if kind == 0x0F:
                    value = self.sip(value)
                elif kind == 0x11 and value:
                    value += self.suffix.encode()
            if vendor == 0 and shift and kind in (0x09, 0x0A) and len(value) == 4:
                value = struct.pack("!I", moved[kind - 0x09] & 0xFFFF_FFFF)
            if len(value) > MAX_HEP_FRAME - 6:
                raise ReplayError("a payload is too long for HEP3 when rewritten")
            out += [struct.pack("!HHH", vendor, kind, len(value) + 6), value]
        total = sum(map(len, out))
        if total > MAX_HEP_FRAME:
            raise ReplayError("a packet is too long for HEP3 when rewritten")
        out[1] = struct.pack("!H", total)
        return b"".join(out)

    def _hep12(self, data: bytes, packet: HepPacket) -> bytes:
        header = bytearray(data[: len(data) - len(packet.payload)])
        at = 8 + 2 * len(packet.source)
        # The time is little-endian from Kamailio, in their host's order from others.
        for layout in ("<II", ">II") if packet.time and self.shift_us else ():
            seconds, micros = struct.unpack_from(layout, header, at)
            if seconds * 1_000_000 + micros == packet.time:
                moved = divmod(packet.time + self.shift_us, 1_000_000)
                struct.pack_into(layout, header, at, moved[0] & 0xFFFF_FFFF, moved[1])
                break
        return bytes(header) + self.sip(packet.payload)


@dataclass(frozen=True)
class Plan:
    """What to play: captures (converted already), how often, how fast, with which identities."""

    captures: Sequence[list[Event]]
    speed: float = 1.0  # math.inf: no pauses
    repeat: int = 1
    fresh: bool = False
    now: bool = False
    calls_per_second: float | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))

    def offsets(self) -> list[list[float]]:
        """Start of each file in each repetition, seconds since the replay began.

        The files follow each other, and so do the repetitions. With `calls_per_second` the
        repetitions overlap instead, so that that many calls begin in a second.
        """
        spans = [max((event.t for event in events), default=0.0) for events in self.captures]
        starts = list(itertools.accumulate([0.0, *(span / self.speed for span in spans)]))
        interval = starts[-1]
        if self.calls_per_second:
            interval = max(1, self.calls()) / self.calls_per_second
        return [[start + turn * interval for start in starts[:-1]] for turn in range(self.repeat)]

    def calls(self) -> int:
        """Number of different Call-IDs in one repetition."""
        marker, found = Rewriter("\0"), set()  # the rewriter knows where a Call-ID ends
        for events in self.captures:
            for _, packet in frames(events):
                found.update(MARKED_CALL_ID.findall(marker.packet(packet)))
        return len(found)

    def steps(self, clock: Callable[[], float] = time.time) -> Iterator[Step]:
        """Yield the steps in order; `clock` (seconds since 1970) is for `now`."""
        began = clock()
        rewriting = self.now or self.fresh or self.repeat > 1
        framed = [reframe(events) for events in self.captures] if rewriting else []

        def one(turn: int, index: int, start: float) -> Iterator[Step]:
            suffix = f"-{self.run_id}-{turn + 1}" if turn or self.fresh else ""
            events = framed[index] if suffix or self.now else self.captures[index]
            shift = 0
            if self.now:
                stamps = (time_of(event.data) for event in events)
                stamp = next((stamp for stamp in stamps if stamp), None)
                # Without pauses nothing is planned, so "now" is when this file's turn has come.
                moment = clock() if math.isinf(self.speed) else began + start
                shift = int(moment * 1e6) - stamp if stamp else 0
            rewriter = Rewriter(suffix, shift)
            for event in events:
                if suffix or shift:
                    event = event._replace(data=rewriter.packet(event.data))
                yield Step(start + event.t / self.speed, (turn, index, event.conn), event)

        turns = (
            one(turn, index, start)
            for turn, starts in enumerate(self.offsets())
            for index, start in enumerate(starts)
        )
        if self.calls_per_second:
            return heapq.merge(*turns, key=lambda step: step.due)
        return itertools.chain.from_iterable(turns)


def limit(steps: Iterable[Step], rate: float) -> Iterator[Step]:
    """Push data steps at least 1/rate seconds apart, and all others behind their predecessor."""
    free = 0.0
    for step in steps:
        step = step._replace(due=max(step.due, free))
        free = step.due + (1 / rate if step.event.kind == "data" else 0.0)
        yield step


class Sender:
    """The sockets to one agent: a UDP socket, and a TCP connection for each recorded one."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._udp: socket.socket | None = None
        self._tcp: dict[tuple[int, int, int], tuple[socket.socket, Framer]] = {}

    def handle(self, step: Step) -> int:
        """Do what the step says; return the packets it completed. Raises NetworkError."""
        event = step.event
        try:
            if event.transport == "udp":
                if self._udp is None:
                    family, kind, proto, _, address = socket.getaddrinfo(
                        self.host, self.port, type=socket.SOCK_DGRAM
                    )[0]
                    self._udp = socket.socket(family, kind, proto)
                    self._udp.connect(address)  # only a connected socket hears of a closed port
                self._udp.send(event.data)
                return 1
            if event.kind == "open":
                connection = socket.create_connection((self.host, self.port), timeout=10)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._tcp[step.key] = connection, Framer()
            elif event.kind == "close":
                self._tcp.pop(step.key)[0].close()
            else:
                connection, framer = self._tcp[step.key]
                connection.sendall(event.data)
                try:
                    return len(framer.feed(event.data))
                except ReplayError:  # sent as recorded, damage and all: no frame to count
                    return 0
            return 0
        except OSError as error:
            raise self._failed(error) from None

    def finish(self) -> None:
        """Close all sockets. Raises NetworkError if nobody listened to the last datagrams."""
        unheard = self._udp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self._udp else 0
        self.close()
        if unheard:
            raise self._failed(OSError(unheard, os.strerror(unheard)))

    def close(self) -> None:
        """Close all sockets, also after an error."""
        for connection, _ in self._tcp.values():
            connection.close()
        self._tcp.clear()
        if self._udp:
            self._udp.close()
            self._udp = None

    def _failed(self, error: OSError) -> NetworkError:
        return NetworkError(f"{self.host}:{self.port}: {error.strerror or error}")


def play(
    steps: Iterable[Step],
    sender: Sender,
    totals: Totals,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[int], Any] = lambda packets: None,
) -> None:
    """Send the steps, each when due (late ones at once), counting in `totals` and `progress`."""
    began = clock()
    try:
        for step in steps:
            if (wait := began + step.due - clock()) > 0:
                sleep(wait)
            packets = sender.handle(step)
            totals.packets += packets
            totals.octets += len(step.event.data)
            progress(packets)
        sender.finish()
    finally:
        totals.seconds = clock() - began
        sender.close()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise argparse.ArgumentTypeError(f"not HOST:PORT: {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _positive(text: str) -> float:
    value = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+", text) else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"not a positive number: {text!r}")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"not a positive whole number: {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hep_replay.py", description=(__doc__ or "").split("\n")[0])
    add, pace = parser.add_argument, parser.add_mutually_exclusive_group()
    text = "where the agent listens (default 127.0.0.1:9060)"
    add("--to", type=_address, default=("127.0.0.1", 9060), metavar="HOST:PORT", help=text)
    text = "default as-recorded; a plain file goes over tcp"
    add("--transport", choices=("udp", "tcp", "as-recorded"), default="as-recorded", help=text)
    pace.add_argument("--speed", type=_positive, default=1.0, metavar="N", help="N times as fast")
    pace.add_argument(
        "--fast", action="store_const", dest="speed", const=math.inf, help="no pauses"
    )
    text = "at most N datagrams or TCP chunks a second; UDP knows no back-pressure"
    add("--rate", type=_positive, metavar="N", help=text)
    add("--repeat", type=_count, default=1, metavar="N", help="play the files N times")
    add("--fresh", action="store_true", help="new call identities also the first time")
    text = "let the repetitions overlap so that R calls begin in a second"
    add("--calls-per-second", type=_positive, metavar="R", help=text)
    add("--now", action="store_true", help="move the time stamps, first packet of each file to now")
    add("--quiet", action="store_true", help="no progress bar and no summary")
    add("files", nargs="+", metavar="FILE", help=".hepl capture, or concatenated HEP3 frames")
    return parser


@contextlib.contextmanager
def _progress(
    captures: list[list[Event]], repeat: int, quiet: bool
) -> Iterator[Callable[[int], Any]]:
    """A bar that counts packets, on a terminal and where tqdm is installed."""
    if quiet or not sys.stderr.isatty():
        yield lambda packets: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda packets: None
        return
    total = None
    with contextlib.suppress(ReplayError):  # a damaged stream has no number of packets
        total = sum(1 for events in captures for _ in frames(events)) * repeat
    with tqdm(total=total, unit=" packets", leave=False) as bar:
        yield bar.update


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(argv)
    totals, note = Totals(), ""
    captures: list[list[Event]] = []
    try:
        for path in options.files:
            events = read_capture(path)
            try:
                captures.append(arrange(events, options.transport))
                if options.repeat > 1 or options.fresh or options.now or options.calls_per_second:
                    reframe(captures[-1])  # a stream that cannot be cut is told before any is sent
            except ReplayError as error:
                raise ReplayError(f"{path}: {error}") from None
        plan = Plan(
            captures, speed=options.speed, repeat=options.repeat, fresh=options.fresh,
            now=options.now, calls_per_second=options.calls_per_second,
        )  # fmt: skip
        steps = limit(plan.steps(), options.rate) if options.rate else plan.steps()
        with _progress(captures, options.repeat, options.quiet) as progress:
            play(steps, Sender(*options.to), totals, progress=progress)
    except ReplayError as error:
        print(f"hep_replay.py: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        note = ", interrupted"
    if not options.quiet:
        rate = totals.packets / totals.seconds if totals.seconds else 0.0
        print(
            f"{len(captures)} file{'s' * (len(captures) != 1)}, {totals.packets} packets, "
            f"{totals.octets} octets in {totals.seconds:.3f} s, {rate:.0f} packets/s{note}",
            file=sys.stderr,
        )
    return 130 if note else 0


if __name__ == "__main__":
    # The agent's module brings gevent, whose loop would print an interrupt before it passes it on.
    gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)
    sys.exit(main())
