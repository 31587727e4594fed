"""The rules of a call's life, each as a scene: messages in, events out, time as a parameter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hepbuild
import rating_agent_hep as agent
from dialog import (
    FORWARDED,
    PROXY,
    REFUSED_CALLS,
    START,
    UAC,
    WHOLE_CALLS,
    Scene,
    ack,
    bye,
    bye_reply,
    cancel,
    in_dialog,
    invite,
    negative_ack,
    numbered,
    reply,
)

# Each scene: a name, the steps (a message, or seconds to wait), and the events they bring about.
SCENES: list[tuple[str, list[bytes | float], list[str]]] = [
    ("caller hangs up", [invite(), reply(180), reply(200), ack(), bye()], ["begin", "end"]),
    ("callee hangs up", [invite(), reply(200), bye(1, tag="s", to="c")], ["begin", "end"]),
    ("busy", [invite(), reply(486), negative_ack()], []),
    ("busy, then nothing more for an hour", [invite(), reply(486), 3600.0], []),
    ("never answered", [invite(), reply(180), 3600.0], []),
    ("requests only", [invite(), ack(), bye()], ["begin", "end"]),
    ("requests only, busy", [invite(), negative_ack(), 5.0], []),
    # 17.1.1.3 by branch and Request-URI; SIPp re-uses the branch, so the URI is the tie-breaker.
    ("requests only, branch re-used by a 2xx ACK", [invite(), ack(vias=(UAC,))], ["begin"]),
    (
        "requests only, ACK to a refusal of a branch whose INVITE comes late",
        [invite(), negative_ack(vias=(PROXY,)), invite(vias=FORWARDED), 5.0],
        [],
    ),
    (
        "caller's ACK to a refusal before the caller's INVITE copy",
        [invite(vias=FORWARDED), negative_ack(), invite(), 5.0],
        [],
    ),
    ("ACK to a refusal whose INVITE copy and reply are lost",
     [invite(), reply(180), negative_ack(vias=(PROXY,)), 5.0], []),
    ("caller's ACK to a refusal, with the caller's INVITE copy and the reply lost",
     [invite(vias=FORWARDED), negative_ack(), 5.0], []),
    ("ACK of unknown kind, nothing else comes", [invite(), ack(vias=(PROXY,)), 5.0], ["begin"]),
    ("401, then answered",
     [invite(), reply(401), negative_ack(), invite(2), reply(200, 2)], ["begin"]),
    ("302, then answered",
     [invite(), reply(302), invite(2), reply(200, 2), bye(3)], ["begin", "end"]),
    ("late 407 does not end the second attempt",
     [invite(), invite(2), reply(407, 1), reply(200, 2)], ["begin"]),
    ("a 200 to the first attempt after the second began is an answer to it (rule 3)",
     [invite(), invite(2), reply(200, 1), bye()], ["begin", "end"]),
    ("200 after a branch's 486", [invite(), reply(486, vias=FORWARDED), reply(200)], ["begin"]),
    ("200 after the caller's 486", [invite(), reply(486), reply(200), bye()], ["begin", "end"]),
    ("a fork rings for minutes after the other's 486",
     [invite(), invite(vias=FORWARDED), reply(486, vias=FORWARDED), 300.0, reply(200)], ["begin"]),
    ("the last branch's 200 after all known ones failed",
     [invite(), reply(486), invite(vias=(("10.0.0.9:5060", "z9hG4bK-z"),)), 60.0, reply(200)],
     ["begin"]),
    ("CANCEL has no effect on an answered call", [invite(), reply(200), cancel(), bye()],
     ["begin", "end"]),
    ("CANCEL and 200 cross", [invite(), cancel(), reply(200), ack(), bye()], ["begin", "end"]),
    ("cancelled", [invite(), cancel(), reply(487), negative_ack(), 60.0], []),
    ("a final response decides, not the ACK",
     [invite(), reply(486, vias=FORWARDED), ack(), 5.0], []),
    ("2xx lost, ACK seen, and the callee answers the BYE (rule 7)",
     [invite(), reply(180), ack(), 2.5, bye(), bye_reply()], ["begin", "end"]),
    ("2xx lost, ACK seen, and nothing by the callee: a caller's word only (rule 7)",
     [invite(), reply(180), ack(), 2.5, bye()], []),
    ("2xx comes within the window", [invite(), reply(180), ack(), 1.0, reply(200)], ["begin"]),
    ("re-INVITE changes nothing",
     [invite(), reply(200), in_dialog("INVITE"), reply(200, 2), bye(3)], ["begin", "end"]),
    ("re-INVITE never creates a call", [in_dialog("INVITE"), reply(200, 2), 5.0], []),
    ("BYE doubled and retransmitted", [invite(), reply(200), bye(), bye(), 0.5, bye()],
     ["begin", "end"]),
    ("BYE challenged and sent again", [invite(), reply(200), bye(2), bye(3)], ["begin", "end"]),
    ("BYE of another fork's dialog does not end the call",
     [invite(), reply(200), reply(200, to="t"), bye(to="t")], ["begin"]),
    ("BYE before the answer, confirmed: that dialog is void (rule 14)",
     [invite(), bye(), bye_reply(), 1.0, reply(200), 10.0], []),
    ("BYE before the answer, and another dialog answers (rule 14)",
     [invite(), bye(to="t"), bye_reply(to="t"), 3.0, reply(200), 10.0, bye(3)], ["begin", "end"]),
    ("BYE before the answer that nobody carried out (rules 12 and 14)",
     [invite(), bye(), bye_reply(407), 3.0, reply(200), 10.0, bye(3)], ["begin", "end"]),
    ("BYE without any call", [bye(), 5.0], []),
    ("everything before its INVITE", [bye(), ack(), reply(200), invite()], ["begin", "end"]),
    ("INVITE too late for what it explains", [reply(200), bye(), 2.5, invite(), 5.0], []),
    ("a copy of the INVITE after the end", [invite(), reply(200), bye(), invite(), reply(200)],
     ["begin", "end"]),
    ("the Call-ID is used again for a new dialog",
     [invite(), reply(200), bye(), invite(tag="d"), reply(200, tag="d"), bye(tag="d")],
     ["begin", "begin", "end", "end"]),
    ("another caller under the same Call-ID is another call (rule 2)",
     [invite(), invite(tag="b"), reply(200, tag="b"), reply(200), bye()],
     ["begin", "begin", "end"]),
    ("redial under the same Call-ID after a refusal",
     [invite(), reply(486), invite(tag="d"), reply(200, tag="d")], ["begin"]),
    ("no tags at all (RFC 2543)",
     [invite(tag=""), reply(200, tag="", to=""), bye(tag="", to="")], ["begin", "end"]),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "kinds"), [s[1:] for s in SCENES], ids=[s[0] for s in SCENES])
def test_scene(steps: list[bytes | float], kinds: list[str]) -> None:
    scene = Scene()
    for step in steps:
        if isinstance(step, bytes):
            scene.see(step)
        else:
            scene.wait(step)
    scene.wait(40)
    assert [event.kind for event in scene.events] == kinds


def test_begin_and_end_carry_their_messages_times_and_the_same_identity() -> None:
    scene = Scene(transaction_tags=("gold", "eu"))
    scene.see(invite(), at=0)
    scene.see(reply(200), at=3.25)
    scene.see(ack(), at=3.5)
    scene.see(bye(), at=63.5)
    scene.see(bye_reply(), at=63.6)
    scene.wait(3)
    assert (scene.seconds(0), scene.seconds(1)) == (3.25, 63.5)
    begin, end = scene.body(0), scene.body(1)
    assert begin == {
        "tenant": "default",
        "transaction_tag": "call-1@host",
        "account_tag": "2000",
        "destination_account_tag": "2001",
        "source": "sip:2000@sip.canyan.io",
        "source_ip": "10.0.0.1",
        "destination": "sip:2001@sip.canyan.io",
        "product_tag": "VOICE",
        "tags": ["gold", "eu"],
        "timestamp_begin": agent.rfc3339(START + 3_250_000),
    }
    assert end == {
        **{name: begin[name] for name in ("tenant", "transaction_tag", "account_tag")},
        "destination_account_tag": "2001",
        "timestamp_end": agent.rfc3339(START + 63_500_000),
    }


def test_requests_only_begin_is_at_once_and_at_the_ack() -> None:
    scene = Scene()
    scene.see(invite(), at=0)
    assert scene.see(ack(), at=2) == ["begin"]
    assert (scene.seconds(), scene.events[0].reason) == (2.0, "ack")


def test_ack_after_a_mirrored_reply_waits_for_its_2xx_which_gives_the_time() -> None:
    scene = Scene()
    scene.see(invite(), at=0)
    scene.see(reply(180), at=1)
    assert scene.see(ack(), at=5.4) == []
    assert scene.see(reply(200), at=5.0) == ["begin"]
    assert (scene.seconds(), scene.events[0].reason) == (5.0, "answer")


def test_begin_on_ack() -> None:
    scene = Scene(begin_on="ack")
    scene.see(invite(), at=0)
    assert scene.see(reply(200), at=4) == []
    assert scene.see(bye(), at=9) == []
    assert scene.see(bye_reply(), at=9) == []
    assert scene.see(ack(), at=5) == ["begin"]
    assert scene.wait(3) == ["end"]
    assert (scene.seconds(0), scene.seconds(1)) == (5.0, 9.0)


def test_begin_on_ack_takes_no_other_forks_ack_and_charges_nothing_without_one() -> None:
    scene = Scene(begin_on="ack")
    for payload in (invite(), reply(200), ack(to="t")):
        assert scene.see(payload) == []
    assert scene.wait(700) == []


def test_deadline_ends_the_call_at_its_longest_duration() -> None:
    scene = Scene(max_call_duration=3600.0)
    scene.see(invite(), at=0)
    scene.see(reply(200), at=10)
    assert scene.wait(3599) == []
    assert scene.wait(2) == ["end"]
    assert (scene.seconds(), scene.events[-1].reason) == (3610.0, "deadline")
    assert scene.see(bye(), at=4000) == []


def test_deadline_at_the_last_sign_of_life() -> None:
    scene = Scene(max_call_duration=3600.0, expired_call_end="last-seen")
    scene.see(invite(), at=0)
    scene.see(reply(200), at=10)
    scene.see(in_dialog("INVITE"), at=1200)
    assert scene.wait(3601) == ["end"]
    assert scene.seconds() == 1200.0


TIMER = [("Session-Expires", "1800;refresher=uac")]


def test_session_timer_ends_a_call_that_is_not_refreshed() -> None:
    scene = Scene()
    scene.see(invite(), at=0)
    scene.see(reply(200, headers=TIMER), at=10)
    assert scene.wait(1800 + agent.SESSION_GRACE - 1) == []
    assert scene.wait(3) == ["end"]
    assert (scene.seconds(), scene.events[-1].reason) == (1810.0, "session")


@pytest.mark.parametrize("method", ["INVITE", "UPDATE"])
def test_session_timer_is_renewed_by_a_refresh_from_either_side(method: str) -> None:
    scene = Scene()
    scene.see(invite(), at=0)
    scene.see(reply(200, headers=TIMER), at=0)
    scene.wait(1000)
    # From the callee: its own CSeq numbers, tags the other way round.
    scene.see(in_dialog(method, 1, tag="s", to="c"), at=1000)
    scene.see(reply(200, 1, tag="s", to="c", cseq_method=method, headers=TIMER), at=1000)
    assert scene.wait(1500) == []
    assert scene.wait(400) == ["end"]
    assert scene.seconds() == 2800.0


def test_session_timer_stops_with_a_refresh_that_agrees_on_none() -> None:
    scene = Scene()
    scene.see(invite())
    scene.see(reply(200, headers=TIMER))
    scene.see(in_dialog("INVITE"))
    scene.see(reply(200, 2))
    assert scene.wait(7200) == []
    scene.see(bye(3))
    assert scene.see(bye_reply(cseq=3)) == ["end"]


def test_session_timer_shorter_than_allowed_counts_as_the_least() -> None:
    scene = Scene()
    scene.see(invite())
    scene.see(reply(200, headers=[("x", "1;refresher=uas")]))
    assert scene.wait(60) == []
    assert scene.wait(90) == ["end"]


def test_ended_calls_leave_nothing_behind() -> None:
    scene = Scene()
    for payload in (invite(), reply(200, headers=TIMER), bye(), bye_reply(), ack(to="x")):
        scene.see(payload)
    scene.wait(3 + agent.REMEMBERED)
    scene.wait(agent.MAX_LOOK_AHEAD)
    table = scene.table
    assert len(table) == 0
    assert not any((table._calls, table._from_tags, table._legs, table._tags))
    assert not any((table._slots, table._order, table._due, table._unanswered, table._answered))


def test_counts_and_notices() -> None:
    scene = Scene()
    scene.see(bye())
    scene.wait(3)
    assert scene.table.counts == {"calls.orphaned": 1}
    notice = scene.table.take_notices()[0]
    assert (notice.kind, notice.call_id) == ("orphan", "call-1@host")
    assert scene.table.take_notices() == []
    for payload in (invite(), reply(486), negative_ack()):
        scene.see(payload)
    scene.wait(40)
    assert scene.table.counts["calls.failed"] == 1
    scene.see(invite())
    scene.wait(601)
    assert scene.table.counts["calls.expired.trying"] == 1


def test_over_max_calls_the_answered_go_last_and_with_their_end() -> None:
    scene = Scene(max_calls=4)
    for number in (1, 2, 3, 4):
        scene.see(numbered(invite(), number))
    scene.see(numbered(reply(200), 1))
    scene.see(numbered(reply(200), 2))
    scene.see(numbered(bye(), 2))
    scene.see(numbered(bye_reply(), 2))
    scene.see(numbered(reply(486), 3))
    scene.wait(3)
    order = []
    for number in (5, 6, 7, 8):
        before = scene.table.sizes()
        scene.see(numbered(invite(), number), at=100 + number)
        after = scene.table.sizes()
        order += [state for state in before if after[state] < before[state]]
        order += ["trying"] if after == before else []
    # Ended, failed, then the oldest that ring: 4 and 5. The answered one is still there.
    assert order == ["ended", "failed", "trying", "trying"]
    assert scene.table.sizes()["answered"] == 1
    for number in (6, 7, 8):
        scene.see(numbered(reply(200), number))
    assert scene.see(numbered(invite(), 9), at=200) == ["end"]
    assert (scene.events[-1].call_id, scene.events[-1].reason) == ("call-1@host", "evicted")
    assert scene.seconds() == 200.0
    assert [notice.kind for notice in scene.table.take_notices()] == ["evicted"]
    assert len(scene.table) == 4


OURS, FLOOD = "192.0.2.1", "203.0.113.9"


def each(scene: Scene, payload: bytes, numbers: Iterable[int], sender: str = OURS) -> list[str]:
    """The same message of several calls; what they brought about."""
    return [
        kind for number in numbers for kind in scene.see(numbered(payload, number), sender=sender)
    ]


def test_a_flood_of_invites_pushes_out_only_its_own() -> None:
    """Nor do running calls go for it, nor what rings, nor what an ended call's copies need."""
    scene = Scene(max_calls=100)
    each(scene, invite(), range(1, 31))
    each(scene, reply(200), range(1, 21))
    each(scene, bye(), range(1, 6))
    each(scene, bye_reply(), range(1, 6))
    scene.wait(3)
    before = scene.table.sizes()
    each(scene, invite(), range(1_000, 3_000), FLOOD)
    assert len(scene.table) == 100
    after = scene.table.sizes()
    assert after == {**before, "trying": 80}
    for number in range(6, 31):
        each(scene, reply(200), [number])
        each(scene, bye(), [number])
    scene.wait(40)
    kinds = [event.kind for event in scene.events]
    assert kinds.count("begin") == kinds.count("end") == 30
    assert "calls.evicted.answered" not in scene.table.counts


