"""Several agents, one set of calls: an exact ledger, with a real redis-server and real processes.

Each packet goes to an agent chosen at random. A mirror does not send again what it sent to an agent
that dies, so the generator sends once more, to another one, what it had sent to that agent in the
last RESENT seconds: whatever was older has to be in Redis.

`make chaos` runs each fault in a run of its own and for longer; `make test` all of them in turn.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
import pytest
from redisserver import RedisServer, needs_redis
from test_calls import ack, bye, bye_reply, invite, negative_ack, numbered, reply
from test_crash import LOCAL, RATE, RESENT, RatingApi

import harness
import hepbuild
import rating_agent_hep as agent

pytestmark = needs_redis

TIMES = int(os.environ.get("CHAOS", "1"))
TIMEOUT = 1.0
LEASE = TIMEOUT + agent.LEASE_MARGIN


class Spray:
    """Calls at a rate a second, each packet to an agent chosen at random, over UDP or TCP.

    The clock of the calls stands still between two runs. An ACK comes 50 ms after its 200, as over
    a network; sooner it might be appended first, and then a call begins with the ACK, as rule 7 has
    it for a mirror without replies.
    """

    def __init__(self, seed: int, rate: float = RATE) -> None:
        self.number = self.packets = self.again = 0
        self.calling = True
        self.ended: dict[str, tuple[float, float]] = {}
        self.refused: set[str] = set()
        self._rate = rate
        self._chance = random.Random(seed)
        self._due: list[tuple[float, int, bytes]] = []
        self._sent: deque[tuple[float, int, bytes]] = deque()
        self._base = time.time()
        self._clock = 0.0
        self._count = 0
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._tcp: dict[int, socket.socket] = {}

    @property
    def over(self) -> bool:
        return not self._due

    def run(self, agents: list[harness.AgentProcess], seconds: float) -> None:
        started, begun = time.monotonic(), self._clock
        while self._clock < begun + seconds:
            gevent.sleep(0.004)
            self._clock = begun + time.monotonic() - started
            while self.calling and self.number < self._clock * self._rate:
                self._call()
            self._due.sort()
            while self._due and self._due[0][0] <= self._clock:
                self._send(agents, self._due.pop(0)[2])
            while self._sent and self._sent[0][0] < self._clock - 2 * RESENT:
                self._sent.popleft()

    def dead(self, pid: int, others: list[harness.AgentProcess]) -> None:
        """Send once more, to others, what an agent was sent last."""
        if pid in self._tcp:
            self._tcp.pop(pid).close()
        again = [data for at, to, data in self._sent if to == pid and at > self._clock - RESENT]
        self.again += len(again)
        for data in again:
            self._send(others, data)

    def _send(self, agents: list[harness.AgentProcess], data: bytes) -> None:
        to = self._chance.choice(agents)
        self.packets += 1
        self._sent.append((self._clock, to.pid, data))
        if self._chance.random() < 0.5:
            self._udp.sendto(data, to.udp)
            return
        if to.pid not in self._tcp:
            self._tcp[to.pid] = socket.create_connection(to.tcp)
        self._tcp[to.pid].sendall(data)

    def _call(self) -> None:
        self.number += 1
        chance, number = self._chance, self.number
        start = self._clock
        answered = start + chance.choice((0.05, 0.3, 1.5))
        end = answered + chance.choice((0.1, 0.4, 1.0, 2.5))
        steps = [(start, invite()), (start + 0.02, reply(180))]
        tag = f"call-{number}@host"
        if chance.random() < 0.1:
            self.refused.add(tag)
            steps += [(answered, reply(486)), (answered + 0.05, negative_ack())]
        else:
            self.ended[tag] = (self._base + answered, self._base + end)
            steps += [(answered, reply(200)), (answered + 0.05, ack())]
            steps += [(end, bye()), (end + 0.05, bye_reply())]
        for when, payload in steps:
            stamp = round((self._base + when) * 1_000_000)
            # Tags of its own, by which no other call is tied to it.
            payload = numbered(payload, number).replace(b"tag=", f"tag=t{number:06}".encode())
            self._count += 1
            self._due.append((when, self._count, hepbuild.hep3(payload, time_us=stamp)))


class Several:
    """Agents, their Redis, their rating API and the calls; `finish` judges."""

    def __init__(self, folder: Path, seed: int, *redis: str, agents: int = 3) -> None:
        self.redis = RedisServer(folder / "redis", *redis)
        self.api = RatingApi()
        self.spray = Spray(seed)
        self.chance = random.Random(seed)
        self.lines: list[dict[str, Any]] = []
        self.options = [
            f"--cluster-url={self.redis.url}",
            f"--rating-api-url={self.api.url}",
            f"--rating-api-timeout={TIMEOUT}",
            "--shutdown-timeout=5",
            LOCAL,
        ]
        self.agents = [harness.AgentProcess(*self.options) for _ in range(agents)]
        self.all_owned()

    def all_owned(self) -> None:
        """Wait until each shard has an owner."""
        leases = [f"rating:lease:{number}" for number in range(64)]
        harness.wait_until(lambda: self.redis.ask("EXISTS", *leases) == ":64", "all are owned")

    def run(self, seconds: float) -> None:
        self.spray.run(self.agents, seconds)

    def end(self, number: int) -> None:
        """Stop one of the agents by a signal."""
        victim = self.agents.pop(self.chance.randrange(len(self.agents)))
        status = victim.stop(number)
        assert status == (0 if number == signal.SIGTERM else -number)
        self.lines += victim.lines
        if self.agents:
            self.spray.dead(victim.pid, self.agents)

    def add(self) -> None:
        self.agents.append(harness.AgentProcess(*self.options))

    # The faults, each with traffic before, during and after it.

    def kills(self) -> None:
        for _ in range(3 * TIMES):
            self.run(self.chance.uniform(0.5, 1.5 + TIMES / 5))
            self.end(signal.SIGKILL)
            self.add()

    def terms(self) -> None:
        for _ in range(2 * TIMES):
            self.run(self.chance.uniform(0.5, 1.5))
            self.end(signal.SIGTERM)
            self.add()

    def zombies(self) -> None:
        for _ in range(TIMES):
            self.run(1.0)
            zombie = self.agents.pop(0)
            zombie.kill(signal.SIGSTOP)
            self.spray.dead(zombie.pid, self.agents)
            self.run(LEASE + 2)
            self.all_owned()
            zombie.kill(signal.SIGCONT)
            harness.wait_until(lambda: zombie.events("shard_lost"), "it sees what it lost")
            self.agents.append(zombie)
            self.run(1.0)

    def changes(self) -> None:
        for _ in range(TIMES):
            self.run(0.5)
            self.add()
            self.run(2.5)
            newest = self.agents[-1]
            assert newest.events("shards_taken"), "the new one has its share"
            assert any(x.events("shards_given_back") for x in self.agents), "from the others"
            self.end(signal.SIGTERM)
            self.run(0.5)

    def redis_restarts(self) -> None:
        for _ in range(TIMES):
            self.run(1.0)
            self.redis.stop(signal.SIGKILL)
            self.run(1.5)
            self.redis.start()
            self.run(1.5)

    def api_faults(self) -> None:
        for mode in ["500", "close", "hang", "refuse", "dead", "busy"] if TIMES > 1 else ["close", "hang"]:
            self.run(0.5)
            self.api.change(mode)
            self.run(1.5)
            self.api.change("ok")

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
        self.redis.stop()
        api.close()
        assert api.faults == []
        assert api.running == {}
        assert set(api.records) == set(spray.ended)
        assert not spray.refused & set(api.records)
        for tag, (answered, end) in spray.ended.items():
            begin, finish = (json.loads(body) for body in api.records[tag])
            late = harness.seconds(begin["timestamp_begin"]) - answered
            longer = harness.seconds(finish["timestamp_end"]) - end
            assert max(abs(late), abs(longer)) < 0.002, f"{tag}: {late:.3f} {longer:.3f}"
        bad = [x for x in self.lines if x["level"] == "ERROR" or "internal" in x.get("event", "")]
        bad = [x for x in bad if x.get("event") != "redis_failed"]
        assert bad == []
        print(
            f"{spray.number} calls, {len(spray.ended)} answered, {spray.packets} packets, "
            f"{spray.again} sent again, {api.repeats} requests repeated"
        )


FAULTS = ["kills", "terms", "zombies", "changes", "redis_restarts", "api_faults"]


@pytest.mark.parametrize("faults", [[x] for x in FAULTS] + [FAULTS], ids=[*FAULTS, "all"])
def test_every_call_is_charged_once(faults: list[str], tmp_path: Path) -> None:
    if TIMES == 1 and faults != FAULTS and not os.environ.get("EACH"):
        pytest.skip("one at a time with CHAOS=2 or more; all of them in turn always")
    several = Several(tmp_path, len(faults), "appendonly yes", "appendfsync always")
    for name in faults:
        getattr(several, name)()
        print(f"{name}: {several.spray.number} calls")
    several.finish()
