"""Sockets that outlive the agent: passed as systemd does, restarted and killed under load."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import gevent
import pytest

import harness
import rating_agent_hep as agent
from chaos import RatingApi, Traffic
from dialog import call
from harness import LOCAL, kinds, whole

CHAOS = int(os.environ.get("CHAOS", "1"))
# Calls a second; a kill costs what arrives in some ms.
RATE = 50
# Seconds around a kill: before it what the agent had read and not yet committed is lost, behind it
# what is sent over TCP while the kernel takes the process apart. It is some ms, on a busy machine
# more; to start takes longer.
NEAR = 0.25
# Calls that one kill may cost: it is 0.9 on average.
COST = 5
# Seconds that the agent waits for a missing message.
WAITS = 0.5
NEVER = "1970-01-01T00:00:00Z"


def hold(*names: str) -> dict[str, socket.socket]:
    """Sockets of loopback by the names of FileDescriptorName=."""
    held = {}
    for name in names:
        kind = socket.SOCK_DGRAM if name == "hep-udp" else socket.SOCK_STREAM
        held[name] = socket.socket(socket.AF_INET, kind)
        held[name].bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            held[name].listen()
        else:
            # As ReceiveBuffer= does; the kernel may grant less.
            held[name].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, agent.RECEIVE_BUFFER)
    return held


def configured(
    monkeypatch: pytest.MonkeyPatch, sock: socket.socket | int, names: str, *argv: str
) -> agent.Configuration:
    """The configuration with one socket, or descriptor, passed to this process."""
    file = sock if isinstance(sock, int) else os.dup(sock.fileno())
    monkeypatch.setattr(agent, "_FIRST_PASSED", file)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": names}
    return agent.load_configuration(argv, environ)


def test_a_passed_socket_takes_the_place_of_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    off = ("--listen-udp=", "--listen-tcp=")
    for name, option in (("hep-udp", "listen_udp"), ("hep-tcp", "listen_tcp")):
        with hold(name)[name] as sock:
            found = configured(monkeypatch, sock, name, *off)
            (passed,) = found.sockets.values()
            host, port = sock.getsockname()
            assert getattr(found.settings, option) == f"{host}:{port}"
            assert passed.getsockname() == (host, port) and not passed.get_inheritable()
            passed.close()
    with hold("status")["status"] as sock, pytest.raises(agent.ConfigError, match="all empty"):
        configured(monkeypatch, sock, "status", *off)
    with hold("hep-tls")["hep-tls"] as sock, pytest.raises(agent.ConfigError, match="tls_cert"):
        configured(monkeypatch, sock, "hep-tls")


@pytest.mark.parametrize("pid, count", [("1", "1"), ("", "1"), ("our own", "0")])
def test_sockets_of_another_process_are_not_touched(pid: str, count: str) -> None:
    pid = pid.replace("our own", str(os.getpid()))
    environ = {"LISTEN_PID": pid, "LISTEN_FDS": count, "LISTEN_FDNAMES": "nonsense"}
    assert agent.load_configuration([], environ).sockets == {}


@contextlib.contextmanager
def wrong_socket(what: str, folder: Path) -> Iterator[tuple[str, socket.socket | int]]:
    """A name, and a socket or descriptor that is not right for it."""
    name, _, fault = what.partition(" ")
    if fault == "file":
        with open(folder / "file", "w") as file:
            yield name, os.dup(file.fileno())
    elif fault == "closed":
        yield name, 999
    else:
        family = socket.AF_UNIX if fault == "unix" else socket.AF_INET
        kind = socket.SOCK_DGRAM if fault in ("datagram", "unbound") else socket.SOCK_STREAM
        with socket.socket(family, kind) as sock:
            if fault in ("unix", "stream"):
                sock.bind(str(folder / "socket") if fault == "unix" else ("127.0.0.1", 0))
                sock.listen()
            elif fault == "datagram":
                sock.bind(("127.0.0.1", 0))
            yield name, sock


@pytest.mark.parametrize(
    "what, said",
    [
        ("hep-udp stream", r"its type is \D*1; allowed: a bound UDP socket"),
        ("hep-tcp datagram", r"its type is \D*2; allowed: a listening TCP socket"),
        ("status unix", r"in the place of listen_status: its family is \D*1; allowed"),
        ("hep-tls silent", "in the place of listen_tls: it does not listen; allowed"),
        ("hep-udp unbound", "it is not bound; allowed"),
        ("hep-tcp file", "Socket operation on non-socket; allowed"),
        ("hep-tcp closed", "descriptor 999, .*Bad file descriptor; allowed"),
        ("rating-agent-hep.socket stream", "LISTEN_FDNAMES: .*allowed: hep-udp, .*each once"),
        (":hep-tcp stream", "LISTEN_FDS, LISTEN_FDNAMES: '1', .*; allowed: a name for each"),
    ],
)
def test_wrong_sockets_are_refused(
    what: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with wrong_socket(what, tmp_path) as (name, sock):
        with pytest.raises(agent.ConfigError, match=said) as caught:
            configured(monkeypatch, sock, name)
        assert "\n" not in str(caught.value)


def test_a_name_may_not_be_passed_twice() -> None:
    held = hold("hep-tcp", "status")
    before, files = harness.passing(held)
    command = [*before, sys.executable, str(harness.ROOT / "rating_agent_hep.py")]
    command[3] = "hep-tcp:hep-tcp"
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=files)
    for file in (*files, *held.values()):
        os.close(file) if isinstance(file, int) else file.close()
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("rating_agent_hep.py: LISTEN_FDNAMES: 'hep-tcp:hep-tcp'; allowed: ")


def test_the_variables_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in agent.PASSING:
        monkeypatch.setenv(name, "1")
    assert agent.main(["check"]) == 0
    assert not set(agent.PASSING) & set(os.environ)


def test_what_waits_in_the_sockets_is_for_the_next_agent(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    """All four kinds; what comes while no agent runs waits in them, and the next one reads it."""
    harness.certificates(tmp_path)
    held = hold("hep-udp", "hep-tcp", "hep-tls", "status")
    udp, tcp, tls, status = (sock.getsockname() for sock in held.values())
    options = [f"--rating-api-url={api.url}", LOCAL, f"--state-dir={tmp_path / 'state'}"]
    options += [f"--tls-cert={tmp_path / 'server.pem'}", f"--tls-key={tmp_path / 'server.key'}"]
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with contextlib.ExitStack() as stack:
        for number in (0, 10):
            harness.send_udp(udp, call(number + 1))
            waiting = stack.enter_context(socket.create_connection(tcp))
            waiting.sendall(b"".join(call(number + 2)))
            with harness.AgentProcess(*options, sockets=held) as process:
                assert (process.udp, process.tcp, process.tls) == (udp, tcp, tls)
                assert all(line["inherited"] for line in process.events("listening"))
                secured = context.wrap_socket(
                    socket.create_connection(tls), server_hostname="localhost"
                )
                stack.enter_context(secured).sendall(b"".join(call(number + 3)))
                said = json.load(urlopen("http://{}:{}/status".format(*status), timeout=10))
                assert {x["transport"] for x in said["listeners"]} == {
                    "udp",
                    "tcp",
                    "tls",
                    "status",
                }
                harness.wait_until(
                    lambda wanted=number and 12 or 6: len(api.requests) == wanted, "all are there"
                )
                assert process.stop() == 0
    for sock in held.values():
        sock.close()
    numbers = (1, 2, 3, 11, 12, 13)
    assert sorted(kinds(api)) == sorted(kind for number in numbers for kind in whole(number))


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
def test_what_was_sent_before_the_sender_could_know_is_read(
    secure: bool, api: harness.RatingServer, tmp_path: Path
) -> None:
    """SIGTERM finds an agent that is far behind: much is sent, hardly anything read."""
    options = [f"--rating-api-url={api.url}", LOCAL, f"--state-dir={tmp_path / 'state'}"]
    if secure:
        harness.certificates(tmp_path)
        options += ["--listen-tls=127.0.0.1:0", f"--tls-cert={tmp_path / 'server.pem'}"]
        options += [f"--tls-key={tmp_path / 'server.key'}"]
    with harness.AgentProcess(*options) as process:
        sender = socket.create_connection(process.tls if secure else process.tcp)
        if secure:
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            sender = context.wrap_socket(sender, server_hostname="localhost")
        sender.sendall(b"".join(call(0)))
        harness.wait_until(lambda: len(api.requests) == 2, "the connection is served")
        process.kill(signal.SIGSTOP)
        writing = gevent.spawn(
            sender.sendall, b"".join(x for number in range(1, 201) for x in call(number))
        )
        gevent.sleep(0)
        process.kill(signal.SIGTERM)
        process.kill(signal.SIGCONT)
        harness.wait_until(lambda: select.select([sender], [], [], 0)[0], "it is told")
        writing.get(timeout=harness.DEADLINE)
        # What is on its way when it is told: some distance, or a busy server.
        gevent.sleep(2 * agent.TICK)
        sender.sendall(b"".join(call(201)))
        sender.close()
        harness.wait_until(lambda: process.ended, "the agent ends")
        assert process.stop() == 0
    with harness.AgentProcess(*options) as process:
        harness.wait_until(lambda: len(api.requests) == 404, "all calls are reported")
        assert process.stop() == 0
    assert sorted(kinds(api)) == sorted(kind for number in range(202) for kind in whole(number))


class Unbroken(Traffic):
    """A mirror that sends on while no agent runs, and nothing twice.

    Where its TCP connection was closed, of which an event loop hears at once, it opens a new one.
    """

    def __init__(self, seed: int, rate: float) -> None:
        super().__init__(seed, rate)
        self.sent: dict[str, list[float]] = {}

    def _send(self, to: harness.AgentProcess, number: int, data: bytes) -> None:
        assert self._tcp is not None
        self.sent.setdefault(f"call-{number}@host", []).append(time.monotonic())
        # The agent never says anything, so this is its end.
        if select.select([self._tcp], [], [], 0)[0]:
            self._connect(to)
        try:
            super()._send(to, number, data)
        except ConnectionError:
            # Closed at this very moment: nothing of it was taken.
            self._connect(to)
            super()._send(to, number, data)

    def _look(self, at: harness.AgentProcess) -> None:
        """Nothing is sent again, and a mirror waits for nobody."""

    def _connect(self, to: harness.AgentProcess) -> None:
        assert self._tcp is not None
        self._tcp.close()
        self._tcp = socket.create_connection(to.tcp)

    def wrong(self, api: RatingApi) -> set[str]:
        """The calls that are charged otherwise than they were."""
        found = (self.refused & set(api.records)) | (set(api.running) - set(self.ended))
        for tag, (answered, end) in self.ended.items():
            begin, finish = map(json.loads, api.records.get(tag, ("{}", "{}")))
            late = harness.seconds(begin.get("timestamp_begin", NEVER)) - answered
            longer = harness.seconds(finish.get("timestamp_end", NEVER)) - end
            if max(abs(late), abs(longer)) > harness.TOLERANCE:
                found.add(tag)
        return found


def restarts(
    folder: Path, number: int, times: int, seed: int
) -> tuple[Unbroken, set[str], list[float]]:
    """End the agent by a signal some times under traffic that goes on.

    Returns the traffic, the calls that were charged wrongly, and when the agents were ended.
    """
    api, traffic, held = RatingApi(), Unbroken(seed, RATE), hold("hep-udp", "hep-tcp")
    options = [f"--rating-api-url={api.url}", LOCAL, f"--state-dir={folder}"]
    options += [f"--reorder-window={WAITS}"]
    process = first = harness.AgentProcess(*options, sockets=held)
    sending, chance, ends = gevent.spawn(traffic.run, first, 1e9), random.Random(seed), []
    try:
        for _ in range(times):
            gevent.sleep(chance.uniform(0.3, 0.7))
            ends.append(time.monotonic())
            process.stop(number)
            process = harness.AgentProcess(*options, sockets=held)
        traffic.calling = False
        harness.wait_until(lambda: traffic.over, "all calls are over")
        # What a kill took never comes: until all are right, or nothing comes any more.
        heard = -1
        while traffic.wrong(api) and heard != len(api.requests):
            heard = len(api.requests)
            gevent.sleep(2 * WAITS)
        assert process.stop() == 0
    finally:
        process.__exit__()
        sending.kill()
        for sock in held.values():
            sock.close()
        api.close()
    assert api.faults == []
    return traffic, traffic.wrong(api), ends


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder that is not on the disk: commits of a busy disk take seconds, which a kill costs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_restart_costs_no_call(memory: Path) -> None:
    traffic, wrong, _ = restarts(memory, signal.SIGTERM, 3 * CHAOS, 7)
    print(f"SIGTERM: {traffic.number} calls, {3 * CHAOS} restarts, {len(wrong)} wrong")
    assert not wrong


def test_a_kill_costs_only_what_the_agent_had_read(memory: Path) -> None:
    traffic, wrong, ends = restarts(memory, signal.SIGKILL, 3 * CHAOS, 8)
    print(f"SIGKILL: {traffic.number} calls, {len(ends)} kills, {len(wrong)} wrong")
    for tag in sorted(wrong):
        near = min((sent - end for sent in traffic.sent[tag] for end in ends), key=abs)
        print(f"{tag}: a packet {near * 1000:+.1f} ms from a kill")
        assert abs(near) < NEAR, f"{tag} is wrong though no kill was near its packets"
    assert len(wrong) <= COST * len(ends)