@pytest.mark.parametrize("senders", [1, 2_000])
def test_a_flood_from_forged_addresses_goes_before_a_sender_whose_calls_are_answered(
    senders: int,
) -> None:
    scene = Scene(max_calls=100)
    each(scene, invite(), range(1, 41))
    each(scene, reply(200), range(1, 31))
    for number in range(1_000, 3_000):
        forged = f"10.0.{number % senders // 250}.{number % senders % 250}"
        each(scene, invite(), [number], forged)
    for number in range(31, 41):
        assert each(scene, reply(200), [number]) == ["begin"]
    assert len(scene.table._unanswered) <= 100


def test_a_flood_of_answered_calls_leaves_others_what_rings() -> None:
    scene = Scene(max_calls=100)
    each(scene, invite(), range(1, 21))
    each(scene, reply(200), range(1, 11))
    for number in range(1_000, 2_000):
        each(scene, invite(), [number], FLOOD)
        each(scene, reply(200), [number], FLOOD)
    for number in range(11, 21):
        assert each(scene, reply(200), [number]) == ["begin"]
    for number in range(1, 21):
        each(scene, bye(), [number])
        each(scene, bye_reply(), [number])
    scene.wait(3)
    ended = [event.call_id for event in scene.events if event.reason == "bye"]
    assert sorted(ended) == sorted(f"call-{number}@host" for number in range(1, 21))


