"""hep_forward: what was let in goes on as it came, and the agent never waits for a target."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.server
import pytest
from test_access import make_agent, server_context, tls_options

import harness
import hepbuild
import rating_agent_hep as agent
import sipservers
from dialog import ack, call, frames, invite, reply
from harness import LOCAL, kinds, whole


class UdpSink:
    """A target over UDP; `packets` is what came."""

    def __init__(self, port: int = 0) -> None:
        self.packets: list[bytes] = []
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", port))
        self.target = f"udp://127.0.0.1:{self._sock.getsockname()[1]}"
        self._reader = gevent.spawn(self._read)

    def _read(self) -> None:
        while True:
            self.packets.append(self._sock.recv(65_536))

    def __enter__(self) -> UdpSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.kill()
        self._sock.close()


class StreamSink:
    """A target over TCP or TLS; `streams` has what came, a text for each connection.

    It reads a connection with `read`, which may be replaced; by default until its end.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.streams: list[bytes] = []
        self.read: Callable[[Any], None] = self.read_all
        more = {"ssl_context": tls} if tls else {}
        self._server = gevent.server.StreamServer(("127.0.0.1", 0), self._serve, **more)
        self._server.start()
        self.port = self._server.server_port
        self.target = f"{'tls' if tls else 'tcp'}://{host}:{self.port}"

    def _serve(self, sock: Any, address: Any) -> None:
        self.streams.append(b"")
        with contextlib.suppress(OSError):
            self.read(sock)
        sock.close()

    def read_all(self, sock: Any) -> None:
        place = len(self.streams) - 1
        while data := sock.recv(65_536):
            self.streams[place] += data

    def __enter__(self) -> StreamSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(timeout=0)


@contextlib.contextmanager
def forwarding(*targets: str, **options: Any) -> Iterator[agent.Agent]:
    """An agent in process whose targets are served."""
    on = make_agent(hep_forward=targets, **options)
    for forwarder in on.forwarders:
        forwarder.greenlet.start()
    try:
        yield on
    finally:
        for forwarder in on.forwarders:
            forwarder.close()


def receive(on: agent.Agent, *packets: bytes, host: str = "127.0.0.1") -> None:
    for packet in packets:
        on.receive(packet, "udp", on.senders.of(host))


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def metric(on: agent.Agent, kind: str) -> int:
    (forwarder,) = on.forwarders
    total = sum(n for name, n in on.metrics.totals.items() if name.startswith(f"forward.{kind}."))
    assert total == forwarder.counts()[kind]
    return total


# As it came


OLD = [hepbuild.hep1(invite()), hepbuild.hep2(invite()), hepbuild.hep2(invite(), byteorder="big")]
NEW = [
    *frames(invite(), auth_key="a key", capture_name="here", capture_id=7),
    *frames(invite(), magic=b"EEP3", extra_chunks=[(0x1234, 1, b"vendor"), (0, 0x99, b"\0")]),
    *frames(invite(), compress="gzip"),
    *frames(invite(), compress="zlib", time_us=None),
    # What is nothing to the agent is something to Homer.
    *frames(b'{"sender_information": {}}', protocol_type=5),
    *frames(b"OPTIONS sip:a SIP/2.0\r\n\r\n"),
    *frames(b"no SIP at all"),
    *frames(b"\r\n\r\n"),
    *frames(b"INVITE sip:a SIP/2.0\r\nX: " + b"x" * 60_000),
]


def test_packets_go_on_octet_by_octet_over_udp_tcp_and_tls(tmp_path: Path) -> None:
    tls = StreamSink(server_context(tmp_path), host="localhost")
    with UdpSink() as udp, StreamSink() as tcp, tls:
        options = {"hep_forward_ca_file": f"{tmp_path}/ca.pem"}
        with forwarding(udp.target, tcp.target, tls.target, **options) as on:
            receive(on, *OLD, *NEW)
            harness.wait_until(lambda: len(udp.packets) == len(OLD + NEW), "all came over UDP")
            for sink in (tcp, tls):
                harness.wait_until(
                    lambda s=sink: len(b"".join(s.streams)) == len(b"".join(NEW)), "all"
                )
            counts = [forwarder.counts() for forwarder in on.forwarders]
    assert udp.packets == OLD + NEW
    # A stream has no frames of HEP1 and HEP2: they would cut the others to pieces.
    assert tcp.streams == tls.streams == [b"".join(NEW)]
    stream = {"sent": len(NEW), "dropped": len(OLD), "connected": 1, "errors": 0}
    assert counts == [
        {"sent": len(OLD + NEW), "dropped": 0, "connected": 0, "errors": 0},
        stream,
        stream,
    ]


