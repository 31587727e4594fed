"""An adversarial caller, as a property: whatever he sends, what he talks is charged, and to him.

`World` is an honest proxy in front of honest callees, as RFC 3261 has them, a mirror on that proxy,
and the call table behind it. Its log of what the callees did is the truth that `check` compares the
events with. `Adversary` lets Hypothesis play the caller. The faults that it found are scenes below.

ADVERSARY_EXAMPLES and ADVERSARY_STEPS, environment variables, make a run longer, with chance.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import hepbuild
import rating_agent_hep as agent

START = 1_790_000_000_000_000  # microseconds
CALLER: hepbuild.Address = ("10.0.0.1", 5060)
PROXY: hepbuild.Address = ("10.0.0.2", 5060)
AOR = "sip:2001@sip.canyan.io"
CALLER_CONTACT = "sip:2000@10.0.0.1:5060"
OURS, VICTIM = "2000", "6666"
# Any account may be written in these; an operator whose callers are not trusted rates by From.
ROUTES = "- account: from\n  destination_account: request-uri\n"

# Seconds: RFC 3261 17.1 and 16.6.
T1, T2, TRANSACTION, TIMER_C = 0.5, 4.0, 32.0, 180.0
SLACK = 0.01

# What the rules leave open, by name. `World.open` notes each with what it opens.
UNANSWERED_BYE = "12: a BYE that the proxy refused by a reply that is not mirrored"
ASTRAY_BYE = "12: a 481 of somebody else, to a BYE that was sent astray; no rule names this one"
SHARED_HOP = "3: INVITEs of one CSeq and lowest branch that differ above it look like copies"
CHALLENGED_BYE = "12: a challenged BYE counts at its own time, its retry follows within 5 s"
UNMIRRORED_REFUSAL = "7: of a call that the proxy refused no reply is mirrored, its ACK decides"
FORGED_ACK = "7: an ACK before any answer, and what follows it; it charges who sent it only"
NEVER_ACKNOWLEDGED = "9, 11: a 2xx that was never acknowledged"
REQUESTS_ONLY_BEGIN = "7: a requests-only mirror knows of an answer by its ACK"


@dataclass(frozen=True)
class Request:
    """What a caller sends; ``vias`` has the top one first, ``credentials`` are valid or none."""

    method: str
    uri: str = AOR
    call_id: str = "call"
    from_tag: str = "c"
    to_tag: str = ""
    cseq: int = 1
    vias: tuple[tuple[str, str], ...] = (("10.0.0.1:5060", "z9hG4bK-1"),)
    user: str = OURS
    credentials: bool = False
    forwards: int = 70
    route: bool = False
    headers: tuple[tuple[str, str], ...] = ()

    def build(self) -> bytes:
        headers = list(self.headers)
        if self.route:
            headers.append(("Route", "<sip:10.0.0.2;lr>"))
        if self.credentials:
            headers.append(("Proxy-Authorization", f'Digest username="{OURS}"'))
        payload = hepbuild.sip_request(
            self.method, self.uri, **self.common(self.vias), headers=headers
        )
        return payload.replace(b"Max-Forwards: 70", b"Max-Forwards: %d" % self.forwards)

    def reply(self, status: int, to_tag: str, vias: tuple[tuple[str, str], ...]) -> bytes:
        common = {**self.common(vias), "to_tag": to_tag}
        return hepbuild.sip_reply(status, **common, cseq_method=self.method)

    def common(self, vias: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        return {
            "call_id": self.call_id,
            "from_tag": self.from_tag,
            "to_tag": self.to_tag or None,
            "cseq": self.cseq,
            "branch": "",
            "vias": vias,
            "from_uri": f"sip:{self.user}@sip.canyan.io",
        }


@dataclass(eq=False)
class Leg:
    """A dialog as its callee knows it; times in seconds, 0 for not yet."""

    callee: int
    invite: Request
    group: Transaction
    to_tag: str
    branch: str
    cseq: int
    answered: float = 0.0
    ended: float = 0.0
    acked: float = 0.0
    # When the mirror showed an ACK for it, and whether one did that may have come after its end.
    ack_seen: float = 0.0
    ack_named: bool = False
    own_cseq: int = 0
    challenged: float = 0.0
    # From when on a limit that the rules name may have ended its charge.
    excused: float = float("inf")

    @property
    def state(self) -> str:
        if self.ended:
            return "ended"
        return "answered" if self.answered else "ringing"


@dataclass(eq=False)
class Transaction:
    """A server transaction of the proxy: the request, its replies, until when it is known."""

    request: Request
    reply: bytes = b""
    legs: list[Leg] = field(default_factory=list)
    final: int = 0
    until: float = float("inf")


class World:
    """Proxy, callees, mirror and call table; ``mode`` is what the mirror shows.

    "requests": requests that the proxy receives; "received": also replies of callees and of the
    caller; "all": also what the proxy sends.
    """

    CALLEES = 2

    def __init__(
        self,
        mode: str = "received",
        *,
        unanswered_bye: str = "end",
        stateless: bool = True,
        challenge_bye: bool = False,
        validates: bool = True,
    ) -> None:
        self.mode, self.unanswered_bye = mode, unanswered_bye
        # Whether the proxy forgets what it refused itself (8.2.7), as auth modules do.
        self.stateless, self.challenge_bye = stateless, challenge_bye
        # Whether it compares the Request-URI with the dialog, as OpenSIPS' validate_dialog does.
        self.validates = validates
        options = agent.Settings(
            sip_local_domains=("sip.canyan.io",), unanswered_bye=unanswered_bye
        )
        self.table = agent.CallTable(options, agent.parse_routes(ROUTES, "routes.yaml", options))
        self.now = 1000.0
        self.events: list[agent.RatingEvent] = []
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count(1)
        self.transactions: dict[tuple[str, str, str], Transaction] = {}
        self.legs: list[Leg] = []
        # Calls, by Call-ID and From tag, of which a reply was mirrored, and which a limit concerns.
        self.replied: dict[tuple[str, str], float] = {}
        self.open: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.sent: list[Request] = []
        self.log: list[str] = []

    # Mirror and time

    def mirror(self, payload: bytes, src: hepbuild.Address, dst: hepbuild.Address) -> None:
        stamp = START + round((self.now - 1000.0) * 1_000_000)
        packet = agent.decode_hep(hepbuild.hep3(payload, src=src, dst=dst, time_us=stamp), 0)
        message = agent.parse_sip(packet.payload, packet.time)
        if message is None:
            return
        if message.status and self.mode == "requests":
            return
        if message.status:
            self.replied[message.call_id, message.from_tag] = self.now
        self.take(self.table.handle(agent.Sighting(packet, message, src[0]), self.now))
        self.take_time(0.001)

    def take(self, events: list[agent.RatingEvent]) -> None:
        self.events += events

    def take_time(self, seconds: float) -> None:
        self.now += seconds

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.later, (self.now + seconds, next(self.numbers), do))

    def wait(self, seconds: float) -> None:
        """Let time pass: what is due happens, and the table looks at its deadlines."""
        end = self.now + seconds
        for step in (0.1, 1.0, 2.1, 5.1, 15.0, 20.0, 32.1, 35.0, 90.0, 300.0, 601.0):
            if step < seconds:
                self.at(step, lambda: None)
        while self.later and self.later[0][0] <= end:
            due, _, do = heapq.heappop(self.later)
            self.now = max(self.now, due)
            do()
            self.take(self.table.expire(self.now))
        self.now = max(self.now, end)
        self.take(self.table.expire(self.now))

    # Proxy

    def send(self, request: Request) -> None:
        """The caller sends a request to the proxy."""
        if self.mode == "requests" and not self.promised(request):
            return
        self.sent.append(request)
        self.log.append(f"{self.now:9.3f} {request}")
        self.mirror(request.build(), CALLER, PROXY)
        key = (*request.vias[0], "INVITE" if request.method == "ACK" else request.method)
        known = self.transactions.get(key)
        if known is not None and self.now > known.until:
            known = None
        if request.method == "ACK":
            self._ack(request, known)
        elif known is not None:
            ours = (known.request.call_id, known.request.from_tag)
            if request.method == "INVITE" and ours != (request.call_id, request.from_tag):
                # By its branch it is another call's (17.2.3): nothing is mirrored for this one.
                self.open[UNMIRRORED_REFUSAL].add((request.call_id, request.from_tag))
            if request.method == "BYE":
                # Another BYE to a dialog, taken for a copy of one that was answered.
                self._doubt_bye(request)
            if known.reply and self.mode == "all":
                self.mirror(known.reply, PROXY, CALLER)
        elif request.forwards == 0:
            self._refuse(request, 483)
        elif request.method == "CANCEL":
            self._cancel(request)
        elif request.to_tag and not request.route:
            self._refuse(request, 404)
        elif request.to_tag:
            self._in_dialog(request)
        elif request.method != "INVITE":
            self._refuse(request, 404)
        elif not request.credentials:
            self._refuse(request, 407)
        elif request.user != OURS:
            self._refuse(request, 403)
        elif request.uri != AOR:
            self._refuse(request, 404)
        else:
            self._invite(request)

    def promised(self, request: Request) -> bool:
        """Whether the rules promise something of it in a requests-only mirror."""
        if request.method == "ACK":
            # To a refusal as 17.1.1.3 has it, or to a 2xx as 13.2.2.4 has it.
            legs = [leg for leg in self._at_uri(request) if leg.answered]
            if legs:
                key = (*request.vias[0], "INVITE")
                fresh = key not in self.transactions and all(
                    each.method != "INVITE" or each.vias[0] != request.vias[0] for each in self.sent
                )
                return (
                    fresh
                    and request.route
                    and request.forwards > 0
                    and request.cseq == legs[0].invite.cseq
                )
            return False
        if request.method == "BYE":
            legs = list(self._at_uri(request))
            if request.forwards == 0:
                return True
            if any((*each.vias[0], "BYE") == (*request.vias[0], "BYE") for each in self.sent):
                return False
            return bool(legs) and request.route
        if request.method == "CANCEL":
            # It makes the ACKs of its INVITE doubtful, so that only one fork may be known of.
            return not self.talks()
        # Of INVITEs with one CSeq but several From an ACK does not say which was answered.
        return request.method != "INVITE" or not any(
            (each.method, each.call_id, each.from_tag, each.cseq)
            == (request.method, request.call_id, request.from_tag, request.cseq)
            and (each.user, each.vias) != (request.user, request.vias)
            for each in self.sent
        )

    def _key(self, request: Request) -> tuple[str, str, str]:
        return (*request.vias[0], request.method)

    def _refuse(self, request: Request, status: int) -> None:
        """A reply of the proxy's own."""
        if request.method == "BYE" and status != 483 and self.mode == "received":
            self._doubt_bye(request)
        payload = request.reply(status, request.to_tag or "proxy", request.vias)
        if not self.stateless:
            self.transactions[self._key(request)] = Transaction(
                request, payload, final=status, until=self.now + TRANSACTION
            )
        if self.mode == "all":
            self.mirror(payload, PROXY, CALLER)

    def _doubt_bye(self, request: Request) -> None:
        if self.unanswered_bye == "ignore":
            return
        for leg in self._named(request):
            self.open[UNANSWERED_BYE].add((request.call_id, request.from_tag))
            leg.excused = min(leg.excused, self.now)

    def _named(self, request: Request) -> Iterator[Leg]:
        """The legs that a request names by its tags, in whichever direction."""
        tags = {request.from_tag, request.to_tag}
        for leg in self.legs:
            if leg.invite.call_id == request.call_id and tags == {leg.invite.from_tag, leg.to_tag}:
                yield leg

    def _relay(self, transaction: Transaction, status: int, to_tag: str) -> None:
        """A reply goes on to the caller."""
        request = transaction.request
        transaction.reply = request.reply(status, to_tag, request.vias)
        if status >= 200 and not transaction.final:
            transaction.final, transaction.until = status, self.now + TRANSACTION
        if self.mode == "all":
            self.mirror(transaction.reply, PROXY, CALLER)

    def _from_callee(
        self, callee: int, request: Request, status: int, to_tag: str, branch: str
    ) -> None:
        vias = (("10.0.0.2:5060", branch), *request.vias)
        self.mirror(request.reply(status, to_tag, vias), self.address(callee), PROXY)

    def _branch(self) -> str:
        return f"z9hG4bK-p{next(self.numbers)}"

    def address(self, callee: int) -> hepbuild.Address:
        return (f"10.0.0.{3 + callee}", 5060)

    def contact(self, callee: int) -> str:
        return f"sip:2001@{self.address(callee)[0]}:5060"

    def _invite(self, request: Request) -> None:
        transaction = self.transactions[self._key(request)] = Transaction(request)
        if self.mode == "all":
            self.mirror(request.reply(100, "", request.vias), PROXY, CALLER)
        for callee in range(self.CALLEES):
            self._offer(callee, transaction)
        self.at(TIMER_C, lambda: self._give_up(transaction))
        self._settle(transaction)

    def _forwarded(self, request: Request, branch: str) -> Request:
        vias = (("10.0.0.2:5060", branch), *request.vias)
        return replace(request, vias=vias, forwards=request.forwards - 1, route=False)

    def _offer(self, callee: int, transaction: Transaction) -> None:
        """The INVITE reaches a callee, who refuses a merged one (8.2.2.2) and rings for another."""
        request, branch = transaction.request, self._branch()
        if self.mode == "all":
            copy = replace(self._forwarded(request, branch), uri=self.contact(callee))
            self.mirror(copy.build(), PROXY, self.address(callee))
        for leg in self.legs:
            same = (leg.invite.call_id, leg.invite.from_tag, leg.invite.cseq) == (
                request.call_id,
                request.from_tag,
                request.cseq,
            )
            if same and leg.callee == callee and leg.state != "ended":
                self._from_callee(callee, request, 482, f"m{next(self.numbers)}", branch)
                return
        to_tag = f"s{callee}-{request.call_id}-{request.from_tag}-{request.cseq}"
        to_tag += "'" * sum(leg.to_tag.strip("'") == to_tag for leg in self.legs)
        leg = Leg(callee, request, transaction, to_tag, branch, request.cseq)
        self.legs.append(leg)
        transaction.legs.append(leg)
        self._from_callee(callee, request, 180, leg.to_tag, branch)
        self._relay(transaction, 180, leg.to_tag)

    def _settle(self, transaction: Transaction) -> None:
        """Once no fork rings, the best refusal goes to the caller (16.7)."""
        if not transaction.final and all(leg.state == "ended" for leg in transaction.legs):
            self._relay(transaction, 486, "proxy")

    def _give_up(self, transaction: Transaction) -> None:
        """Timer C: the proxy cancels what still rings."""
        for leg in transaction.legs:
            self._stop_ringing(leg)
        self._settle(transaction)

    def _stop_ringing(self, leg: Leg) -> None:
        """CANCEL from the proxy, or whatever ends an early dialog: 487 from the callee."""
        if leg.state == "ringing":
            leg.ended = self.now
            self._from_callee(leg.callee, leg.invite, 487, leg.to_tag, leg.branch)

    def _cancel(self, request: Request) -> None:
        invite = self.transactions.get((*request.vias[0], "INVITE"))
        if invite is None or self.now > invite.until:
            self._refuse(request, 481)
            return
        self._refuse(request, 200)
        if not invite.final:
            self._give_up(invite)

    def _ack(self, request: Request, invite: Transaction | None) -> None:
        absorbed = invite is not None and invite.final >= 300
        of_invite = replace(request, method="INVITE", to_tag="")
        if not any(self._alike(of_invite, each) for each in self.sent):
            self._forge_ack(request)
        if not any(leg.answered for leg in self._named(request)):
            self.open[FORGED_ACK].add((request.call_id, request.from_tag))
        for leg in self._named(request):
            if request.from_tag == leg.invite.from_tag:
                leg.ack_named = True
                if not leg.ended:
                    leg.ack_seen = leg.ack_seen or self.now
        if absorbed or not request.forwards or not (request.to_tag and request.route):
            return
        for leg in self._at_uri(request):
            if leg.answered and request.cseq == leg.invite.cseq:
                leg.acked = leg.acked or self.now

    @staticmethod
    def _alike(one: Request, other: Request) -> bool:
        """Whether an ACK to the one would be an ACK to a refusal of the other (17.1.1.3)."""
        names = ("method", "call_id", "from_tag", "to_tag", "cseq", "uri")
        same = all(getattr(one, name) == getattr(other, name) for name in names)
        return same and one.vias[0] == other.vias[0]

    def _forge_ack(self, request: Request) -> None:
        key = (request.call_id, request.from_tag)
        forgotten = self.now - self.replied.get(key, 0.0) > self.table.settings.invite_timeout
        if forgotten and self.mode == "received":
            self.open[UNMIRRORED_REFUSAL].add(key)

    def _at_uri(self, request: Request) -> Iterator[Leg]:
        """The dialog of a request at the callee whom its Request-URI names (12.2.2)."""
        for leg in self.legs:
            if (
                self.contact(leg.callee) == request.uri
                and leg.invite.call_id == request.call_id
                and leg.invite.from_tag == request.from_tag
                and leg.to_tag == request.to_tag
                and leg.state != "ended"
            ):
                yield leg

    def _target(self, leg: Leg, request: Request) -> str:
        """Where a request with these tags belongs: to the callee, or back to the caller."""
        ours = request.from_tag == leg.invite.from_tag
        return self.contact(leg.callee) if ours else CALLER_CONTACT

    def _in_dialog(self, request: Request) -> None:
        callees = [self.contact(callee) for callee in range(self.CALLEES)]
        known = list(self._named(request))
        astray = any(self._target(leg, request) != request.uri for leg in known)
        if request.uri not in callees or (self.validates and astray):
            self._refuse(request, 404)
            return
        if request.method == "BYE" and astray:
            self.open[ASTRAY_BYE].add((request.call_id, request.from_tag))
            for named in known:
                named.excused = min(named.excused, self.now)
        transaction = self.transactions[self._key(request)] = Transaction(request)
        branch = self._branch()
        if self.mode == "all":
            copy = self._forwarded(request, branch)
            self.mirror(copy.build(), PROXY, ("10.0.0.3", 5060))
        leg = next(self._at_uri(request), None)
        callee = next(i for i in range(self.CALLEES) if self.contact(i) == request.uri)
        status = self._answer(leg, request)
        self._from_callee(callee, request, status, request.to_tag, branch)
        self._relay(transaction, status, request.to_tag)
        if leg is not None and request.method == "BYE" and status == 200 and not leg.answered:
            self._from_callee(callee, leg.invite, 487, leg.to_tag, leg.branch)
            self._settle(leg.group)

    def _answer(self, leg: Leg | None, request: Request) -> int:
        """What a callee does with a request of a dialog."""
        if leg is None:
            return 481
        if request.cseq < leg.cseq:
            return 500
        leg.cseq = request.cseq
        if request.method == "INVITE" and not leg.answered:
            return 491
        if request.method == "BYE":
            if self.challenge_bye and not request.credentials:
                leg.challenged = self.now
                return 401
            leg.ended = self.now
            if leg.challenged and self.now - leg.challenged <= 5.0:
                self.open[CHALLENGED_BYE].add((request.call_id, request.from_tag))
                leg.excused = min(leg.excused, leg.challenged)
        return 200

    # Callees

    def rings(self) -> list[Leg]:
        return [leg for leg in self.legs if leg.state == "ringing"]

    def talks(self) -> list[Leg]:
        return [leg for leg in self.legs if leg.state == "answered"]

    def answer(self, leg: Leg, cross: bool = False) -> None:
        """A callee takes the call; ``cross``: the other forks do before they are cancelled."""
        self._take_call(leg)
        for other in leg.group.legs:
            if cross and other.state == "ringing":
                self._take_call(other)
            self._stop_ringing(other)

    def _take_call(self, leg: Leg) -> None:
        self.log.append(f"{self.now:9.3f} {leg.to_tag} answers")
        leg.answered = self.now
        self._repeat(leg, 0.0, T1)

    def _repeat(self, leg: Leg, age: float, interval: float) -> None:
        """The 2xx, again until its ACK comes, and then a BYE (13.3.1.4)."""
        if leg.acked or leg.ended:
            return
        if age >= 64 * T1:
            self.hang_up(leg)
            return
        self._from_callee(leg.callee, leg.invite, 200, leg.to_tag, leg.branch)
        self._relay(leg.group, 200, leg.to_tag)
        interval = min(interval, 64 * T1 - age)
        self.at(interval, lambda: self._repeat(leg, age + interval, min(2 * interval, T2)))

    def refuse(self, leg: Leg) -> None:
        leg.ended = self.now
        self._from_callee(leg.callee, leg.invite, 486, leg.to_tag, leg.branch)
        self._settle(leg.group)

    def hang_up(self, leg: Leg, status: int = 200) -> None:
        """A callee's BYE, and what the caller answers, 0 for nothing."""
        leg.ended = self.now
        leg.own_cseq += 1
        bye = Request(
            "BYE",
            CALLER_CONTACT,
            leg.invite.call_id,
            leg.to_tag,
            leg.invite.from_tag,
            leg.own_cseq,
            ((f"{self.address(leg.callee)[0]}:5060", f"z9hG4bK-b{next(self.numbers)}"),),
            "2001",
            route=True,
        )
        self.log.append(f"{self.now:9.3f} {leg.to_tag} hangs up, answered {status}")
        self.mirror(bye.build(), self.address(leg.callee), PROXY)
        if status:
            vias = (("10.0.0.2:5060", self._branch()), *bye.vias)
            self.mirror(bye.reply(status, bye.to_tag, vias), CALLER, PROXY)

    # The truth

    def finish(self) -> None:
        """The caller stops: what runs is ended, and time passes."""
        for leg in self.rings():
            self.refuse(leg)
        for leg in self.talks():
            self.hang_up(leg)
        # A callee's BYE that the caller did not answer, or refused: then he pays for longer.
        self.wait(self.table.settings.max_call_duration + 700.0)
        self.check()

    def check(self) -> None:
        charged = self._charged()
        by_call: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for call_id, begin, end in charged:
            by_call[call_id].append((begin, end))
        for call_id in {leg.invite.call_id for leg in self.legs} | by_call.keys():
            self._check_call(call_id, by_call[call_id])

    def _charged(self) -> list[tuple[str, float, float]]:
        """Invariants 2 and 4; what was charged: Call-ID, begin, end in seconds."""
        running: dict[str, agent.RatingEvent] = {}
        ended: dict[str, float] = {}
        charged: list[tuple[str, float, float]] = []
        for event in self.events:
            tag = event.transaction_tag
            if event.kind == "begin":
                assert tag not in running, self.story("begun twice")
                again = event.time / 1e6 - ended.get(tag, 0.0)
                assert again >= agent.REMEMBERED, self.story("begun again")
                running[tag] = event
                continue
            assert tag in running, self.story("ended without begin")
            begin = running.pop(tag)
            assert event.time >= begin.time, self.story("ended before its begin")
            assert event.account_tag == begin.account_tag, self.story("ended for another")
            ended[tag] = event.time / 1e6
            since, until = (1000.0 + (each.time - START) / 1e6 for each in (begin, event))
            if since < until and not self.opened(UNMIRRORED_REFUSAL, event.call_id):
                assert begin.account_tag == OURS, self.story(f"charged to {begin.account_tag}")
                assert begin.destination_account_tag in ("", "2001"), self.story("of another")
            charged.append((event.call_id, since, until))
        assert not running, self.story("never ended")
        return charged

    def opened(self, limit: str, call_id: str) -> bool:
        return any(call_id == known for known, _ in self.open[limit])

    def _check_call(self, call_id: str, charged: list[tuple[float, float]]) -> None:
        """Invariants 1 and 3, at each moment when something changes."""
        groups: dict[int, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if leg.invite.call_id == call_id and leg.answered:
                groups[id(leg.group)].append(leg)
        # SHARED_HOP: INVITEs that only differ in upper Vias are one attempt.
        hops: dict[tuple[str, int, tuple[str, str]], list[Leg]] = defaultdict(list)
        for legs in groups.values():
            invite = legs[0].invite
            hops[invite.from_tag, invite.cseq, invite.vias[-1]] += legs
        talked = [self._talked(legs) for legs in hops.values()]
        moments = {t for spans in talked for span in spans for t in span}
        for moment in sorted(moments):
            for t in (moment + SLACK, moment - SLACK):
                running = sum(any(a + SLACK <= t <= b - SLACK for a, b in x) for x in talked)
                paid = sum(a - SLACK <= t <= b + SLACK for a, b in charged)
                assert paid >= running, self.story(f"{call_id} is not charged at {t:.3f}")
        if not self.opened(UNMIRRORED_REFUSAL, call_id) and not self.opened(FORGED_ACK, call_id):
            real = [span for span in charged if span[1] - span[0] > SLACK]
            assert len(real) <= len(groups), self.story(f"{call_id}: charged without an answer")
            answers = [min(leg.answered for leg in legs) for legs in groups.values()]
            for begin, _ in real:
                assert begin >= min(answers) - SLACK, self.story("charged before the answer")

    def _talked(self, legs: list[Leg]) -> list[tuple[float, float]]:
        """The spans of one accepted INVITE that must be charged."""
        acked = any(leg.acked or leg.ack_named for leg in legs)
        spans = []
        for leg in legs:
            begin, end = leg.answered, min(leg.ended, leg.excused)
            if not leg.acked and (acked or leg.ended - leg.answered >= 16.0):
                self.open[NEVER_ACKNOWLEDGED].add((leg.invite.call_id, leg.invite.from_tag))
                continue
            if self.mode == "requests":
                if not leg.ack_seen:
                    continue
                begin = leg.ack_seen
            spans.append((begin, end))
        return spans

    def story(self, what: str) -> str:
        lines = [what, *self.log, "events:"]
        for event in self.events:
            at = 1000.0 + (event.time - START) / 1e6
            lines.append(f"{at:9.3f} {event.kind} {event.transaction_tag} {event.account_tag}")
            lines[-1] += f" by {event.reason}"
        for leg in self.legs:
            lines.append(f"{leg.to_tag}: {leg.answered:.3f} to {leg.ended:.3f}, ACK {leg.acked}")
        return "\n".join(lines)


CALLS = st.sampled_from(["call", "call", "call", "call2"])
TAGS = st.sampled_from(["c", "c", "c", "d"])
NUMBERS = st.sampled_from([1, 1, 2, 2, 3, 4, 10, 2**31 + 7])
USERS = st.sampled_from([OURS, OURS, VICTIM])
BRANCHES = st.sampled_from(["z9hG4bK-1", "z9hG4bK-1", "z9hG4bK-2", "z9hG4bK-3", "z9hG4bK-4"])
HOP = st.builds(lambda branch: ("10.0.0.1:5060", branch), BRANCHES)
VIAS = st.lists(HOP, min_size=1, max_size=3).map(tuple) | st.tuples(HOP)
INDEX = st.integers(0, 5)
HEADERS = st.sampled_from(
    [
        (),
        (),
        (
            ("P-Asserted-Identity", f"<sip:{VICTIM}@sip.canyan.io>"),
            ("History-Info", "<sip:6666@h>"),
        ),
    ]
)


class Adversary(RuleBasedStateMachine):
    """The caller, and what the callees do meanwhile."""

    mode = "received"
    options: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.mode, **self.options)

    def send(self, request: Request) -> None:
        self.world.send(request)

    @rule(
        call_id=CALLS, tag=TAGS, cseq=NUMBERS, vias=VIAS, user=USERS, headers=HEADERS,
        credentials=st.booleans(), forwards=st.sampled_from([70, 70, 70, 0]),
    )  # fmt: skip
    def invite(
        self, call_id: str, tag: str, cseq: int, vias: Any, user: str, headers: Any,
        credentials: bool, forwards: int,
    ) -> None:  # fmt: skip
        """An INVITE without a To tag, with or without credentials."""
        request = Request(
            "INVITE", AOR, call_id, tag, "", cseq, vias, user, credentials, forwards,
            headers=headers,
        )  # fmt: skip
        self.send(request)

    @rule(cseq=st.sampled_from([1, 2, 3]), tag=TAGS)
    def call(self, cseq: int, tag: str) -> None:
        """An honest call begins."""
        vias = (("10.0.0.1:5060", f"z9hG4bK-n{next(self.world.numbers)}"),)
        self.send(Request("INVITE", AOR, "call", tag, "", cseq, vias, credentials=True))

    @precondition(lambda self: self.world.legs)
    @rule(
        index=INDEX, method=st.sampled_from(["BYE", "BYE", "ACK", "INVITE", "UPDATE", "INFO"]),
        more=st.sampled_from([-1, 0, 0, 1, 1, 2, 5, 2**31]), vias=VIAS, fresh=st.booleans(),
        forwards=st.sampled_from([70, 70, 70, 0]), route=st.sampled_from([True, True, False]),
        credentials=st.booleans(), user=USERS,
    )  # fmt: skip
    def in_dialog(
        self, index: int, method: str, more: int, vias: Any, fresh: bool, forwards: int,
        route: bool, credentials: bool, user: str,
    ) -> None:  # fmt: skip
        """A request with the tags of a dialog, mostly one that the callee would take."""
        leg = self.world.legs[-1 - index % len(self.world.legs)]
        if fresh:
            vias = (("10.0.0.1:5060", f"z9hG4bK-n{next(self.world.numbers)}"),)
        self.send(
            Request(
                method,
                self.world.contact(leg.callee),
                leg.invite.call_id,
                leg.invite.from_tag,
                leg.to_tag,
                min(max(leg.invite.cseq + more, 0), 2**32 - 1),
                vias,
                user,
                credentials,
                forwards,
                route,
            )  # fmt: skip
        )

    @precondition(lambda self: self.world.legs)
    @rule(
        index=INDEX, method=st.sampled_from(["BYE", "ACK", "INVITE", "UPDATE"]), vias=VIAS,
        swap=st.booleans(), cseq=NUMBERS,
        to_tag=st.sampled_from(["", "x", "c", "s0-call-c-1", None]),
        tag=TAGS, call_id=CALLS, route=st.booleans(), uri=st.sampled_from([AOR, None]),
        callee=st.integers(0, 1),
    )  # fmt: skip
    def beside(
        self, index: int, method: str, vias: Any, swap: bool, to_tag: str | None, cseq: int,
        tag: str, call_id: str, route: bool, uri: str | None, callee: int,
    ) -> None:  # fmt: skip
        """A request whose tags, Call-ID or Request-URI are of no dialog, or the other way round."""
        leg = self.world.legs[-1 - index % len(self.world.legs)]
        if to_tag is None:
            to_tag = leg.to_tag
        if swap:
            tag, to_tag = to_tag, tag
        if uri is None:
            uri = self.world.contact(callee)
        self.send(Request(method, uri, call_id, tag, to_tag, cseq, vias, route=route))

    @precondition(lambda self: self.world.sent)
    @rule(index=st.integers(0, 30), change=st.sampled_from(["", "ACK", "CANCEL", "user", "route"]))
    def again(self, index: int, change: str) -> None:
        """What was sent before once more, or what goes with it."""
        request = self.world.sent[-1 - index % len(self.world.sent)]
        if change in ("ACK", "CANCEL"):
            if request.method != "INVITE":
                return
            request = replace(request, method=change, credentials=False)
        elif change == "user":
            request = replace(request, user=OURS, credentials=True)
        elif change == "route":
            request = replace(request, route=True)
        self.send(request)

    @precondition(lambda self: any(not leg.acked for leg in self.world.talks()))
    @rule(index=INDEX)
    def acknowledge(self, index: int) -> None:
        legs = [leg for leg in self.world.talks() if not leg.acked]
        leg = legs[index % len(legs)]
        vias = (("10.0.0.1:5060", f"z9hG4bK-n{next(self.world.numbers)}"),)
        invite = leg.invite
        self.send(
            Request(
                "ACK",
                self.world.contact(leg.callee),
                invite.call_id,
                invite.from_tag,
                leg.to_tag,
                invite.cseq,
                vias,
                route=True,
            )  # fmt: skip
        )

    @precondition(lambda self: self.world.rings())
    @rule(index=INDEX, cross=st.booleans())
    def answer(self, index: int, cross: bool) -> None:
        legs = self.world.rings()
        self.world.answer(legs[index % len(legs)], cross)

    @precondition(lambda self: self.world.rings())
    @rule(index=INDEX)
    def refuse(self, index: int) -> None:
        legs = self.world.rings()
        self.world.refuse(legs[index % len(legs)])

    @precondition(lambda self: self.world.talks())
    @rule(index=INDEX, status=st.sampled_from([200, 200, 481, 500, 401, 0]))
    def hang_up(self, index: int, status: int) -> None:
        legs = self.world.talks()
        self.world.hang_up(legs[index % len(legs)], status)

    @rule(seconds=st.sampled_from([0.2, 1.5, 3.0, 10.0, 20.0, 33.0, 100.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @precondition(lambda self: self.world.legs)
    @rule(
        index=INDEX, method=st.sampled_from(["BYE", "INVITE", "ACK", "UPDATE"]),
        vary=st.sampled_from(["to_tag", "cseq", "branch", "way", "from_tag"]),
        count=st.sampled_from([20, 40, 70]),
    )  # fmt: skip
    def flood(self, index: int, method: str, vary: str, count: int) -> None:
        """So many that the bounds of what is known of a call are reached."""
        leg = self.world.legs[-1 - index % len(self.world.legs)]
        if vary == "from_tag" and method != "INVITE":
            return
        if vary in ("from_tag", "to_tag") and self.mode == "requests":
            # Of requests alone nothing tells what is answered from what a flood invents.
            return
        for number in range(count):
            name = f"f{next(self.world.numbers)}"
            request = Request(
                method, AOR, leg.invite.call_id, leg.invite.from_tag, leg.to_tag, 50,
                (("10.0.0.1:5060", "z9hG4bK-9"),),
            )  # fmt: skip
            if method == "INVITE" and vary in ("branch", "from_tag"):
                request = replace(request, to_tag="")
            if vary == "to_tag":
                request = replace(request, to_tag=name)
            elif vary == "cseq":
                request = replace(request, cseq=50 + number)
            elif vary == "branch":
                request = replace(request, vias=(("10.0.0.1:5060", name),))
            elif vary == "way":
                request = replace(request, uri=f"sip:{name}@h")
            else:
                request = replace(request, from_tag=name)
            self.world.send(request)

    def teardown(self) -> None:
        self.world.finish()


# What the machine found, reduced: each would talk for nothing, or on another's bill.


def honest(call_id: str = "call", **more: Any) -> Request:
    return Request("INVITE", call_id=call_id, credentials=True, **more)


def via(branch: str) -> tuple[tuple[str, str], ...]:
    return (("10.0.0.1:5060", branch),)


def acknowledge(world: World, leg: Leg, **more: Any) -> None:
    world.send(
        Request(
            "ACK",
            world.contact(leg.callee),
            leg.invite.call_id,
            leg.invite.from_tag,
            leg.to_tag,
            leg.invite.cseq,
            via(f"z9hG4bK-n{next(world.numbers)}"),
            route=True,
            **more,
        )  # fmt: skip
    )


@pytest.fixture(params=["received", "all"])
def world(request: Any) -> World:
    return World(request.param, unanswered_bye="ignore")


def test_the_answer_says_which_of_two_invites_with_one_branch_is_charged(world: World) -> None:
    """Rule 3: a challenge without a transaction, and the branch used again."""
    world.send(Request("INVITE", user=VICTIM))
    world.send(honest())
    world.send(Request("INVITE", user=VICTIM, vias=via("z9hG4bK-2") + via("z9hG4bK-1")))
    world.answer(world.rings()[0])
    world.wait(60.0)
    world.finish()
    assert world.events[0].account_tag == OURS


def test_a_reinvite_before_the_answer_does_not_hide_it(world: World) -> None:
    """Rule 1: its CSeq is that of the INVITE; the proxy refuses it, it has no Route."""
    world.send(honest())
    (leg, _) = world.rings()
    world.send(Request("INVITE", to_tag=leg.to_tag, vias=via("z9hG4bK-2")))
    world.answer(leg)
    world.send(Request("INVITE", to_tag=leg.to_tag, vias=via("z9hG4bK-3")))
    acknowledge(world, leg)
    world.wait(600.0)
    world.finish()


@pytest.mark.parametrize("cross", [False, True])
def test_an_ack_that_is_held_back_for_long(world: World, cross: bool) -> None:
    """Rules 9 and 11: 25 s after the answer, and then the caller talks on."""
    world.send(honest())
    (leg, other) = world.rings()
    world.answer(leg, cross)
    if cross:
        acknowledge(world, other)
        world.hang_up(other)
    world.wait(25.0)
    acknowledge(world, leg)
    world.wait(600.0)
    world.finish()


def test_a_flood_under_one_call_id_does_not_push_out_what_rings(world: World) -> None:
    """Rule 4, over MAX_CALLS_PER_ID and MAX_ATTEMPTS."""
    world.send(honest())
    for number in range(2 * agent.MAX_CALLS_PER_ID):
        world.send(Request("INVITE", from_tag=f"f{number}", vias=via(f"z9hG4bK-f{number}")))
        world.send(Request("INVITE", vias=via(f"z9hG4bK-g{number}")))
    leg = world.rings()[0]
    world.answer(leg)
    acknowledge(world, leg)
    world.wait(60.0)
    world.finish()
    assert len(world.events) == 2


def test_an_ack_while_it_rings_is_to_no_refusal(world: World) -> None:
    """Rule 8: with branch and Request-URI of the INVITE, 40 s before the answer."""
    world.send(honest())
    world.send(Request("ACK"))
    world.wait(40.0)
    leg = world.rings()[0]
    world.answer(leg)
    acknowledge(world, leg)
    world.wait(600.0)
    world.finish()


def test_what_rings_when_another_call_with_its_tags_ends_is_charged(world: World) -> None:
    """Rule 2: the second INVITE is answered after the BYE of the first."""
    world.send(honest())
    first = world.rings()[0]
    world.answer(first)
    acknowledge(world, first)
    world.send(honest(cseq=2, vias=via("z9hG4bK-2")))
    world.hang_up(first)
    world.wait(40.0)
    second = world.rings()[0]
    world.answer(second)
    acknowledge(world, second)
    world.wait(600.0)
    world.finish()
    assert [event.kind for event in world.events] == ["begin", "end"] * 2


def test_an_invite_with_the_cseq_of_an_answered_one_is_another_call(world: World) -> None:
    """Rule 2: both forks of the second are one call, also beside a third that was challenged."""
    world.send(honest())
    world.answer(world.rings()[0])
    world.hang_up(world.talks()[0])
    world.send(Request("INVITE", cseq=2, vias=via("z9hG4bK-3")))
    world.send(honest(cseq=2, vias=via("z9hG4bK-2")))
    world.answer(world.rings()[0], cross=True)
    for leg in world.talks():
        acknowledge(world, leg)
    world.wait(60.0)
    world.finish()
    assert sorted(event.kind for event in world.events) == ["begin", "begin", "end", "end"]


def test_an_answered_invite_sent_again_after_its_transaction_is_a_new_call(world: World) -> None:
    """Rule 1: nobody acknowledged the first, whose end is not reported yet."""
    world.send(honest())
    world.answer(world.rings()[0])
    world.wait(33.0)
    world.send(honest())
    world.wait(10.0)
    leg = world.rings()[0]
    world.answer(leg)
    acknowledge(world, leg)
    world.wait(600.0)
    world.finish()


def test_a_bye_that_was_refused_on_many_ways_and_then_carried_out(world: World) -> None:
    """Rule 12: one branch, over MAX_WAYS Request-URIs, 600 s before it goes where it belongs."""
    world.send(honest())
    leg = world.rings()[0]
    world.answer(leg)
    acknowledge(world, leg)
    bye = Request("BYE", to_tag=leg.to_tag, cseq=2, vias=via("z9hG4bK-b"))
    for number in range(2 * agent.MAX_WAYS):
        world.send(replace(bye, uri=f"sip:{number}@h"))
    world.wait(600.0)
    world.send(replace(bye, uri=world.contact(leg.callee), route=True))
    assert not world.talks()
    world.finish()


def test_an_ack_that_comes_before_its_invite_waits_for_the_refusal() -> None:
    """Rule 7: where the proxy's own replies are mirrored, nobody can charge another so."""
    world = World("all")
    world.send(Request("ACK", "sip:x@h", to_tag="x", vias=via("z9hG4bK-2")))
    world.send(Request("INVITE", user=VICTIM))
    world.wait(60.0)
    world.finish()
    assert not world.events


def test_what_comes_late_in_a_call_is_followed_as_well(world: World) -> None:
    """Rule 2: over invite_timeout after the answer."""
    world.send(honest())
    first = world.rings()[0]
    world.answer(first)
    acknowledge(world, first)
    world.wait(700.0)
    world.send(honest(cseq=2, vias=via("z9hG4bK-2")))
    second = world.rings()[0]
    world.answer(second)
    acknowledge(world, second)
    world.wait(60.0)
    world.finish()
    assert len(world.events) == 4


def test_the_to_tag_of_an_answer_was_used_before_in_another_call(world: World) -> None:
    """Rule 2: a re-INVITE in a dialog of the second call's while that rings."""
    world.send(honest())
    world.answer(world.rings()[0])
    world.send(Request("INVITE", cseq=3, vias=via("z9hG4bK-3")))
    world.send(Request("INVITE", to_tag="s0-call-c-3", cseq=50, vias=via("z9hG4bK-4")))
    world.send(honest(cseq=3, vias=via("z9hG4bK-2")))
    world.answer(world.rings()[1], cross=True)
    world.finish()
    assert len(world.events) == 4


def test_a_reinvite_with_the_branch_of_a_refused_invite_is_none_of_it(world: World) -> None:
    """Rule 3: the victim's INVITE was challenged, the re-INVITE is in an answered dialog."""
    world.send(Request("INVITE", cseq=3, vias=via("z9hG4bK-3"), user=VICTIM))
    world.send(honest())
    first = world.rings()[0]
    world.answer(first)
    acknowledge(world, first)
    world.send(honest(cseq=3, vias=via("z9hG4bK-2")))
    second = world.rings()[0]
    world.answer(second)
    acknowledge(world, second)
    reinvite = Request("INVITE", world.contact(second.callee), to_tag=second.to_tag, cseq=3)
    world.send(replace(reinvite, vias=via("z9hG4bK-3"), route=True))
    world.wait(60.0)
    world.finish()
    assert len(world.events) == 4


def test_a_branch_that_is_used_again_rings_as_long_as_any_other(world: World) -> None:
    """Rule 2: nobody took the first, nine minutes before."""
    world.send(honest(cseq=3, vias=via("z9hG4bK-3")))
    world.wait(560.0)
    world.send(honest(cseq=3, vias=via("z9hG4bK-3")))
    world.send(honest())
    dear, _, cheap, _ = world.rings()
    world.answer(cheap)
    acknowledge(world, cheap)
    world.wait(100.0)
    world.answer(dear)
    acknowledge(world, dear)
    world.wait(60.0)
    world.finish()
    assert len(world.events) == 4


def test_a_2xx_that_is_sent_again_after_the_end_begins_nothing() -> None:
    """Rule 6: its CSeq is higher than that of the victim's INVITE; the caller has it repeated."""
    world = World("all")
    world.send(honest(cseq=4, vias=via("z9hG4bK-3") + via("z9hG4bK-2")))
    world.answer(world.rings()[0])
    world.hang_up(world.talks()[0])
    world.wait(10.0)
    world.send(Request("INVITE", user=VICTIM))
    world.send(Request("INVITE", call_id="call2", vias=via("z9hG4bK-3")))
    world.finish()
    assert len(world.events) == 2


def test_what_rings_on_is_followed_without_replies_too() -> None:
    """Rule 2, in a requests-only mirror."""
    world = World("requests")
    world.send(honest())
    world.send(honest(cseq=2, vias=via("z9hG4bK-2")))
    first, _, second, _ = world.rings()
    world.answer(first)
    acknowledge(world, first)
    world.wait(10.0)
    world.hang_up(first)
    world.wait(20.0)
    world.answer(second)
    acknowledge(world, second)
    world.wait(60.0)
    world.finish()
    assert len(world.events) == 4


def test_an_ack_beside_a_cancel_whose_invite_was_not_seen_does_no_harm() -> None:
    world = World("received")
    world.send(honest())
    world.send(Request("CANCEL", cseq=5, vias=via("z9hG4bK-5")))
    world.send(Request("ACK", "sip:x@h", to_tag="x", cseq=5, vias=via("z9hG4bK-6")))
    world.send(Request("BYE", "sip:x@h", to_tag="x", cseq=6, vias=via("z9hG4bK-7")))
    world.finish()


HUNT = "ADVERSARY_EXAMPLES" in os.environ
MACHINES: list[tuple[str, dict[str, Any]]] = [
    ("received", {"unanswered_bye": "ignore"}),
    ("received", {"unanswered_bye": "ignore", "challenge_bye": True}),
    ("received", {}),
    ("received", {"stateless": False}),
    ("received", {"unanswered_bye": "ignore", "validates": False}),
    ("all", {}),
    ("requests", {}),
]


@pytest.mark.parametrize(("mode", "options"), MACHINES, ids=lambda x: str(x))
def test_whatever_the_caller_sends(mode: str, options: dict[str, Any]) -> None:
    machine = type("Machine", (Adversary,), {"mode": mode, "options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("ADVERSARY_EXAMPLES", 60)),
            stateful_step_count=int(os.environ.get("ADVERSARY_STEPS", 15)),
            deadline=None,
            derandomize=not HUNT,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
