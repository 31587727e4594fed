#!/usr/bin/env python3
"""Run the agent for a while on a bad network with a bad API, and check every call at the end.

    soak.py --seconds 600 --rate 300

The agent is a process with a journal; it gets calls over UDP and TCP of which one message in twenty
is lost, one in twenty doubled, one in ten late, so that it is overtaken; two more senders send what
is no HEP or no SIP. The rating API, a process too, fails one request in fifty: status 500,
`ok: false`, a connection closed before or after the work, an answer that never comes.

Which messages were lost is known, so for each call it is known what must be begun and ended, and
with which time stamp: a call whose 200 was lost begins with its ACK if the callee's word follows,
one whose BYE was lost ends with the reply to it, or at its deadline, one whose INVITE was lost, or
that was refused, is not charged. Exit status: 0 where
the ledger is exact, memory flat and the log calm; 1 where not.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse
import heapq
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import gevent.server
import urllib3

import hepbuild
import rating_agent_hep as agent
from fuzz import Mutator

LOSS, DOUBLED, LATE = 0.05, 0.05, 0.1
# Seconds by which a late message is late at most; well below the agent's reorder window of 2 s.
LATEST = 0.3
REORDER_WINDOW = agent.Settings.reorder_window
FAULT_EACH = 50  # requests, on average
FAULTS = ("status 500", "ok: false", "closed before", "closed after", "no answer")
API_TIMEOUT = 2.0  # seconds
CONNECTIONS = 4
# Packets a second of the sender over UDP, connections a second of the one over TCP.
MALFORMED = (50, 5)
SAMPLE_EACH = 5.0  # seconds between two looks at memory
# Octets by which memory may grow from the end of the first third to the end, by a straight line
# through the samples; shorter runs than this many seconds are not judged.
MAX_GROWTH, JUDGED_FROM = 4 * 1024 * 1024, 120.0
# Log lines a second above INFO: some fifteen kinds, three of each.
MAX_WARNINGS = 15 * agent.MAX_WARNINGS_PER_SECOND
# Seconds for the rest to arrive after the last deadline: an event that fails five times in a row.
PATIENCE = 60.0
PREFIX = "soak-"


# The rating API


class Api:
    """Keeps a ledger, and fails one request in FAULT_EACH."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.records: dict[str, dict[str, str]] = {}
        self.bodies: dict[tuple[str, str], bytes] = {}
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def serve(self) -> None:
        """Serve until killed; prints the port."""
        server = gevent.server.StreamServer(("127.0.0.1", 0), self._converse)
        server.start()
        print(server.server_port, flush=True)
        server.serve_forever()

    def _converse(self, sock: socket.socket, _: object) -> None:
        file = sock.makefile("rb")
        while request := file.readline().decode():
            length = 0
            while (line := file.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = file.read(length)
            method, path, _ = request.split(" ", 2)
            if method == "GET":
                self._answer(sock, "200 OK", self._told(path))
            elif not self._handle(sock, path.rpartition("/")[2].partition("_")[0], body):
                break
        sock.close()

    def _told(self, path: str) -> dict[str, Any]:
        if path == "/ledger":
            return {"records": self.records, "counts": self.counts, "faults": self.faults[:20]}
        return {"begun": self.counts["begun"], "ended": self.counts["ended"]}

    def _handle(self, sock: socket.socket, kind: str, body: bytes) -> bool:
        """Whether the connection stays open."""
        self.counts["requests"] += 1
        fault = ""
        if self._chance.random() * FAULT_EACH < 1:
            fault = self._chance.choice(FAULTS)
            self.counts[fault] += 1
        if fault in ("", "closed after", "no answer"):
            ok = self._carry_out(kind, body)
        if fault == "no answer":
            gevent.sleep(API_TIMEOUT + 1)
        if fault in ("closed before", "closed after", "no answer"):
            return False
        if fault == "status 500":
            self._answer(sock, "500 Internal Server Error", {})
        else:
            self._answer(sock, "200 OK", {"ok": not fault and ok})
        return True

    @staticmethod
    def _answer(sock: socket.socket, status: str, content: Any) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + body)

    def _carry_out(self, kind: str, body: bytes) -> bool:
        """As reference/rating-api.md has it, with an eye on what no agent may do."""
        content = json.loads(body)
        tag = content["transaction_tag"]
        record = self.records.setdefault(tag, {})
        self.counts["repeated"] += (kind, tag) in self.bodies
        known = self.bodies.setdefault((kind, tag), body)
        # What the malformed senders bring about is only carried out.
        ours = tag.startswith(PREFIX)
        if ours and known != body:
            self.faults.append(f"{tag}: {kind} again with other octets")
        if ours and kind == "begin" and "end" in record:
            self.faults.append(f"{tag}: begun again after its end")
        if kind == "end" and "begin" not in record:
            self.faults += [f"{tag}: ended without its begin"] * ours
            return False
        if kind == "end" and "end" in record:
            return False
        if ours and kind not in record:
            self.counts["begun" if kind == "begin" else "ended"] += 1
        record[kind] = content[f"timestamp_{kind}"]
        return True