def test_what_senders_have_is_counted_to_the_last_call() -> None:
    scene = Scene()
    for number in range(1, 9):
        for payload in (invite(), reply(486 if number % 2 else 200), bye(), bye_reply()):
            scene.see(numbered(payload, number), sender=f"192.0.2.{number % 3}")
    assert sum(scene.table._unanswered.values()) == sum(scene.table._answered.values()) == 4
    scene.wait(3 + agent.REMEMBERED)
    scene.wait(agent.MAX_LOOK_AHEAD)
    assert scene.table._unanswered == scene.table._answered == {}


def test_what_is_known_of_one_call_is_bounded() -> None:
    """A caller may send any number of requests under one Call-ID: each leaves some 0.3 kB."""
    scene = Scene()
    scene.see(invite())
    for number in range(60):
        scene.see(bye(number + 2, to=f"t{number % 20}"))
        scene.see(ack(number, to="s"))
        for way in range(agent.MAX_WAYS + 3):
            scene.see(bye(99).replace(b"BYE sip:2001@", b"BYE sip:%d@" % way))
            scene.see(bye(way + 200))
    (call,) = scene.table._calls["call-1@host"]
    assert len(call.dialogs) == agent.MAX_DIALOGS
    dialog = call.find_dialog("s")
    assert dialog is not None
    assert len(dialog.acks) == len(dialog.byes) == agent.MAX_REQUESTS
    assert all(len(bye.seen) <= agent.MAX_WAYS for bye in dialog.byes)
    assert len(agent.pack_call(call, 0)) < 40_000


