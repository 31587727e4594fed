"""The pure core, driven by the times of a recording: 32 s of it take no time in a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import rating_agent_hep as agent

# Seconds of the monotonic clock at which a recording begins.
START = 10_000.0
# Seconds. How often the agent looks whether a call has waited long enough, and how long it is
# watched closely: after the reorder window there are only long time-outs.
TICK, CLOSELY = 0.1, 2.5
# Seconds after the last message at which all that waits for an answer is decided: 64*T1 and more.
SETTLED = 40.0


class Arrival(NamedTuple):
    """A HEP packet, and when it came: seconds since the recording began."""

    time: float
    frame: bytes


class Core:
    """A call table whose clock is that of the packets; `events` is what it reported.

    `unix` is UNIX time at the beginning of the recording. With `restart` the agent is stopped and
    started again at each so many messages and ticks that changed something: only what `pack_call`
    wrote is left.
    """

    def __init__(
        self, settings: agent.Settings, routes: str = "", unix: float = 0.0, restart: int = 0
    ) -> None:
        self.settings = settings
        self.table = agent.CallTable(settings, agent.parse_routes(routes, "routes.yaml", settings))
        self.events: list[agent.RatingEvent] = []
        self.now = START
        self._offset = unix - START
        self._restart = restart
        self._changes = 0
        self._kept: dict[int, str] = {}
        if restart:
            self.table.changed = {}

    def play(self, arrivals: Iterable[Arrival], wait: float = SETTLED) -> list[agent.RatingEvent]:
        """Take in all packets at their times, let `wait` seconds pass; return all events."""
        for arrival in arrivals:
            self.advance(START + arrival.time)
            self.take(arrival.frame)
        self.advance(self.now + wait)
        return self.events

    def take(self, frame: bytes) -> None:
        """Take in one packet now; one that is broken changes nothing."""
        try:
            packet = agent.decode_hep(frame, round((self.now + self._offset) * 1_000_000))
        except agent.HepError:
            return
        if packet.protocol_type != agent.SIP_PROTOCOL_TYPE:
            return
        for payload in agent.split_messages(packet):
            try:
                message = agent.parse_sip(payload, packet.time)
            except agent.SipError:
                continue
            if message is not None:
                sighting = agent.Sighting(packet, message, "127.0.0.1")
                self.note(self.table.handle(sighting, self.now))

    def advance(self, until: float) -> None:
        """Let time pass, tick by tick."""
        closely = self.now + CLOSELY
        while self.now < until:
            self.now = min(until, self.now + (TICK if self.now < closely else 10 * TICK))
            self.note(self.table.expire(self.now))

    def close(self) -> None:
        """What SIGTERM does without a journal: all that waits for a message is decided."""
        self.note(self.table.expire(self.now, closing=True))

    def note(self, events: list[agent.RatingEvent]) -> None:
        """Keep what was reported, and start again where that is wanted."""
        self.events += events
        changed = self.table.changed
        if not self._restart or not changed:
            return
        self._changes += 1
        for row, call in changed.items():
            if call is None:
                self._kept.pop(row, None)
            else:
                self._kept[row] = agent.pack_call(call, self._offset)
        changed.clear()
        if self._changes % self._restart:
            return
        serial, rules = self.table.next_serial(), self.table.rules
        self.table = agent.CallTable(self.settings, rules)
        self.table.restore(self._kept.items(), serial, self.now, self._offset)

    def calls(self) -> list[agent.Call]:
        """All calls that the table knows."""
        return [call for part in self.table.slices() for call in part]


def by_tag(events: Iterable[agent.RatingEvent]) -> dict[str, list[agent.RatingEvent]]:
    """The events of each transaction tag, in order."""
    tags: dict[str, list[agent.RatingEvent]] = {}
    for event in events:
        tags.setdefault(event.transaction_tag, []).append(event)
    return tags


def settings(**options: Any) -> agent.Settings:
    """Settings with the domain of all recordings."""
    return agent.Settings(**{"sip_local_domains": ("sip.canyan.io",), **options})


def kind_of(frame: bytes) -> bytes:
    """Call, method or status, and CSeq: alike for a message, its copies and retransmissions."""
    start = max(frame.find(b"SIP/2.0 "), 0)
    status = frame[start : start + 11] if frame.find(b" SIP/2.0\r") < 0 else b""
    call_id = next(
        (x for x in frame.split(b"\r\n") if x.lower().startswith((b"call-id:", b"i:"))), b""
    )
    cseq = next((x for x in frame.split(b"\r\n") if x.lower().startswith(b"cseq:")), frame[-20:])
    return b"|".join((call_id, status, cseq))