# Calls


@dataclass
class Plan:
    """All that is sent, and what must come of it. ``due`` is a heap of (time, number, lane,
    packet); lane 0 is UDP, the others are TCP connections. ``expected`` maps transaction tags to
    time stamps by kind."""

    chance: random.Random
    max_call_duration: float
    due: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def add_call(self, start: float) -> None:
        """Plan one call from UNIX time ``start`` on."""
        number, draw = next(self.numbers), self.chance
        name, kind = f"{PREFIX}{number}", draw.choices(KINDS, (75, 10, 7, 8))[0]
        lane = draw.choice((0, 0, *range(1, CONNECTIONS + 1)))
        arrived: dict[str, float] = {}
        sent: dict[str, int] = {}
        self.counts[f"calls {kind}"] += 1
        for what, at, payload in call_messages(draw, kind, name):
            stamp = round((start + at) * 1_000_000)
            self.counts["messages"] += 1
            if draw.random() < LOSS:
                self.counts["lost"] += 1
                continue
            packet = hepbuild.hep3(payload, time_us=stamp, capture_id=lane)
            arrival = start + at
            if draw.random() < LATE:
                arrival += draw.uniform(0, LATEST)
                self.counts["late"] += 1
            self._send(arrival, lane, packet)
            arrived[what], sent[what] = arrival, stamp
            if draw.random() < DOUBLED:
                self.counts["doubled"] += 1
                self._send(arrival + draw.uniform(0, LATEST), lane, packet)
        times = what_must_come(arrived, sent, self.max_call_duration)
        if times:
            self.expected[name] = {kind: agent.rfc3339(at) for kind, at in times.items()}

    def _send(self, at: float, lane: int, packet: bytes) -> None:
        heapq.heappush(self.due, (at, next(self.numbers), lane, packet))


KINDS = ("answered", "challenged", "busy", "cancelled")


def call_messages(draw: random.Random, kind: str, name: str) -> Iterator[tuple[str, float, bytes]]:
    """The messages of one call: what they are, seconds since its start, octets."""
    same: dict[str, Any] = {"call_id": name, "from_tag": "c", "branch": ""}
    aor, contact = "sip:2001@sip.canyan.io", "sip:2001@127.0.0.30:5060"
    cseq, vias = 1, [("127.0.0.20:5070", f"z9hG4bK-{name}-1")]

    def request(
        method: str, uri: str, hop: str = "", to: str | None = "s", number: int = 0
    ) -> bytes:
        return hepbuild.sip_request(
            method,
            uri,
            **same,
            to_tag=to,
            cseq=number or cseq,
            vias=[("127.0.0.20:5070", f"z9hG4bK-{name}-{hop}")] if hop else vias,
        )

    def reply(status: int) -> bytes:
        return hepbuild.sip_reply(status, **same, to_tag="s", cseq=cseq, vias=vias)

    def bye_reply() -> bytes:
        hops = [("127.0.0.20:5070", f"z9hG4bK-{name}-bye")]
        return hepbuild.sip_reply(
            200, **same, to_tag="s", cseq=cseq + 1, cseq_method="BYE", vias=hops
        )

    at = 0.0
    if kind == "challenged":
        yield "first invite", at, request("INVITE", aor, to=None)
        yield "407", at + 0.05, reply(407)
        yield "first ack", at + 0.1, request("ACK", aor)
        at, cseq, vias = at + 0.15, 2, [("127.0.0.20:5070", f"z9hG4bK-{name}-2")]
    yield "invite", at, request("INVITE", aor, to=None)
    yield "180", at + 0.1, reply(180)
    at += draw.uniform(0.3, 0.8)
    if kind in ("busy", "cancelled"):
        if kind == "cancelled":
            yield "cancel", at - 0.05, request("CANCEL", aor, to=None)
        yield "refusal", at, reply(487 if kind == "cancelled" else 486)
        yield "negative ack", at + 0.05, request("ACK", aor)
        return
    yield "200", at, reply(200)
    yield "ack", at + 0.05, request("ACK", contact, "ack")
    at += draw.uniform(1, 8)
    yield "bye", at, request("BYE", contact, "bye", number=cseq + 1)
    yield "bye reply", at + 0.05, bye_reply()