def test_what_was_not_let_in_does_not_go_on() -> None:
    on = make_agent(
        hep_forward=("udp://127.0.0.1:9",),
        hep_allow=("127.0.0.0/8",),
        hep_auth_key=("key",),
        hep_rate_limit=2,
    )
    (forwarder,) = on.forwarders
    receive(on, *frames(invite(), auth_key="key"), host="192.0.2.1")
    receive(on, *frames(invite()), *frames(invite(), auth_key="other"), hepbuild.hep1(invite()))
    receive(on, b"junk", frames(invite(), auth_key="key")[0][:-1])
    assert len(forwarder) == 0
    receive(on, *frames(invite(), auth_key="key") * 3)
    assert len(forwarder) == 2 and on.metrics.totals["packets.dropped.rate_limit"] == 1


@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
def test_a_second_agent_behind_the_first_reports_the_same(
    api: harness.RatingServer, tmp_path: Path, transport: str
) -> None:
    harness.certificates(tmp_path)
    numbers = range(1, 41)
    packets = [packet for number in numbers for packet in call(number)]
    with (
        harness.RatingServer() as other,
        harness.AgentProcess(
            "--rating-api-url", other.url, LOCAL, *tls_options(tmp_path)
        ) as second,
    ):
        host, port = getattr(second, transport)
        options = (
            f"--hep-forward={transport}://localhost:{port}",
            f"--hep-forward-ca-file={tmp_path}/ca.pem",
        )
        with harness.AgentProcess("--rating-api-url", api.url, LOCAL, *options) as first:
            harness.send_udp(first.udp, packets[::2])
            harness.send_tcp(first.tcp, packets[1::2])
            for server in (api, other):
                harness.wait_until(
                    lambda s=server: len(s.requests) == 2 * len(numbers), "all calls are reported"
                )
            assert first.stop() == 0
        assert second.stop() == 0

    def ledger(server: harness.RatingServer) -> list[str]:
        return sorted(map(str, server.requests))

    assert sorted(kinds(other)) == sorted(x for number in numbers for x in whole(number))
    assert ledger(other) == ledger(api)
    assert not [line for line in first.lines + second.lines if line["level"] != "INFO"]
    assert len(first.events("forward_connected")) == (transport != "udp")


# It shows each message that Kamailio's module for capture servers hands on, and stores nothing.
CAPTURE = """
log_stderror=yes
children=1
disable_tcp=yes
listen=udp:127.0.0.1:{port}
loadmodule "pv.so"
loadmodule "xlog.so"
loadmodule "db_text.so"
loadmodule "sipcapture.so"
modparam("sipcapture", "db_url", "text://{folder}")
modparam("sipcapture", "hep_capture_on", 1)
request_route {{ route(SHOW); }}
onreply_route {{ route(SHOW); }}
route[SHOW] {{
    xlog("L_ERR", "took $si:$sp $(mb{{s.encode.hexa}}) end\\n");
    drop;
}}
"""


def test_what_kamailio_takes_as_a_capture_server(tmp_path: Path) -> None:
    kamailio, port = sipservers.program("kamailio"), sipservers.free_port()
    (tmp_path / "kamailio.cfg").write_text(CAPTURE.format(folder=tmp_path, port=port))
    (tmp_path / "version").write_text("table_name(str) table_version(int)\n")
    command = [kamailio, "-DD", "-E", "-m", "32", "-Y", str(tmp_path)]
    command += ["-f", str(tmp_path / "kamailio.cfg")]
    log = tmp_path / "kamailio.log"

    def took() -> list[tuple[str, ...]]:
        return re.findall(r"took (\S+) (\S+) end", log.read_text())

    messages = [invite(), reply(180), reply(200), ack()]
    with (
        sipservers.running(command, log, tmp_path),
        forwarding(f"udp://127.0.0.1:{port}") as on,
    ):
        harness.wait_until(lambda: sipservers.listens(port), "Kamailio listens")
        receive(on, *(hepbuild.hep3(payload) for payload in messages))
        harness.wait_until(lambda: len(took()) >= len(messages), "all came")
    host, number = hepbuild.SRC
    assert took() == [(f"{host}:{number}", payload.hex()) for payload in messages]


