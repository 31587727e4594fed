"""Who may send, how much of it is taken, TLS on both sides, and what is known of a sender."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.server
import pytest

import harness
import hep_replay
import hepbuild
import rating_agent_hep as agent
from dialog import ack, bye, bye_reply, call, frames, invite, reply
from harness import LOCAL, kinds, whole
from ratings import event

KEY = "first key"


def make_agent(**options: Any) -> agent.Agent:
    settings = dataclasses.replace(agent.Settings(), **options)
    return agent.Agent(
        settings, agent.load_rules(settings), agent.WarningLimiter(), tls=agent.load_tls(settings)
    )


def send_from(source: str, address: tuple[str, int], datagrams: Iterable[bytes]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        for datagram in datagrams:
            sock.sendto(datagram, address)


def closed(sock: socket.socket) -> bool:
    """Whether the agent closes the connection, having said nothing."""
    sock.settimeout(harness.DEADLINE)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def with_key(number: int, key: bytes | str | None) -> list[bytes]:
    return frames(invite(), reply(200), ack(), bye(), bye_reply(), number=number, auth_key=key)


# hep_allow


def test_only_networks_of_hep_allow_may_send(api: harness.RatingServer) -> None:
    allow = "--hep-allow=127.0.0.2,127.1.0.0/16"
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL, allow) as process:
        send_from("127.0.0.1", process.udp, [*call(1), b"junk"] * 20)
        with socket.create_connection(process.tcp) as refused:
            assert closed(refused)
        send_from("127.0.0.2", process.udp, call(2))
        with socket.create_connection(process.tcp, source_address=("127.1.2.3", 0)) as sock:
            sock.sendall(b"".join(call(3)))
            harness.wait_until(lambda: len(api.requests) == 4, "the allowed calls are reported")
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(whole(2) + whole(3))
    packets = process.events("dropped_not_allowed")
    assert {(line["level"], line["sender"]) for line in packets} == {("WARNING", "127.0.0.1")}
    assert len(packets) < 20
    (line,) = process.events("connection_not_allowed")
    assert line["sender"] == "127.0.0.1"
    assert not [line for line in process.lines if line.get("event", "").startswith("malformed")]


def test_what_hep_allow_refuses_is_counted_and_not_parsed() -> None:
    on = make_agent(hep_allow=("192.0.2.0/24", "2001:db8::/32"))
    for host, allowed in (
        ("192.0.2.255", True),
        ("::ffff:192.0.2.1", True),
        ("2001:db8:1::1", True),
        ("192.0.3.1", False),
        ("::ffff:10.0.0.1", False),
        ("2001:db9::1", False),
        ("::1", False),
    ):
        sender = on.senders.of(host)
        assert sender.allowed is allowed, host
        on.receive(b"junk", "udp", sender)
        assert sender.dropped == {"hep_magic" if allowed else "not_allowed": 1}
        assert on.admit(sender) is allowed
    assert on.metrics.totals["packets.dropped.not_allowed"] == 4
    assert on.metrics.totals["connections.refused.not_allowed"] == 4
    assert on.metrics.totals["packets.malformed.hep_magic"] == 3


def test_refused_senders_are_forgotten_first() -> None:
    on = make_agent(hep_allow=("192.0.2.0/24",))
    quiet = on.senders.of("192.0.2.1")
    for number in range(2 * agent.MAX_SENDERS):
        forged = on.senders.of(f"10.0.{number >> 8}.{number & 255}")
        on.receive(b"junk", "udp", forged)
    assert len(on.senders) == agent.MAX_SENDERS
    assert on.senders.of("192.0.2.1") is quiet


# hep_auth_key


def test_only_packets_with_a_key_are_taken(api: harness.RatingServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nsecond\n")
    options = ("--rating-api-url", api.url, LOCAL, f"--hep-auth-key-file={keys}")
    old = [
        hepbuild.hep1(payload, src=hepbuild.SRC, dst=hepbuild.DST)
        for payload in (invite(), reply(200), bye(), bye_reply())
    ]
    with harness.AgentProcess(*options) as process:
        refused = [*with_key(1, None), *with_key(2, "wrong"), *with_key(3, ""), *old]
        harness.send_udp(process.udp, refused * 5)
        harness.send_tcp(process.tcp, with_key(4, KEY[:-1]) + with_key(5, KEY + "x"))
        harness.send_udp(process.udp, with_key(6, KEY))
        harness.send_tcp(process.tcp, with_key(7, "second") + with_key(8, KEY.encode() + b"\0"))
        harness.wait_until(lambda: len(api.requests) == 6, "the calls with a key are reported")
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(whole(6) + whole(7) + whole(8))
    for kind in ("no_key", "wrong_key"):
        assert 1 <= len(process.events(f"dropped_{kind}")) < 20
    assert not any(key in str(process.lines) for key in (KEY, "second", "wrong'"))


def test_packets_without_a_key_are_counted_and_their_sip_is_not_parsed() -> None:
    on = make_agent(hep_auth_key=(KEY, "second"))
    sender = on.senders.of("192.0.2.1")
    for key in (None, "wrong", "second ", b"\0", KEY):
        on.receive(hepbuild.hep3(b"no SIP at all", auth_key=key), "udp", sender)
    assert sender.dropped == {"no_key": 1, "wrong_key": 3, "sip_start_line": 1}
    assert on.metrics.totals["packets.dropped.no_key"] == 1
    assert on.metrics.totals["packets.dropped.wrong_key"] == 3


def test_the_key_as_kamailio_sends_it() -> None:
    folder = harness.captures_folder() / "kamailio-5.6" / "core-udp"
    captures = [hep_replay.read_capture(str(path)) for path in folder.glob("*.hepl")]
    packets = [data for events in captures for _, data in hep_replay.frames(events)]
    for key, dropped in (("s3cret-key", 0), ("s3cret-ke", len(packets))):
        on = make_agent(hep_auth_key=(key,), rating_api_url="http://127.0.0.1:1")
        sender = on.senders.of("192.0.2.1")
        for packet in packets:
            on.receive(packet, "udp", sender)
        assert sender.packets == len(packets) > 0
        assert sender.dropped.get("wrong_key", 0) == dropped
        assert "no_key" not in sender.dropped
        on.delivery.kill()


# hep_rate_limit


def test_the_rate_of_a_sender_has_a_burst_of_a_second_and_then_its_share() -> None:
    sender = agent.Sender("192.0.2.1", True)
    assert [sender.within(10, 100.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert [sender.within(10, 100.25) for _ in range(3)] == [True, True, False]
    assert sum(sender.within(10, 101.0 + number / 1000) for number in range(1000)) in (17, 18)
    assert sum(sender.within(10, 1e6) for _ in range(100)) == 10, "silence saves no more than that"


def test_packets_over_the_rate_are_dropped_and_those_of_others_are_not() -> None:
    on = make_agent(hep_rate_limit=100, hep_auth_key=(KEY,))
    loud, other = on.senders.of("192.0.2.1"), on.senders.of("192.0.2.2")
    for _ in range(300):
        on.receive(hepbuild.hep3(b"\r\n"), "udp", other)
    for _ in range(300):
        on.receive(hepbuild.hep3(b"\r\n", auth_key=KEY), "udp", loud)
    on.receive(hepbuild.hep3(b"\r\n", auth_key=KEY), "udp", other)
    assert 180 <= loud.dropped["rate_limit"] <= 200
    assert on.metrics.totals["packets.dropped.rate_limit"] == loud.dropped["rate_limit"]
    assert other.dropped == {"no_key": 300, "empty": 1}, "forged packets take none of its share"


# Limits of connections


@contextlib.contextmanager
def listening(on: agent.Agent, kind: type[agent.TcpServer] = agent.TcpServer) -> Iterator[Any]:
    server = kind(agent.bind("127.0.0.1:0", socket.SOCK_STREAM), on)
    server.start()
    try:
        yield server
    finally:
        server.stop(timeout=0)


@contextlib.contextmanager
def connected(server: agent.TcpServer, count: int, source: str = "127.0.0.1") -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                socket.create_connection(server.address, source_address=(source, 0))
            )
            for _ in range(count)
        ]


def test_one_sender_does_not_get_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_CONNECTIONS", 10)
    monkeypatch.setattr(agent, "MAX_CONNECTIONS_PER_SENDER", 7)
    on = make_agent()
    refused = "connections.refused.too_many"
    with listening(on) as server, connected(server, 30) as greedy:
        harness.wait_until(lambda: on.metrics.totals.get(refused) == 23, "the others are refused")
        assert all(closed(sock) for sock in greedy[7:])
        sender = on.senders.of("127.0.0.1")
        assert (sender.connections, sender.dropped["connection_too_many"]) == (7, 23)
        with connected(server, 2, "127.0.0.2") as (modest, _):
            harness.wait_until(lambda: on.connections == 9, "another sender gets its place")
            modest.sendall(frames(b"\r\n")[0])
            harness.wait_until(lambda: on.senders.of("127.0.0.2").packets, "and is heard")
        greedy[0].close()
        harness.wait_until(lambda: sender.connections == 6, "the place is free again")
        with connected(server, 1):
            harness.wait_until(lambda: sender.connections == 7, "and taken")
    harness.wait_until(lambda: on.connections == sender.connections == 0, "all are closed")


def test_a_silent_connection_makes_room_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "MAX_CONNECTIONS", 3)
    on = make_agent()
    with listening(on) as server, connected(server, 3) as old:
        harness.wait_until(lambda: on.connections == 3, "the listener is full")
        now = time.monotonic()
        with connected(server, 1) as (newcomer,):
            newcomer.sendall(frames(b"\r\n")[0])
            server.close_overdue(now + 0.9 * agent.STALLED)
            gevent.sleep(0.05)
            assert on.connections == 3 and on.metrics.totals.get("packets.received.tcp") is None
            for connection in server._open:
                connection.since -= agent.CROWDED_IDLE
            server.close_overdue(now + 0.91 * agent.STALLED)
            assert all(closed(sock) for sock in old)
            wanted = "packets.received.tcp"
            harness.wait_until(lambda: on.metrics.totals.get(wanted), "the newcomer is heard")
    assert on.metrics.totals["connections.idle"] == 3


def look(server: agent.TcpServer, seconds: float) -> None:
    """Look at the connections of a server as if so much time had passed since the last look."""
    for connection in server._open:
        connection.since -= seconds
    server.close_overdue(time.monotonic())


def test_a_frame_has_its_time_however_its_octets_trickle(lines: list[Any]) -> None:
    on = make_agent()
    frame = frames(b"\r\n")[0]
    with listening(on) as server, connected(server, 2) as (slow, silent):
        harness.wait_until(lambda: on.connections == 2, "both are open")
        look(server, 1e6)
        for index in range(9):
            slow.sendall(frame[index : index + 1])
            harness.wait_until(
                lambda: any(each.inside for each in server._open), "the octet is read"
            )
            gevent.sleep(0.02)
            look(server, agent.FRAME_TIMEOUT / 10)
        assert on.connections == 2, "90 % of its time is over"
        slow.sendall(frame[9:10])
        gevent.sleep(0.02)
        look(server, agent.FRAME_TIMEOUT / 10 + 0.1)
        assert closed(slow)
        silent.sendall(frame)
        harness.wait_until(lambda: on.metrics.totals.get("packets.received.tcp"), "heard")
    assert on.metrics.totals["packets.malformed.hep_slow"] == 1
    sender = on.senders.of("127.0.0.1")
    assert sender.dropped["hep_slow"] == 1 and "30 s" in sender.fault
    assert "malformed_hep_slow" in [line.event for line in lines]


def test_each_whole_frame_gives_the_next_one_its_own_time() -> None:
    on = make_agent()
    stream = b"".join(frames(*[b"\r\n"] * 5))
    size = len(stream) // 5
    with listening(on) as server, connected(server, 1) as (sock,):
        for index in range(5):
            end = (index + 1) * size + (10 if index < 4 else 0)
            sock.sendall(stream[index * size + (10 if index else 0) : end])
            harness.wait_until(
                lambda: on.metrics.totals.get("packets.received.tcp") == index + 1,  # noqa: B023
                "a frame is read",
            )
            gevent.sleep(0.02)
            look(server, agent.FRAME_TIMEOUT * 0.9)
        assert on.connections == 1
    assert "packets.malformed.hep_slow" not in on.metrics.totals


def test_hep_idle_timeout_closes_silent_connections() -> None:
    on = make_agent(hep_idle_timeout=3600.0)
    with listening(on) as server, connected(server, 2) as (silent, other):
        harness.wait_until(lambda: on.connections == 2, "both are open")
        look(server, 3500)
        other.sendall(frames(b"\r\n")[0])
        harness.wait_until(lambda: on.metrics.totals.get("packets.received.tcp"), "heard")
        gevent.sleep(0.02)
        look(server, 101)
        assert closed(silent)
        harness.wait_until(lambda: on.connections == 1, "it is gone")
        look(server, 3400)
        gevent.sleep(0.02)
        assert on.connections == 1
    assert on.metrics.totals["connections.idle"] == 1


def test_the_agent_looks_at_its_connections(api: harness.RatingServer) -> None:
    options = ("--rating-api-url", api.url, "--hep-idle-timeout=0.3")
    with harness.AgentProcess(*options) as process, socket.create_connection(process.tcp) as sock:
        assert closed(sock)
        harness.wait_until(lambda: process.events("connection_idle"), "it is logged")
        (line,) = process.events("connection_idle")
        assert (line["level"], line["sender"]) == ("INFO", "127.0.0.1")


def test_time_in_which_the_agent_did_not_read_is_not_the_senders() -> None:
    on = make_agent(hep_idle_timeout=10.0)
    with listening(on) as server, connected(server, 2) as (inside, _):
        inside.sendall(b"HEP3")
        harness.wait_until(lambda: any(each.inside for each in server._open), "it is inside")
        server.close_overdue(time.monotonic() + 1e6)
        server.close_overdue(time.monotonic() + 1e6 + 1)
        gevent.sleep(0.02)
        assert on.connections == 2
        server.close_overdue(time.monotonic() + 1e6 + 4)
        server.close_overdue(time.monotonic() + 1e6 + 8)
        server.close_overdue(time.monotonic() + 1e6 + 12)
        harness.wait_until(lambda: on.connections == 1, "the silent one is closed")
        for seconds in (16, 20, 24, 28, 32):
            server.close_overdue(time.monotonic() + 1e6 + seconds)
        harness.wait_until(lambda: on.connections == 0, "and then the slow one")


def test_connections_leave_files_for_the_rating_api(api: harness.RatingServer) -> None:
    """With a limit of 64 files each listener takes 16 connections, and calls are delivered."""
    options = ("--rating-api-url", api.url, LOCAL)
    with harness.AgentProcess(*options, files=64) as process, contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(process.tcp)
        gevent.sleep(0.2)
        harness.send_udp(process.udp, call(1))
        harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")
        assert process.stop() == 0


# TLS


def client_context(folder: Path, cert: str = "", **more: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if cert:
        context.load_cert_chain(folder / f"{cert}.pem", folder / f"{cert}.key")
    for name, value in more.items():
        setattr(context, name, value)
    return context


@contextlib.contextmanager
def secured(address: tuple[str, int], context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with socket.create_connection(address) as plain:
        plain.settimeout(harness.DEADLINE)
        with context.wrap_socket(plain, server_hostname="localhost") as sock:
            yield sock


def tls_options(folder: Path) -> tuple[str, ...]:
    pair = (f"--tls-cert={folder}/server.pem", f"--tls-key={folder}/server.key")
    return ("--listen-tls=127.0.0.1:0", *pair)


def serial(sock: ssl.SSLSocket) -> str:
    return str((sock.getpeercert() or {})["serialNumber"])


def test_hep_over_tls(api: harness.RatingServer, tmp_path: Path) -> None:
    harness.certificates(tmp_path)
    options = ("--rating-api-url", api.url, LOCAL, *tls_options(tmp_path))
    with harness.AgentProcess(*options) as process:
        for number, version in ((1, ssl.TLSVersion.TLSv1_2), (2, ssl.TLSVersion.TLSv1_3)):
            context = client_context(tmp_path, minimum_version=version, maximum_version=version)
            with secured(process.tls, context) as sock:
                stream = b"".join(call(number))
                for start in range(0, len(stream), 700):
                    sock.sendall(stream[start : start + 700])
                # A frame larger than a TLS record.
                sock.sendall(frames(b"OPTIONS sip:a SIP/2.0\r\nX: " + b"x" * 60_000)[0])
                sock.sendall(b"".join(call(number + 10)))
        harness.wait_until(lambda: len(api.requests) == 8, "the calls are reported")
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(whole(1) + whole(2) + whole(11) + whole(12))
    assert not [line for line in process.lines if line["level"] != "INFO"]


def test_handshakes_that_fail_or_hang_cost_only_themselves(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    harness.certificates(tmp_path)
    options = ("--rating-api-url", api.url, LOCAL, *tls_options(tmp_path))
    with harness.AgentProcess(*options) as process, contextlib.ExitStack() as stack:
        hanging = [stack.enter_context(socket.create_connection(process.tls)) for _ in range(20)]
        hanging[0].sendall(b"\x16\x03\x01\x02\x00\x01")
        for junk in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"".join(call(1))):
            with socket.create_connection(process.tls) as sock:
                sock.sendall(junk)
                sock.settimeout(harness.DEADLINE)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(1000):
                        pass
        old = client_context(tmp_path)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionResetError)), secured(process.tls, old):
            pass
        with secured(process.tls, client_context(tmp_path)) as sock:
            sock.sendall(b"".join(call(2)))
            harness.wait_until(lambda: len(api.requests) == 2, "the call is reported")
        assert kinds(api) == whole(2)
        assert process.stop() == 0
    failures = process.events("connection_handshake_failed")
    assert 3 <= len(failures) <= 4
    assert {(line["level"], line["sender"]) for line in failures} == {("WARNING", "127.0.0.1")}


def test_a_handshake_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    monkeypatch.setattr(agent, "HANDSHAKE_TIMEOUT", 0.1)
    harness.certificates(tmp_path)
    on = make_agent(
        listen_tls=":0", tls_cert=f"{tmp_path}/server.pem", tls_key=f"{tmp_path}/server.key"
    )
    with listening(on, agent.TlsServer) as server, connected(server, 3) as socks:
        assert all(closed(sock) for sock in socks)
    assert on.metrics.totals["connections.handshake_failed"] == 3
    assert [line.getMessage() for line in lines] == ["connection failed: no handshake in time"] * 3
    assert on.connections == on.senders.of("127.0.0.1").connections == 0


def test_tls_client_ca_asks_senders_for_a_certificate(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    harness.certificates(stranger)
    harness.certificates(tmp_path)
    foreign = client_context(tmp_path)
    foreign.load_cert_chain(stranger / "client.pem", stranger / "client.key")
    options = (*tls_options(tmp_path), f"--tls-client-ca={tmp_path}/ca.pem")
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL, *options) as process:
        for context in (client_context(tmp_path), foreign):
            # With TLS 1.3 a client learns of it only when it reads.
            with pytest.raises((ssl.SSLError, OSError)), secured(process.tls, context) as sock:
                sock.sendall(b"".join(call(1)))
                sock.recv(1)
        with secured(process.tls, client_context(tmp_path, "client")) as sock:
            sock.sendall(b"".join(call(2)))
            harness.wait_until(lambda: len(api.requests) == 2, "the call is reported")
        assert process.stop() == 0
    assert kinds(api) == whole(2)
    assert len(process.events("connection_handshake_failed")) == 2


def test_sighup_reloads_certificates_whole_or_not_at_all(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    harness.certificates(tmp_path)
    options = ("--rating-api-url", api.url, LOCAL, *tls_options(tmp_path))
    with harness.AgentProcess(*options) as process:
        context = client_context(tmp_path)
        with secured(process.tls, context) as before:
            first = serial(before)
            before.sendall(call(1)[0])
            (tmp_path / "server.key").write_text("no key")
            process.kill(signal.SIGHUP)
            harness.wait_until(lambda: process.events("reload_failed"), "the key is refused")
            message = process.events("reload_failed")[0]["message"]
            assert f"tls_key: {tmp_path}/server.key: " in message and "allowed" in message
            with secured(process.tls, context) as sock:
                assert serial(sock) == first, "the old one is kept"
            harness.certificates(tmp_path)
            process.kill(signal.SIGHUP)
            harness.wait_until(lambda: process.events("reloaded"), "the new one is taken")
            with pytest.raises(ssl.SSLCertVerificationError), secured(process.tls, context):
                pass
            with secured(process.tls, client_context(tmp_path)) as sock:
                assert serial(sock) != first
            before.sendall(b"".join(call(1)[1:]))
            harness.wait_until(lambda: len(api.requests) == 2, "the old connection lives")
    assert kinds(api) == whole(1)


def test_sighup_reads_who_may_send_and_secrets_again_whole_or_not_at_all(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    keys, token, config = (tmp_path / name for name in ("keys", "token", "config.yaml"))

    def write(allow: str, key: str, secret: str, tenant: str = "one") -> None:
        keys.write_text(f"{key}\n")
        token.write_text(f"{secret}\n")
        config.write_text(
            f"rating_api_url: {api.url}\nsip_local_domains: sip.canyan.io\ntenant: {tenant}\n"
            f"hep_allow: [{allow}]\nhep_auth_key_file: {keys}\nrating_api_token_file: {token}\n"
        )

    def asked() -> list[str]:
        """The token that each call was reported with."""
        return [headers["HTTP_AUTHORIZATION"] for headers in api.headers]

    write("127.0.0.0/8", KEY, "old")
    with harness.AgentProcess("-c", str(config)) as process:
        with socket.create_connection(process.tcp, source_address=("127.0.0.3", 0)) as third:
            third.sendall(b"".join(with_key(1, KEY)))
            harness.wait_until(lambda: len(api.requests) == 2, "the first call is reported")
            # One of them is bad: none is taken.
            write("127.0.0.2", "second", "new")
            token.write_text("two\nlines\n")
            process.kill(signal.SIGHUP)
            harness.wait_until(lambda: process.events("reload_failed"), "the token is refused")
            third.sendall(b"".join(with_key(2, "second") + with_key(3, KEY)))
            harness.wait_until(lambda: len(api.requests) == 4, "the old key is in force")
            write("127.0.0.2", "second", "new", tenant="two")
            process.kill(signal.SIGHUP)
            harness.wait_until(lambda: process.events("reloaded"), "all is taken")
            # From a network that may not send any more; with the old key; and as it is to be.
            third.sendall(b"".join(with_key(4, "second")))
            harness.wait_until(lambda: process.events("dropped_not_allowed"), "it is refused")
            send_from("127.0.0.2", process.udp, with_key(5, KEY) + with_key(6, "second"))
            harness.wait_until(lambda: len(api.requests) == 6, "the new key is in force")
        assert process.stop() == 0
    assert kinds(api) == whole(1) + whole(3) + whole(6)
    assert asked() == ["Bearer old"] * 4 + ["Bearer new"] * 2
    (failed,) = process.events("reload_failed")
    assert f"rating_api_token_file: {token}: several lines; allowed: " in failed["message"]
    (line,) = process.events("reloaded")
    assert line["changed"] == ["hep_allow", "hep_auth_key", "rating_api_token"]
    assert line["needs_restart"] == ["tenant"]
    assert {body["tenant"] for _, body in api.requests} == {"one"}
    assert not any(text in str(process.lines) for text in (KEY, "second", "Bearer"))


@pytest.mark.parametrize("change", ["token", "password"])
def test_an_api_is_asked_with_the_secret_in_force(api: harness.RatingServer, change: str) -> None:
    before = agent.Settings(rating_api_token="old")
    client = agent.RatingApi(api.url, before)
    client.send(event("begin"))
    more: dict[str, Any] = {"rating_api_token": "new"}
    if change == "password":
        more = {"rating_api_username": "a", "rating_api_password": "b"}
    client.authorize(agent.Settings(**more))
    client.send(event("begin"))
    got = [headers["HTTP_AUTHORIZATION"] for headers in api.headers]
    assert got == ["Bearer old", {"token": "Bearer new", "password": "Basic YTpi"}[change]]


def test_a_reload_with_passed_sockets_and_no_address(tmp_path: Path) -> None:
    """What sockets took the place of is not read again, and nothing of it needs a restart."""
    config = tmp_path / "config.yaml"
    config.write_text("listen_udp: ''\nlisten_tcp: ''\n")
    names = {"hep-udp": socket.SOCK_DGRAM, "hep-tcp": socket.SOCK_STREAM}
    sockets = {name: agent.bind("127.0.0.1:0", kind) for name, kind in names.items()}
    with harness.AgentProcess("-c", str(config), flags=(), sockets=sockets) as process:
        config.write_text("listen_udp: ''\nlisten_tcp: ''\nhep_allow: [192.0.2.0/24]\n")
        process.kill(signal.SIGHUP)
        harness.wait_until(lambda: process.events("reloaded"), "the network is taken")
        assert process.stop() == 0
    for sock in sockets.values():
        sock.close()
    (line,) = process.events("reloaded")
    assert line["changed"] == ["hep_allow"] and line["needs_restart"] == []


# The rating API over HTTPS

TOKEN = "hunter2"


def server_context(folder: Path, *hosts: str) -> ssl.SSLContext:
    harness.certificates(folder, *hosts)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


@contextlib.contextmanager
def https_api(folder: Path, *hosts: str) -> Iterator[harness.RatingServer]:
    with harness.RatingServer(server_context(folder, *hosts)) as server:
        yield server


def test_events_go_to_an_https_api_whose_certificate_is_trusted(tmp_path: Path) -> None:
    with https_api(tmp_path) as api:
        options = ("--rating-api-url", api.url, f"--rating-api-ca-file={tmp_path}/ca.pem", LOCAL)
        with harness.AgentProcess(*options) as process:
            harness.send_udp(process.udp, call(1))
            harness.wait_until(lambda: kinds(api) == whole(1), "the call is reported")
            assert process.stop() == 0


@pytest.mark.parametrize("fault", ["unknown authority", "system's authorities", "other host"])
def test_an_api_without_the_right_certificate_is_told_nothing(fault: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    harness.certificates(other)
    hosts = ["rating.example"] if fault == "other host" else []
    with https_api(tmp_path, *hosts) as api:
        ca = {"unknown authority": other / "ca.pem", "other host": tmp_path / "ca.pem"}.get(fault)
        settings = agent.Settings(rating_api_ca_file=str(ca or ""), rating_api_token=TOKEN)
        with pytest.raises(agent.DeliveryError) as caught:
            agent.RatingApi(api.url, settings).send(event("begin"))
        assert (caught.value.kind, caught.value.unknown) == ("connection", False)
        assert "certificate" in str(caught.value).lower()
        assert api.requests == [] and api.headers == []


def test_a_tls_fault_behind_the_request_leaves_its_outcome_unknown(tmp_path: Path) -> None:
    context = server_context(tmp_path)
    read = []

    def answer(sock: ssl.SSLSocket, _: Any) -> None:
        read.append(sock.recv(10_000))
        # Past TLS, on the bare connection.
        socket.socket.send(sock, b"HTTP/1.1 200 OK\r\n\r\n")  # type: ignore[arg-type]

    server = gevent.server.StreamServer(("127.0.0.1", 0), answer, ssl_context=context)
    server.start()
    settings = agent.Settings(rating_api_ca_file=str(tmp_path / "ca.pem"))
    with pytest.raises(agent.DeliveryError) as caught:
        agent.RatingApi(f"https://127.0.0.1:{server.server_port}", settings).send(event("end"))
    server.stop(timeout=1)
    assert read and caught.value.unknown


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_a_redirect_never_gets_the_token_nor_the_call(status: str, tmp_path: Path) -> None:
    with https_api(tmp_path) as api, harness.RatingServer() as elsewhere:
        api.location = f"{elsewhere.url}/v1/begin_transaction"
        api.answer = lambda path, body: (status, {"ok": True})
        settings = agent.Settings(
            rating_api_ca_file=str(tmp_path / "ca.pem"), rating_api_token=TOKEN
        )
        with pytest.raises(agent.DeliveryError) as caught:
            agent.RatingApi(api.url, settings).send(event("begin"))
        assert caught.value.kind == f"status_{status[:3]}"
        assert [headers["HTTP_AUTHORIZATION"] for headers in api.headers] == [f"Bearer {TOKEN}"]
        assert elsewhere.requests == [] and elsewhere.headers == []


# Fairness


def flood(address: tuple[str, int], stop: list[bool], sent: list[int]) -> None:
    """A connection that always has more to read, of what can't matter: at most 400 MB."""
    message = b"OPTIONS sip:a SIP/2.0\r\nCSeq: 1 OPTIONS\r\n" + b"X: y\r\n" * 50
    block = b"".join(frames(message) * 100)
    with socket.create_connection(address) as sock:
        while not stop and sum(sent) < 400_000_000:
            sock.sendall(block)
            sent.append(len(block))