def what_must_come(
    arrived: dict[str, float], sent: dict[str, int], max_call_duration: float
) -> dict[str, int]:
    """The events of a call by reference/sip-call-rules.md: kind to time in microseconds.

    ``arrived`` and ``sent`` tell of the messages that were not lost when they reached the agent,
    and their time stamps.
    """
    known = [arrived[each] for each in ("invite", "first invite") if each in arrived]
    replies = [arrived[each] for each in ("407", "180", "200", "bye reply") if each in arrived]
    asked = arrived.get("invite", 0.0)
    acked = max(asked, arrived.get("ack", 0.0))
    if "invite" in arrived and "ack" in arrived and not any(at < acked for at in replies):
        # It looks like a mirror of requests only (rule 7).
        begin, begun_at = sent["ack"], acked
    elif "200" in arrived and known:
        begin, begun_at = sent["200"], max(asked, arrived["200"])
        if "invite" not in arrived:
            # To a CSeq that was not seen: certain after the reorder window (rule 6).
            begun_at += REORDER_WINDOW
    elif {"invite", "180", "ack", "bye reply"} <= arrived.keys():
        # It rang, and the callee's own word follows the ACK (rule 7).
        begin, begun_at = sent["ack"], max(acked, arrived["bye reply"])
    else:
        return {}
    end = begin + round(max_call_duration * 1_000_000)
    if "bye" in arrived:
        doubtful = replies and "bye reply" not in arrived
        if not doubtful or arrived["bye"] + agent.LINGER < begun_at + max_call_duration:
            end = sent["bye"]
    elif "bye reply" in arrived:
        end = sent["bye reply"]
    return {"begin": begin, "end": end}


# The run


class Watch:
    """What the agent's process does meanwhile: memory, log lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.samples: list[tuple[float, int]] = []
        self.warnings: Counter[int] = Counter()
        self.lines: Counter[str] = Counter()
        # Of our calls; those of the malformed senders may well be refused.
        self.rejected: list[str] = []
        self.addresses: dict[str, tuple[str, int]] = {}

    def read_log(self) -> None:
        """Count the lines above INFO by second and by event."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if b'"level": "INFO"' not in line:
                self.warnings[int(time.monotonic())] += 1
                record = json.loads(line)
                self.lines[record.get("event", "?")] += 1
                if record.get("event") == "event_rejected":
                    tag = record["transaction_tag"]
                    self.rejected += [tag] if tag.startswith(PREFIX) else []
            elif b'"listening"' in line:
                record = json.loads(line)
                host, _, port = record["address"].rpartition(":")
                self.addresses[record["transport"]] = (host, int(port))

    def sample(self) -> None:
        """Look at its memory each SAMPLE_EACH, for ever."""
        started = time.monotonic()
        while True:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
            self.samples.append((time.monotonic() - started, pages * os.sysconf("SC_PAGE_SIZE")))
            gevent.sleep(SAMPLE_EACH)

    def growth(self, seconds: float) -> float:
        """Octets of growth over the last two thirds, by a straight line through the samples."""
        late = [(at, size) for at, size in self.samples if seconds / 3 <= at <= seconds]
        if len(late) < 3:
            return 0.0
        mean_at = sum(at for at, _ in late) / len(late)
        mean = sum(size for _, size in late) / len(late)
        above = sum((at - mean_at) * (size - mean) for at, size in late)
        return above / sum((at - mean_at) ** 2 for at, _ in late) * (late[-1][0] - late[0][0])


