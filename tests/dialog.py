"""The messages of a call as a proxy mirrors them, and a call table that sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import hepbuild
import rating_agent_hep as agent

UAC = ("127.0.0.20:5070", "z9hG4bK-a")  # the caller's hop: sent-by and branch
PROXY = ("127.0.0.10:5060", "z9hG4bK-p")
OTHER_BRANCH = ("127.0.0.10:5060", "z9hG4bK-q")
FORWARDED = (PROXY, UAC)
FORKED = (OTHER_BRANCH, UAC)
AOR = "sip:2001@sip.canyan.io"
CONTACT = "sip:2001@127.0.0.30:5060"
START = 1_790_000_000_000_000  # microseconds


class Scene:
    """A call table and a clock; `see` takes a message and returns what it brought about."""

    def __init__(self, routes: str = "", **options: Any) -> None:
        options.setdefault("sip_local_domains", ("sip.canyan.io",))
        self.settings = agent.Settings(**options)
        rules = agent.parse_routes(routes, "routes.yaml", self.settings)
        self.table = agent.CallTable(self.settings, rules)
        self.now = 1000.0
        self.events: list[agent.RatingEvent] = []

    def see(
        self,
        payload: bytes,
        at: float | None = None,
        capture_id: int = 1,
        sender: str = "127.0.0.1",
    ) -> list[str]:
        """One message, stamped `at` seconds after START (default: now), arriving now."""
        stamp = START + round((self.now - 1000.0 if at is None else at) * 1_000_000)
        data = hepbuild.hep3(payload, time_us=stamp, capture_id=capture_id)
        packet = agent.decode_hep(data, 0)
        message = agent.parse_sip(packet.payload, packet.time)
        if message is None:
            return []
        return self._note(self.table.handle(agent.Sighting(packet, message, sender), self.now))

    def wait(self, seconds: float) -> list[str]:
        """Let time pass, in steps as the agent's ticks."""
        end, kinds = self.now + seconds, []
        for step in (0.1, 1.0, 2.1, 32.1, 90.0, 600.0, 3600.0):
            if self.now + step < end:
                self.now += step
                kinds += self._note(self.table.expire(self.now))
        self.now = end
        return kinds + self._note(self.table.expire(self.now))

    def _note(self, events: list[agent.RatingEvent]) -> list[str]:
        self.events += events
        return [event.kind for event in events]

    def body(self, index: int = -1) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.events[index].body)
        return body

    def seconds(self, index: int = -1) -> float:
        """When an event happened, in seconds after START."""
        return (self.events[index].time - START) / 1_000_000


def invite(
    cseq: int = 1, *, vias: Any = (UAC,), uri: str = AOR, tag: str = "c", **more: Any
) -> bytes:
    return hepbuild.sip_request("INVITE", uri, **common(tag, None, vias), cseq=cseq, **more)


def reply(
    status: int, cseq: int = 1, *, vias: Any = (UAC,), tag: str = "c", to: str = "s", **more: Any
) -> bytes:
    return hepbuild.sip_reply(status, **common(tag, to, vias), cseq=cseq, **more)


def ack(
    cseq: int = 1,
    *,
    vias: Any = (("127.0.0.20:5070", "z9hG4bK-new"),),
    uri: str = CONTACT,
    tag: str = "c",
    to: str = "s",
) -> bytes:
    return hepbuild.sip_request("ACK", uri, **common(tag, to, vias), cseq=cseq)


def negative_ack(cseq: int = 1, *, vias: Any = (UAC,), uri: str = AOR) -> bytes:
    return ack(cseq, vias=vias, uri=uri)


def bye(cseq: int = 2, *, tag: str = "c", to: str = "s") -> bytes:
    return hepbuild.sip_request(
        "BYE", CONTACT, **common(tag, to, [("127.0.0.20:5070", f"z9hG4bK-bye{cseq}")]), cseq=cseq
    )


def bye_reply(status: int = 200, cseq: int = 2, *, tag: str = "c", to: str = "s") -> bytes:
    """The final reply to `bye` with the same CSeq and tags."""
    vias = [("127.0.0.20:5070", f"z9hG4bK-bye{cseq}")]
    return hepbuild.sip_reply(status, **common(tag, to, vias), cseq=cseq, cseq_method="BYE")


def in_dialog(method: str, cseq: int = 2, *, tag: str = "c", to: str = "s") -> bytes:
    vias = [("127.0.0.20:5070", f"z9hG4bK-{method}{cseq}")]
    return hepbuild.sip_request(method, CONTACT, **common(tag, to, vias), cseq=cseq)


def cancel(vias: Any = (UAC,)) -> bytes:
    return hepbuild.sip_request("CANCEL", AOR, **common("c", None, vias), cseq=1)


def common(tag: str, to: str | None, vias: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "call_id": "call-1@host",
        "from_tag": tag,
        "to_tag": to,
        "branch": "",
        "vias": list(vias),
    }


def numbered(payload: bytes, number: int) -> bytes:
    return payload.replace(b"call-1@host", f"call-{number}@host".encode())


def frames(*payloads: bytes, number: int = 1, **more: Any) -> list[bytes]:
    return [hepbuild.hep3(numbered(payload, number), **more) for payload in payloads]


def call(number: int) -> list[bytes]:
    return frames(invite(), reply(200), ack(), bye(), bye_reply(), number=number)


# Whole calls whose messages may come in any order, any number of times, with any of them missing.
WHOLE_CALLS = {
    "transaction mirror": [
        invite(), reply(100), invite(vias=FORWARDED), reply(180, vias=FORWARDED), reply(180),
        reply(200, vias=FORWARDED), reply(200), ack(), ack(vias=(PROXY, ("127.0.0.20:5070", "n"))),
        bye(), bye(), bye_reply(),
    ],
    "requests only": [invite(), ack(), bye()],
    "challenged": [
        invite(), reply(407), negative_ack(), invite(2, vias=(("127.0.0.20:5070", "b2"),)),
        reply(200, 2), ack(2), bye(3),
    ],
    "forked": [
        invite(), invite(vias=FORWARDED), invite(vias=FORKED), reply(180, to="t"),
        reply(486, to="t", vias=FORKED), negative_ack(vias=(OTHER_BRANCH,)), reply(200), ack(),
        bye(),
    ],
    "re-invite": [
        invite(), reply(200), ack(), in_dialog("INVITE", 2), reply(200, 2), ack(2), bye(3),
    ],
    "cancel crosses": [invite(), reply(180), cancel(), reply(200), ack(), bye()],
}  # fmt: skip
REFUSED_CALLS = {
    "busy": [
        invite(), invite(vias=FORWARDED), reply(180), reply(486, vias=FORWARDED),
        negative_ack(vias=(PROXY,)), reply(486), negative_ack(),
    ],
    "busy, requests only": [invite(), negative_ack()],
    "cancelled": [invite(), reply(180), cancel(), reply(487), negative_ack()],
    "challenged, then busy": [
        invite(), reply(407), negative_ack(), invite(2, vias=(("127.0.0.20:5070", "b2"),)),
        reply(486, 2), negative_ack(2, vias=(("127.0.0.20:5070", "b2"),)),
    ],
    "all forks busy": [
        invite(), invite(vias=FORWARDED), invite(vias=FORKED), reply(486, vias=FORWARDED),
        reply(486, vias=FORKED), negative_ack(vias=(PROXY,)), negative_ack(vias=(OTHER_BRANCH,)),
        reply(486), negative_ack(),
    ],
}  # fmt: skip
