#!/usr/bin/env python3
"""Measure the agent: calls and packets a second, CPU a packet, memory a call, pauses, start.

The agent runs on the first core, pinned; the generator of the mirror and the rating API share the
second one. Each figure has its baseline from the same run, measured in turns with it: a process
that does nothing but drain a UDP socket, and a loop of bare urllib3 POSTs over as many connections.
Figures are medians of the rounds.

    benchmark.py                      everything: half an hour
    benchmark.py --rounds 1 --brief   everything, short and rough: ten minutes
    benchmark.py --only job-udp       one of them; --list names them

All traffic is on loopback. Nothing else should run meanwhile; the figures say nothing about a
machine that is busy. `--json FILE` writes them for a program.

    benchmark.py --against HEAD --only core    what a change brings: 15 seconds
    benchmark.py --against v0.1.0 --brief      all figures, short: half an hour

`--against REVISION` measures the module of that revision of git (old) and the module as it lies in
the working tree (new) in turns: old, new, new, old and so on. Each round gives a ratio new/old; the
table shows the median of the ratios, the least and the greatest. A busy machine disturbs both
modules alike, so the ratio holds where the values do not; but a difference that is smaller than
the range of the ratios means nothing.

Only the module changes: this script and all else are those of the working tree. The script relies
on little of the module: the command line, the log lines "listening" and "journal_opened", and the
names that `be_agent` and `follow` use. An option that a revision does not know is left out, and
the row says so. A figure that a revision cannot give has a row that says why. A comparison shows
the greatest speed of the whole job and its CPU time, not the speed that is held for long. Beside
the longest pause it shows the usual one: the median of the longest pauses of each half second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import itertools
import json
import os
import py_compile
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
MODULE = "rating_agent_hep"
AGENT_CORE, OTHER_CORE = 0, 1
CONNECTIONS = 16  # requests at one time, the default of rating_api_concurrency
# Calls between two messages of one call in the stream of the generator.
LAG = 50
# Calls sent and not begun yet in a run that goes as fast as the agent does, and the calls a second
# with which it begins, so that the first packets have room in the receive buffer. Ends come seconds
# later, when no late message can change them.
WINDOW = 1500
RAMP = 5_000
# Seconds for anything that has to happen beside what is measured.
DEADLINE = 120.0
# The core follows calls by a clock of its own: slots of the mirror in a second, ticks in a second
# while packets come, and seconds with one tick each after them, so that what is over is forgotten.
CORE_SLOTS, CORE_TICKS, CORE_LAST = 100, 10, 60
# Calls of one run of the core: some 50 ms. Among many short runs some are not disturbed at all.
CORE_CALLS = 300
CORE_COPIES = ("once", "twice")
# Turns in one round of a comparison, where not one: as short as these are, they lie close together.
TURNS = {"core": 8}
# Microseconds since 1970 and seconds of the monotonic clock when it begins.
CORE_EPOCH, CORE_START = 1_790_000_000_000_000, 1_000.0
# Where `hep3` puts the seconds of the time stamp, and its microseconds.
SECONDS_AT, MICROS_AT = 62, 72
ACCOUNTS = "--sip-local-domains=sip.example.com"
# Units of which less is better.
COSTS = ("us", "ms", "s", "kB")
OK = b'{"ok":true}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
EVENT_ALIAS = re.compile(r"(e\d+):\s*(begin|end)Transaction")

SDP = """v=0
o=- 53655765 2353687637 IN IP4 198.51.100.7
s=-
c=IN IP4 198.51.100.7
t=0 0
m=audio 6000 RTP/AVP 8 0 101
a=rtpmap:8 PCMA/8000
a=rtpmap:0 PCMU/8000
a=rtpmap:101 telephone-event/8000
a=sendrecv
"""
COMMON = """Max-Forwards: 70
Contact: <sip:2000@198.51.100.7:5060;transport=udp>
Allow: INVITE, ACK, CANCEL, BYE, OPTIONS, UPDATE, INFO, PRACK, REFER, NOTIFY
Supported: replaces, timer
User-Agent: Telephone 4.2.1
"""
# A call of seven packets as a proxy mirrors it: start line, From tag and To tag in place of @.
MESSAGES = (
    ("INVITE sip:2001@sip.example.com SIP/2.0", "1 INVITE", "z9hG4bKi@", False, True),
    ("SIP/2.0 100 Giving a try", "1 INVITE", "z9hG4bKi@", False, False),
    ("SIP/2.0 180 Ringing", "1 INVITE", "z9hG4bKi@", True, False),
    ("SIP/2.0 200 OK", "1 INVITE", "z9hG4bKi@", True, True),
    ("ACK sip:2001@198.51.100.9:5060 SIP/2.0", "1 ACK", "z9hG4bKa@", True, False),
    ("BYE sip:2001@198.51.100.9:5060 SIP/2.0", "2 BYE", "z9hG4bKb@", True, False),
    ("SIP/2.0 200 OK", "2 BYE", "z9hG4bKb@", True, False),
)
OPTIONS_REQUEST = ("OPTIONS sip:sip.example.com SIP/2.0", "9 OPTIONS", "z9hG4bKo@", False, False)
REGISTER_REQUEST = ("REGISTER sip:sip.example.com SIP/2.0", "7 REGISTER", "z9hG4bKr@", False, False)


def hep3(payload: bytes) -> bytes:
    """A HEP3 frame around a SIP message, with the present time."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    chunks = [(1, b"\x02"), (2, b"\x11"), (3, b"\xc6\x33\x64\x07"), (4, b"\xc6\x33\x64\x01")]
    chunks += [(7, struct.pack(">H", 5060)), (8, struct.pack(">H", 5060))]
    chunks += [(9, struct.pack(">I", seconds)), (10, struct.pack(">I", micros)), (11, b"\x01")]
    chunks += [(12, struct.pack(">I", 2001)), (15, payload)]
    body = b"".join(struct.pack(">HHH", 0, kind, len(value) + 6) + value for kind, value in chunks)
    return b"HEP3" + struct.pack(">H", len(body) + 6) + body


