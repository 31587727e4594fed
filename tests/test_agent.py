"""The whole agent as a process: faults of peers, signals, reload, shutdown."""

from __future__ import annotations

import json
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import gevent
import pytest

import harness
import hepbuild
import rating_agent_hep as agent
from dialog import ack, bye, bye_reply, call, frames, in_dialog, invite, numbered, reply
from harness import LOCAL, kinds, whole


@pytest.fixture
def running(api: harness.RatingServer) -> Any:
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL) as process:
        yield process


def test_a_stream_octet_by_octet(api: harness.RatingServer, running: harness.AgentProcess) -> None:
    stream = b"".join(call(1))
    harness.send_tcp(running.tcp, (stream[at : at + 1] for at in range(len(stream))))
    harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")


def test_a_stream_cut_at_every_octet_boundary_of_a_frame(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    frame = call(1)[0]
    for cut in range(1, len(frame)):
        stream = b"".join(call(cut))
        harness.send_tcp(running.tcp, (stream[:cut], stream[cut:]))
    count = len(frame) - 1
    harness.wait_until(lambda: len(api.requests) == 2 * count, "all calls are reported")
    assert sorted(kinds(api)) == sorted(x for cut in range(1, len(frame)) for x in whole(cut))


def test_a_connection_that_loses_framing_costs_only_itself(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    with (
        socket.create_connection(running.tcp) as good,
        socket.create_connection(running.tcp) as bad,
    ):
        messages = call(1)
        good.sendall(messages[0][:50])
        # What came whole before the fault counts.
        bad.sendall(b"".join(call(2)) + b"GET / HTTP/1.1\r\n\r\n")
        assert bad.recv(1) == b""
        good.sendall(messages[0][50:] + b"".join(messages[1:]))
        harness.wait_until(lambda: len(api.requests) == 4, "both calls are reported")
    assert sorted(kinds(api)) == sorted(whole(1) + whole(2))
    (line,) = running.events("malformed_hep_framing")
    assert line["level"] == "WARNING" and "47455420" in line["message"]


def test_hep1_and_hep2_over_udp(api: harness.RatingServer, running: harness.AgentProcess) -> None:
    payloads = (invite(), reply(200), ack(), bye(), bye_reply())
    old = [
        hepbuild.hep1(numbered(payload, 1), src=hepbuild.SRC, dst=hepbuild.DST)
        for payload in payloads
    ]
    for number, padded in ((2, True), (3, False)):
        old += [
            hepbuild.hep2(
                numbered(payload, number),
                src=hepbuild.SRC,
                dst=hepbuild.DST,
                time_us=hepbuild.TIME_US,
                capture_id=7,
                padded=padded,
            )
            for payload in payloads
        ]
    harness.send_udp(running.udp, old)
    harness.wait_until(lambda: len(api.requests) == 6, "all calls are reported")
    assert sorted(kinds(api)) == sorted(whole(1) + whole(2) + whole(3))
    stamps = [body.get("timestamp_begin") for _, body in api.requests]
    assert stamps.count(agent.rfc3339(hepbuild.TIME_US)) == 2


def test_datagrams_of_the_largest_size(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    """65,507 octets is what UDP over IPv4 carries; gevent's own server would cut at 8,192."""
    datagrams = []
    for payload in (invite(), reply(200), bye(), bye_reply()):
        spare = 65_507 - len(hepbuild.hep3(numbered(payload, 1)))
        head, _, _ = numbered(payload, 1).partition(b"\r\n\r\n")
        filled = head.replace(b"\r\nFrom:", b"\r\nX: " + b"x" * (spare - 5) + b"\r\nFrom:")
        datagrams += [hepbuild.hep3(filled + b"\r\n\r\n")]
        assert len(datagrams[-1]) == 65_507
    harness.send_udp(running.udp, datagrams)
    harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")


def test_bad_packets_cost_only_themselves_and_are_not_a_flood_of_lines(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    good = call(1)
    bad = [
        b"",
        b"x",
        b"HEP3",
        good[0][:-1],
        good[0] + b"x",
        b"HEP3" + struct.pack("!HHHH", 12, 0, 1, 3),
        hepbuild.hep3(b"no SIP at all"),
        hepbuild.hep3(b"\r\n\r\n"),
        hepbuild.hep3(b"NOTICE: a log line", protocol_type=100),
        hepbuild.hep3(invite().replace(b"Call-ID", b"X-Other")),
        hepbuild.hep3(reply(200).replace(b"CSeq: 1", b"CSeq: one")),
    ] * 30
    mixed = [datagram for packet in good for datagram in (*bad, packet)]
    harness.send_udp(running.udp, mixed)
    harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")
    assert running.stop() == 0
    assert running.events("internal_error") == []
    lines = [line for line in running.lines if line.get("event", "").startswith("malformed")]
    # Several kinds, at most a few lines of each in each of the few seconds that this takes.
    assert 5 <= len({line["event"] for line in lines}) <= 10
    assert len(lines) < 150 < len(bad) * len(good)
    assert running.events("held_back") or any("held_back" in line for line in lines)


def test_a_bad_message_of_a_stream_hides_none_behind_it(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    """Several SIP messages of a TCP connection in one HEP packet, as a sniffer may take them."""
    bad = invite().replace(b"Call-ID", b"X-Other")
    payloads = (invite(), reply(200), ack(), bye(), bye_reply())
    stream = b"\r\n\r\n" + b"\r\n".join(x for message in payloads for x in (bad, message))
    harness.send_udp(running.udp, frames(stream, protocol=6))
    harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")
    assert len(running.events("malformed_sip_missing")) == 1


def test_one_line_for_each_begin_and_end(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    harness.send_udp(running.udp, call(1))
    harness.wait_until(lambda: running.events("call_end"), "the end is logged")
    (begin,), (end,) = running.events("call_begin"), running.events("call_end")
    for line in (begin, end):
        assert line["level"] == "INFO"
        assert line["call_id"] == line["transaction_tag"] == "call-1@host"
        assert (line["tenant"], line["account_tag"]) == ("default", "2000")
        assert (line["destination_account_tag"], line["attempt"]) == ("2001", 1)
        assert line["outcome"] == "ok"
    assert begin["timestamp_begin"] == end["timestamp_end"] == agent.rfc3339(hepbuild.TIME_US)


def test_begin_is_answered_before_the_end_is_sent(api: harness.RatingServer) -> None:
    order = []

    def slow(path: str, body: dict[str, Any]) -> tuple[str, Any]:
        order.append(("in", path))
        gevent.sleep(0.3 if "begin" in path else 0)
        order.append(("out", path))
        return "200 OK", {"ok": True}

    api.answer = slow
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL) as process:
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: len(order) == 4, "both are answered")
    begin, end = "/v1/begin_transaction", "/v1/end_transaction"
    assert order == [("in", begin), ("out", begin), ("in", end), ("out", end)]


def test_sigterm_delivers_what_waits_and_what_is_held(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    # The end waits for the answer of another fork, and of the second call nobody answers the BYE.
    harness.send_udp(running.udp, [*call(1), *call(2)[:-1]])
    assert running.stop(signal.SIGTERM) == 0
    assert sorted(kinds(api)) == sorted(whole(1) + whole(2))
    assert running.events("stopped")


def test_sigint_and_an_api_that_is_gone_log_what_could_not_be_delivered() -> None:
    options = ("--rating-api-url=http://127.0.0.1:1", "--shutdown-timeout=0.3", LOCAL)
    with harness.AgentProcess(*options) as process:
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: process.events("api_error"), "the API is tried")
        assert process.stop(signal.SIGINT) == 0
        lost = process.events("event_undelivered")
    assert [line["level"] for line in lost] == ["ERROR", "ERROR"]
    replays = [line["replay"] for line in lost]
    assert [replay["url"] for replay in replays] == [
        f"http://127.0.0.1:1/v1/{kind}_transaction" for kind in ("begin", "end")
    ]
    assert replays[0]["body"]["timestamp_begin"] == agent.rfc3339(hepbuild.TIME_US)
    assert not any(replay["maybe_delivered"] for replay in replays)


def test_a_second_signal_exits_at_once() -> None:
    options = ("--rating-api-url=http://127.0.0.1:1", "--shutdown-timeout=3600", LOCAL)
    with harness.AgentProcess(*options) as process:
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: process.events("api_error"), "the API is tried")
        process.kill(signal.SIGTERM)
        harness.wait_until(lambda: process.events("stopping"), "it is stopping")
        assert not process.ended
        assert process.stop(signal.SIGTERM) == 1


def test_running_calls_are_told_of_at_the_end(running: harness.AgentProcess) -> None:
    harness.send_udp(running.udp, frames(invite(), reply(200), in_dialog("INVITE")))
    harness.wait_until(lambda: running.events("call_begin"), "the call has begun")
    assert running.stop() == 0
    assert running.events("calls_forgotten")[0]["running"] == 1


def test_sighup_reloads_the_routes_whole_or_not_at_all(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    routes = tmp_path / "routes.yaml"
    routes.write_text("- {name: one, tenant: first}\n")
    options = ("--rating-api-url", api.url, "--routes", str(routes), LOCAL)
    with harness.AgentProcess(*options) as process:
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: len(api.requests) == 2, "the first call")
        routes.write_text("- {name: two, tenant: second}\n- {name: broken, tenat: x}\n")
        process.kill(signal.SIGHUP)
        harness.wait_until(lambda: process.events("reload_failed"), "the file is refused")
        message = process.events("reload_failed")[0]["message"]
        assert f"{routes}:2" in message and "'tenat'" in message and "allowed" in message
        harness.send_udp(process.udp, call(2))
        harness.wait_until(lambda: len(api.requests) == 4, "the second call")
        routes.write_text("- {name: two, tenant: second}\n")
        process.kill(signal.SIGHUP)
        harness.wait_until(lambda: process.events("reloaded"), "the file is taken")
        harness.send_udp(process.udp, call(3))
        harness.wait_until(lambda: len(api.requests) == 6, "the third call")
    assert [body["tenant"] for _, body in api.requests] == ["first"] * 4 + ["second"] * 2


def test_statsd_is_told_and_its_absence_disturbs_nothing(api: harness.RatingServer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(harness.DEADLINE)
        options = ("--statsd-host=127.0.0.1", f"--statsd-port={statsd.getsockname()[1]}")
        with harness.AgentProcess("--rating-api-url", api.url, LOCAL, *options) as process:
            harness.send_udp(process.udp, [*call(1), b"junk"])
            seen: dict[str, float] = {}
            wanted = {"calls.ended", "packets.malformed.hep_magic", "calls.state.ended"}
            wanted |= {"events.waiting", "connections"}
            while not wanted <= set(seen):
                for line in statsd.recv(65_536).decode().split("\n"):
                    name, _, value = line.partition(":")
                    number, _, kind = value.partition("|")
                    name = name.removeprefix("rating_agent_hep.")
                    seen[name] = seen.get(name, 0) * (kind == "c") + float(number)
        assert seen["packets.received.udp"] == 6
        assert (seen["calls.begun"], seen["calls.ended"], seen["calls.end.bye"]) == (1, 1, 1)
        assert seen["packets.malformed.hep_magic"] == 1
        assert (seen["events.waiting"], seen["connections"]) == (0, 0)
    api.requests.clear()
    options = ("--statsd-host=no-such-host.invalid",)
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL, *options) as process:
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")


def test_log_lines_are_json_whatever_a_peer_sends(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    odd = b'call-\xff\xc3\xa9"\\\x1b[31m^@host'
    messages = (invite(), reply(200), bye(), bye_reply())
    datagrams = [message.replace(b"call-1@host", odd) for message in messages]
    harness.send_udp(running.udp, [hepbuild.hep3(datagram) for datagram in datagrams])
    harness.wait_until(lambda: len(api.requests) == 2, "the call is reported")
    tag = 'call-^ff^c3^a9"\\^1b[31m^5e@host'
    assert {body["transaction_tag"] for _, body in api.requests} == {tag}
    harness.wait_until(lambda: running.events("call_end"), "it is logged")
    assert running.events("call_end")[0]["call_id"] == tag
    assert json.dumps(running.lines)