# It never waits


def test_a_queue_is_bounded_in_octets(monkeypatch: pytest.MonkeyPatch, lines: list[Any]) -> None:
    packet = frames(invite())[0]
    size = len(packet) + agent._PACKET_OVERHEAD
    monkeypatch.setattr(agent, "FORWARD_QUEUE", 10 * size)
    on = make_agent(hep_forward=("udp://127.0.0.1:9",))
    receive(on, *[packet] * 25)
    (forwarder,) = on.forwarders
    assert len(forwarder) == 10 and metric(on, "dropped") == 15
    # Each was taken in all the same.
    assert sum(on.sizes().values()) == 1 and on.metrics.totals["packets.received.udp"] == 25
    (line,) = [line for line in lines if line.__dict__["event"] == "forward_dropped"]
    assert line.__dict__["target"] == "udp://127.0.0.1:9" and "queue is full" in line.getMessage()


def test_a_packet_takes_no_more_memory_than_is_counted() -> None:
    on = make_agent(hep_forward=("udp://127.0.0.1:9",))
    (forwarder,) = on.forwarders
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(20_000):
        forwarder.put(b"HEP3" + bytes(30 + index % 50))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(forwarder) == 20_000 and grown <= forwarder._octets


def test_a_target_that_does_not_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    monkeypatch.setattr(agent, "FORWARD_QUEUE", 1_000_000)
    monkeypatch.setattr(agent, "FORWARD_STALLED", 0.5)
    monkeypatch.setattr(agent, "retry_delay", lambda failures: 0.01)
    packet = frames(b"INVITE sip:a SIP/2.0\r\nX: " + b"x" * 10_000)[0]
    with StreamSink() as sink:
        over = gevent.event.Event()
        # The first connection is not read, those after it are.
        sink.read = lambda sock: over.wait() if len(sink.streams) == 1 else sink.read_all(sock)
        with forwarding(sink.target) as on:
            (forwarder,) = on.forwarders
            # Until all buffers of the kernel are full.
            while not metric(on, "dropped"):
                receive(on, *[packet] * 20)
                assert forwarder._octets <= agent.FORWARD_QUEUE
                gevent.sleep(0.001)
            assert (
                metric(on, "sent") + metric(on, "dropped") + len(forwarder)
                <= (on.metrics.totals["packets.received.udp"])
            )
            harness.wait_until(lambda: metric(on, "errors"), "the connection is given up")
            harness.wait_until(lambda: not forwarder, "what waits is sent over a new one")
            harness.wait_until(lambda: sink.streams[-1].endswith(packet), "and it arrives")
            over.set()
    # The new stream begins with a whole frame, although the old one ended within one.
    assert sink.streams[-1] == packet * (len(sink.streams[-1]) // len(packet))


def test_no_call_waits_for_a_target(api: harness.RatingServer) -> None:
    """One does not answer, one takes nothing, one has no name: the calls are reported."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        # The queue of its connections is full: the next gets no answer.
        for _ in range(2):
            waiting = stack.enter_context(contextlib.closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(address)
        deaf = stack.enter_context(StreamSink())
        over = gevent.event.Event()
        deaf.read = lambda sock: over.wait()
        targets = f"tcp://127.0.0.1:{address[1]},{deaf.target},tcp://no.such.host.invalid:9060"
        options = ("--rating-api-url", api.url, LOCAL, f"--hep-forward={targets}")
        process = stack.enter_context(harness.AgentProcess(*options))
        for number in range(1, 11):
            harness.send_udp(process.udp, call(number))
        harness.wait_until(lambda: len(api.requests) == 20, "the calls are reported")
        harness.wait_until(lambda: process.events("forward_failed"), "the name is not there")
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < 10
        over.set()
    (line,) = [x for x in process.events("forward_failed") if "invalid" in x["target"]]
    assert line["level"] == "WARNING"
    assert any("the agent stops" in x["message"] for x in process.events("forward_dropped"))


# When a target goes and comes back


def test_tcp_is_connected_anew_with_a_longer_pause_each_time(
    monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(agent, "retry_delay", lambda failures: pauses.append(failures) or 0.01)
    with StreamSink() as sink:
        # It takes connections only to close them.
        sink.read = lambda sock: None
        with forwarding(sink.target) as on:
            packets = [packet for number in range(1, 9) for packet in call(number)]
            harness.wait_until(
                lambda: receive(on, packets[0]) or len(pauses) >= 4, "it is tried again"
            )
            assert pauses[:4] == [1, 2, 3, 4]
            sink.read = sink.read_all
            before = len(sink.streams)
            harness.wait_until(
                lambda: receive(on, packets[0]) or b"".join(sink.streams[before:]), "it is back"
            )
            receive(on, *packets)
            harness.wait_until(lambda: sink.streams[-1].endswith(b"".join(packets)), "all arrive")
            assert metric(on, "connected") == len(sink.streams) >= 5
    failed = [line for line in lines if line.__dict__["event"] == "forward_failed"]
    assert failed and "closed the connection" in failed[0].getMessage()


def test_the_pause_is_short_again_after_a_connection_that_lasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(agent, "retry_delay", lambda failures: pauses.append(failures) or 0.01)
    # Any connection counts as one that lasted.
    monkeypatch.setattr(agent, "RETRY_LAST", 0.0)
    with StreamSink() as sink:
        sink.read = lambda sock: None
        with forwarding(sink.target) as on:
            harness.wait_until(
                lambda: receive(on, *frames(invite())) or len(pauses) >= 3, "it is tried again"
            )
    assert pauses[:3] == [1, 1, 1]


def test_an_end_is_seen_before_packets_are_written_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "retry_delay", lambda failures: 0.01)
    with StreamSink() as sink:
        restart = gevent.event.Event()

        def read_once(sock: Any) -> None:
            sink.streams[-1] += sock.recv(65_536)
            restart.wait()

        sink.read = read_once
        first, second = frames(invite(), reply(200))
        with forwarding(sink.target) as on:
            receive(on, first)
            harness.wait_until(lambda: sink.streams == [first], "the first packet came")
            sink.read = sink.read_all
            restart.set()
            harness.wait_until(lambda: metric(on, "errors") == 1, "the end is seen")
            receive(on, second)
            harness.wait_until(lambda: sink.streams == [first, second], "none is lost")
            assert metric(on, "dropped") == 0 and metric(on, "sent") == 2


def test_nobody_at_a_udp_port_costs_packets_only(lines: list[Any]) -> None:
    port = free_port()
    with forwarding(f"udp://127.0.0.1:{port}") as on:
        harness.wait_until(
            lambda: receive(on, *frames(invite())) or metric(on, "errors") >= 3,
            "errors are counted",
        )
        assert on.forwarders[0].status(0.0)["last_error"].endswith("Connection refused")
        with UdpSink(port) as sink:
            harness.wait_until(
                lambda: receive(on, *frames(reply(200))) or sink.packets, "it is there again"
            )
    assert sum(line.__dict__["event"] == "forward_failed" for line in lines) == 1


def test_a_datagram_that_is_too_long_costs_itself() -> None:
    with UdpSink() as sink, forwarding(sink.target) as on:
        long = frames(b"x" * (agent.MAX_HEP_FRAME - 100))[0]
        assert 65_507 < len(long) <= agent.MAX_HEP_FRAME
        (short,) = frames(invite())
        receive(on, short, long, short)
        harness.wait_until(lambda: len(sink.packets) == 2, "the others came")
        assert metric(on, "dropped") == 1 and sink.packets == [short, short]


def test_names_are_resolved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """UDP: each FORWARD_RESOLVE, and while the name can't be told the old address stays."""
    answers: list[Any] = []

    def resolve(host: str, port: int, family: int, kind: int) -> Any:
        assert (host, port) == ("homer.example", 9060)
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return [(socket.AF_INET, kind, 0, "", ("127.0.0.1", answers[-1]))]

    monkeypatch.setattr(agent, "FORWARD_RESOLVE", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    packets = frames(invite(), reply(200), ack())
    with UdpSink() as old, UdpSink() as new, forwarding("udp://homer.example:9060") as on:
        for answer, packet, sink in (
            (old, packets[0], old),
            (socket.gaierror(-3, "Temporary failure"), packets[1], old),
            (new, packets[2], new),
        ):
            answers.append(
                answer if isinstance(answer, Exception) else int(answer.target.split(":")[-1])
            )
            receive(on, packet)
            harness.wait_until(
                lambda s=sink, p=packet: p in s.packets, "it came where the name says"
            )
        assert metric(on, "errors") == 1 and metric(on, "dropped") == 0
    assert old.packets == packets[:2] and new.packets == packets[2:]


def test_a_name_is_resolved_anew_at_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "retry_delay", lambda failures: 0.01)
    with StreamSink() as old, StreamSink() as new:
        ports = [old.port]
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_: [(socket.AF_INET, 0, 0, "", ("127.0.0.1", ports[-1]))],
        )
        old.read = lambda sock: sock.recv(65_536)
        with forwarding("tcp://homer.example:9060") as on:
            receive(on, *frames(invite()))
            harness.wait_until(lambda: metric(on, "sent") == 1, "the first one came")
            ports.append(new.port)
            harness.wait_until(lambda: metric(on, "errors") == 1, "the connection has ended")
            (packet,) = frames(reply(200))
            receive(on, packet)
            harness.wait_until(lambda: new.streams == [packet], "it came where the name says")