def stamped(packet: bytes, micros: int) -> bytes:
    """A packet of `hep3` with another time, in microseconds since 1970."""
    seconds, rest = (struct.pack(">I", part) for part in divmod(micros, 1_000_000))
    middle = packet[SECONDS_AT + 4 : MICROS_AT]
    return packet[:SECONDS_AT] + seconds + middle + rest + packet[MICROS_AT + 4 :]


def template(message: tuple[str, str, str, bool, bool], hop: bool = False) -> list[bytes]:
    """A packet in the pieces between which a call's number goes, eight octets each.

    With ``hop`` it is the message between the proxy and the callee, with the proxy's Via on top.
    """
    start, cseq, branch, tagged, with_body = message
    proxy = f"Via: SIP/2.0/UDP 198.51.100.1:5060;branch={branch[:-1]}p@\n" if hop else ""
    body = SDP.replace("\n", "\r\n") if with_body else ""
    head = (
        f"{start}\n{proxy}Via: SIP/2.0/UDP 198.51.100.7:5060;rport;branch={branch}\n"
        f"From: <sip:2000@sip.example.com>;tag=f@\n"
        f"To: <sip:2001@sip.example.com>{';tag=t@' if tagged else ''}\n"
        f"Call-ID: @-bench@198.51.100.7\nCSeq: {cseq}\n{COMMON}"
        f"{'Content-Type: application/sdp' + chr(10) if with_body else ''}"
        f"Content-Length: {len(body)}\n\n"
    ).replace("\n", "\r\n")
    marked = re.sub(r"(tag=[ft]|z9hG4bK[a-z]+|Call-ID: )@", lambda m: m[1] + "\0" * 8, head)
    return hep3((marked + body).encode()).split(b"\0" * 8)


class Mirror:
    """The mirror of many calls: `packets` gives those of a slot, in which each call has moved on.

    In slot s it is the turn of message i of call s - i*LAG. Calls are numbered from `first`. With
    `twice` each message is there as the proxy received it and as it forwarded it.
    """

    def __init__(
        self, first: int, calls: int, messages: Sequence[int] = range(7), twice: bool = False
    ) -> None:
        self.first, self.calls = first, calls
        self._templates = [self._copies(MESSAGES[index], twice) for index in messages]
        self.slots = calls + (len(messages) - 1) * LAG

    @staticmethod
    def _copies(message: tuple[str, str, str, bool, bool], twice: bool) -> list[list[bytes]]:
        if not twice:
            return [template(message)]
        # A reply comes from the callee's side, where the proxy's Via is on top.
        reply = message[0].startswith("SIP/2.0")
        return [template(message, hop) for hop in (reply, not reply)]

    def packets(self, slot: int) -> list[bytes]:
        return [
            (b"%08d" % (self.first + slot - index * LAG)).join(pieces)
            for index, copies in enumerate(self._templates)
            if 0 <= slot - index * LAG < self.calls
            for pieces in copies
        ]


class Ledger:
    """The rating API: answers ok at once, REST and GraphQL, and counts each call's events."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.requests = 0

    def take(self, path: bytes, body: bytes) -> bytes:
        self.requests += 1
        content = json.loads(body)
        if path == b"/graphql":
            answers = {}
            for alias, kind in EVENT_ALIAS.findall(content["query"]):
                self._note(kind, content["variables"][f"{alias}_transaction_tag"])
                answers[alias] = {"ok": True}
            return json.dumps({"data": answers}).encode()
        self._note(
            "begin" if path.endswith(b"begin_transaction") else "end", content["transaction_tag"]
        )
        return OK

    def _note(self, kind: str, tag: str) -> None:
        counts = self.begun if kind == "begin" else self.ended
        counts[tag] = counts.get(tag, 0) + 1

    def faults(self, calls: int) -> str:
        """What is wrong with the calls, "" where each was begun and ended exactly once."""
        wrong = [
            f"{what}: {len(counts)} of {calls} calls, {sum(counts.values())} requests"
            for what, counts in (("begun", self.begun), ("ended", self.ended))
            if len(counts) != calls or sum(counts.values()) != calls
        ]
        return "; ".join(wrong)


class _Connection(asyncio.Protocol):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = re.search(rb"content-length: *(\d+)", head, re.I)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            answer = self._ledger.take(head.split(b" ", 2)[1], body)
            self._transport.write(ANSWER % (len(answer), answer))


class Failed(SystemExit):
    """What was to be measured did not run; the text says why."""


class Process:
    """One of this script's roles in a process of its own, pinned to the agent's core."""

    def __init__(self, role: str, *arguments: str, **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.log = Path(self.folder.name, "log")
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE), "--role", role, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        self.pid = self._process.pid
        self._asked = 0

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [line for line in self.log.read_text().splitlines() if f'"{event}"' in line]
        return [json.loads(line) for line in found if line.endswith("}")]

    def wait_for(self, event: str, number: int = 1) -> list[dict[str, Any]]:
        deadline = time.monotonic() + DEADLINE
        while True:
            # Asked for before the log is read: a process may write its line and end.
            over = time.monotonic() > deadline or self._process.poll() is not None
            if len(lines := self.lines(event)) >= number:
                return lines
            if over:
                raise self._failed(f"no {event!r}")
            time.sleep(0.005)

    def _failed(self, text: str) -> Failed:
        return Failed(f"{text} from process {self.pid}: {self.log.read_text()[-500:]}")

    def ask(self, event: str) -> dict[str, Any]:
        """Have it do its work once more, in the role `core`; returns the line that it prints."""
        self._asked += 1
        assert self._process.stdin
        # Of a process that is gone `wait_for` tells why.
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        return self.wait_for(event, self._asked)[-1]

    def address(self, transport: str) -> tuple[str, int]:
        for line in self.wait_for("listening", 2):
            if line["transport"] == transport:
                return "127.0.0.1", int(line["address"].rpartition(":")[2])
        raise Failed(f"the agent does not listen over {transport}")

    @property
    def cpu(self) -> float:
        """Seconds of CPU so far, of all threads."""
        # What clock_getcpuclockid(3) makes of a pid, which Python does not have: to a nanosecond,
        # where /proc counts in hundredths of a second.
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:
            raise self._failed("nothing more") from None

    @property
    def resident(self) -> int:
        """Octets of resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGESIZE"
        )

    def settle(self) -> None:
        """Wait until it has nothing to do."""
        deadline = time.monotonic() + DEADLINE
        before = -1.0
        while time.monotonic() < deadline:
            # Ticks and polls cost some milliseconds a second.
            if (cpu := self.cpu) - before <= 0.01:
                return
            before = cpu
            time.sleep(0.3)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.kill(self.pid, signal.SIGKILL)
                self._process.wait()
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self.folder.cleanup()


