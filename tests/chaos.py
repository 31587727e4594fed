"""Calls under load, and a rating API with a ledger: for kills, restarts and outages."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.pool
import gevent.server

import harness
import hepbuild
from dialog import ack, bye, bye_reply, invite, negative_ack, numbered, reply
from ratings import Request, Server, answer

# Calls a second.
RATE = 120
# Seconds before the agent was seen to have read all: what was sent in them is sent again.
RESENT = 0.2
# Seconds between two looks: each takes milliseconds where there are thousands of sockets.
LOOK = 0.05


def random_call(
    chance: random.Random, start: float, shortest: float, gap: float
) -> tuple[list[tuple[float, bytes]], tuple[float, float] | None]:
    """The messages of a call with their times, and from when to when it is charged, if it is.

    One in ten is refused. Times are seconds: `shortest` is the least that is talked, and `gap` is
    between what goes one way and what goes back.
    """
    answered = start + chance.choice((0.05, 0.3, 1.5))
    end = answered + chance.choice((shortest, 0.4, 1.0, 2.5))
    steps = [(start, invite()), (start + 0.02, reply(180))]
    if chance.random() < 0.1:
        return [*steps, (answered, reply(486)), (answered + gap, negative_ack())], None
    steps += [(answered, reply(200)), (answered + gap, ack())]
    return [*steps, (end, bye()), (end + gap, bye_reply())], (answered, end)


class RatingApi(Server):
    """A rating API with the ledger of reference/rating-api.md, and faults by `mode`."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.running: dict[str, tuple[bytes, set[str]]] = {}
        self.records: dict[str, tuple[bytes, bytes]] = {}
        self.faults: list[str] = []
        self.bodies: dict[tuple[str, str], str] = {}
        self.repeats = 0
        self.rude: dict[str, int] = {}
        self._thaw = gevent.event.Event()
        super().__init__(self._behave)

    def change(self, mode: str) -> None:
        """ok, refuse (connections), 500, hang, dead (its storage), close, busy (503)."""
        port = self._server.server_port
        if mode == "refuse":
            self._server.stop(timeout=0)
        elif self.mode == "refuse":
            self._server = gevent.server.StreamServer(
                ("127.0.0.1", port), self._serve, spawn=gevent.pool.Pool()
            )
            self._server.start()
        self.mode = mode
        if mode == "hang":
            self._thaw.clear()
        else:
            self._thaw.set()

    def _behave(self, _: Any, request: Request) -> bytes | None:
        mode = self.mode
        self.rude[mode] = self.rude.get(mode, 0) + 1
        if mode == "500":
            return answer(500, b"Internal Server Error")
        if mode == "busy":
            return answer(503, Retry_After="2")
        if mode == "dead":
            return answer(200, {"ok": False})
        if mode == "hang":
            # Requests of a frozen engine are carried out after the thaw.
            self._thaw.wait()
        kind = request.path.rpartition("/")[2].partition("_")[0]
        tag = json.loads(request.body)["transaction_tag"]
        if mode != "close" or random.random() < 0.5:
            ok = self._carry_out(kind, tag, request.body)
        return None if mode == "close" else answer(200, {"ok": ok})

    def _carry_out(self, kind: str, tag: str, body: bytes) -> bool:
        content = json.loads(body)
        # While its storage is dead it refuses both parties, and then one alone may be tried.
        parties = {name for name in content if name.endswith("account_tag")}
        content = {name: content[name] for name in content if name not in parties}
        rest = json.dumps(content)
        known = self.bodies.setdefault((kind, tag), rest)
        self.repeats += known is not rest
        if known != rest:
            self.faults.append(f"{tag}: {kind} with other octets")
        if kind == "begin":
            if tag in self.records:
                self.faults.append(f"{tag}: begun again after its end")
            self.running[tag] = (body, parties | self.running.get(tag, (b"", set()))[1])
            return True
        if tag not in self.running:
            if tag not in self.records:
                self.faults.append(f"{tag}: ended without its begin")
            return False
        begin, begun = self.running.pop(tag)
        if begun != parties:
            self.faults.append(f"{tag}: begun for {begun}, ended for {parties}")
        self.records[tag] = (begin, body)
        return True