def test_a_flood_over_tcp_does_not_starve_udp(api: harness.RatingServer) -> None:
    """400 calls a second over UDP beside three TCP floods: none is missed."""
    stop: list[bool] = []
    sent: list[int] = []
    count = 400
    with harness.AgentProcess("--rating-api-url", api.url, LOCAL) as process:
        pool = gevent.get_hub().threadpool
        floods = [pool.spawn(flood, process.tcp, stop, sent) for _ in range(3)]
        harness.wait_until(lambda: len(sent) > 10, "the floods have begun")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(process.udp)
            for number in range(count):
                for packet in call(number):
                    sock.send(packet)
                if number % 4 == 3:
                    gevent.sleep(0.01)
        harness.wait_until(lambda: len(api.requests) == 2 * count, "all calls are reported")
        still = len(sent)
        harness.wait_until(lambda: len(sent) > still, "the floods went on all the time")
        stop.append(True)
        gevent.wait(floods, timeout=harness.DEADLINE)
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(x for number in range(count) for x in whole(number))


def test_a_flood_over_udp_does_not_starve_tcp(api: harness.RatingServer) -> None:
    stop: list[bool] = []
    sent: list[int] = []
    packet = frames(b"OPTIONS sip:a SIP/2.0\r\nCSeq: 1 OPTIONS\r\n")[0]

    def flood_udp(address: tuple[str, int]) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not stop and len(sent) < 3_000_000:
                sock.sendto(packet, address)
                sent.append(1)

    with harness.AgentProcess("--rating-api-url", api.url, LOCAL) as process:
        flooding = gevent.get_hub().threadpool.spawn(flood_udp, process.udp)
        harness.wait_until(lambda: len(sent) > 10_000, "the flood has begun")
        for number in range(100):
            harness.send_tcp(process.tcp, [b"".join(call(number))])
        harness.wait_until(lambda: len(api.requests) == 200, "all calls are reported")
        still = len(sent)
        harness.wait_until(lambda: len(sent) > still, "the flood went on all the time")
        stop.append(True)
        flooding.wait(timeout=harness.DEADLINE)
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(x for number in range(100) for x in whole(number))