# Roles


def load_module() -> Any:
    """The module in the folder that MODULE_FOLDER names."""
    folder = os.environ["MODULE_FOLDER"]
    sys.path.insert(0, folder)
    module = importlib.import_module(MODULE)
    assert module.__file__ == f"{folder}/{MODULE}.py", module.__file__
    return module


def replace(owner: Any, name: str, value: Any) -> None:
    """Put `value` in the place of a part of the module; a revision may not have it."""
    if not hasattr(owner, name):
        raise SystemExit(f"this revision has no {name} in {owner.__name__}")
    setattr(owner, name, value)


def be_agent(arguments: list[str]) -> int:
    if os.environ.get("CORES") != "all":
        os.sched_setaffinity(0, {AGENT_CORE})
    else:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    module = load_module()
    import gevent

    if os.environ.get("NO_DELIVERY"):
        replace(module.Delivery, "put", lambda *_, **__: None)
    if os.environ.get("NULL_API"):
        delivered = module.DELIVERED
        replace(module.RatingApi, "send", lambda *_, **__: delivered)
    if os.environ.get("RECEIVE_BUFFER"):
        replace(module, "RECEIVE_BUFFER", int(os.environ["RECEIVE_BUFFER"]))
    if not os.environ.get("BEYOND", "1"):
        replace(module, "_SO_RCVBUFFORCE", -1)
    if os.environ.get("QUIET"):
        # Once it has said where it listens.
        gevent.spawn_later(0.3, module.log.setLevel, "WARNING")
    if os.environ.get("PAUSES"):

        def watch() -> None:
            longest, told = 0.0, time.monotonic()
            while True:
                before = time.monotonic()
                gevent.sleep(0.001)
                now = time.monotonic()
                longest = max(longest, now - before - 0.001)
                if now - told >= 0.5:
                    print(json.dumps({"event": "pause", "longest": longest}), flush=True)
                    longest, told = 0.0, now

        gevent.spawn(watch)
    status: int = module.main(arguments)
    return status


def be_drain(arguments: list[str]) -> int:
    """Receive over UDP and throw away: the baseline, or a target on the core of an argument."""
    os.sched_setaffinity(0, {int(arguments[0]) if arguments else AGENT_CORE})
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024 * 1024)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, 33, 16 * 1024 * 1024)
    sock.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    for transport in ("udp", "tcp"):
        line = {"event": "listening", "transport": transport, "address": address}
        print(json.dumps(line), flush=True)
    while True:
        sock.recvfrom(65_536)


def be_poster(arguments: list[str]) -> int:
    """The baseline of delivery: bare urllib3 POSTs from as many greenlets as the agent has."""
    os.sched_setaffinity(0, {AGENT_CORE})
    from gevent import monkey

    monkey.patch_all()
    import gevent
    import urllib3

    url, seconds = arguments[0], float(arguments[1])
    pool = urllib3.connection_from_url(url, maxsize=CONNECTIONS, block=True)
    body = json.dumps(
        {
            "tenant": "default",
            "transaction_tag": "x" * 30,
            "account_tag": "2000",
            "source": "sip:2000@sip.example.com",
            "source_ip": "198.51.100.7",
            "destination": "sip:2001@sip.example.com",
            "product_tag": "VOICE",
            "timestamp_begin": "2026-11-24T12:00:00.000Z",
        }
    ).encode()
    headers = {"Content-Type": "application/json"}
    count, end = 0, time.monotonic() + seconds

    def post() -> None:
        nonlocal count
        while time.monotonic() < end:
            pool.urlopen("POST", "/v1/begin_transaction", body=body, headers=headers, retries=False)
            count += 1

    before = time.process_time()
    gevent.joinall([gevent.spawn(post) for _ in range(CONNECTIONS)])
    line = {
        "event": "posted",
        "a_second": count / seconds,
        "cpu": (time.process_time() - before) / count,
    }
    print(json.dumps(line), flush=True)
    return 0


def be_core(arguments: list[str]) -> int:
    """What the core costs in process: CPU microseconds a call, anew for each line of stdin."""
    os.sched_setaffinity(0, {AGENT_CORE})
    module = load_module()
    # The agent collects garbage in moments of its own choice.
    gc.disable()
    mirrors = {name: Mirror(10_000_000, CORE_CALLS, twice=name == "twice") for name in CORE_COPIES}
    ticks = {name: core_ticks(mirror) for name, mirror in mirrors.items()}
    for _ in sys.stdin:
        costs = {name: follow(module, ticks[name]) / CORE_CALLS * 1e6 for name in CORE_COPIES}
        print(json.dumps({"event": "core", **costs}), flush=True)
    return 0


def core_ticks(mirror: Mirror) -> list[tuple[float, int, list[bytes]]]:
    """The mirror by virtual time: `now` and arrival of each tick, and the packets in it."""
    width = CORE_SLOTS // CORE_TICKS
    loaded = mirror.slots // width + 1
    ticks = []
    for tick in (*range(loaded), *range(loaded, loaded + CORE_LAST * CORE_TICKS, CORE_TICKS)):
        arrival = CORE_EPOCH + tick * 1_000_000 // CORE_TICKS
        slots = range(tick * width, (tick + 1) * width)
        packets = [stamped(packet, arrival) for slot in slots for packet in mirror.packets(slot)]
        ticks.append((CORE_START + tick / CORE_TICKS, arrival, packets))
    return ticks


def follow(module: Any, ticks: list[tuple[float, int, list[bytes]]]) -> float:
    """CPU seconds in which a new call table follows the calls to their end."""
    configuration = module.load_configuration([ACCOUNTS], {})
    table = module.CallTable(configuration.settings, configuration.rules)
    decode, parse, sighting = module.decode_hep, module.parse_sip, module.Sighting
    events = 0
    gc.collect()
    gc.freeze()
    before = time.process_time()
    for now, arrival, packets in ticks:
        for data in packets:
            packet = decode(data, arrival)
            message = parse(packet.payload, packet.time)
            if message is not None:
                events += len(table.handle(sighting(packet, message), now))
        events += len(table.expire(now))
    seconds = time.process_time() - before
    if events != 2 * CORE_CALLS:
        raise SystemExit(f"{events} events of {CORE_CALLS} calls, where each has two")
    return seconds


