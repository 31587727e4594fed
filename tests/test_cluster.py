"""Several agents, one set of calls: an exact ledger, with a real redis-server and real processes.

Each packet goes to an agent chosen at random. A mirror does not send again what it sent to an agent
that dies, so the generator sends once more, to another one, what it had sent to that agent in the
last RESENT seconds: whatever was older has to be in Redis.

`make chaos` runs each fault in a run of its own and for longer; `make test` all of them in turn.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.server
import pytest
import redis
from pure import kind_of
from redisserver import PROGRAM, RedisServer, free_port, needs_redis
from test_cases import CAPTURES, CASES, FIELD, Case, arrivals, faults, stamps, told_of

import harness
import hepbuild
import rating_agent_hep as agent
from chaos import RATE, Generator, RatingApi
from dialog import ack, bye, bye_reply, invite, numbered, reply
from harness import LOCAL

pytestmark = needs_redis
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")

TIMES = int(os.environ.get("CHAOS", "1"))
TIMEOUT = 1.0
LEASE = TIMEOUT + agent.LEASE_MARGIN
# Seconds. An agent needs some 10 ms to append what it gets; on a machine that does much else, more.
RESENT = 1.0


ONLY_CHAOS = pytest.mark.skipif(
    TIMES == 1 and "EACH" not in os.environ, reason="one at a time: make chaos, or EACH=1"
)


STARTED: list[harness.AgentProcess | RedisServer] = []


def start(*options: str) -> harness.AgentProcess:
    """An agent that does not outlive its test."""
    STARTED.append(harness.AgentProcess(*options))
    return STARTED[-1]  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails in the middle leaves no process behind."""
    yield
    while STARTED:
        STARTED.pop().__exit__(None, None, None)


def unique(payload: bytes, number: int) -> bytes:
    """A message of a call with a Call-ID of its own, and with tags of its own as well."""
    return numbered(payload, number).replace(b"tag=", f"tag=t{number:06}".encode())


class Spray(Generator):
    """Calls at a rate a second, each packet to an agent chosen at random, over UDP or TCP.

    The clock of the calls stands still between two runs. An ACK comes 50 ms after its 200, as over
    a network; sooner it might be appended first, and then a call begins with the ACK, as rule 7 has
    it for a mirror without replies.
    """

    def __init__(self, seed: int, rate: float = RATE) -> None:
        super().__init__(seed, rate, shortest=0.1, gap=0.05)
        self.again = 0
        self.twice = False
        self._sent: deque[tuple[float, int, bytes]] = deque()
        self._count = 0
        # Of each packet when it went where, for what a failure says.
        self.went: dict[bytes, list[str]] = {}
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._tcp: dict[int, socket.socket] = {}

    def run(self, agents: list[harness.AgentProcess], seconds: float) -> None:
        last, end = time.monotonic(), self._clock + seconds
        while self._clock < end:
            gevent.sleep(0.004)
            now = time.monotonic()
            # On a busy machine it is slower, and brings nothing that is late all at once.
            self._clock += min(now - last, 0.02)
            last = now
            while self.calling and self.number < self._clock * self._rate:
                for when, payload, stamp in self._call():
                    self._count += 1
                    frame = hepbuild.hep3(unique(payload, self.number), time_us=stamp)
                    self._due.append((when, self._count, frame))
            self._due.sort()
            while self._due and self._due[0][0] <= self._clock:
                self._send(agents, self._due.pop(0)[2])
            while self._sent and self._sent[0][0] < self._clock - 2 * RESENT:
                self._sent.popleft()

    def dead(self, pid: int, others: list[harness.AgentProcess]) -> None:
        """Send once more, to others, what an agent was sent last."""
        if pid in self._tcp:
            self._tcp.pop(pid).close()
        since = self._clock if self.twice else self._clock - RESENT
        again = [data for at, to, data in self._sent if to == pid and at > since]
        self.again += len(again)
        for data in again:
            self._send(others, data)

    def _send(self, agents: list[harness.AgentProcess], data: bytes) -> None:
        for to in self._chance.sample(agents, 2 if self.twice else 1):
            self.packets += 1
            self._sent.append((self._clock, to.pid, data))
            udp = self._chance.random() < 0.5
            where = f"{self._clock:.3f} {to.pid} {'udp' if udp else 'tcp'}"
            self.went.setdefault(kind_of(data), []).append(where)
            if udp:
                self._udp.sendto(data, to.udp)
                continue
            if to.pid not in self._tcp:
                self._tcp[to.pid] = socket.create_connection(to.tcp)
            self._tcp[to.pid].sendall(data)


def owned(redis: RedisServer) -> None:
    """Wait until each shard has an owner."""
    leases = [f"rating:lease:{number}" for number in range(64)]
    harness.wait_until(lambda: redis.ask("EXISTS", *leases) == ":64", "all are owned")


def unread(redis: RedisServer) -> int:
    """Entries of all streams that are not committed yet."""
    return sum(int(redis.ask("XLEN", f"rating:stream:{number}")[1:]) for number in range(64))