def dropped_by_kernel(port: int) -> int:
    """Datagrams that the kernel dropped before the agent could read them."""
    lines = [*Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(x.split()[-1]) for x in lines if x.split()[1].endswith(f":{port:04X}"))


def send(plan: Plan, watch: Watch, until: float, rate: float) -> None:
    """Send what is due, and plan calls until then; returns once all is sent."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.connect(watch.addresses["udp"])
    lanes = [udp, *(socket.create_connection(watch.addresses["tcp"]) for _ in range(CONNECTIONS))]
    next_call = time.time()
    while plan.due or next_call < until:
        now = time.time()
        while next_call < min(now, until):
            plan.add_call(next_call)
            next_call += plan.chance.expovariate(rate)
        for _ in range(50):
            if not plan.due or plan.due[0][0] > now:
                break
            _, _, lane, packet = heapq.heappop(plan.due)
            plan.counts["packets sent"] += 1
            if lane:
                lanes[lane].sendall(packet)
            else:
                lanes[0].send(packet)
        gevent.sleep(0.002)
    for sock in lanes:
        sock.close()


def send_malformed(watch: Watch, mutator: Mutator, counts: Counter[str]) -> None:
    """A sender over UDP whose packets are broken, for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(watch.addresses["udp"])
        while True:
            udp.send(mutator.octets(mutator.packet())[:60_000] or b"?")
            counts["malformed datagrams"] += 1
            gevent.sleep(1 / MALFORMED[0])


def lose_framing(watch: Watch, mutator: Mutator, counts: Counter[str]) -> None:
    """A sender over TCP that loses framing and connects anew, for ever."""
    while True:
        with socket.create_connection(watch.addresses["tcp"]) as tcp:
            tcp.sendall(mutator.random.choice(mutator.packets) + mutator.random.randbytes(100))
        counts["malformed connections"] += 1
        gevent.sleep(1 / MALFORMED[1])


def soak(seconds: float, rate: float, seed: int, folder: str) -> list[str]:
    """The whole run; prints the table and returns what is wrong."""
    # Calls without a BYE would stay for the whole run, and memory with them.
    duration = max(10.0, seconds / 10)
    api = subprocess.Popen([sys.executable, __file__, "--serve-api"], stdout=subprocess.PIPE)
    assert api.stdout is not None
    url = f"http://127.0.0.1:{int(api.stdout.readline())}"
    options = [f"--max-call-duration={duration}", f"--invite-timeout={duration}"]
    options += [f"--rating-api-url={url}", f"--rating-api-timeout={API_TIMEOUT}"]
    options += [f"--state-dir={folder}", "--rating-api-concurrency=32"]
    options += ["--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0"]
    options += ["--sip-local-domains=sip.canyan.io"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "rating_agent_hep.py"), *options], stdout=subprocess.PIPE
    )
    try:
        watch, plan = Watch(process), Plan(random.Random(seed), duration)
        reader = gevent.spawn(watch.read_log)
        with gevent.Timeout(30):
            while len(watch.addresses) < 2:
                gevent.sleep(0.05)
        mutator = Mutator(f"{seed}:soak")
        beside = [
            gevent.spawn(watch.sample),
            gevent.spawn(lose_framing, watch, mutator, plan.counts),
        ]
        beside += [gevent.spawn(send_malformed, watch, mutator, plan.counts)]
        started = time.time()
        send(plan, watch, started + seconds, rate)
        took = time.time() - started
        gevent.killall(beside)
        ledger = wait_for_ledger(url, plan, duration + PATIENCE)
        drops = dropped_by_kernel(watch.addresses["udp"][1])
        cpu = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]))
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
        reader.join(timeout=10)
    finally:
        for child in (process, api):
            if child.poll() is None:
                child.kill()
            child.wait()
    return judge(plan, watch, ledger, drops, status, cpu / os.sysconf("SC_CLK_TCK"), seconds, took)


