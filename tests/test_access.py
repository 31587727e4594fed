"""Who may send, how much of it is taken, and what is known of a sender."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from test_calls import invite

import hepbuild
import rating_agent_hep as agent


def make_agent(**options: Any) -> agent.Agent:
    settings = dataclasses.replace(agent.Settings(), **options)
    return agent.Agent(settings, agent.load_rules(settings), agent.WarningLimiter())


# What is known of a sender


def test_a_sender_is_counted_by_what_became_of_its_packets() -> None:
    on = make_agent()
    sender = on.senders.of("::ffff:192.0.2.1")
    assert sender is on.senders.of("192.0.2.1") and sender.address == "192.0.2.1"
    bad = hepbuild.hep3(b"no SIP at all")
    before = time.time_ns() // 1000, time.monotonic()
    for packet in (hepbuild.hep3(invite()), bad, bad, b"junk", hepbuild.hep3(b"", protocol_type=5)):
        on.receive(packet, "udp", sender)
    assert sender.packets == 5
    assert sender.dropped == {"sip_start_line": 2, "hep_magic": 1, "not_sip": 1}
    assert sender.fault == "no HEP packet: it begins with 6a756e6b"
    assert before[0] - 1 <= sender.seen_at <= time.time_ns() // 1000 + 1
    assert before[1] <= sender.seen <= time.monotonic()
    assert on.metrics.totals["packets.dropped.not_sip"] == 1
    assert on.metrics.totals["packets.malformed.hep_magic"] == 1


def test_the_clock_skew_of_a_sender_is_smoothed() -> None:
    on = make_agent()
    sender = on.senders.of("192.0.2.1")
    on.receive(hepbuild.hep1(invite(), src=hepbuild.SRC, dst=hepbuild.DST), "udp", sender)
    assert sender.skew is None, "HEP1 has no time stamp"
    for late in (5.0, 5.0, 3.0):
        stamp = round((time.time() - late) * 1_000_000)
        on.receive(hepbuild.hep3(invite(), time_us=stamp), "udp", sender)
    assert sender.skew == pytest.approx(5000 - 2000 / 16, abs=100)


def test_forged_addresses_do_not_take_memory_and_connections_are_kept() -> None:
    senders = agent.Senders()
    connected = senders.of("192.0.2.1")
    connected.connections = 1
    idle, busy = senders.of("192.0.2.2"), senders.of("192.0.2.3")
    for number in range(3 * agent.MAX_SENDERS):
        senders.of(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        assert senders.of("192.0.2.3") is busy
    assert len(senders) == len(list(senders)) == agent.MAX_SENDERS
    assert senders.of("192.0.2.1") is connected
    assert senders.of("192.0.2.2") is not idle
