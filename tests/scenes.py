"""Calls in a short notation: one line a message, its time in front.

    0     INVITE
    1     200
    1.05  ACK
    4     BYE
    4.02  200:BYE

A line is `TIME WHAT [OPTION...]`. TIME is in seconds: when the mirror saw the message, and when it
came. WHAT is a method, a status (of the INVITE, or of a method behind a colon), `reINVITE`, `NACK`
(an ACK to a refusal, with the branch and Request-URI of its INVITE) or `-` for nothing at all.
Options:

    c=N       CSeq; default 1 for INVITE, ACK, NACK, CANCEL and the callee, else 2
    callee    the callee sends the request, or gets the reply
    to=TAG    the callee's tag, default s; to= for none
    tag=TAG   the caller's tag, default c
    id=TEXT   Call-ID
    br=TEXT   branch of the lowest Via, where it is not that of method, CSeq and side
    hop=TEXT  as it left the proxy: one more Via with a branch of that name
    uri=URI   Request-URI; default the called number for INVITE, NACK and CANCEL, else the Contact
    from=URI  the caller's URI in From, likewise dest= for the URI in To
    h=LINE    a further header, may be there several times; quotes where it holds blanks
    mf=N      Max-Forwards
    seen=T    the mirror's time stamp, where it differs from when the message came
    cap=N     capture id
    corr=TEXT correlation id
"""

from __future__ import annotations

import shlex
from typing import Any

from pure import Arrival

import hepbuild

# UNIX time of a scene's second 0: 2026-11-25T10:00:00Z.
UNIX = 1_795_600_800
CALLER, PROXY, CALLEE = ("127.0.0.20", 5070), ("127.0.0.10", 5060), ("127.0.0.30", 5060)
AOR = "sip:2001@sip.canyan.io"
CONTACT = "sip:2001@127.0.0.30:5060"
CALLERS_CONTACT = "sip:2000@127.0.0.20:5070"


class Line:
    """One line of a scene."""

    def __init__(self, text: str) -> None:
        time, self.what, *options = shlex.split(text)
        self.time = float(time)
        self.options: dict[str, str] = {}
        self.headers: list[tuple[str, str]] = []
        for option in options:
            name, _, value = option.partition("=")
            if name == "h":
                header, _, content = value.partition(":")
                self.headers.append((header, content.strip()))
            else:
                self.options[name] = value
        status, _, method = self.what.partition(":")
        self.status = int(status) if status.isdigit() else 0
        self.method = (method or "INVITE") if self.status else self.what
        unknown = set(self.options) - set(
            "c callee to tag id br hop uri from dest mf seen cap corr".split()
        )
        assert not unknown, f"{text!r}: {unknown}"

    def get(self, name: str, default: str) -> str:
        return self.options.get(name, default)

    @property
    def callee(self) -> bool:
        return "callee" in self.options

    @property
    def stamp(self) -> int:
        """Microseconds of UNIX time."""
        return UNIX * 1_000_000 + round(float(self.get("seen", str(self.time))) * 1_000_000)

    def payload(self) -> bytes:
        """The SIP message."""
        method = self.method.removeprefix("re").replace("NACK", "ACK")
        first = self.method in ("INVITE", "ACK", "NACK", "CANCEL") or self.callee
        cseq = int(self.get("c", "1" if first else "2"))
        side = "e" if self.callee else "r"
        kind = "INVITE" if self.method in ("NACK", "CANCEL", "reINVITE") else method
        lowest = self.get("br", f"{kind}{cseq}{side}")
        sent_by = "{}:{}".format(*(CALLEE if self.callee else CALLER))
        vias = [(sent_by, f"z9hG4bK-{lowest}")]
        hop = self.options.get("hop")
        if hop is not None:
            above = ("{}:{}".format(*PROXY), f"z9hG4bK-{hop}-{lowest}")
            # A proxy sends the ACK to a refusal and the CANCEL of a branch itself.
            vias = [above] if self.method in ("NACK", "CANCEL") else [above, *vias]
        to = self.get("to", "s") or None
        if not self.status and self.method in ("INVITE", "CANCEL"):
            to = None
        ours, theirs = self.get("tag", "c"), to
        ends = self.get("from", "sip:2000@sip.canyan.io"), self.get("dest", AOR)
        if self.callee:
            ends = ends[1], ends[0]
        common = {
            "call_id": self.get("id", "call-1@host"),
            "from_tag": theirs if self.callee else ours,
            "to_tag": ours if self.callee else theirs,
            "cseq": cseq,
            "branch": "",
            "vias": vias,
            "from_uri": ends[0],
            "to_uri": ends[1],
            "headers": self.headers,
        }
        if self.status:
            return hepbuild.sip_reply(self.status, cseq_method=method, **common)
        outside = self.method in ("INVITE", "NACK", "CANCEL") and hop is None
        uri = AOR if outside else CALLERS_CONTACT if self.callee else CONTACT
        request = hepbuild.sip_request(method, self.get("uri", uri), **common)
        return request.replace(
            b"Max-Forwards: 70", f"Max-Forwards: {self.get('mf', '70')}".encode()
        )

    def arrival(self, payload: bytes = b"", **options: Any) -> Arrival:
        """The message as a HEP packet; `options` are those of `hepbuild.hep3`."""
        ends = (CALLEE if self.callee else CALLER), PROXY
        if "hop" in self.options:
            ends = PROXY, (CALLER if self.callee else CALLEE)
        if self.status:
            ends = ends[1], ends[0]
        usual = {
            "src": ends[0],
            "dst": ends[1],
            "time_us": self.stamp,
            "capture_id": int(self.get("cap", "1")),
            "correlation_id": self.options.get("corr"),
        }
        frame = hepbuild.hep3(payload or self.payload(), **{**usual, **options})
        return Arrival(self.time, frame)

    def old_arrival(self) -> Arrival:
        """The same as HEP2, without padding."""
        usual = {"time_us": self.stamp, "capture_id": int(self.get("cap", "1")), "padded": False}
        return Arrival(self.time, hepbuild.hep2(self.payload(), **usual))

    def beyond(self, later: float = 0.005) -> Line:
        """The same on the other side of the proxy: one Via more, a little later or earlier."""
        copy = Line(f"{self.time} {self.what}")
        copy.options, copy.headers = {**self.options, "hop": "p"}, self.headers
        if not self.status:
            copy.time += later
            copy.options["seen"] = str(float(self.get("seen", str(self.time))) + later)
        return copy

    def forwarded(self, later: float = 0.005) -> Line:
        """The same message some time later."""
        copy = Line(f"{self.time + later} {self.what}")
        copy.options, copy.headers = dict(self.options), self.headers
        copy.options["seen"] = str(float(self.get("seen", str(self.time))) + later)
        return copy


def read(text: str) -> list[Line]:
    """The lines of a scene."""
    lines = [Line(line) for line in text.strip().splitlines() if line.strip()]
    return sorted(lines, key=lambda line: line.time)


def messages(text: str) -> list[Line]:
    """The lines of a scene that are messages."""
    return [line for line in read(text) if line.what != "-"]


def arrivals(lines: list[Line]) -> list[Arrival]:
    """The packets of a scene."""
    return [line.arrival() for line in lines]