def wait_for_ledger(url: str, plan: Plan, patience: float) -> dict[str, Any]:
    """The API's ledger, once it has as many begins and ends as it must, or patience is over."""
    http = urllib3.PoolManager()
    wanted = {"begun": len(plan.expected), "ended": len(plan.expected)}
    deadline = time.monotonic() + patience
    while http.request("GET", url + "/counts").json() != wanted and time.monotonic() < deadline:
        gevent.sleep(0.5)
    # One that must not come would come by now.
    gevent.sleep(3)
    ledger: dict[str, Any] = http.request("GET", url + "/ledger").json()
    return ledger


def judge(
    plan: Plan,
    watch: Watch,
    ledger: dict[str, Any],
    drops: int,
    status: int,
    cpu: float,
    seconds: float,
    took: float,
) -> list[str]:
    """Print the table; return what is wrong."""
    got = {tag: times for tag, times in ledger["records"].items() if tag.startswith(PREFIX)}
    wrong = [
        f"{tag}: {got.get(tag, {})}, expected {plan.expected.get(tag, {})}"
        for tag in sorted(got.keys() | plan.expected.keys())
        if got.get(tag, {}) != plan.expected.get(tag, {})
    ]
    growth, worst = watch.growth(seconds), max(watch.warnings.values(), default=0)
    sizes = [size / 2**20 for _, size in watch.samples]
    rows: list[tuple[str, object]] = [("seconds", f"{took:.0f}"), *sorted(plan.counts.items())]
    rows += [("calls that must be rated", len(plan.expected)), ("calls rated", len(got))]
    rows += [("calls that differ", len(wrong))]
    rows += [(f"API: {name}", number) for name, number in sorted(ledger["counts"].items())]
    rows += [("agent: CPU seconds", f"{cpu:.1f}"), ("agent: exit status", status)]
    rows += [("agent: datagrams dropped by the kernel", drops)]
    rows += [("memory, MB: at first, after a third, last, growth", " ".join(
        f"{size:.1f}" for size in (sizes[0], sizes[len(sizes) // 3], sizes[-1], growth / 2**20)
    ))]  # fmt: skip
    rows += [("log lines above INFO: in all, most in a second", f"{watch.lines.total()}, {worst}")]
    rows += [(f"log: {event}", number) for event, number in watch.lines.most_common()]
    for name, value in rows:
        print(f"{name:52}{value:>24}")
    faults = [*wrong[:20], *ledger["faults"]]
    faults += [f"{tag}: an event was rejected" for tag in watch.rejected[:20]]
    if drops:
        faults.append(f"the kernel dropped {drops} datagrams: the ledger can't be exact")
    if status:
        faults.append(f"the agent ended with {status}")
    if seconds >= JUDGED_FROM and growth > MAX_GROWTH:
        faults.append(f"memory grew by {growth / 2**20:.1f} MB")
    if worst > MAX_WARNINGS:
        faults.append(f"{worst} log lines above INFO in one second, over {MAX_WARNINGS}")
    if watch.lines["internal_error"]:
        faults.append(f"{watch.lines['internal_error']} internal errors")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Calls for a while on a bad network, all checked.")
    parser.add_argument("--seconds", type=float, default=600.0, help="for which calls begin")
    parser.add_argument("--rate", type=float, default=300.0, help="calls a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve-api", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve_api:
        Api(arguments.seed).serve()
        return 0
    folder = tempfile.mkdtemp(prefix="soak-")
    try:
        faults = soak(arguments.seconds, arguments.rate, arguments.seed, folder)
    finally:
        shutil.rmtree(folder)
    memory = "memory flat" if arguments.seconds >= JUDGED_FROM else "memory not judged so soon"
    print("\n".join(faults) or f"every call right, log calm, {memory}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
