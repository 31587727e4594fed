"""Kills, restarts and outages under load: an exact ledger at the end.

The agent is a process, the sockets are real, the rating API is a server that the test controls.
`make chaos` runs the same for longer: CHAOS=N multiplies the kills and restarts.

A mirror does not send again what it sent to a dead agent. What the agent had read in its last
10 ms, and what still lay in the socket's buffer, is gone with a kill -9; so that the ledger must be
exact all the same, the generator sends once more what it had sent before the kill: from RESENT
seconds before the agent had last read all on. Whatever was older has to be on disk, and what is
sent twice must not count twice.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

import harness
import rating_agent_hep as agent
from chaos import RatingApi, Traffic
from harness import LOCAL
from ratings import fill

TIMES = int(os.environ.get("CHAOS", "1"))


STARTED: list[harness.AgentProcess] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A test that fails leaves no agent behind."""
    yield
    while STARTED:
        STARTED.pop().__exit__()


class Chaos:
    """The three together; `finish` judges."""

    def __init__(self, folder: Path, seed: int, *options: str) -> None:
        self.api = RatingApi()
        self.traffic = Traffic(seed)
        self.folder = folder / "state"
        self.options = (
            f"--rating-api-url={self.api.url}",
            f"--state-dir={self.folder}",
            "--rating-api-timeout=1",
            LOCAL,
            *options,
        )
        self.lines: list[dict[str, Any]] = []

    def start(self) -> harness.AgentProcess:
        STARTED.append(harness.AgentProcess(*self.options))
        return STARTED[-1]

    def stop(self, process: harness.AgentProcess, number: int) -> int:
        status = process.stop(number)
        self.lines += process.lines
        return status

    def finish(self, process: harness.AgentProcess, seconds: float) -> None:
        """Let all calls end, wait for the last to be reported, stop the agent, and judge."""
        traffic, api = self.traffic, self.api
        traffic.calling = False
        while not traffic.over:
            traffic.run(process, 0.5)
        harness.wait_until(
            lambda: len(api.records) >= len(traffic.ended), "all calls are ended", seconds
        )
        assert self.stop(process, signal.SIGTERM) == 0
        api.close()
        traffic.judge(api)
        bad = [x for x in self.lines if x["level"] == "ERROR" or "internal" in x.get("event", "")]
        assert bad == []
        print(
            f"{traffic.number} calls, {len(traffic.ended)} answered, {traffic.packets} packets, "
            f"{api.repeats} requests repeated, answered by mode: {api.rude}"
        )


def test_kill_at_random_moments_under_load(tmp_path: Path) -> None:
    chaos, chance = Chaos(tmp_path, 1), random.Random(1)
    process = chaos.start()
    for _ in range(30 * TIMES):
        chaos.traffic.run(process, chance.uniform(0.1, 0.9))
        assert chaos.stop(process, signal.SIGKILL) == -signal.SIGKILL
        process = chaos.start()
    chaos.finish(process, 60)
    assert chaos.traffic.number > 900


# Seconds of each fault, under load, and the seconds of good answers between them.
FAULTS = {"refuse": 20.0, "500": 4.0, "hang": 5.0, "dead": 10.0, "close": 4.0, "busy": 4.0}
BETWEEN = 2.0


def test_an_api_with_every_fault_in_turn_under_load(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, 2)
    process = chaos.start()
    for mode, seconds in FAULTS.items():
        chaos.traffic.run(process, BETWEEN)
        chaos.api.change(mode)
        chaos.traffic.run(process, seconds)
        chaos.api.change("ok")
        known, deadline = len(chaos.api.records), time.monotonic() + 60
        while len(chaos.api.records) == known:
            assert time.monotonic() < deadline, f"no recovery from {mode}"
            chaos.traffic.run(process, 0.5)
    chaos.finish(process, 90)
    # A Retry-After stops all but what is under way at that moment.
    least = {mode: 1 if mode == "busy" else 3 for mode in FAULTS if mode != "refuse"}
    assert all(chaos.api.rude[mode] >= number for mode, number in least.items())