# What is measured


class Figure(NamedTuple):
    """One line of the table; `met` is None where there is no target."""

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    baseline: str = ""
    note: str = ""


class Bench:
    """The figures, each a method; `rounds` and `brief` say how thoroughly.

    `folder` is where the module lies. In a comparison `known` has the options of the command line
    that this revision knows, as "--max-calls"; `remarks` collects what a reader of its values must
    know: calls that were charged wrongly, options that were left out. `stack` holds the processes
    that live on from one round to the next, until it is closed.
    """

    def __init__(
        self, rounds: int, brief: bool, folder: Path = ROOT, known: frozenset[str] | None = None
    ) -> None:
        self.rounds, self.brief = rounds, brief
        self.folder, self.known = folder, known
        self.remarks: list[str] = []
        self.next_call = 10_000_000
        self.stack = contextlib.ExitStack()
        self._core: Process | None = None

    def start_agent(self, *options: str, **environment: str) -> Process:
        """The agent; NULL_API=1 answers its events in process, RECEIVE_BUFFER is asked for."""
        options = ("--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0", ACCOUNTS, *options)
        if self.known is not None:
            unknown = [x for x in options if x.partition("=")[0] not in self.known]
            self.remarks += [f"without {option}" for option in unknown]
            options = tuple(x for x in options if x not in unknown)
        return Process("agent", *options, MODULE_FOLDER=str(self.folder), **environment)

    def mirror(self, calls: int, messages: Sequence[int] = range(7)) -> Mirror:
        """Calls that no agent has seen."""
        self.next_call += calls
        return Mirror(self.next_call - calls, calls, messages)

    # The whole job

    async def _serve(self, ledger: Ledger) -> tuple[asyncio.AbstractServer, str]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(ledger), "127.0.0.1", 0)
        return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _drive(
        self, agent: Process, ledger: Ledger, mirror: Mirror, rate: float, udp: bool = True
    ) -> float:
        """Send calls, at `rate` a second or, for 0, as fast as they begin; the begins a second.

        These are counted in the second half, when ends come as well.
        """
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.connect(agent.address("udp" if udp else "tcp"))
            started = last = time.monotonic()
            slot = progress = 0
            marks: list[float] = []

            def look() -> float:
                nonlocal progress, last
                now, events = time.monotonic(), len(ledger.begun) + len(ledger.ended)
                if events != progress:
                    progress, last = events, now
                share = (0.5, 0.98, inf)[len(marks)]
                if len(ledger.begun) >= share * mirror.calls:
                    marks.append(now)
                return now

            while slot < mirror.slots:
                now = look()
                due = (now - started) * (rate or RAMP)
                if not rate:
                    due = min(due, len(ledger.begun) + WINDOW)
                if now - last > 5 and not rate:
                    break  # Something was lost: the ledger tells.
                todo = min(int(due) - slot, mirror.slots - slot, 10)
                for _ in range(todo):
                    for packet in mirror.packets(slot):
                        sock.sendall(packet)
                    slot += 1
                await asyncio.sleep(0 if todo > 0 else 0.0005)
            while len(ledger.ended) < mirror.calls and look() - last < 5:
                await asyncio.sleep(0.002)
            first, end = marks if len(marks) == 2 else (started, inf)
            return 0.48 * mirror.calls / (end - first)

    def _job(
        self, *options: str, calls: int, rate: float = 0, udp: bool = True
    ) -> tuple[float, str, float]:
        """Calls a second of one run, what was wrong with its ledger, and CPU seconds a call."""

        async def run() -> tuple[float, str, float]:
            ledger = Ledger()
            server, url = await self._serve(ledger)
            with self.start_agent(f"--rating-api-url={url}", *options) as agent:
                agent.address("udp")
                cpu = agent.cpu
                held = await self._drive(agent, ledger, self.mirror(calls), rate, udp)
                cpu = (agent.cpu - cpu) / calls
            server.close()
            fault = ledger.faults(calls)
            self.remarks += [fault] if fault else []
            return held, fault, cpu

        return asyncio.run(run())

    def _posts(self, seconds: float) -> float:
        """POSTs a second of the bare loop."""

        async def run() -> float:
            server, url = await self._serve(Ledger())
            with Process("poster", url, str(seconds)) as poster:
                while not poster.lines("posted"):
                    await asyncio.sleep(0.1)
                rate = float(poster.lines("posted")[0]["a_second"])
            server.close()
            return rate

        return asyncio.run(run())

    def _whole(self, target: float, share: float) -> Iterator[Figure]:
        brief = self.brief
        runs, posts, faults = [], [], []
        for _ in range(self.rounds):
            posts.append(self._posts(1.5 if brief else 4))
            runs.append(self._job(calls=12_000 if brief else 20_000))
            faults += [runs[-1][1]] if runs[-1][1] else []
        rate = statistics.median(run[0] for run in runs)
        allowed = statistics.median(posts) / 2
        target = max(target, share * allowed)
        yield Figure(
            "whole job: as fast as it goes",
            rate,
            "calls/s",
            f">= {target:,.0f}",
            rate >= target,
            f"{allowed:,.0f} by bare POSTs",
            "; ".join(faults)
            or f"all right; {statistics.median(x[2] for x in runs) * 1e6:.0f} us CPU a call",
        )
        if self.known is not None:
            cpu = statistics.median(run[2] for run in runs) * 1e6
            yield Figure("whole job: CPU a call", cpu, "us")
            return
        # At a steady rate, whatever the agent does: what it holds for long.
        for part in (0.97, 0.93, 0.88, 0.8, 0.7):
            seconds = 5 if brief else 30
            _, fault, cpu = self._job(calls=int(rate * part * seconds), rate=rate * part)
            if not fault:
                break
        held = rate * part
        yield Figure(
            f"whole job: held for {seconds} s",
            held if not fault else 0,
            "calls/s",
            f">= {target:,.0f}",
            not fault and held >= target,
            "",
            fault or f"all right; {cpu * 1e6:.0f} us CPU a call",
        )

    def job_udp(self) -> Iterator[Figure]:
        """Whole job over UDP."""
        yield from self._whole(1_500, 0.75)

    def job_journal(self) -> Iterator[Figure]:
        """The same with the journal, as a part of the figure without."""
        calls = 12_000 if self.brief else 20_000
        parts, rates, faults = [], [], []
        for _ in range(self.rounds):
            without = self._job(calls=calls)
            with tempfile.TemporaryDirectory(dir=ROOT) as folder:
                within = self._job(f"--state-dir={folder}/state", calls=calls)
            parts.append(within[0] / without[0])
            rates.append(within[0])
            faults += [x for x in (without[1], within[1]) if x]
        part = statistics.median(parts)
        yield Figure(
            "journal: part of the figure without",
            part,
            "",
            ">= 0.8",
            part >= 0.8,
            "",
            "; ".join(faults) or f"all right; {statistics.median(rates):,.0f} calls/s",
        )

    # CPU

    def core(self) -> Iterator[Figure]:
        """CPU for a call in decoder, parser and call table alone: quick, and steady to 2 %."""
        if self._core is None:
            process = Process("core", MODULE_FOLDER=str(self.folder))
            self._core = self.stack.enter_context(process)
            self.stack.callback(setattr, self, "_core", None)
            # The interpreter adapts itself to the code in the first one.
            self._core.ask("core")
        costs = [self._core.ask("core") for _ in range(self.rounds)]
        for name in CORE_COPIES:
            value = min(cost[name] for cost in costs)
            yield Figure(f"core: CPU a call, each message {name}", value, "us")

    def _send(self, process: Process, packets: Iterable[bytes], udp: bool) -> int:
        """Send packets no faster than a receive buffer of 4 MB holds; returns how many."""
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        count = 0
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.connect(process.address("udp" if udp else "tcp"))
            started = time.monotonic()
            for packet in packets:
                sock.sendall(packet)
                count += 1
                if udp and count % 50 == 0:
                    # 14,000 a second.
                    time.sleep(max(0.0, count / 14_000 - (time.monotonic() - started)))
        process.settle()
        return count

    def _cpu(self, process: Process, packets: Iterable[bytes], udp: bool) -> float:
        process.settle()
        before = process.cpu
        count = self._send(process, packets, udp)
        return (process.cpu - before) / count * 1e6

    def _ignored(self) -> Iterator[bytes]:
        kinds = [template(x) for x in (OPTIONS_REQUEST, REGISTER_REQUEST, MESSAGES[1])]
        number = 20_000 if self.brief else 100_000
        # A 100 of no call waits as an orphan where it is no copy: here it belongs to a call.
        first = self.next_call
        self.next_call += 1
        yield (b"%08d" % first).join(template(MESSAGES[0]))
        for index in range(number):
            yield (b"%08d" % first).join(kinds[index % len(kinds)])

    def cpu_ignored(self) -> Iterator[Figure]:
        """CPU for a packet that can't matter."""
        for udp, target in ((True, 12), (False, 6)):
            values, drains = [], []
            with self.start_agent(NULL_API="1") as agent, Process("drain") as drain:
                for _ in range(self.rounds):
                    values.append(self._cpu(agent, self._ignored(), udp))
                    if udp:
                        drains.append(self._cpu(drain, self._ignored(), True))
            value = statistics.median(values)
            baseline = f"{statistics.median(drains):.1f} by a bare drain" if drains else ""
            name = f"CPU a packet that can't matter, {'UDP' if udp else 'TCP'}"
            yield Figure(name, value, "us", f"<= {target}", value <= target, baseline)

    def _calls(self, number: int, messages: Sequence[int] = range(7)) -> Iterator[bytes]:
        mirror = self.mirror(number, messages)
        return (packet for slot in range(mirror.slots) for packet in mirror.packets(slot))

    def cpu_call(self) -> Iterator[Figure]:
        """CPU for a call of seven packets without delivery, and with all but HTTP."""
        number = 3_000 if self.brief else 10_000
        for name, target, environment in (
            ("without delivery", 150, {"NO_DELIVERY": "1"}),
            ("with outbox, workers and log lines, but no HTTP", 0, {"NULL_API": "1"}),
        ):
            for udp in (False, True):
                values = []
                with self.start_agent(**environment) as agent:
                    for _ in range(self.rounds):
                        values.append(self._cpu(agent, self._calls(number), udp) * 7)
                value = statistics.median(values)
                transport = "UDP" if udp else "TCP"
                wanted, met = (f"<= {target}", value <= target) if target else ("", None)
                yield Figure(f"CPU a call {name}, {transport}", value, "us", wanted, met)

    def forward(self) -> Iterator[Figure]:
        """CPU for a packet with one UDP target of hep_forward, as a part of that without."""
        number = 1_500 if self.brief else 5_000
        kinds: dict[str, Callable[[], Iterable[bytes]]] = {
            "of a call": lambda: self._calls(number),
            "that can't matter": self._ignored,
        }
        ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
        costs: dict[str, list[float]] = {kind: [] for kind in kinds}
        with Process("drain", str(OTHER_CORE)) as sink, contextlib.ExitStack() as stack:
            target = f"--hep-forward=udp://127.0.0.1:{sink.address('udp')[1]}"
            agents = [
                stack.enter_context(self.start_agent(*options, NULL_API="1"))
                for options in ((), (target,))
            ]
            for turn in range(2 * self.rounds):
                for kind, packets in kinds.items():
                    pair = {}
                    for index in (0, 1) if turn % 2 else (1, 0):
                        pair[index] = self._cpu(agents[index], packets(), True)
                    ratios[kind].append(pair[1] / pair[0])
                    costs[kind].append(pair[0])
        for kind in kinds:
            ratio = statistics.median(ratios[kind])
            without = statistics.median(costs[kind])
            spread = f"{min(ratios[kind]):.2f} to {max(ratios[kind]):.2f}"
            yield Figure(
                f"forwarding: CPU a packet {kind}, part of that without",
                ratio,
                "",
                "<= 1.3",
                ratio <= 1.3,
                f"{without:.1f} us without",
                spread,
            )

    # Bursts

    def burst(self) -> Iterator[Figure]:
        """Packets sent at once of which none is lost."""
        packet = (b"%08d" % 1).join(template(OPTIONS_REQUEST))
        for name, environment in (
            ("the default receive buffer", {"RECEIVE_BUFFER": "106496"}),
            ("as large as net.core.rmem_max allows", {"BEYOND": ""}),
            ("the 16 MiB that root gets", {}),
        ):
            with self.start_agent(NULL_API="1", **environment) as agent:
                address = agent.address("udp")
                granted = next(
                    x["receive_buffer"] for x in agent.lines("listening") if x["transport"] == "udp"
                )
                best, low, high = 0, 0, 400_000
                while high - low > max(50, low // 20):
                    size = (low + high) // 2 if low else max(high // 64, 100)
                    dropped = _udp_drops(address[1])
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                        sock.connect(address)
                        for _ in range(size):
                            sock.send(packet)
                    agent.settle()
                    if _udp_drops(address[1]) == dropped:
                        best, low = max(best, size), size
                    else:
                        high = size
                    if low and low * 2 < high and best == low:
                        high = min(high, low * 4)
                yield Figure(
                    f"burst without loss, {name}",
                    best,
                    "packets",
                    "",
                    None,
                    "",
                    f"{granted:,} octets granted, packets of {len(packet)}",
                )

    # Memory and growth

    def memory(self) -> Iterator[Figure]:
        """Resident memory for an open call."""
        number = 20_000 if self.brief else 100_000
        with self.start_agent(NULL_API="1") as agent:
            self._send(agent, self._calls(200), False)
            before = agent.resident
            self._send(agent, self._calls(number, range(5)), False)
            value = (agent.resident - before) / number
        yield Figure(
            f"memory an open call, {number:,} of them", value / 1000, "kB", "<= 1.0", value <= 1000
        )

    def growth(self) -> Iterator[Figure]:
        """CPU for a call beside many open ones."""
        measured = 3_000 if self.brief else 6_000
        steps = (1_000, 10_000, 50_000) if self.brief else (1_000, 10_000, 100_000, 500_000)
        costs: dict[int, list[float]] = {step: [] for step in steps}
        # All sizes at the same time, in turns: a machine's mood changes over minutes.
        with contextlib.ExitStack() as stack:
            agents = {}
            for step in steps:
                agent = stack.enter_context(self.start_agent("--max-calls=2000000", NULL_API="1"))
                self._send(agent, self._calls(step, range(5)), False)
                agents[step] = agent
            for _ in range(self.rounds):
                for step, agent in agents.items():
                    costs[step].append(self._cpu(agent, self._calls(measured), False) * 7)
        middle = {step: statistics.median(values) for step, values in costs.items()}
        first = middle[steps[0]]
        for step in steps:
            part = middle[step] / first
            yield Figure(
                f"CPU a call beside {step:,} open ones",
                middle[step],
                "us",
                "<= 1.15 of the first",
                part <= 1.15,
                "",
                f"{part:.2f} of the first",
            )

    def pause(self) -> Iterator[Figure]:
        """The longest pause of the event loop with many calls under load."""
        number = 40_000 if self.brief else 200_000
        for name, journal in (("", False), (" and journal", True)):
            with tempfile.TemporaryDirectory(dir=ROOT) as folder:
                options = ["--max-calls=1000000"]
                options += [f"--state-dir={folder}/state"] if journal else []
                with self.start_agent(*options, NULL_API="1", PAUSES="1", QUIET="1") as agent:
                    self._send(agent, self._calls(number, range(5)), True)
                    seen = len(agent.lines("pause"))
                    # Full calls among them, at 7,000 packets a second; they linger and expire.
                    count, started = 0, time.monotonic()
                    seconds = 10 if self.brief else 45
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                        sock.connect(agent.address("udp"))
                        for packet in self._calls(1_000 * seconds):
                            sock.send(packet)
                            count += 1
                            if count % 20 == 0:
                                time.sleep(max(0.0, count / 7_000 - (time.monotonic() - started)))
                    pauses = [line["longest"] * 1000 for line in agent.lines("pause")[seen + 1 :]]
            value, usual = max(pauses), statistics.median(pauses)
            if self.known is not None:
                # One moment of another process makes the longest, so that no ratio holds.
                yield Figure(f"usual pause, {number:,} open calls{name}", usual, "ms")
            yield Figure(
                f"longest pause, {number:,} open calls{name}",
                value,
                "ms",
                "<= 20",
                value <= 20,
                "",
                f"median of the half seconds' longest {usual:.1f} ms",
            )

    def start(self) -> Iterator[Figure]:
        """Start with a journal of many calls."""
        number = 20_000 if self.brief else 100_000
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            options = ("--max-calls=1000000", f"--state-dir={folder}/state")
            with self.start_agent(*options, NULL_API="1") as agent:
                self._send(agent, self._calls(number, range(5)), False)
            values = []
            for _ in range(self.rounds):
                started = time.monotonic()
                with self.start_agent(*options, NULL_API="1") as agent:
                    running = agent.wait_for("journal_opened")[0]["running"]
                    values.append(time.monotonic() - started)
                if running != number:
                    raise Failed(f"{running} of {number} calls came back")
        value = statistics.median(values)
        yield Figure(f"start with {number:,} calls in the journal", value, "s", "<= 5", value <= 5)

    # Several agents

    def cluster(self) -> Iterator[Figure]:
        """CPU a call of 1, 2 and 3 agents with Redis, at 600 calls a second; what Redis needs."""
        calls, rate = (2_000, 600) if self.brief else (12_000, 600)
        alone, _, fault = self._sprayed(None, 1, calls, rate)
        yield Figure(
            "one agent, no Redis: CPU a call", alone * 1e6, "us", note=fault or "all right"
        )
        for number in (1, 2, 3):
            with RedisServer() as server:
                cpu, lag, fault = self._sprayed(server, number, calls, rate)
                redis = server.cpu / calls
            note = f"Redis {redis * 1e6:.0f} us: {1 / redis:,.0f} calls/s a core; lag {lag:.1f} s"
            yield Figure(
                f"{number} agents: CPU a call of all",
                cpu * 1e6,
                "us",
                f"<= {alone * 1.5e6:.0f}" if number == 1 else "",
                cpu <= alone * 1.5 if number == 1 else None,
                note=fault or note,
            )
        with RedisServer() as server:
            with self.start_agent(*server.options, NULL_API="1") as agent:
                agent.wait_for("shards_taken")
                before, number = server.memory, 1_000 if self.brief else 10_000
                self._send(agent, self._calls(number, range(5)), False)
                server.wait_until_read()
                call = (server.memory - before) / number
            for packet in self._calls(number, range(1)):
                server.ask("XADD", "waiting", "*", "f", packet)
            entry = server.number("MEMORY", "USAGE", "waiting", "SAMPLES", "0") / number
        yield Figure("Redis memory: a running call", call / 1000, "kB")
        yield Figure("Redis memory: a waiting packet", entry / 1000, "kB")

    def cluster_rate(self) -> Iterator[Figure]:
        """Calls a second that two agents on two cores hold, with Redis and the API beside them."""
        seconds, held, note = 4 if self.brief else 20, 0.0, "none"
        for rate in (400, 600, 800, 1_000, 1_300, 1_600):
            with RedisServer() as server:
                _, lag, fault = self._sprayed(server, 2, rate * seconds, rate, CORES="all")
            if fault:
                note = f"at {rate}: {fault}"
                break
            held, note = rate, f"all right; lag {lag:.1f} s at the end"
        yield Figure(f"2 agents on 2 cores: held for {seconds} s", held, "calls/s", note=note)

    def _sprayed(
        self, server: RedisServer | None, number: int, calls: int, rate: float, **environment: str
    ) -> tuple[float, float, str]:
        """Packets go to agents in turn: CPU seconds a call, last lag, what was wrong."""

        async def run() -> tuple[float, float, str]:
            ledger = Ledger()
            api, url = await self._serve(ledger)
            options = (f"--rating-api-url={url}", *(server.options if server else ()))
            with contextlib.ExitStack() as stack:
                agents = [
                    stack.enter_context(self.start_agent(*options, QUIET="", **environment))
                    for _ in range(number)
                ]
                places = [agent.address("udp") for agent in agents]
                if server:
                    for agent in agents:
                        agent.wait_for("shards_taken")
                    server.start_counting()
                before = sum(agent.cpu for agent in agents)
                last = await self._spray(places, ledger, self.mirror(calls), rate)
                cpu = (sum(agent.cpu for agent in agents) - before) / calls
            api.close()
            fault = ledger.faults(calls)
            self.remarks += [fault] if fault else []
            return cpu, last, fault

        return asyncio.run(run())

    async def _spray(
        self, places: list[tuple[str, int]], ledger: Ledger, mirror: Mirror, rate: float
    ) -> float:
        """Send each packet to another agent; the seconds from the last packet to the last end."""
        turn = itertools.cycle(places)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            started = time.monotonic()
            for slot in range(mirror.slots):
                while (late := slot / rate - (time.monotonic() - started)) > 0:
                    await asyncio.sleep(late)
                for packet in mirror.packets(slot):
                    sock.sendto(packet, next(turn))
                await asyncio.sleep(0)
            sent = time.monotonic()
            while len(ledger.ended) < mirror.calls and time.monotonic() - sent < 15:
                await asyncio.sleep(0.01)
            return time.monotonic() - sent


class RedisServer:
    """A redis-server for the figures of a cluster, on the other core, without a disk."""

    def __init__(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise Failed("no redis-server: make redis-server")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/tmp")
        self.options = (f"--cluster-url=redis://127.0.0.1:{self.port}",)
        self._before = 0.0
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.ask("PING")
                return
            time.sleep(0.02)
        raise Failed("redis-server does not start")

    def ask(self, *words: str | bytes) -> bytes:
        """The answer to a command, as Redis writes it."""
        octets = [word.encode() if isinstance(word, str) else word for word in words]
        parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in octets]
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            sock.sendall(b"*%d\r\n" % len(parts) + b"".join(parts))
            return sock.recv(65_536)

    def number(self, *words: str) -> int:
        """The answer to a command that answers a number."""
        return int(self.ask(*words)[1:])

    @property
    def memory(self) -> int:
        found = re.search(rb"used_memory:(\d+)", self.ask("INFO", "memory"))
        assert found
        return int(found[1])

    @property
    def cpu(self) -> float:
        """Seconds of CPU since `start_counting`."""
        return time.clock_gettime(~self._process.pid << 3 | 2) - self._before

    def start_counting(self) -> None:
        self._before += self.cpu

    def wait_until_read(self) -> None:
        """Until no stream has an entry that was not committed."""
        deadline = time.monotonic() + DEADLINE
        while any(self.number("XLEN", f"rating:stream:{number}") for number in range(64)):
            if time.monotonic() > deadline:
                raise Failed("the streams are not read")
            time.sleep(0.05)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _udp_drops(port: int) -> int:
    """Packets that the kernel dropped at a UDP socket of 127.0.0.1, as /proc/net/udp has them."""
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        columns = line.split()
        if int(columns[1].rpartition(":")[2], 16) == port:
            return int(columns[-1])
    raise SystemExit(f"no socket at port {port}")


FIGURES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "job-udp": Bench.job_udp,
    "job-journal": Bench.job_journal,
    "core": Bench.core,
    "cpu-ignored": Bench.cpu_ignored,
    "cpu-call": Bench.cpu_call,
    "forward": Bench.forward,
    "burst": Bench.burst,
    "memory": Bench.memory,
    "growth": Bench.growth,
    "pause": Bench.pause,
    "start": Bench.start,
    "cluster": Bench.cluster,
    "cluster-rate": Bench.cluster_rate,
}