class Several:
    """Agents, their Redis, their rating API and the calls; `finish` judges."""

    def __init__(self, folder: Path, seed: int, *more: str, agents: int = 3) -> None:
        self.redis = RedisServer(folder / "redis", *more)
        STARTED.append(self.redis)
        self.api = RatingApi()
        self.spray = Spray(seed)
        self.chance = random.Random(seed)
        self.lines: list[dict[str, Any]] = []
        self.backs = 0
        self.frozen: harness.AgentProcess | None = None
        self.frozen_at = 0.0
        self.options = [
            f"--cluster-url={self.redis.url}",
            f"--rating-api-url={self.api.url}",
            f"--rating-api-timeout={TIMEOUT}",
            "--shutdown-timeout=5",
            LOCAL,
        ]
        self.agents = [start(*self.options) for _ in range(agents)]
        if agents:
            self.all_owned()

    def client(self) -> Any:
        """The client that the agent uses, too."""
        return redis.Redis(port=self.redis.port)

    def cluster(self) -> agent.Cluster:
        """One that knows which call is in which shard, and takes no part."""
        settings = agent.Settings(cluster_url=self.redis.url)
        metrics = agent.Metrics(settings)
        rules, delivery = agent.load_rules(settings), agent.Delivery(settings, metrics)
        cluster = agent.Cluster(settings, rules, metrics, delivery)
        cluster.join()
        return cluster

    def close(self) -> None:
        self.redis.stop()
        self.api.close()

    def all_owned(self) -> None:
        owned(self.redis)

    def run(self, seconds: float) -> None:
        self.spray.run(self.agents, seconds)

    def run_until(self, event: str, agents: list[harness.AgentProcess]) -> None:
        """Go on with the traffic until one of some agents logs an event."""
        deadline = time.monotonic() + harness.DEADLINE
        while not any(process.events(event) for process in agents):
            assert time.monotonic() < deadline, f"no {event}"
            self.run(0.2)

    def end(self, number: int) -> None:
        """Stop one of the agents by a signal."""
        victim = self.agents.pop(self.chance.randrange(len(self.agents)))
        status = victim.stop(number)
        assert status == (0 if number == signal.SIGTERM else -number)
        self.lines += victim.lines
        if self.agents:
            self.spray.dead(victim.pid, self.agents)

    def add(self) -> None:
        self.agents.append(start(*self.options))

    # The faults, each with traffic before, during and after it.

    def kills(self) -> None:
        for _ in range(2 * TIMES):
            self.run(self.chance.uniform(0.5, 1.5 + TIMES / 5))
            self.end(signal.SIGKILL)
            self.add()

    def kills_under_a_doubled_mirror(self) -> None:
        """Each packet goes to two agents, and nothing is sent again."""
        self.spray.twice = True
        self.kills()
        self.run(1.0)
        self.spray.twice = False

    def terms(self) -> None:
        for _ in range(TIMES):
            self.run(self.chance.uniform(0.5, 1.5))
            self.end(signal.SIGTERM)
            self.add()

    def zombies(self) -> None:
        for _ in range(TIMES):
            self.run(0.5)
            self.freeze()
            self.run(LEASE + 2)
            self.thaw()

    def freeze(self) -> None:
        self.frozen, self.frozen_at = self.agents.pop(0), time.monotonic()
        self.frozen.kill(signal.SIGSTOP)
        self.spray.dead(self.frozen.pid, self.agents)

    def thaw(self) -> None:
        """Not before all that the frozen agent owned has other owners."""
        while time.monotonic() < self.frozen_at + LEASE + 2:
            self.run(0.2)
        self.all_owned()
        assert self.frozen is not None
        self.frozen.kill(signal.SIGCONT)
        self.run_until("shard_lost", [self.frozen])
        self.agents.append(self.frozen)
        self.frozen = None
        self.run(0.5)

    def changes(self) -> None:
        for _ in range(TIMES):
            self.add()
            self.run_until("shards_taken", self.agents[-1:])
            given_back = any(x.events("shards_given_back") for x in self.agents)
            assert given_back or self.frozen, "the others, or a frozen one, lose what it takes"
            self.run(0.5)
            self.end(signal.SIGTERM)

    def redis_restarts(self) -> None:
        for _ in range(TIMES):
            self.run(0.5)
            self.redis.stop(signal.SIGKILL)
            self.run(1.0)
            self.redis.start()
            self.run(1.0)

    def api_faults(self) -> None:
        modes = ["close", "hang", "500", "refuse", "dead", "busy"]
        for mode in modes if TIMES > 1 else modes[:2]:
            self.api.change(mode)
            self.run(1.2)
            self.api.change("ok")
            self.run(0.3)

    def all_together(self) -> None:
        """What happens to agents, happens while another one is frozen."""
        self.kills()
        self.run(0.5)
        self.freeze()
        self.terms()
        self.changes()
        self.thaw()
        self.redis_restarts()
        self.api_faults()

    def finish(self, seconds: float = 60) -> None:
        """Let all calls end, wait for the last to be reported, stop the agents, and judge."""
        spray, api = self.spray, self.api
        spray.calling = False
        while not spray.over:
            self.run(0.5)
        try:
            harness.wait_until(
                lambda: len(api.records) >= len(spray.ended), "all calls are ended", seconds
            )
        finally:
            missing = set(spray.ended) - set(api.records)
            print(f"missing: {sorted(missing)[:10]}, {len(missing)}")
        while self.agents:
            self.end(signal.SIGTERM)
        self.close()

        def went(tag: str) -> str:
            return str({kind: at for kind, at in spray.went.items() if tag.encode() in kind})

        spray.judge(api, went)
        bad = [x for x in self.lines if x["level"] == "ERROR" or "internal" in x.get("event", "")]
        bad = [x for x in bad if x.get("event") not in ("redis_failed", "journal_failed")]
        assert bad == []
        print(
            f"{spray.number} calls, {len(spray.ended)} answered, {spray.packets} packets, "
            f"{spray.again} sent again, {api.repeats} requests repeated"
        )


