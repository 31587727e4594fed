"""docs/senders.md: each routes.yaml on the page, run with messages of its sender's shape."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import harness
import hepbuild
import rating_agent_hep as agent
from hepbuild import Address

PAGE = (harness.ROOT / "docs" / "senders.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n## ")[1:]}
ROUTES = {
    name: blocks[0]
    for name, text in SECTIONS.items()
    if (blocks := re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S))
}
START = 1_790_000_000_000_000  # microseconds
PHONE: Address = ("203.0.113.7", 5062)
SERVER: Address = ("192.0.2.5", 5060)
CARRIER: Address = ("198.51.100.9", 5060)
DOMAIN = "sip.example.com"
NUMBER = "sip:+390612345@carrier.example"

# Seconds, payload, source and destination of a SIP message on the wire.
Message = tuple[float, bytes, Address, Address]


@dataclass(frozen=True)
class Leg:
    """One call between two parties; `hangs_up` is which of them sends the BYE."""

    call_id: str
    caller: Address
    callee: Address
    from_uri: str
    to_uri: str
    answer: float
    end: float
    headers: Sequence[tuple[str, str]] = ()
    hangs_up: str = "caller"
    challenge: int = 0  # the status that the first INVITE gets
    # Of a proxy's copy: the hops behind the proxy's own.
    behind: Sequence[Address] = ()

    def messages(self) -> list[Message]:
        first = 2 if self.challenge else 1
        found = self._attempt(1, self.challenge, 0.0) if self.challenge else []
        found += self._attempt(first, 200, self.answer)
        forward = self.hangs_up == "caller"
        bye = self.request("BYE", first + 1, forward=forward)
        done = self.reply(200, first + 1, "BYE", forward=forward)
        found += [(self.end, *self.way(bye, forward))]
        return [*found, (self.end + 0.01, *self.way(done, not forward))]

    def _attempt(self, cseq: int, status: int, at: float) -> list[Message]:
        invited = min(cseq * 0.1, at)
        refused = status >= 300
        return [
            (invited, *self.way(self.request("INVITE", cseq), True)),
            (invited + 0.01, *self.way(self.reply(100, cseq), False)),
            (max(at, invited + 0.02), *self.way(self.reply(status, cseq), False)),
            (max(at, invited) + 0.03, *self.way(self.request("ACK", cseq, new=not refused), True)),
        ]

    def way(self, payload: bytes, forward: bool) -> tuple[bytes, Address, Address]:
        ends = (self.caller, self.callee) if forward else (self.callee, self.caller)
        return payload, *ends

    def request(
        self, method: str, cseq: int, *, forward: bool = True, new: bool = True, **more: Any
    ) -> bytes:
        """One request of this leg; the branch of a new transaction, or that of the INVITE."""
        initial = method == "INVITE"
        branch = f"{method if new else 'INVITE'}{cseq}"
        uri = self.to_uri if initial or not new else f"sip:{self.callee[0]}:{self.callee[1]}"
        tags = ("c", None if initial else "s") if forward else ("s", "c")
        uris = (self.from_uri, self.to_uri) if forward else (self.to_uri, self.from_uri)
        headers = self.headers if initial else ()
        return hepbuild.sip_request(
            method,
            uri,
            call_id=self.call_id,
            from_tag=tags[0],
            to_tag=tags[1],
            cseq=cseq,
            branch="",
            vias=self._vias(branch, forward),
            from_uri=uris[0],
            to_uri=uris[1],
            headers=[*headers, *more.get("headers", ())],
        )

    def reply(
        self, status: int, cseq: int, method: str = "INVITE", *, forward: bool = True
    ) -> bytes:
        """The reply to a request that went `forward`."""
        tags = ("c", "s") if forward else ("s", "c")
        uris = (self.from_uri, self.to_uri) if forward else (self.to_uri, self.from_uri)
        return hepbuild.sip_reply(
            status,
            call_id=self.call_id,
            from_tag=tags[0],
            to_tag=tags[1] if status > 100 else None,
            cseq=cseq,
            cseq_method=method,
            branch="",
            vias=self._vias(f"{method}{cseq}", forward),
            from_uri=uris[0],
            to_uri=uris[1],
        )

    def _vias(self, branch: str, forward: bool) -> list[tuple[str, str]]:
        hops = [self.caller if forward else self.callee, *self.behind]
        return [(f"{host}:{port}", f"z9hG4bK{branch}{host}") for host, port in hops]


# Of a leg that was charged: the accounts of both sides, begin and end in seconds.
Charge = tuple[str | None, str | None, float, float]


def charged(
    messages: Iterable[Message], routes: str, *, stamped: bool = True, **packet: Any
) -> dict[str, Charge]:
    """What the agent reports of a mirror, by transaction tag; seconds are after START."""
    packets = []
    for at, payload, source, destination in sorted(messages, key=lambda message: message[0]):
        time_us = START + round(at * 1_000_000)
        own = {"correlation_id": call_id(payload), **packet}
        stamp = time_us if stamped else 0
        data = hepbuild.hep3(payload, src=source, dst=destination, time_us=stamp, **own)
        packets.append((at, data))
    return follow(packets, routes)


def follow(
    packets: Iterable[tuple[float, bytes]], routes: str, **options: Any
) -> dict[str, Charge]:
    """The same of HEP packets that arrive so many seconds after START."""
    settings = agent.Settings(**options)
    table = agent.CallTable(settings, agent.parse_routes(routes, "routes.yaml", settings))
    events: list[agent.RatingEvent] = []
    now = 1000.0
    for at, data in packets:
        seen = agent.decode_hep(data, START + round(at * 1_000_000))
        message = agent.parse_sip(seen.payload, seen.time)
        now = 1000.0 + at
        if message is not None:
            events += table.handle(agent.Sighting(seen, message, SERVER[0]), now)
    for _ in range(4):
        now += 40.0
        events += table.expire(now)
    found: dict[str, Any] = {}
    for event in events:
        body = json.loads(event.body)
        since = round((event.time - START) / 1_000_000, 3)
        tags = body.get("account_tag"), body.get("destination_account_tag")
        if event.kind == "begin":
            assert body["transaction_tag"] not in found, "begun twice"
            found[body["transaction_tag"]] = (*tags, since)
        else:
            assert len(found[body["transaction_tag"]]) == 3, "ended twice"
            found[body["transaction_tag"]] += (since,)
    return found


def call_id(payload: bytes) -> str:
    return re.findall(rb"Call-ID: (\S+)", payload)[0].decode()


def caller_leg(**more: Any) -> Leg:
    """From the phone to the B2BUA, which asks who it is."""
    values = {"answer": 1.1, "end": 9.0, "challenge": 401, **more}
    user = f"sip:2000@{DOMAIN}"
    return Leg("phone@203.0.113.7", PHONE, SERVER, user, f"sip:+390612345@{DOMAIN}", **values)


def carrier_leg(name: str = "first", **more: Any) -> Leg:
    """From the B2BUA to the carrier, under its own Call-ID and address, with the header."""
    values = {"answer": 1.0, "end": 9.1, "headers": [("X-Account", "2000")], **more}
    return Leg(f"{name}@192.0.2.5", SERVER, CARRIER, f"sip:2000@{SERVER[0]}", NUMBER, **values)


B2BUAS = {
    "Asterisk": {"capture_id": 30},
    # Its stamps may be zero: the time of arrival stands in.
    "FreeSWITCH": {"capture_id": 100, "stamped": False, "correlation_id": None},
    "drachtio": {"capture_id": 101, "correlation_id": None},
}
SNIFFERS = {
    "heplify": {"capture_id": 2002, "capture_name": "edge-1", "correlation_id": ""},
    "captagent": {"capture_id": 2001, "correlation_id": None},
    "sngrep": {"capture_id": 7 << 16, "correlation_id": None},
}


def test_the_page_has_a_route_for_each_sender_and_no_other() -> None:
    assert set(ROUTES) == {*B2BUAS, *SNIFFERS}
    assert len(re.findall("^```yaml$", PAGE, re.M)) == len(ROUTES)
    for name in ROUTES:
        assert f"[{name}](#{name.lower()})" in PAGE and "To check: `decode`" in SECTIONS[name]


@pytest.mark.parametrize(
    ("name", "line", "factor"),
    [
        ("Asterisk", r"^capture_id = (\d+)$", 1),
        ("FreeSWITCH", r";capture_id=(\d+)\"", 1),
        ("drachtio", r"--homer-id (\d+)$", 1),
        ("drachtio", r"capture-server .* id=\"(\d+)\"", 1),
        ("heplify", r"-hn (\S+)", 1),
        ("captagent", r"\"capture-id\" value=\"(\d+)\"", 1),
        ("sngrep", r"^set eep.send.id (\d+)$", 1 << 16),
    ],
)
def test_the_route_names_what_the_sender_is_told(name: str, line: str, factor: int) -> None:
    told = re.findall(line, SECTIONS[name], re.M)
    (named,) = set(re.findall(r"capture_(?:id|name): ([\w-]+)", ROUTES[name]))
    assert told and {text if factor == 1 else str(int(text) * factor) for text in told} == {named}


@pytest.mark.parametrize("name", B2BUAS)
def test_of_two_legs_the_one_to_the_carrier_is_charged(name: str) -> None:
    legs = [caller_leg(), carrier_leg()]
    messages = [message for leg in legs for message in leg.messages()]
    reported = charged(messages, ROUTES[name], **B2BUAS[name])
    assert reported == {"first@192.0.2.5": ("2000", None, 1.0, 9.1)}


@pytest.mark.parametrize("name", B2BUAS)
def test_other_legs_are_not_charged(name: str) -> None:
    """A phone that writes the header itself, a call from the carrier, and one that is refused."""
    forged = caller_leg(headers=[("X-Account", "3000")])
    incoming = Leg("in@198", CARRIER, SERVER, NUMBER, f"sip:2000@{DOMAIN}", 1.0, 5.0)
    onward = Leg("on@192", SERVER, PHONE, NUMBER, f"sip:2000@{PHONE[0]}", 1.0, 5.0)
    messages = [*forged.messages(), *incoming.messages(), *onward.messages()]
    messages += carrier_leg("busy")._attempt(1, 486, 1.0)
    assert charged(messages, ROUTES[name], **B2BUAS[name]) == {}


def recording(name: str) -> list[tuple[float, bytes]]:
    """What Asterisk 22.10.1 sent, set up by the page but for addresses (the forms of captures)."""
    path = harness.ROOT / "tests" / "senders" / f"asterisk-22.10_{name}.hepl"
    lines = map(json.loads, path.read_text(encoding="ascii").splitlines())
    return [(line["t"], base64.b64decode(line["data"])) for line in lines]


def answered_legs(packets: Iterable[tuple[float, bytes]]) -> dict[str, tuple[float, float]]:
    """When each leg was answered and hung up by what is in the packets, read without the agent."""
    found: dict[str, dict[str, float]] = {}
    for _, data in packets:
        (text,) = re.findall(rb"\x00\x00\x00\x0f..(.*)", data, re.S)
        seconds, micros = (
            int.from_bytes(re.findall(rb"\x00\x00\x00" + kind + rb"\x00\x0a(.{4})", data, re.S)[0])
            for kind in (rb"\x09", rb"\x0a")
        )
        at = round(seconds + micros / 1_000_000 - START / 1_000_000, 3)
        if text.startswith(b"SIP/2.0 200") and re.search(rb"CSeq: \d+ INVITE", text):
            found.setdefault(call_id(text), {}).setdefault("answer", at)
        elif text.startswith(b"BYE"):
            found.setdefault(call_id(text), {}).setdefault("end", at)
    return {name: (times["answer"], times["end"]) for name, times in found.items()}


# Who is a carrier's leg in them, by what Asterisk's own log said; the others are the phone's.
RECORDED = {
    # A phone that writes an X-Account of its own calls, and transfers the callee to another number.
    "caller_transfers": "dd660fd1-cfd3-4788-a6d1-5f056548d088 f7e6c3ad-6bce-4269-8040-7901415d526f",
    # A phone is called by the carrier, and transfers that call to a number.
    "callee_transfers": "f7a0a7ac-01e2-4366-a17b-dcf77f2f4359",
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_blind_transfer_is_charged_leg_by_leg(name: str) -> None:
    """REFER: the phone is gone, and the other side is connected under a new leg to the carrier."""
    packets = recording(name)
    legs = answered_legs(packets)
    assert len(legs) == 3
    routes = ROUTES["Asterisk"].replace("198.51.100.0/24", "127.0.0.30/32")
    reported = follow(packets, routes)
    assert reported == {leg: ("2000", None, *legs[leg]) for leg in RECORDED[name].split()}


def test_what_the_page_warns_of() -> None:
    """Without the routes a transferred call is free; the correlation id charges both legs."""
    packets = recording("caller_transfers")
    legs = answered_legs(packets)
    (phone,) = set(legs) - set(RECORDED["caller_transfers"].split())
    reported = follow(packets, "", sip_local_domains=("pbx.example",))
    assert reported == {phone: ("2000", "2001", *legs[phone])}
    assert max(end for _, end in legs.values()) > legs[phone][1] + 1.0
    tied = "- {name: tied, account: [from], transaction_tag: correlation-id}\n"
    messages = [*caller_leg().messages(), *carrier_leg().messages()]
    assert len(charged(messages, tied, **B2BUAS["Asterisk"])) == 2


@pytest.mark.parametrize("name", SNIFFERS)
def test_a_sniffed_call_is_charged_once(name: str) -> None:
    """Beside a proxy the wire has each message twice: as it came in, and as it went on."""
    user = f"sip:2000@{DOMAIN}"
    near = Leg("wire@203.0.113.7", PHONE, SERVER, user, NUMBER, 1.0, 9.0)
    far = Leg("wire@203.0.113.7", SERVER, CARRIER, user, NUMBER, 1.0, 9.0, behind=[PHONE])
    messages = [*near.messages(), *far.messages()]
    # The second copy of each is the one that the proxy sent.
    messages = [
        (at + (0.002 if source == SERVER else 0.0), payload, source, destination)
        for at, payload, source, destination in messages
    ]
    reported = charged(messages, ROUTES[name], **SNIFFERS[name])
    ((tag, (account, callee, *times)),) = reported.items()
    assert (tag, account, callee) == ("wire@203.0.113.7", "2000", None)
    # Either copy's time will do.
    assert times == pytest.approx([1.0, 9.0], abs=harness.TOLERANCE)
    elsewhere = {**SNIFFERS[name], "capture_id": 99, "capture_name": "edge-2"}
    assert charged(messages, ROUTES[name], **elsewhere) == {}