@pytest.mark.parametrize("fault", ["host", "authority", "plain"])
def test_a_tls_target_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(agent, "retry_delay", lambda failures: 0.01)
    context = server_context(tmp_path, *(["other.example"] if fault == "host" else []))
    if fault == "authority":
        harness.certificates(tmp_path)
    with StreamSink(None if fault == "plain" else context, host="localhost") as sink:
        # A plain one answers something that is no TLS.
        if fault == "plain":
            sink.read = lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        target = f"tls://localhost:{sink.port}"
        with forwarding(target, hep_forward_ca_file=f"{tmp_path}/ca.pem") as on:
            receive(on, *frames(invite()))
            harness.wait_until(lambda: metric(on, "errors") >= 2, "it is refused")
            assert metric(on, "sent") == metric(on, "connected") == 0
            error = on.forwarders[0].last_error
    expected = {"host": "Hostname mismatch", "authority": "verify failed", "plain": "WRONG_VERSION"}
    assert expected[fault] in error
    assert not any(sink.streams)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_an_agent_does_not_forward_to_itself(api: harness.RatingServer, transport: str) -> None:
    kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
    # On all addresses: the target names one of them.
    sock = agent.bind("0.0.0.0:0", kind)
    target = f"{transport}://localhost:{sock.getsockname()[1]}"
    options = ("--rating-api-url", api.url, LOCAL, f"--hep-forward={target}")
    with sock, harness.AgentProcess(*options, sockets={f"hep-{transport}": sock}) as process:
        (other,) = {"udp", "tcp"} - {transport}
        send = harness.send_udp if other == "udp" else harness.send_tcp
        send(getattr(process, other), call(1))
        harness.wait_until(lambda: len(api.requests) == 2, "the call is reported")
        harness.wait_until(lambda: process.events("forward_failed"), "it is said")
        process.kill(signal.SIGUSR1)
        harness.wait_until(lambda: process.events("status"), "the status is told")
        assert process.stop() == 0
    assert "this agent itself" in process.events("forward_failed")[0]["message"]
    counters = process.events("status")[0]["status"]["counters"]
    assert counters[f"packets.received.{other}"] == 5
    assert f"packets.received.{transport}" not in counters


