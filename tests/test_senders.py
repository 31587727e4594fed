"""docs/senders.md: each routes.yaml on the page, run with messages of its sender's shape."""

from __future__ import annotations

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
OTHER_NUMBER = "sip:+390654321@carrier.example"

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


def charged(
    messages: Iterable[Message], routes: str, *, stamped: bool = True, **packet: Any
) -> dict[str, tuple[str | None, str | None, float, float]]:
    """What the agent reports of a mirror: accounts of both sides, begin and end, by Call-ID."""
    settings = agent.Settings(**packet.pop("settings", {}))
    table = agent.CallTable(settings, agent.parse_routes(routes, "routes.yaml", settings))
    events: list[agent.RatingEvent] = []
    now = 1000.0
    for at, payload, source, destination in sorted(messages, key=lambda message: message[0]):
        time_us = START + round(at * 1_000_000)
        own = {"correlation_id": call_id(payload), **packet}
        data = hepbuild.hep3(
            payload, src=source, dst=destination, time_us=time_us if stamped else 0, **own
        )
        seen = agent.decode_hep(data, time_us)
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


def carrier_leg(name: str = "first", number: str = NUMBER, **more: Any) -> Leg:
    """From the B2BUA to the carrier, under its own Call-ID and address, with the header."""
    values = {"answer": 1.0, "end": 9.1, "headers": [("X-Account", "2000")], **more}
    return Leg(f"{name}@192.0.2.5", SERVER, CARRIER, f"sip:2000@{SERVER[0]}", number, **values)


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


def blind_transfer() -> list[Message]:
    """The caller transfers the carrier's side to another number, and is gone.

    As seen of Asterisk: REFER and 202, then its BYE to the phone; the first leg to the carrier
    goes on beside a second one, which has the header by inheritance.
    """
    phone = caller_leg(end=5.0, hangs_up="callee")
    referred = [("Refer-To", "<sip:+390654321@sip.example.com>")]
    refer = phone.request("REFER", 4, headers=referred)
    accepted = phone.reply(202, 4, "REFER")
    by = [("X-Account", "2000"), ("Referred-By", f"<sip:2000@{DOMAIN}>")]
    second = carrier_leg("second", OTHER_NUMBER, answer=6.0, end=20.0, headers=by)
    first = carrier_leg(end=20.1, hangs_up="callee")
    return [
        *phone.messages(),
        (4.8, *phone.way(refer, True)),
        (4.9, *phone.way(accepted, False)),
        *first.messages(),
        *((at if at >= 6.0 else at + 5.0, *rest) for at, *rest in second.messages()),
    ]


def test_a_blind_transfer_is_charged_leg_by_leg() -> None:
    reported = charged(blind_transfer(), ROUTES["Asterisk"], **B2BUAS["Asterisk"])
    assert reported == {
        "first@192.0.2.5": ("2000", None, 1.0, 20.1),
        "second@192.0.2.5": ("2000", None, 6.0, 20.0),
    }


def test_what_the_page_warns_of() -> None:
    """Without the routes a transferred call is free; the correlation id charges both legs."""
    local = {"sip_local_domains": (DOMAIN,)}
    reported = charged(blind_transfer(), "", settings=local, **B2BUAS["Asterisk"])
    assert reported == {"phone@203.0.113.7": ("2000", "+390612345", 1.1, 5.0)}
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
