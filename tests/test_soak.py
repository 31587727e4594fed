"""scripts/soak.py: the rules it computes by, its rating API, and a short run of all of it."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

import harness
import rating_agent_hep as agent
import soak

SENT = {"invite": 0, "180": 1, "200": 2, "ack": 3, "bye": 9, "bye reply": 10}


@pytest.mark.parametrize(
    ("lost", "late", "times"),
    [
        ((), {}, {"begin": 2, "end": 9}),
        (("180",), {}, {"begin": 2, "end": 9}),
        (("200",), {}, {"begin": 3, "end": 9}),
        (("200", "180"), {}, {"begin": 3, "end": 9}),
        # A reply to the INVITE came, but none that says that it rang.
        (("200", "180"), {"407": 0.5}, {}),
        (("ack",), {}, {"begin": 2, "end": 9}),
        (("bye",), {}, {"begin": 2, "end": 10}),
        (("bye reply",), {}, {"begin": 2, "end": 9}),
        (("bye", "bye reply"), {}, {"begin": 2, "end": 2 + 60_000_000}),
        # Of a BYE that nobody answered the deadline is sooner than 32 s.
        (("bye reply",), {"bye": 35.0}, {"begin": 2, "end": 2 + 60_000_000}),
        # Replies are mirrored, so an ACK needs the callee's word.
        (("200", "bye reply"), {}, {}),
        # Without any reply it looks like a mirror of requests only.
        (("180", "200", "bye reply"), {}, {"begin": 3, "end": 9}),
        (("200", "ack"), {}, {}),
        (("invite",), {}, {}),
        # An ACK that overtakes all replies looks like that of a mirror without replies.
        ((), {"180": 5.0, "200": 5.0}, {"begin": 3, "end": 9}),
        ((), {"200": 5.0}, {"begin": 2, "end": 9}),
        # Judged when the INVITE comes: by then the 200 is there.
        ((), {"180": 5.0, "200": 5.0, "invite": 6.0}, {"begin": 2, "end": 9}),
    ],
)
def test_what_must_come(lost: Any, late: dict[str, float], times: dict[str, int]) -> None:
    sent = {what: at for what, at in SENT.items() if what not in lost}
    sent |= {"407": 0} if "407" in late else {}
    arrived = {what: late.get(what, float(at)) for what, at in sent.items()}
    assert soak.what_must_come(arrived, sent, 60.0) == times


@pytest.mark.parametrize("kind", soak.KINDS)
def test_the_rules_are_those_of_the_agent(kind: str) -> None:
    """Each call, with any of its messages lost or late, in a call table over virtual time."""
    settings = agent.Settings(sip_local_domains=("sip.canyan.io",), max_call_duration=60.0)
    rules = agent.parse_routes("", "routes.yaml", settings)
    rated = 0
    for seed in range(400):
        plan = soak.Plan(random.Random(seed), 60.0)
        plan.chance.choices = lambda *_, **__: [kind]  # type: ignore[method-assign]
        plan.add_call(1_790_000_000.0)
        table, events = agent.CallTable(settings, rules), []
        for at, _, _, data in sorted(plan.due):
            now = at - 1_790_000_000.0
            events += table.expire(now)
            packet = agent.decode_hep(data, 0)
            message = agent.parse_sip(packet.payload, packet.time)
            assert message is not None
            events += table.handle(agent.Sighting(packet, message), now)
        for now in (15.0, 30.0, 45.0, 90.0, 180.0):
            events += table.expire(now)
        got = {event.kind: agent.rfc3339(event.time) for event in events}
        assert len(got) == len(events)
        assert got == plan.expected.get("soak-0", {}), seed
        rated += bool(got)
    assert (rated > 300) == (kind in ("answered", "challenged")) and rated < 400


def test_its_rating_api_tells_what_no_agent_may_do() -> None:
    api = soak.Api(1)
    begin = b'{"transaction_tag": "soak-1", "timestamp_begin": "a"}'
    end = b'{"transaction_tag": "soak-1", "timestamp_end": "b"}'
    assert not api._carry_out("end", end)
    assert api._carry_out("begin", begin) and api._carry_out("begin", begin)
    assert api.faults == ["soak-1: ended without its begin"]
    assert api._carry_out("end", end) and not api._carry_out("end", end)
    assert api.records == {"soak-1": {"begin": "a", "end": "b"}}
    assert (api.counts["begun"], api.counts["ended"], api.counts["repeated"]) == (1, 1, 3)
    api._carry_out("begin", begin.replace(b'a"', b'c"'))
    assert [x.partition(": ")[2] for x in api.faults[1:]] == [
        "begin again with other octets",
        "begun again after its end",
    ]


def test_growth_is_that_of_a_straight_line_after_a_third() -> None:
    watch = soak.Watch(None)  # type: ignore[arg-type]
    watch.samples = [(at, 1_000 * max(at, 30)) for at in range(0, 91, 5)]
    assert watch.growth(90) == pytest.approx(60_000)
    watch.samples = [(at, 7) for at in range(0, 91, 5)]
    assert watch.growth(90) == 0


def test_a_short_run() -> None:
    done = subprocess.run(
        [sys.executable, str(harness.ROOT / "scripts" / "soak.py"), "--seconds=6", "--rate=60"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    assert "every call right" in done.stdout
    rows = {line[:52].strip(): line[52:].strip() for line in done.stdout.splitlines()}
    assert int(rows["calls rated"]) > 150 and int(rows["lost"]) > 50