def test_what_waits_is_sent_at_the_end(api: harness.RatingServer) -> None:
    packets = [packet for number in range(1, 101) for packet in call(number)]
    with StreamSink() as sink:
        options = ("--rating-api-url", api.url, LOCAL, f"--hep-forward={sink.target}")
        with harness.AgentProcess(*options) as process:
            # What it has read when it is told to stop, and what it reads then.
            harness.send_tcp(process.tcp, packets)
            assert process.stop() == 0
        received = process.events("stopped") and b"".join(sink.streams)
    assert received == b"".join(packets)


@pytest.mark.parametrize("sink", [UdpSink, StreamSink])
def test_the_end_waits_for_what_waits(sink: Any) -> None:
    packets = [packet for number in range(1, 201) for packet in call(number)]
    with sink() as target, forwarding(target.target) as on:
        receive(on, *packets)
        agent.finish_forwarding(on.forwarders, harness.DEADLINE)
        assert metric(on, "sent") == len(packets) and metric(on, "dropped") == 0
        if sink is StreamSink:
            # The other side has read all before the end.
            assert target.streams == [b"".join(packets)]


def test_nothing_is_written_to_a_connection_that_has_ended() -> None:
    on = make_agent(hep_forward=("tcp://127.0.0.1:9",))
    (forwarder,) = on.forwarders
    reader = gevent.spawn(lambda: None)
    reader.join()
    receive(on, *frames(invite()))
    assert forwarder._wait(reader) is False and forwarder._wait() is True