# The captures, the cases and the field recordings


def play(agents: list[harness.AgentProcess], case: Case, pace: bool, seed: str) -> None:
    """The packets of a recording, each to an agent chosen at random, at their times or at once.

    At once a retransmission is not to overtake its original, which it leaves 0.5 s after: all that
    are alike go the same way.
    """
    began = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for index, arrival in enumerate(arrivals(case)):
            chance = random.Random(f"{seed} {index if pace else kind_of(arrival.frame)!r}")
            if pace:
                gevent.sleep(max(began + arrival.time - time.monotonic(), 0))
            elif index % 20 == 19:
                gevent.sleep(0.005)
            to = chance.choice(agents)
            if pace and arrival.frame[:4] == b"HEP3" and chance.random() < 0.3:
                harness.send_tcp(to.tcp, [arrival.frame])
            else:
                datagrams.sendto(arrival.frame, to.udp)


def later(redis: RedisServer, seconds: float) -> None:
    """Let the time of all streams leap: an entry with a later number, of a message of no call."""
    frame = agent.pack_frame(hepbuild.hep3(b"OPTIONS sip:a@b SIP/2.0\r\n\r\n"), 0, "127.0.0.1")
    number = f"{round((time.time() + seconds) * 1000)}-0"
    for shard in range(64):
        redis.add(f"rating:stream:{shard}", number, frame)


def test_captures_cases_and_recordings_through_three_agents(tmp_path: Path) -> None:
    """The same ledger as through one; with routes that tie legs, these meet."""
    plain = [x for x in CASES + FIELD if x.plain and arrivals(x)[-1].time <= 12.0] + CAPTURES
    clusters = [gevent.spawn(through_three, tmp_path / "plain", plain, "")]
    for routes in {case.routes for case in CASES + FIELD if case.tied}:
        chosen = [x for x in CASES + FIELD if x.routes == routes]
        clusters.append(gevent.spawn(through_three, tmp_path / str(hash(routes)), chosen, routes))
    assert len(clusters) == 3 and len(plain) > 100
    gevent.joinall(clusters, raise_error=True)


def through_three(folder: Path, chosen: list[Case], routes: str) -> None:
    folder.mkdir()
    (folder / "routes.yaml").write_text(routes)
    with RedisServer(folder / "redis") as redis, harness.RatingServer() as api:
        options = [f"--cluster-url={redis.url}", f"--rating-api-url={api.url}", LOCAL]
        options.append(f"--routes={folder / 'routes.yaml'}")
        agents = [start(*options) for _ in range(3)]
        owned(redis)
        for pace in (True, False):
            players = [
                gevent.spawn(play, agents, case, pace, str(case))
                for case in chosen
                if (case not in CAPTURES) == pace
            ]
            gevent.joinall(players, raise_error=True)
        before = 0
        for leap in (5, 40, 90):
            # Leaps behind what is read, and what is to come of it.
            harness.wait_until(lambda: unread(redis) == 0, "all is read")
            gevent.sleep(0.5)
            before = len(api.requests)
            later(redis, leap)
        harness.wait_until(lambda: unread(redis) == 0, "all is read")
        gevent.sleep(1.0)
        assert before
        for process in agents:
            assert process.stop() == 0
            assert [x for x in process.lines if x["level"] == "ERROR" or "internal" in str(x)] == []
    told = told_of(api.requests)
    wrong = []
    for case in chosen:
        own = {call["call_id"][:60] for call in case.calls}
        events = [event for name in own for event in told.pop(name, [])]
        wrong += [f"{case}: {x}" for x in faults(case, events, frozenset(stamps(case, b"ACK")))]
    assert wrong == []
    assert told == {}


# One agent dies