class Generator:
    """Calls at a rate a second, by a clock of its own, and what must come of each."""

    def __init__(self, seed: int, rate: float, shortest: float, gap: float) -> None:
        self.number = self.packets = 0
        self.calling = True
        self.ended: dict[str, tuple[float, float]] = {}
        self.refused: set[str] = set()
        self._rate = rate
        self._shortest, self._gap = shortest, gap
        self._chance = random.Random(seed)
        self._due: list[tuple[float, int, bytes]] = []
        self._base = time.time()
        self._clock = 0.0

    @property
    def over(self) -> bool:
        return not self._due

    def _call(self) -> list[tuple[float, bytes, int]]:
        """One more call: when each message goes by the clock, its octets, its UNIX time in us."""
        self.number += 1
        tag = f"call-{self.number}@host"
        steps, charged = random_call(self._chance, self._clock, self._shortest, self._gap)
        if charged is None:
            self.refused.add(tag)
        else:
            self.ended[tag] = (self._base + charged[0], self._base + charged[1])
        return [(at, payload, round((self._base + at) * 1_000_000)) for at, payload in steps]

    def judge(self, api: RatingApi, about: Callable[[str], str] = lambda tag: "") -> None:
        """Each call was begun and ended once, within 2 ms; `about` adds to what a failure says."""
        assert api.faults == []
        assert api.running == {}
        assert set(api.records) == set(self.ended)
        assert not self.refused & set(api.records)
        for tag, (answered, end) in self.ended.items():
            begin, finish = (json.loads(body) for body in api.records[tag])
            late = harness.seconds(begin["timestamp_begin"]) - answered
            longer = harness.seconds(finish["timestamp_end"]) - end
            assert max(abs(late), abs(longer)) < 0.002, (
                f"{tag}: {late:.3f} {longer:.3f} {about(tag)}"
            )


def unread(of: harness.AgentProcess) -> bool:
    """Does anything, octets or connections, wait for the agent in its sockets, as Linux has it?"""
    for kind, (_, port) in (("udp", of.udp), ("tcp", of.tcp)):
        # Local and remote address, state, what waits to be sent and to be read.
        row = rb": \w+:%04X \w+:\w+ \w+ \w+:(\w+)" % port
        if any(int(x, 16) for x in re.findall(row, Path(f"/proc/net/{kind}").read_bytes())):
            return True
    return False


class Traffic(Generator):
    """Calls at a rate a second over UDP and TCP; some ring for long, some are refused.

    Each call keeps to one of the two, and TCP is one connection for as long as the agent lives:
    spread over several, its ACK may be read before all its replies, and then the call begins with
    the ACK, some ms late, as in a mirror without replies.
    """

    def __init__(self, seed: int, rate: float = RATE) -> None:
        super().__init__(seed, rate, shortest=0.05, gap=0.01)
        self._sent: deque[tuple[float, int, bytes]] = deque()
        # The generator's clock when the agent had read all that was sent until then.
        self._read = 0.0
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._tcp: socket.socket | None = None
        self._connected_to: harness.AgentProcess | None = None

    def run(self, to: harness.AgentProcess, seconds: float) -> None:
        """Send for some seconds of the generator's own clock, which stands still between runs."""
        if self._connected_to is not to:
            if self._tcp is not None:
                self._tcp.close()
            self._tcp, self._connected_to = socket.create_connection(to.tcp), to
        again = [kept for kept in self._sent if kept[0] > self._read - RESENT]
        self._sent.clear()
        for _, number, data in again:
            self._sent.append((self._clock, number, data))
            self._send(to, number, data)
        started, begun, looked = time.monotonic(), self._clock, self._clock
        while self._clock < begun + seconds:
            gevent.sleep(0.004)
            if self._clock >= looked + LOOK:
                looked = self._clock
                self._look(to)
            self._clock = begun + time.monotonic() - started
            while self.calling and self.number < self._clock * self._rate:
                for when, payload, stamp in self._call():
                    data = hepbuild.hep3(numbered(payload, self.number), time_us=stamp)
                    self._due.append((when, self.number, data))
            self._due.sort()
            while self._due and self._due[0][0] <= self._clock:
                _, number, data = self._due.pop(0)
                self._sent.append((self._clock, number, data))
                self._send(to, number, data)
            while self._sent and self._sent[0][0] < self._read - RESENT:
                self._sent.popleft()

    def _look(self, at: harness.AgentProcess) -> None:
        """Has it read all? On a busy machine it takes a while until the agent has its turn."""
        late = time.monotonic() + LOOK / 2
        while behind := unread(at):
            if time.monotonic() > late:
                break
            gevent.sleep(0.004)
        self._read = self._read if behind else self._clock

    def _send(self, to: harness.AgentProcess, number: int, data: bytes) -> None:
        self.packets += 1
        if number % 2:
            self._udp.sendto(data, to.udp)
        else:
            assert self._tcp is not None
            self._tcp.sendall(data)