def machine() -> str:
    """Processor, cores, Python and date, for the head of the table."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{model[1] if model else 'processor unknown'}, {os.cpu_count()} cores, Python {version}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def amount(value: float, unit: str) -> str:
    """A value as people read it."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def show(figure: Figure) -> str:
    """A figure as a line of a Markdown table."""
    met = {True: "yes", False: "**no**", None: ""}[figure.met]
    value = amount(figure.value, figure.unit)
    return (
        f"| {figure.name} | {value} | {figure.target} | {met} | {figure.baseline} | {figure.note} |"
    )


def measure(names: Iterable[str], bench: Bench) -> Iterator[dict[str, Any]]:
    """Print the figures as they come, and yield them for --json."""
    print(f"| figure | value | target | met | baseline | note |\n{'|---' * 6}|")
    for name in names:
        with bench.stack:
            for found in FIGURES[name](bench):
                print(show(found), flush=True)
                yield found._asdict()


# The comparison of two revisions


class Compared(NamedTuple):
    """A figure of two revisions: old and new values and their ratios new/old, one a round."""

    name: str
    unit: str
    old: list[float]
    new: list[float]
    ratios: list[float]


def take_modules(revision: str, folder: Path) -> tuple[Path, Path]:
    """Folders with the module of a revision, and with a copy of it as it lies in the tree now."""
    command = ["git", "-C", str(ROOT), "show", f"{revision}:{MODULE}.py"]
    shown = subprocess.run(command, capture_output=True)
    if shown.returncode:
        raise SystemExit(f"--against {revision}: {shown.stderr.decode().strip()}")
    contents = {"old": shown.stdout, "new": (ROOT / f"{MODULE}.py").read_bytes()}
    for side, content in contents.items():
        (folder / side).mkdir()
        (folder / side / f"{MODULE}.py").write_bytes(content)
    same = " (the same octets: what differs is noise)" if len(set(contents.values())) == 1 else ""
    print(f"old: {revision}, new: the working tree{same}\n")
    return folder / "old", folder / "new"