@ONLY_CHAOS
def test_failover_and_what_a_kill_costs(tmp_path: Path) -> None:
    """Nothing is sent again here: what is lost is what the killed agent had not appended."""
    several = Several(tmp_path, 7, "appendonly yes", agents=2)
    spray, redis = several.spray, several.redis
    client = several.client()
    several.run_until("shards_taken", several.agents[-1:])
    several.run(1.5)
    victim = several.agents.pop()
    leases = client.mget([f"rating:lease:{number}" for number in range(64)])
    mark = f":{victim.pid}:".encode()
    lost = {number for number, owner in enumerate(leases) if owner and mark in owner}
    assert 20 < len(lost) < 44, "each has its share"
    victim.kill(signal.SIGKILL)
    killed = time.monotonic()
    assert victim.stop() == -signal.SIGKILL
    # What it had sent arrives.
    gevent.sleep(0.5)
    known = set(several.api.bodies)
    sent, again = spray.packets, 0.0
    place = several.cluster()
    while not again:
        several.run(0.1)
        fresh = {tag for _, tag in set(several.api.bodies) - known}
        if any(place.shard_of(tag) in lost for tag in fresh):
            again = time.monotonic() - killed
        assert time.monotonic() - killed < LEASE + 20, "no failover"
    spray.calling = False
    while not spray.over:
        several.run(0.5)
    harness.wait_until(lambda: unread(redis) == 0, "all is read")
    added = sum(
        client.xinfo_stream(f"rating:stream:{number}")["entries-added"]
        for number in range(64)
        if client.exists(f"rating:stream:{number}")
    )
    missing = spray.packets - added
    print(f"failover in {again:.1f} s, lease {LEASE:g} s; {missing} of {sent} packets lost")
    # It may be none; the traffic of a second would be 700.
    assert 0 <= missing < 350
    while several.agents:
        several.end(signal.SIGTERM)
    several.close()
    assert several.api.faults == []


# What an operator does