# Status, metrics, options


def test_status_and_metrics_show_each_target() -> None:
    with UdpSink() as sink, forwarding(sink.target, "tcp://127.0.0.1:1") as on:
        receive(on, *frames(invite()))
        harness.wait_until(lambda: on.forwarders[0].counts()["sent"], "it is sent")
        harness.wait_until(lambda: on.forwarders[1].counts()["errors"], "the other fails")
        good, bad = on.status(time.monotonic(), 1, 1)["forward"]
        text = agent.prometheus_text(on.metrics.totals, {}, {})
    assert good == {
        "target": sink.target,
        "waiting": 0,
        "sent": 1,
        "dropped": 0,
        "connected": 0,
        "errors": 0,
        "last_error": "",
        "last_error_at": None,
    }
    assert bad["waiting"] == 1 and "refused" in bad["last_error"]
    assert abs(bad["last_error_at"] - time.time()) < harness.DEADLINE
    name = sink.target.replace("://", "_").replace(".", "_").replace(":", "_")
    assert f'rating_agent_hep_forward_sent_total{{target="{name}"}} 1\n' in text
    assert 'rating_agent_hep_forward_errors_total{target="tcp_127_0_0_1_1"} 1\n' in text


def test_who_forwards_nothing_sees_nothing_of_it() -> None:
    on = make_agent()
    receive(on, *frames(invite()))
    assert on.forwarders == () and on.status(time.monotonic(), 1, 1)["forward"] == []
    assert not [name for name in on.metrics.totals if "forward" in name]


@pytest.mark.parametrize(
    "text",
    [
        "homer.example:9060",
        "http://homer.example:9060",
        "udp://homer.example",
        "udp://:9060",
        "udp://homer.example:0",
        "tcp://homer.example:65536",
        "tcp://homer.example:port",
        "tls://user@homer.example:9060",
        "tcp://homer..example:9060",
        f"tcp://{'x' * 64}.example:9060",
        "udp://2001:db8::1:9060",
        "udp://homer.example:9060/",
        "udp://a:1 udp://a:1",
        " ".join(f"udp://a:{port}" for port in range(1, 10)),
    ],
)
def test_a_bad_target_is_one_line(text: str) -> None:
    with pytest.raises(agent.ConfigError) as caught:
        agent.load_configuration([f"--hep-forward={text}"], {})
    message = str(caught.value)
    assert message.startswith("hep_forward: ") and "; allowed: " in message and "\n" not in message


def test_as_many_targets_as_are_allowed() -> None:
    targets = tuple(f"udp://[2001:db8::1]:{port}" for port in range(1, 9))
    assert len(targets) == agent.MAX_FORWARD_TARGETS
    assert agent.forward_targets(", ".join(targets)) == targets


def test_a_bad_ca_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    options = ["--hep-forward=tls://a:1", f"--hep-forward-ca-file={tmp_path}/ca.pem"]
    with pytest.raises(agent.ConfigError, match=r"^hep_forward_ca_file: .*; allowed: "):
        agent.load_configuration(options, {})