def known_options(folder: Path) -> frozenset[str]:
    """The options that the module in a folder has by its --help; it is compiled on the way."""
    path = folder / f"{MODULE}.py"
    try:
        # Or the first process would have the memory that the compiler leaves behind.
        py_compile.compile(str(path), doraise=True)
    except py_compile.PyCompileError as error:
        raise SystemExit(f"{folder.name}: {error.msg.strip()}") from None
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name}: it does not start: {done.stderr[-500:]}")
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))


def in_turns(name: str, old: Bench, new: Bench, turns: Iterable[int]) -> Iterator[Compared]:
    """A figure of both revisions, with one value a turn; raises Failed where one can't give it."""
    found: dict[str, Compared] = {}
    for turn in turns:
        # Old, new, new, old: what becomes slower with time disturbs both alike.
        for side, bench in (("old", old), ("new", new))[:: -1 if turn % 2 else 1]:
            try:
                figures = list(FIGURES[name](bench))
            except (Failed, OSError) as error:
                raise Failed(f"{side}: {error}") from None
            for figure in figures:
                empty = Compared(figure.name, figure.unit, [], [], [])
                getattr(found.setdefault(figure.name, empty), side).append(figure.value)
    for row in found.values():
        pairs = zip(row.old, row.new, strict=True)
        yield row._replace(ratios=[after / before for before, after in pairs if before])