def test_rejected_events_are_listed_sent_again_and_dropped_from_any_machine(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as redis, harness.RatingServer() as api:
        api.answer = lambda path, body: ("400 Bad Request", {})
        options = [f"--cluster-url={redis.url}", f"--rating-api-url={api.url}", LOCAL]
        agents = [start(*options) for _ in range(2)]
        owned(redis)
        chance = random.Random(8)
        for number in range(6):
            for payload in (invite(), reply(200), ack()):
                frame = hepbuild.hep3(unique(payload, number))
                harness.send_udp(chance.choice(agents).udp, [frame])

        def outbox(*words: str) -> tuple[int, list[str]]:
            out = io.StringIO()
            settings = agent.Settings(cluster_url=redis.url)
            return agent.outbox(settings, words, out), out.getvalue().splitlines()

        def states() -> list[str]:
            return [line.split()[0] for line in outbox("list")[1][1:]]

        harness.wait_until(lambda: states() == ["rejected"] * 6, "all are rejected")
        assert outbox("drop", "call-0@host") == (0, ["1 events dropped"])
        assert outbox("drop", "call-0@host")[0] == 2, "nothing is left of it"
        api.requests.clear()
        api.answer = lambda path, body: ("200 OK", {"ok": True})
        status, lines = outbox("retry", "call-1@host", "call-2@host")
        assert (status, lines) == (
            0,
            ["2 events to be sent again, by a running agent within seconds"],
        )
        harness.wait_until(lambda: states() == ["rejected"] * 3, "two are taken up")
        harness.wait_until(lambda: len(api.requests) == 2, "and sent")
        assert outbox("retry")[1][0].startswith("3 events")
        harness.wait_until(lambda: states() == [], "the others, too")
        # The ends of what was begun again are sent, that of what was dropped is not.
        for number in range(6):
            for payload in (bye(), bye_reply()):
                frame = hepbuild.hep3(unique(payload, number), time_us=hepbuild.TIME_US + 9_000_000)
                harness.send_udp(chance.choice(agents).udp, [frame])
        harness.wait_until(lambda: len(api.requests) >= 10, "they are ended")
        # A look by both agents later there is no more.
        gevent.sleep(2 * agent.BEAT)
        tags = [body["transaction_tag"] for path, body in api.requests if "end" in path]
        assert sorted(tags) == [f"call-{number}@host" for number in range(1, 6)]
        assert all(process.stop() == 0 for process in agents)


def test_a_leg_in_another_shard_ends_the_call_whose_tags_it_has(tmp_path: Path) -> None:
    """Behind a proxy that hides the topology a BYE has another Call-ID, and so another shard."""
    several = Several(tmp_path, 11, agents=2)
    place = several.cluster()
    here = place.shard_of("call-1@host")
    other = next(n for n in range(2, 99) if place.shard_of(f"call-{n}@host") != here)
    choose = several.chance.choice
    steps = [(invite(), 0.0), (reply(180), 0.1), (reply(200), 0.5), (ack(), 0.6)]
    legs = [(bye(), 5.0), (bye_reply(), 5.1)]
    base = hepbuild.TIME_US

    def send(payload: bytes, number: int, at: float) -> None:
        payload = numbered(payload, number).replace(b"tag=", b"tag=long-enough-")
        frame = hepbuild.hep3(payload, time_us=base + round(at * 1e6))
        harness.send_udp(choose(several.agents).udp, [frame])

    for payload, at in steps:
        send(payload, 1, at)
    harness.wait_until(lambda: several.api.running, "the call is begun")
    tags = several.client().hgetall("rating:tags")
    assert tags == {b"long-enough-c": str(here).encode()}
    for payload, at in legs:
        send(payload, other, at)
    harness.wait_until(lambda: several.api.records, "the leg has ended it")
    (body,) = [json.loads(end) for _, end in several.api.records.values()]
    assert harness.seconds(body["timestamp_end"]) == pytest.approx(base / 1e6 + 5.0, abs=0.002)
    harness.wait_until(lambda: not several.client().hgetall("rating:tags"), "its tag is free")
    while several.agents:
        several.end(signal.SIGTERM)
    several.close()


def test_legs_that_a_part_of_the_call_id_ties_are_charged_once(tmp_path: Path) -> None:
    """A B2BUA's second leg has a Call-ID of its own: hashed by it, the legs would never meet."""
    routes = tmp_path / "routes.yaml"
    routes.write_text("- transaction_tag: {from: call-id, match: '^(.+?)(?:_b2b-1)*$'}\n")
    several = Several(tmp_path, 13, agents=0)
    several.options.append(f"--routes={routes}")
    several.agents = [start(*several.options) for _ in range(2)]
    several.all_owned()
    base = hepbuild.TIME_US

    def send(payload: bytes, leg: str, at: float) -> None:
        payload = payload.replace(b"call-1@host", f"call-1@host{leg}".encode())
        payload = payload.replace(b"tag=", f"tag={leg}".encode())
        frame = hepbuild.hep3(payload, time_us=base + round(at * 1e6))
        harness.send_udp(several.chance.choice(several.agents).udp, [frame])

    for payload, at in ((invite(), 0.0), (reply(200), 0.5), (ack(), 0.6)):
        send(payload, "", at)
        send(payload, "_b2b-1", at + 0.02)
    harness.wait_until(lambda: several.api.running, "the call is begun")
    for payload, at in ((bye(), 5.0), (bye_reply(), 5.1)):
        send(payload, "_b2b-1", at)
        send(payload, "", at + 0.02)
    harness.wait_until(lambda: several.api.records, "the call is ended")
    while several.agents:
        several.end(signal.SIGTERM)
    assert several.api.faults == [] and several.api.running == {}
    assert list(several.api.bodies) == [("begin", "call-1@host"), ("end", "call-1@host")]
    several.close()


@contextlib.contextmanager
def balancing(folder: Path, *agents: tuple[int, int]) -> Iterator[Any]:
    """nginx with conf/nginx as it is, but for addresses, before agents' ports of TCP and UDP."""
    port = free_port()
    text = (harness.ROOT / "conf" / "nginx" / "nginx.conf").read_text()
    text = text.replace("listen 9060", f"listen 127.0.0.1:{port}")
    for name, numbers in zip(("agent-1:9060", "agent-2:9060"), agents, strict=True):
        for number in numbers:
            text = text.replace(f"server {name}", f"server 127.0.0.1:{number}", 1)
    (folder / "nginx.conf").write_text(text)
    more = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;"
    nginx = subprocess.Popen([str(NGINX), "-c", str(folder / "nginx.conf"), "-g", more])

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        harness.wait_until(listens, "nginx listens")
        yield SimpleNamespace(pid=nginx.pid, udp=("127.0.0.1", port), tcp=("127.0.0.1", port))
    finally:
        nginx.terminate()
        nginx.wait()


@pytest.mark.skipif(not NGINX, reason="no nginx; make redis-server installs it")
def test_the_example_of_a_balancer_and_that_of_redis(tmp_path: Path) -> None:
    """conf/redis and conf/nginx as they are, but for addresses, ports and folders."""
    example = (harness.ROOT / "conf" / "redis" / "redis.conf").read_text()
    lines = [x for x in example.splitlines() if x and not x.startswith(("#", "save"))]
    several = Several(tmp_path, 12, *lines, agents=2)
    with balancing(tmp_path, *((each.tcp[1], each.udp[1]) for each in several.agents)) as balancer:
        several.spray.run([balancer], 3.0)
        several.spray.calling = False
        while not several.spray.over:
            several.spray.run([balancer], 0.5)
        several.finish()


@pytest.mark.skipif(not NGINX, reason="no nginx; make redis-server installs it")
def test_the_balancer_notices_over_udp_that_an_agent_is_away(tmp_path: Path) -> None:
    agents = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock in agents:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(0.5)
    ports = [(free_port(), sock.getsockname()[1]) for sock in agents]
    with (
        balancing(tmp_path, *ports) as balancer,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):

        def arrived(of: int, at: list[socket.socket]) -> int:
            for _ in range(of):
                sender.sendto(b"HEP3", balancer.udp)
            count = 0
            for sock in at:
                with contextlib.suppress(TimeoutError):
                    while sock.recv(100):
                        count += 1
            return count

        assert arrived(20, agents) == 20 and arrived(20, agents[:1]) == 10
        agents.pop().close()
        harness.wait_until(lambda: arrived(20, agents) == 20, "the other one gets all")
    agents[0].close()


def test_status_of_a_cluster(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as redis:
        options = [f"--cluster-url={redis.url}", "--listen-status=127.0.0.1:0"]
        with harness.AgentProcess(*options) as one, harness.AgentProcess(*options) as other:
            owned(redis)

            def status(process: harness.AgentProcess) -> dict[str, Any]:
                with urllib.request.urlopen(f"{process.status}/status") as answer:
                    found: dict[str, Any] = json.load(answer)
                return found

            def shares() -> list[int]:
                return [status(process)["cluster"]["shards"] for process in (one, other)]

            harness.wait_until(lambda: shares() == [32, 32], "both have their share")

            def told() -> list[int]:
                return [x["shards"] for x in status(one)["cluster"]["agents"]]

            harness.wait_until(lambda: told() == [32, 32], "and each knows of the other")
            cluster = status(one)["cluster"]
            assert {x["name"] for x in cluster["agents"]} >= {cluster["name"]}
            assert (cluster["redis"], cluster["of"], cluster["unappended"]) == ("ok", 64, 0)
            assert status(one)["healthy"] and status(one)["journal"] is None
            redis.kill(signal.SIGSTOP)
            harness.wait_until(lambda: not status(one)["healthy"], "it is seen")
            assert "Redis does not answer" in status(one)["faults"][0]
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{one.status}/healthz")
            redis.kill(signal.SIGCONT)
            harness.wait_until(lambda: status(one)["healthy"], "it comes back by itself")
            with urllib.request.urlopen(f"{one.status}/metrics") as answer:
                metrics = answer.read().decode()
            assert "\nrating_agent_hep_cluster_agents 2\n" in metrics
            assert re.search(r"^rating_agent_hep_cluster_shards_taken_total [1-9]", metrics, re.M)


# What is wrong with Redis


@pytest.mark.parametrize(
    ("redis", "option", "text"),
    [
        (["requirepass geheim"], [], "cluster_url, cluster_password: "),
        (["requirepass geheim"], ["--cluster-password=falsch"], "cluster_url, cluster_password: "),
        (["maxmemory 100mb", "maxmemory-policy allkeys-lru"], [], "allkeys-lru would lose calls"),
        (["replicaof 127.0.0.1 1"], [], "cluster_url: a replica; "),
        (["cluster-enabled yes"], [], "cluster_url: Redis Cluster; "),
    ],
    ids=["no password", "wrong password", "eviction", "replica", "Redis Cluster"],
)
def test_a_redis_that_is_refused(
    redis: list[str], option: list[str], text: str, tmp_path: Path, capfd: Any
) -> None:
    with RedisServer(tmp_path / "redis", *redis) as server:
        assert refused(server.url, *option).count(text) == 1


def refused(url: str, *options: str) -> str:
    """Start an agent that is refused with one line; returns that."""
    command = [sys.executable, str(harness.ROOT / "rating_agent_hep.py"), f"--cluster-url={url}"]
    command += ["--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "; allowed: " in line and "geheim" not in line
    assert '"listening"' not in done.stdout
    return line


def test_tls_a_socket_and_a_password_from_a_file(tmp_path: Path) -> None:
    """The ways to Redis other than plain TCP, with a certificate of an authority of our own."""
    harness.certificates(tmp_path)
    (tmp_path / "password").write_text("geheim\n")
    port, path = free_port(), tmp_path / "redis.sock"
    options = ["requirepass geheim", f"unixsocket {path}", f"tls-port {port}"]
    options += [f"tls-cert-file {tmp_path}/server.pem", f"tls-key-file {tmp_path}/server.key"]
    options += [f"tls-ca-cert-file {tmp_path}/ca.pem", "tls-auth-clients no"]
    with RedisServer(tmp_path / "redis", *options):
        for url in (
            f"unix://{path}",
            f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/ca.pem",
        ):
            command = [f"--cluster-url={url}", f"--cluster-password-file={tmp_path}/password"]
            with harness.AgentProcess(*command) as process:
                harness.wait_until(lambda x=process: x.events("shards_taken"), url)  # type: ignore[misc]
                assert process.stop() == 0
                assert "geheim" not in str(process.lines)
        assert "certificate" in failure(f"rediss://127.0.0.1:{port}/0", "geheim")


def failure(url: str, password: str) -> str:
    """Why an agent does not reach a Redis."""
    settings = agent.Settings(cluster_url=url, cluster_password=password)
    metrics = agent.Metrics(settings)
    delivery = agent.Delivery(settings, metrics)
    with pytest.raises(agent.RedisError) as caught:
        agent.Cluster(settings, agent.load_rules(settings), metrics, delivery).join()
    return str(caught.value)


def test_a_cluster_that_was_made_otherwise_is_refused(tmp_path: Path) -> None:
    routes = tmp_path / "routes.yaml"
    routes.write_text("- transaction_tag: correlation-id\n")
    with RedisServer(tmp_path / "redis") as redis:
        with harness.AgentProcess(f"--cluster-url={redis.url}") as process:
            owned(redis)
            assert process.stop() == 0
        line = refused(redis.url, "--cluster-shards=32")
        assert "cluster_shards: 32, but rating has 64; " in line
        assert "routes: " in refused(redis.url, f"--routes={routes}")
        redis.ask("SET", "other:config", "1")
        assert "cluster_name: other: WRONGTYPE" in refused(redis.url, "--cluster-name=other")
        redis.ask("HSET", "old:config", "version", "0")
        assert "old has 0" in refused(redis.url, "--cluster-name=old")


def test_an_old_redis_is_refused() -> None:
    """No package has one that old: a server that says so."""

    def serve(sock: Any, _: Any) -> None:
        text = b"# Server\r\nredis_version:6.2.14\r\nrole:master\r\n"
        while data := sock.recv(4096):
            known = b"INFO" in data
            answer = b"$%d\r\n%s\r\n" % (len(text), text) if known else b"+OK\r\n"
            sock.sendall(answer * max(data.count(b"*"), 1))

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve)
    server.start()
    url = f"redis://127.0.0.1:{server.server_port}"
    line = gevent.spawn(refused_in_process, url).get()
    server.stop(timeout=0)
    assert "Redis 6.2.14; allowed: Redis 7 or later" in line


def refused_in_process(url: str) -> str:
    settings = agent.Settings(cluster_url=url)
    metrics = agent.Metrics(settings)
    rules = agent.load_rules(settings)
    with pytest.raises(agent.ConfigError) as caught:
        agent.Cluster(settings, rules, metrics, agent.Delivery(settings, metrics)).join()
    return str(caught.value)


def test_without_the_client_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "redis.py").write_text("raise ImportError\n")
    path = os.environ.get("PYTHONPATH", "")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{path}"}
    command = [sys.executable, str(harness.ROOT / "rating_agent_hep.py")]
    done = subprocess.run(
        [*command, "--cluster-url=redis://localhost"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install 'rating-agent-hep[cluster]'" in done.stderr
    # Who has no cluster needs no client.
    done = subprocess.run([*command, "check"], env=environ, capture_output=True, text=True)
    assert done.returncode == 0


def test_a_redis_that_fails_in_each_way_and_comes_back(tmp_path: Path) -> None:
    """Under traffic, with an exact ledger: each costs time, and nothing else."""
    several = Several(tmp_path, 9, agents=2)
    redis = several.redis

    def fails(text: str) -> None:
        deadline = time.monotonic() + harness.DEADLINE
        before = sum(len(x.events("redis_back")) for x in several.agents)
        while not any(
            text in x["message"] for y in several.agents for x in y.events("redis_failed")
        ):
            assert time.monotonic() < deadline, f"no {text}"
            several.run(0.2)
        several.backs = before

    def is_back() -> None:
        deadline = time.monotonic() + harness.DEADLINE
        while sum(len(x.events("redis_back")) for x in several.agents) <= several.backs:
            assert time.monotonic() < deadline, "it does not come back"
            several.run(0.2)
        several.run(0.5)

    several.run(0.5)
    redis.ask("SCRIPT", "FLUSH")
    several.run(0.5)
    redis.ask("REPLICAOF", "127.0.0.1", "1")
    fails("read only replica")
    redis.ask("REPLICAOF", "NO", "ONE")
    is_back()
    redis.ask("CONFIG", "SET", "maxmemory", "1")
    fails("maxmemory")
    redis.ask("CONFIG", "SET", "maxmemory", "0")
    is_back()
    redis.kill(signal.SIGSTOP)
    fails("no answer in time")
    redis.kill(signal.SIGCONT)
    is_back()
    several.finish()


@pytest.mark.parametrize("case", ["its disk was lost", "the power was cut"])
def test_a_redis_that_comes_back_without_its_last(case: str, tmp_path: Path) -> None:
    """Under traffic: what the agents still know is written again, and taken over from there."""
    several = Several(tmp_path, len(case), "appendonly yes", "appendfsync everysec")
    redis, sizes = several.redis, deque([0], maxlen=15)
    (log,) = (redis.folder / "appendonlydir").glob("*.incr.aof")
    for _ in range(30):
        several.run(0.1)
        sizes.append(log.stat().st_size)
    redis.stop(signal.SIGKILL)
    # The last 1.5 s were not on the disk yet.
    assert 0 < sizes[0] < sizes[-1]
    if case == "the power was cut":
        os.truncate(log, sizes[0])
    else:
        shutil.rmtree(log.parent)
    several.run(0.5)
    redis.start()
    several.run_until("redis_went_back", several.agents)
    several.run(1.0)
    for _ in range(3):
        # Who takes over knows no more than Redis.
        several.end(signal.SIGKILL)
        several.add()
        several.run(1.0)
    several.finish()


def test_a_failover_of_redis_to_its_replica_by_sentinel(tmp_path: Path) -> None:
    several = Several(tmp_path, 13, agents=0)
    replica = RedisServer(tmp_path / "replica", f"replicaof 127.0.0.1 {several.redis.port}")
    STARTED.append(replica)
    port = free_port()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"port {port}\nsentinel monitor mymaster 127.0.0.1 {several.redis.port} 1\n"
        "sentinel down-after-milliseconds mymaster 1000\n"
        "sentinel failover-timeout mymaster 5000\n"
    )
    sentinel = subprocess.Popen([PROGRAM, str(conf), "--sentinel"], stdout=subprocess.DEVNULL)
    several.options[0] = f"--cluster-url=sentinel://127.0.0.1:{port}/mymaster/0"
    try:
        # Redis lists a replica before it has copied anything, 5 s before by default.
        copied = "master_link_status:up"
        harness.wait_until(lambda: copied in replica.ask("INFO", "replication"), "copied")
        for _ in range(2):
            several.add()
        several.all_owned()
        several.run(2.0)
        several.redis.stop(signal.SIGKILL)
        several.run_until("redis_back", several.agents)
        several.redis = replica
        several.run(2.0)
        several.end(signal.SIGKILL)
        several.add()
        several.run(1.0)
        several.finish()
    finally:
        sentinel.kill()
        sentinel.wait()


def test_agents_that_start_before_their_redis(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.stop()
    with harness.RatingServer() as api:
        options = [f"--cluster-url={redis.url}", f"--rating-api-url={api.url}", LOCAL]
        with harness.AgentProcess(*options) as process:
            harness.wait_until(lambda: process.events("redis_failed"), "it says so")
            steps = [hepbuild.hep3(x) for x in (invite(), reply(180), reply(200), ack())]
            harness.send_udp(process.udp, steps)
            redis.start()
            harness.wait_until(lambda: api.requests, "the call is begun all the same")
            assert process.stop() == 0
    redis.stop()


def test_a_stop_while_redis_is_away_waits_for_it(tmp_path: Path) -> None:
    several = Several(tmp_path, 3, "appendonly yes", "appendfsync always", agents=1)
    (process,) = several.agents
    several.redis.stop()
    harness.wait_until(lambda: process.events("redis_failed"), "it says so")
    steps = (invite(), reply(200), ack(), bye(), bye_reply())
    harness.send_udp(process.udp, [hepbuild.hep3(numbered(x, 1)) for x in steps])
    process.kill(signal.SIGTERM)
    harness.wait_until(lambda: process.events("stopping"), "it stops")
    several.redis.start()
    harness.wait_until(lambda: process.ended, "it has stopped")
    assert process.stop() == 0 and not process.events("unappended")
    start(*several.options)
    harness.wait_until(lambda: len(several.api.bodies) == 2, "the next one charges the call")
    several.close()


def test_what_another_program_writes_into_a_stream_costs_only_itself(tmp_path: Path) -> None:
    several = Several(tmp_path, 14, agents=1)
    client = several.client()
    for number in range(64):
        stream = f"rating:stream:{number}"
        client.xadd(stream, {"a": "1", "b": "2"})
        client.xadd(stream, {"f": b"no frame"})
        client.xadd(stream, {"f": agent.pack_frame(b"HEP3 of nobody", 0, "192.0.2.1")})
    several.run(0.5)
    several.finish()


def test_datagrams_over_the_limit_are_dropped_counted_and_said() -> None:
    settings = agent.Settings(cluster_url="redis://127.0.0.1:1")
    metrics = agent.Metrics(settings)
    delivery = agent.Delivery(settings, metrics)
    cluster = agent.Cluster(settings, agent.load_rules(settings), metrics, delivery)
    frame = bytes(60_000)
    taken = 0
    while cluster.append(["call"], frame):
        taken += 1
    assert taken == agent.MAX_UNAPPENDED // len(frame)
    assert cluster.unappended == taken * len(frame) and cluster.behind


def test_frames_are_kept_for_a_while_and_are_appended_again_once(monkeypatch: Any) -> None:
    settings = agent.Settings(cluster_url="redis://127.0.0.1:1")
    metrics = agent.Metrics(settings)
    delivery = agent.Delivery(settings, metrics)
    cluster = agent.Cluster(settings, agent.load_rules(settings), metrics, delivery)
    cluster._salt = b"salt"
    frame, appended = bytes(60_000), 0

    known = 0

    def ask(*commands: Any) -> list[bytes]:
        nonlocal appended
        appended += sum(command[0] == "XADD" for command in commands)
        return [b"1-1"] * len(commands)

    def append(number: int) -> int:
        nonlocal appended
        appended = 0
        assert all(cluster.append(["call"], frame) for _ in range(number))
        while cluster.unappended:
            link: Any = SimpleNamespace(ask=ask, one=lambda *_: known)
            cluster._append(link)
        return appended

    def redis_is_away() -> None:
        cluster._fail("append", agent.RedisError("timeout", "no answer in time"))
        cluster._work("append")

    now = 1000.0
    monkeypatch.setattr(agent, "boottime", lambda: now)
    cluster._work("beat")
    assert append(400) == 400
    redis_is_away()
    assert append(1) == agent.MAX_APPENDED_KEPT // len(frame) + 1
    # What was appended long before is of calls that may be forgotten.
    now += agent.APPENDED_KEPT + agent.REDIS_TIMEOUT + 0.1
    redis_is_away()
    assert append(1) == 1
    now += agent.APPENDED_KEPT - 0.1
    redis_is_away()
    assert append(1) == 2
    now += agent.APPENDED_KEPT + 0.1
    assert append(1) == 1
    redis_is_away()
    assert append(1) == 2
    # What Redis still has is not appended again.
    known = cluster._groups
    redis_is_away()
    assert append(1) == 1


FAULTS = ["kills", "kills_under_a_doubled_mirror", "terms", "zombies", "changes"]
FAULTS += ["redis_restarts", "api_faults"]


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(name, marks=ONLY_CHAOS) for name in FAULTS),
        "all_together",
    ],
)
def test_every_call_is_charged_once(fault: str, tmp_path: Path) -> None:
    several = Several(tmp_path, len(fault), "appendonly yes", "appendfsync always")
    getattr(several, fault)()
    several.finish()