@pytest.mark.parametrize("mode", ["ok", "hang", "refuse"])
def test_sigterm_under_load_and_restart(mode: str, tmp_path: Path) -> None:
    timeout = 3.0
    chaos = Chaos(tmp_path, 3, f"--shutdown-timeout={timeout}")
    process = chaos.start()
    for _ in range(4 * TIMES):
        chaos.traffic.run(process, 1.0)
        chaos.api.change(mode)
        chaos.traffic.run(process, 0.3)
        started = time.monotonic()
        assert chaos.stop(process, signal.SIGTERM) == 0
        # The interpreter's own end comes on top.
        assert time.monotonic() - started < timeout + 1, "it takes longer than it may"
        chaos.api.change("ok")
        process = chaos.start()
    chaos.finish(process, 60)


def test_kill_during_outages(tmp_path: Path) -> None:
    """A kill while the API fails in each way, and the API back only after the restart."""
    chaos = Chaos(tmp_path, 4)
    process = chaos.start()
    for mode in [*FAULTS, "close", "hang"] * TIMES:
        chaos.traffic.run(process, 0.5)
        chaos.api.change(mode)
        chaos.traffic.run(process, 1.0)
        chaos.stop(process, signal.SIGKILL)
        process = chaos.start()
        chaos.traffic.run(process, 0.5)
        chaos.api.change("ok")
    chaos.finish(process, 90)


def test_a_torn_log_after_a_kill_is_told_of(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, 5)
    process = chaos.start()
    chaos.traffic.run(process, 1.0)
    chaos.stop(process, signal.SIGKILL)
    log = chaos.folder / (agent.JOURNAL_FILE + "-wal")
    os.truncate(log, log.stat().st_size - 1000)
    with chaos.start() as process:
        (line,) = process.events("journal_torn")
        assert line["level"] == "WARNING" and "octets" in line["message"]
        assert process.events("journal_opened")[0]["running"] > 0
        assert process.stop() == 0
    chaos.api.close()


def resident(pid: int) -> int:
    """Octets of memory that a process holds."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_thousand_waiting_events(tmp_path: Path) -> None:
    """They take no memory and little time to start with; those that are read go in order."""
    options = ["--rating-api-url=http://127.0.0.1:1", LOCAL]
    with harness.AgentProcess(*options, f"--state-dir={tmp_path / 'idle'}") as process:
        idle = resident(process.pid)
    folder = tmp_path / "state"
    journal = agent.Journal(str(folder))
    fill(journal, 50_000)
    assert journal.commit(60)
    journal.close(60)
    started = time.monotonic()
    with harness.AgentProcess(*options, f"--state-dir={folder}") as process:
        took = time.monotonic() - started
        harness.wait_until(lambda: process.events("journal_opened"), "it says what it has")
        assert process.events("journal_opened")[0]["waiting"] == 100_000
        harness.wait_until(lambda: process.events("api_down"), "the API is tried")
        gevent.sleep(1)
        grown = resident(process.pid) - idle
    print(f"start with 100,000 waiting events: {took:.2f} s, {grown / 1e6:.1f} MB over idle")
    assert took < 5
    assert grown < 60e6


def test_the_disk_runs_full_and_has_room_again(tmp_path: Path) -> None:
    """A limit of the kernel on the size of files stands in for a full disk: writing fails."""
    resource = pytest.importorskip("resource")
    chaos = Chaos(tmp_path, 6)
    with chaos.start() as process:
        chaos.traffic.run(process, 1.0)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        chaos.traffic.run(process, 1.0)
        harness.wait_until(lambda: process.events("journal_failed"), "it says so")
        line = process.events("journal_failed")[0]
        assert line["level"] == "ERROR" and "going on from memory" in line["message"]
        known = len(chaos.api.records)
        chaos.traffic.run(process, 1.0)
        assert len(chaos.api.records) > known, "calls are reported all the same"
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        harness.wait_until(lambda: process.events("journal_back"), "it returns by itself")
        chaos.stop(process, signal.SIGKILL)
        # What was in memory only is on disk by now.
        chaos.lines = [x for x in chaos.lines if x.get("event") != "journal_failed"]
        chaos.finish(chaos.start(), 60)