def test_orphans_leave_after_the_reorder_window() -> None:
    scene = Scene()
    for number in range(3_000):
        scene.see(numbered(bye(), number))
    assert scene.table.sizes()["orphan"] == 3_000
    for _ in range(3_000 // agent.MAX_EXPIRED_PER_TICK + 2):
        scene.wait(3)
    assert len(scene.table) == 0 and scene.table.counts["calls.orphaned"] == 3_000


def test_calls_of_one_call_id_are_bounded() -> None:
    scene = Scene()
    for number in range(agent.MAX_CALLS_PER_ID + 9):
        scene.see(invite(tag=f"tag-{number}"))
    assert len(scene.table._calls["call-1@host"]) == len(scene.table) == agent.MAX_CALLS_PER_ID
    assert scene.table.counts["calls.evicted.trying"] == 9


def test_attempts_of_one_call_are_bounded_and_the_next_is_a_call_of_its_own() -> None:
    """Else a caller could push out the attempt that is answered."""
    scene = Scene()
    for number in range(agent.MAX_ATTEMPTS + 5):
        scene.see(invite(number + 1, vias=(("10.0.0.1:1", f"z9hG4bK-{number}"),)))
    sizes = [len(call.attempts) for call in scene.table._calls["call-1@host"]]
    assert sizes == [agent.MAX_ATTEMPTS, 5]
    assert scene.see(reply(200, 2, vias=(("10.0.0.1:1", "z9hG4bK-1"),))) == ["begin"]
    assert scene.see(reply(200, 19, vias=(("10.0.0.1:1", "z9hG4bK-18"),), to="t")) == ["begin"]


def test_invite_copies_are_bounded() -> None:
    scene = Scene()
    for number in range(agent.MAX_INVITE_COPIES + 20):
        scene.see(invite(vias=((f"10.0.0.1:{number}", f"z9hG4bK-{number}"), UAC)))
    (call,) = scene.table._calls["call-1@host"]
    assert len(call.attempts[0].copies) == agent.MAX_INVITE_COPIES
    assert len(call.attempts[0].further) == agent.MAX_FURTHER


def test_copies_of_one_branch_are_bounded() -> None:
    """A copy with other lower hops each time: it was 0.2 kB more each, and packed whole each."""
    scene = Scene()
    for number in range(2_000):
        hops = [PROXY, (f"10.0.0.1:{number}", f"z9hG4bK-{number}"), UAC]
        scene.see(invite(vias=hops, uri=f"sip:{number}@h"))
    (call,) = scene.table._calls["call-1@host"]
    sizes = [len(x.uris) + len(x.below) for x in call.attempts[0].copies]
    assert sum(sizes) < agent.MAX_COPY_VALUES + agent.MAX_VIAS
    assert len(agent.pack_call(call, 0)) < 50_000
    assert scene.see(ack()) == ["begin"]


def test_sessions_that_end_in_one_second_are_ended_over_several_ticks() -> None:
    """As after a restart, which gives all of them a whole new interval."""
    scene = Scene()
    count = agent.MAX_EXPIRED_PER_TICK * 2 + 10
    for number in range(count):
        scene.see(numbered(invite(), number))
        scene.see(numbered(reply(200, headers=TIMER), number))
    scene.events.clear()
    scene.now += 1800 + agent.SESSION_GRACE + 2
    sizes = [len(scene._note(scene.table.expire(scene.now))) for _ in range(4)]
    assert sizes == [agent.MAX_EXPIRED_PER_TICK] * 2 + [10, 0]
    assert scene.table.sizes()["answered"] == 0


WHOLESALE = """
- name: wholesale
  match: {capture_id: 2001}
  tenant: wholesale
  account: header:X-Account
- name: internal
  match: {from_domain: internal.example}
  action: ignore
"""


def test_two_capture_agents_of_two_tenants_charge_each_their_own() -> None:
    """A retail and a wholesale proxy in one path: the same call, one charge in each tenant."""
    scene = Scene(WHOLESALE)
    scene.see(reply(200))
    account = [("X-Account", "reseller")]
    assert scene.see(invite(), capture_id=1) == ["begin"]
    assert scene.see(invite(vias=FORWARDED, headers=account), capture_id=2001) == ["begin"]
    scene.see(bye())
    scene.see(bye_reply())
    assert scene.wait(3) == ["end", "end"]
    tenants = [(event.kind, event.tenant, event.account_tag) for event in scene.events]
    assert tenants == [
        ("begin", "default", "2000"),
        ("begin", "wholesale", "reseller"),
        ("end", "default", "2000"),
        ("end", "wholesale", "reseller"),
    ]


def test_a_forwarded_copy_from_the_same_capture_agent_is_never_a_second_call() -> None:
    routes = "- match: {source_network: 10.0.0.0/24}\n  tenant: customer\n"
    for order in ((0, 1), (1, 0)):
        scene = Scene(routes)
        copies = [
            hepbuild.hep3(invite(), src=("10.0.0.7", 5060), time_us=START),
            hepbuild.hep3(invite(vias=FORWARDED), src=("192.0.2.1", 5060), time_us=START),
        ]
        for index in order:
            packet = agent.decode_hep(copies[index], 0)
            message = agent.parse_sip(packet.payload, packet.time)
            assert message is not None
            scene.table.handle(agent.Sighting(packet, message), scene.now)
        # The copy nearest to the caller says whose call it is, in whatever order they come.
        assert scene.see(reply(200)) == ["begin"]
        assert (scene.events[0].tenant, scene.body()["source_ip"]) == ("customer", "10.0.0.7")


@pytest.mark.parametrize("first", [1, 2])
def test_legs_that_a_header_ties_are_one_call(first: int) -> None:
    """A session border controller changes Call-ID and tags (RFC 5853); X-Leg says what belongs."""
    scene = Scene("- transaction_tag: header:X-Leg\n")
    tied = [("X-Leg", "one")]
    for number in (1, 2):
        scene.see(numbered(invite(headers=tied), number))
    for number in (first, 3 - first):
        scene.see(numbered(reply(200), number))
    for number in (1, 2):
        scene.see(numbered(bye(), number))
        scene.see(numbered(bye_reply(), number))
    scene.wait(3)
    assert [event.kind for event in scene.events] == ["begin", "end"]
    assert {event.call_id for event in scene.events} == {f"call-{first}@host"}
    assert {event.transaction_tag for event in scene.events} == {"one"}
    assert scene.table.counts["calls.unrated.tied"] == 1
    # Without the header each leg is a call of its own.
    for payload in (invite(), reply(200), bye(), bye_reply()):
        scene.see(numbered(payload, 3))
    scene.wait(3)
    assert [event.kind for event in scene.events] == ["begin", "end"] * 2


def test_ignored_and_accountless_calls_are_followed_but_not_reported() -> None:
    scene = Scene(WHOLESALE)
    internal = {"from_uri": "sip:7@internal.example"}
    for payload in (invite(**internal), reply(200, **internal), bye()):
        assert scene.see(payload) == []
    foreign = {"from_uri": "sip:1@a.example", "to_uri": "sip:2@b.example"}
    for payload in (invite(**foreign), reply(200, **foreign), bye()):
        assert scene.see(numbered(payload, 2)) == []
    assert scene.table.counts == {"calls.unrated.ignored": 1, "calls.unrated.no_account": 1}


def test_an_account_that_only_a_later_copy_shows_is_taken_up() -> None:
    scene = Scene(sip_local_domains=())
    scene.see(invite())
    scene.see(invite(vias=FORWARDED, headers=[("P-Asserted-Identity", "<sip:77@x.example>")]))
    assert scene.see(reply(200)) == ["begin"]
    assert scene.events[0].account_tag == "77"


def test_reloaded_rules_are_for_new_calls_only() -> None:
    scene = Scene()
    scene.see(invite())
    scene.table.rules = agent.parse_routes("- tenant: new\n", "r", scene.settings)
    scene.see(reply(200))
    scene.see(numbered(invite(), 2))
    scene.see(numbered(reply(200), 2))
    assert [event.tenant for event in scene.events] == ["default", "new"]


def test_a_poisoned_message_does_not_cost_another_call() -> None:
    """A Via whose quote never closes: the parser must not fail when it is looked at later."""
    odd = reply(200).replace(b"Via: SIP", b'Via: "broken, SIP')
    scene = Scene()
    scene.see(numbered(invite(), 2))
    scene.see(numbered(reply(180), 2))
    scene.see(numbered(ack(), 2))
    scene.see(invite())
    assert scene.see(odd) == ["begin"]
    assert scene.see(numbered(reply(200), 2)) == ["begin"]


def play(messages: Sequence[tuple[int, bytes]], gaps: Sequence[float] = ()) -> Scene:
    """Messages with their place in the call as time stamp, in the given order of arrival."""
    scene = Scene()
    for (place, payload), gap in itertools.zip_longest(messages, gaps[: len(messages)]):
        scene.see(payload, at=place * 0.01)
        if gap:
            scene.wait(gap)
    scene.wait(40)
    return scene


@pytest.mark.parametrize("name", WHOLE_CALLS)
def test_any_order_within_the_window_gives_the_same_two_events(name: str) -> None:
    messages = list(enumerate(WHOLE_CALLS[name]))
    chance = random.Random(name)
    for _ in range(300):
        chance.shuffle(messages)
        doubled = [message for message in messages for _ in range(chance.choice((1, 1, 2)))]
        scene = play(doubled)
        kinds = [event.kind for event in scene.events]
        assert kinds == ["begin", "end"], [payload.split(b"\r\n")[0] for _, payload in doubled]


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_no_order_makes_a_refused_call_begin(name: str) -> None:
    messages = list(enumerate(REFUSED_CALLS[name]))
    orders: Any = itertools.permutations(messages)
    for order in itertools.islice(orders, 0, None, max(1, 5040 // 720)):
        assert play(order).events == [], [payload.split(b"\r\n")[0] for _, payload in order]
        if len(messages) > 7:
            break
    chance = random.Random(name)
    for _ in range(200):
        chance.shuffle(messages)
        assert play(messages).events == []


def test_a_late_answer_belongs_to_the_call_of_its_cseq() -> None:
    """Not to an earlier attempt, which goes on as a call of its own behind the end."""
    messages = list(enumerate(WHOLE_CALLS["challenged"]))
    late = [messages[place] for place in (0, 3, 5, 6, 4)]
    for gaps in ([0.0, 0.0, 2.2], [0.0, 0.0, 0.0, 2.2], [0.0, 0.0, 2.2, 2.2]):
        assert [event.kind for event in play(late, gaps).events] == ["begin", "end"]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_comes_at_most_one_begin_then_at_most_one_end(data: st.DataObject) -> None:
    """Any messages of a call, missing, doubled, in any order and with any gaps between them."""
    messages = data.draw(st.sampled_from([*WHOLE_CALLS.values(), *REFUSED_CALLS.values()]))
    picked = data.draw(st.lists(st.sampled_from(list(enumerate(messages))), max_size=25))
    gaps = data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.2, 10.0]), max_size=len(picked)))
    scene = play(picked, gaps)
    assert [event.kind for event in scene.events] in ([], ["begin"], ["begin", "end"])