def in_rounds(name: str, old: Bench, new: Bench, rounds: int) -> list[Compared]:
    """A figure of both revisions, with one value a round: the median of its turns."""
    found: dict[str, Compared] = {}
    width = TURNS.get(name, 1)
    for start in range(0, rounds * width, width):
        with old.stack, new.stack:
            for part in in_turns(name, old, new, range(start, start + width)):
                row = found.setdefault(part.name, Compared(part.name, part.unit, [], [], []))
                row.old.append(statistics.median(part.old))
                row.new.append(statistics.median(part.new))
                row.ratios.extend([statistics.median(part.ratios)] if part.ratios else [])
    return list(found.values())


def show_compared(row: Compared, note: str) -> str:
    """A comparison as a line of a Markdown table."""
    old, new = (amount(statistics.median(side), row.unit) for side in (row.old, row.new))
    ratio, spread = "", ""
    if row.ratios:
        ratio = f"{statistics.median(row.ratios):.3f}"
        spread = f"{min(row.ratios):.3f} to {max(row.ratios):.3f}"
    better = "less" if row.unit in COSTS else "more"
    return f"| {row.name} | {old} | {new} | {ratio} | {spread} | {better} | {note} |"


def compare(names: Iterable[str], old: Bench, new: Bench, rounds: int) -> Iterator[dict[str, Any]]:
    """Print the comparison of each figure as it comes, and yield it for --json."""
    heads = ("figure", "old", "new", "new/old", f"least to greatest of {rounds}", "better", "note")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in names:
        rows, failure = [], ""
        try:
            rows = in_rounds(name, old, new, rounds)
        except Failed as error:
            failure = str(error)
        remarks = [f"old: {x}" for x in old.remarks] + [f"new: {x}" for x in new.remarks]
        old.remarks, new.remarks = [], []
        note = "; ".join(dict.fromkeys(remarks))
        for row in rows:
            print(show_compared(row, note), flush=True)
            yield {**row._asdict(), "note": note}
        if failure:
            # Of the end of a log or a traceback the last line says most.
            first, *others = failure.replace("|", "/").splitlines()
            reason = " ... ".join(line[:150] for line in (first, *others[-1:], note) if line)
            print(f"| {name} | | | | | | not compared: {reason} |", flush=True)
            yield {"name": name, "failed": failure, "note": note}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help="only these")
    parser.add_argument("--list", action="store_true", help="name the figures")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--brief", action="store_true", help="short runs")
    parser.add_argument("--against", metavar="REVISION", help="compare with this revision of git")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds}; allowed: 1 or more")
    return options


def main() -> int:
    roles = {"agent": be_agent, "drain": be_drain, "poster": be_poster, "core": be_core}
    if sys.argv[1:2] == ["--role"]:
        return roles[sys.argv[2]](sys.argv[3:])
    options = parse_arguments()
    if options.list:
        for name, figure in FIGURES.items():
            print(f"{name:<12} {figure.__doc__}")
        return 0
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("two cores are needed: one for the agent, one for what it talks to")
    os.sched_setaffinity(0, {OTHER_CORE})
    # So that the processes and folders of a run that is stopped go with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = options.only or list(FIGURES)
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if options.against:
            folders = take_modules(options.against, Path(folder))
            old, new = (Bench(1, options.brief, x, known_options(x)) for x in folders)
            figures = list(compare(names, old, new, options.rounds))
        else:
            figures = list(measure(names, Bench(options.rounds, options.brief)))
    if options.json:
        content = {"machine": machine(), "figures": figures}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