def test_connections_that_have_more_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are, the loop comes round after about one budget of frames."""
    on = make_agent()
    taken: list[str] = []
    monkeypatch.setattr(on, "receive", lambda frame, transport, sender: taken.append(transport))
    block = b"".join(frames(b"\r\n") * 5000)
    with listening(on) as server, connected(server, 8) as socks:
        writers = [gevent.spawn(sock.sendall, block) for sock in socks]
        rounds: list[int] = []

        def count_rounds() -> None:
            while len(taken) < 8 * 5000:
                gevent.idle(gevent.get_hub().loop.MAXPRI)
                rounds.append(len(taken))

        gevent.spawn(count_rounds).get(timeout=harness.DEADLINE)
        gevent.joinall(writers, timeout=harness.DEADLINE)
    steps = [after - before for before, after in zip(rounds, rounds[1:], strict=False)]
    assert max(steps) <= 3 * agent.TCP_BUDGET and len(taken) == 8 * 5000


# What is known of a sender


def test_a_sender_is_counted_by_what_became_of_its_packets() -> None:
    on = make_agent()
    sender = on.senders.of("::ffff:192.0.2.1")
    assert sender is on.senders.of("192.0.2.1") and sender.address == "192.0.2.1"
    bad = hepbuild.hep3(b"no SIP at all")
    before = time.time_ns() // 1000
    for packet in (hepbuild.hep3(invite()), bad, bad, b"junk", hepbuild.hep3(b"", protocol_type=5)):
        on.receive(packet, "udp", sender)
    assert sender.packets == 5
    assert sender.dropped == {"sip_start_line": 2, "hep_magic": 1, "not_sip": 1}
    assert sender.fault == "no HEP packet: it begins with 6a756e6b"
    assert before - 1 <= sender.seen_at <= time.time_ns() // 1000 + 1
    assert on.metrics.totals["packets.dropped.not_sip"] == 1
    assert on.metrics.totals["packets.malformed.hep_magic"] == 1


def test_a_flood_of_faults_makes_few_lines_and_all_are_told_of() -> None:
    stream = io.StringIO()
    limiter = agent.set_up_logging(agent.Settings(), stream)
    try:
        settings = agent.Settings(hep_allow=("192.0.2.1",))
        on = agent.Agent(settings, agent.load_rules(settings), limiter)
        for _ in range(1000):
            on.receive(b"junk", "udp", on.senders.of("192.0.2.1"))
            on.receive(b"junk", "udp", on.senders.of("192.0.2.2"))
        on.flush(0.0)
    finally:
        agent.log.handlers.clear()
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    for name in ("malformed_hep_magic", "dropped_not_allowed"):
        made = [line for line in told if line["event"] == name]
        held = [line for line in told if name in (line["event"], line.get("kind"))]
        assert 3 <= len(made) <= 9
        assert len(made) + sum(line.get("held_back", 0) for line in held) == 1000


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
