"""Call records: one line for each call that is over, exactly once; nothing waits for their disk."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import pytest

import harness
import hepbuild
import rating_agent_hep as agent
from dialog import (
    FORWARDED,
    REFUSED_CALLS,
    START,
    WHOLE_CALLS,
    Scene,
    ack,
    bye,
    bye_reply,
    cancel,
    invite,
    negative_ack,
    numbered,
    reply,
)
from ratings import Server, answer

LOCAL = "sip.canyan.io"
OFFSET = 1_700_000_000.0  # UNIX time less the monotonic clock
REFUSED = [invite(), reply(180), reply(486), negative_ack()]
WHOLE = [invite(), reply(180), reply(200), ack(), bye(), bye_reply()]


# What a table says


class Recorded(Scene):
    """A scene with records; `save` and `restart` are what a journal and a restart do to it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.disk: dict[int, str] = {}
        self._start()

    def _start(self) -> None:
        table = agent.RecordedTable(self.settings, self.table.rules)
        table.restore(list(self.disk.items()), self.table.next_serial(), self.now, OFFSET)
        self.table: agent.RecordedTable = table
        self.records: list[agent.CallRecord] = getattr(self, "records", [])

    def save(self) -> None:
        for row, call in (self.table.changed or {}).items():
            self.disk.pop(row, None)
            if call is not None:
                self.disk[row] = agent.pack_call(call, OFFSET)
        self.table.changed = {}
        self.records += self.table.take_records()

    def restart(self) -> None:
        self.save()
        self._start()


def played(messages: list[bytes], restarts: bool, **options: Any) -> list[agent.CallRecord]:
    scene = Recorded(**options)
    for place, payload in enumerate(messages):
        scene.see(payload, at=place * 0.5)
        if restarts:
            scene.restart()
    scene.wait(700)
    scene.save()
    return [record._replace(row=0) for record in scene.records]


@pytest.mark.parametrize("name", [*WHOLE_CALLS, *REFUSED_CALLS])
def test_a_restart_after_each_message_changes_no_record(name: str) -> None:
    messages = {**WHOLE_CALLS, **REFUSED_CALLS}[name]
    once = played(messages, restarts=False)
    assert played(messages, restarts=True) == once
    assert [record.charged for record in once] == [name in WHOLE_CALLS]


@pytest.mark.parametrize(
    ("messages", "outcome", "status", "phrase"),
    [
        (WHOLE, agent.CHARGED, 200, "Reason"),
        (REFUSED, agent.REFUSED, 486, "Reason"),
        ([invite(), reply(180), cancel(), reply(487), negative_ack()], agent.CANCELLED, 487, "x"),
        ([invite(), reply(180)], agent.NOT_ANSWERED, 0, ""),
        ([bye(), bye_reply()], agent.MISSING, 0, ""),
    ],
)
def test_what_is_known_before_a_restart_is_in_the_record(
    messages: list[bytes], outcome: str, status: int, phrase: str
) -> None:
    (record,) = played(messages, restarts=True)
    assert (record.outcome, record.status) == (outcome, status)
    assert bool(record.phrase) == bool(phrase)
    if outcome != agent.MISSING:
        assert (record.source, record.invited) == ("sip:2000@sip.canyan.io", START)
        assert record.ringing == START + 500_000
    if outcome == agent.CHARGED:
        assert (record.begun_by, record.ended_by, record.hung_up) == ("answer", "bye", "caller")
        assert record.seconds == 1.0


@pytest.mark.parametrize("restarts", [False, True])
def test_a_call_without_replies_has_its_parties(restarts: bool) -> None:
    (record,) = played([invite(), ack(), bye()], restarts)
    assert (record.source, record.destination) == (
        "sip:2000@sip.canyan.io",
        "sip:2001@sip.canyan.io",
    )
    assert (record.invited, record.ringing, record.status) == (START, 0, 0)
    assert (record.begun_by, record.outcome) == ("ack", agent.CHARGED)


def test_a_nearer_reply_is_kept_although_it_is_no_new_fact() -> None:
    """A proxy turns the callee's 480 into a 486 for the caller; the table needs one of them."""
    messages = [invite(), invite(vias=FORWARDED), reply(480, vias=FORWARDED), reply(486)]
    (record,) = played(messages, restarts=True)
    assert record.status == 486


def test_a_plain_table_packs_a_call_as_small_as_before() -> None:
    scene = Scene()
    for payload in WHOLE[:4]:
        scene.see(payload)
    (call,) = next(scene.table.slices())
    assert call.told is None


# The journal


@pytest.fixture
def journals(tmp_path: Path) -> Iterator[Callable[..., agent.Journal]]:
    made: list[agent.Journal] = []

    def make(records: bool = True) -> agent.Journal:
        made.append(agent.Journal(str(tmp_path / "state"), records))
        return made[-1]

    yield make
    for journal in made:
        journal.close(harness.DEADLINE)


def event(kind: str, row: int, serial: int, attempts: int = 1) -> agent.RatingEvent:
    made = agent.RatingEvent(
        kind=kind,
        call_id=f"c{row}",
        tenant="default",
        transaction_tag=f"c{row}",
        account_tag="1",
        destination_account_tag="",
        time=START,
        reason="",
        api_url="http://127.0.0.1:1",
        body=b"{}",
        row=row,
        serial=serial,
    )
    made.attempts = attempts
    return made


def test_a_record_is_whole_when_its_end_waits_no_more(journals: Any) -> None:
    journal = journals()
    begin, end = event("begin", 1, 2, attempts=3), event("end", 1, 3)
    journal.put_event(begin)
    journal.put_event(end)
    journal.drop_event(begin)
    assert journal.commit()
    journal.put_record(1, '{"call_record":"a"}', charged=True)
    journal.put_record(4, '{"call_record":"b"}', charged=False)
    assert journal.commit()
    (free,) = journal.load_records(9)
    nothing = {"begin_attempts": None, "end_attempts": None, "delivery": None}
    assert free == (4, {"call_record": "b", **nothing})
    journal.close(9)
    journal = journals()
    assert journal.last_serial == 4, "no row of a record that waits is used again"
    journal.drop_event(end)
    assert journal.commit()
    done = {"begin_attempts": 3, "end_attempts": 1, "delivery": "delivered"}
    assert journal.load_records(9) == [(1, {"call_record": "a", **done}), free]
    assert journal.load_records(1) == [(1, {"call_record": "a", **done})]
    journal.drop_records([1, 4])
    assert journal.holds([4]) and journal.commit() and not journal.holds([4])
    assert journal.load_records(9) == []


@pytest.mark.parametrize("result", ["rejected", "lost"])
def test_a_begin_that_is_not_delivered_decides(result: str, journals: Any) -> None:
    journal = journals()
    begin, end = event("begin", 1, 2), event("end", 1, 3, attempts=0)
    journal.put_record(1, "{}", charged=True)
    if result == "lost":
        journal.drop_event(begin, agent.LOST)
        journal.drop_event(end)
    else:
        journal.reject_event(begin)
        journal.reject_event(end)
    assert journal.commit()
    ((_, fields),) = journal.load_records(9)
    assert fields == {"begin_attempts": 1, "end_attempts": 0, "delivery": result}


def test_what_is_noted_while_the_disk_fails_is_written_later(
    journals: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "JOURNAL_RETRY", 0.0)
    journal = journals()
    write, journal._write = journal._write, lambda *_: "disk I/O error"
    journal.put_record(1, '{"n":1}', charged=True)
    assert not journal.commit(harness.DEADLINE)
    journal.drop_event(event("end", 1, 2))
    assert not journal.commit(harness.DEADLINE) and journal.holds([1])
    journal._write = write
    assert journal.commit(harness.DEADLINE)
    ((row, fields),) = journal.load_records(9)
    assert (row, fields["n"], fields["end_attempts"]) == (1, 1, 1)


def test_records_are_bounded_in_memory_and_on_disk(
    journals: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_RECORDS_IN_MEMORY", 10)
    monkeypatch.setattr(agent, "MAX_RECORDS", 4)
    journal = journals()
    for row in range(1, 13):
        journal.put_record(row, "{}", charged=False)
    assert journal.records_lost == 2
    assert journal.commit()
    assert [row for row, _ in journal.load_records(99)] == list(range(3, 13))
    journal.trim_records()
    assert journal.records_lost == 8
    assert [row for row, _ in journal.load_records(99)] == [9, 10, 11, 12]


def test_without_records_nothing_of_them_is_written_and_leftovers_go(journals: Any) -> None:
    journal = journals(False)
    journal.drop_event(event("begin", 1, 2))
    assert journal._records == {}
    journal.close(9)
    journal = journals()
    journal.drop_event(event("begin", 7, 8))
    assert journal.commit()
    journal.close(9)
    # The call ended while no records were made.
    journal = journals()
    assert journal._db.execute("SELECT count(*) FROM call_records").fetchone() == (0,)


# The file


def line(name: str, text: str = "") -> tuple[str, bytes]:
    return name, json.dumps(
        {"call_record": name, "x": text}, separators=(",", ":")
    ).encode() + b"\n"


def names(path: Path) -> list[str]:
    return [json.loads(each)["call_record"] for each in path.read_text().splitlines()]


def test_a_line_that_was_cut_is_taken_away_and_the_last_lines_are_known(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = agent.RecordFile(str(path))
    assert file.write([line("a"), line("b"), line("c")]) == ""
    whole = path.read_bytes()
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        file = agent.RecordFile(str(path))
        assert path.read_bytes() == whole[: whole.rfind(b"\n", 0, size) + 1]
        assert file.write([line("a"), line("b"), line("c"), line("d")]) == ""
        assert names(path) == ["a", "b", "c", "d"]
        assert file.write([line("e")]) == ""


def test_as_many_lines_are_known_as_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "TAIL_READ", 100)
    lines = [line(str(number), "x" * random.randrange(300)) for number in range(1_200)]
    path = tmp_path / "records"
    assert agent.RecordFile(str(path)).write(lines) == ""
    again = lines[-agent.MAX_RECORDS_AT_ONCE :]
    assert agent.RecordFile(str(path)).write([*again, line("new")]) == ""
    assert names(path) == [*(name for name, _ in lines), "new"]


@pytest.mark.parametrize("octets", [b"{}\n", b"some other file", b"\n", b'{"call_recor_'])
def test_a_file_of_something_else_is_left_untouched(octets: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(octets)
    with pytest.raises(agent.ConfigError, match="call_records: .*something else.*allowed: "):
        agent.RecordFile(str(path))
    assert path.read_bytes() == octets


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing" / "file", Path("/dev/full")):
        with pytest.raises(agent.ConfigError, match="call_records: .*allowed: "):
            agent.RecordFile(str(path))


def test_a_disk_that_is_full_in_the_middle_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    file = agent.RecordFile(str(path))
    assert file.write([line("a")]) == ""
    write_all = agent._write_all

    def full(number: int, octets: bytes) -> None:
        write_all(number, octets[: len(octets) // 2 + 3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(agent, "_write_all", full)
    batch = [line("b"), line("c")]
    assert file.write(batch) == "No space left on device" == file.failure
    monkeypatch.setattr(agent, "_write_all", write_all)
    assert file.write([*batch, line("d")]) == "" == file.failure
    assert names(path) == ["a", "b", "c", "d"]


def test_a_path_is_opened_anew_when_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = agent.RecordFile(str(path))
    assert file.write([line("a")]) == ""
    path.rename(tmp_path / "records.1")
    assert file.write([line("b")]) == ""
    file.reopen()
    assert file.write([line("b"), line("c")]) == ""
    assert (names(tmp_path / "records.1"), names(path)) == (["a", "b"], ["c"])
    path.rename(tmp_path / "records.2")
    tmp_path.joinpath("records").mkdir()
    file.reopen()
    assert file.write([line("d")]) != ""
    tmp_path.joinpath("records").rmdir()
    assert file.write([line("d")]) == ""
    assert names(path) == ["d"]


# The agent


class Rig:
    """An agent without sockets, whose commits and records are made when the test says so."""

    def __init__(self, folder: Path, url: str, **options: Any) -> None:
        self.path = folder / "records"
        options.setdefault("reorder_window", 0.0)
        settings = agent.Settings(
            rating_api_url=url,
            state_dir=str(folder / "state"),
            call_records=str(self.path),
            sip_local_domains=(LOCAL,),
            **options,
        )
        self.records = agent.RecordFile(str(self.path))
        self.journal = agent.Journal(settings.state_dir, True)
        limiter = agent.WarningLimiter()
        rules = agent.load_rules(settings)
        self.agent = agent.Agent(settings, rules, limiter, self.journal, None, self.records)
        (self.shard,) = self.agent.shards

    def see(self, *payloads: bytes, number: int = 1) -> None:
        sender = self.agent.senders.of("127.0.0.1")
        for place, payload in enumerate(payloads):
            packet = hepbuild.hep3(numbered(payload, number), time_us=START + place * 500_000)
            self.agent.receive(packet, "udp", sender)

    def commit(self) -> None:
        assert self.agent.commit(harness.DEADLINE)

    def deliver(self) -> None:
        def done() -> bool:
            self.agent.tick()
            self.commit()
            return self.agent.waiting == 0

        harness.wait_until(done, "all is delivered")

    def end_of_ringing(self) -> None:
        """Time goes on until what failed is forgotten."""
        self.shard.expire(time.monotonic() + 700)
        self.commit()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(each) for each in self.path.read_text().splitlines()]

    def die(self) -> None:
        """As kill -9 leaves it, but for the file lock and the threads."""
        self.agent.delivery.kill()
        self.journal._pending.clear()
        self.journal.close(harness.DEADLINE)


@pytest.fixture
def rigs(tmp_path: Path, server: Server) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(tmp_path, server.url, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.die()


def test_the_lines_of_a_charged_and_of_a_refused_call(rigs: Any, server: Server) -> None:
    failing = [answer(503), answer(503)]
    ok = answer(200, {"ok": True})
    server.behave = lambda *_: failing.pop() if failing else ok
    rig = rigs()
    rig.see(*WHOLE)
    rig.see(*REFUSED, number=2)
    rig.commit()
    assert rig.shard.write_records() is False and rig.lines() == [], "its end was not answered yet"
    rig.deliver()
    rig.end_of_ringing()
    rig.shard.write_records()
    charged, refused = rig.lines()
    assert re.fullmatch(r"[0-9a-f]{16}", charged.pop("call_record"))
    assert charged == {
        "call_id": "call-1@host",
        "from_tag": "c",
        "to_tag": "s",
        "tenant": "default",
        "route": "main",
        "transaction_tag": "call-1@host",
        "account_tag": "2000",
        "destination_account_tag": "2001",
        "source": "sip:2000@sip.canyan.io",
        "source_ip": charged["source_ip"],
        "destination": "sip:2001@sip.canyan.io",
        "sender": "127.0.0.1",
        "capture_id": 0,
        "invited": agent.rfc3339(START),
        "ringing": agent.rfc3339(START + 500_000),
        "answered": agent.rfc3339(START + 1_000_000),
        "ended": agent.rfc3339(START + 2_000_000),
        "seconds": 1.0,
        "status": 200,
        "reason": charged["reason"],
        "begun_by": "answer",
        "ended_by": "bye",
        "hung_up": "caller",
        "charged": True,
        "outcome": "charged",
        "begin_attempts": 3,
        "end_attempts": 1,
        "delivery": "delivered",
    }
    assert charged["source_ip"] and charged["reason"]
    shown = {name: refused[name] for name in ("answered", "ended", "seconds", "charged", "outcome")}
    assert list(shown.values()) == [None, None, 0.0, False, "refused"]
    assert (refused["status"], refused["delivery"], refused["end_attempts"]) == (486, None, None)
    assert rig.agent.metrics.totals["records.written"] == 2


@pytest.mark.parametrize("committed", [False, True])
def test_an_agent_that_dies_behind_the_writing_writes_nothing_twice(
    committed: bool, rigs: Any
) -> None:
    rig = rigs()
    for number in range(1, 6):
        rig.see(*WHOLE, number=number)
    rig.deliver()
    rig.shard.write_records()
    if committed:
        rig.commit()
    else:
        rig.journal._records.clear()
    before = rig.path.read_bytes()
    rig.die()
    # The file system may have lost the end of the last write with a power cut before its fsync.
    if not committed:
        rig.path.write_bytes(before[: len(before) * 2 // 3])
    rig = rigs()
    rig.shard.write_records()
    rig.commit()
    assert sorted(x["call_id"] for x in rig.lines()) == [f"call-{n}@host" for n in range(1, 6)]
    assert rig.path.read_bytes() == before
    assert rig.journal.load_records(9) == []


def test_no_record_is_written_before_the_call_has_left_the_journal(rigs: Any) -> None:
    """Else the call would come back with a restart, and make another record."""
    rig = rigs()
    rig.see(*REFUSED)
    rig.commit()
    rig.shard.expire(time.monotonic() + 700)
    assert rig.shard.write_records() is False and rig.lines() == []
    rig.die()
    rig = rigs()
    rig.end_of_ringing()
    rig.shard.write_records()
    assert [x["call_id"] for x in rig.lines()] == ["call-1@host"]


def test_the_next_records_wait_until_the_journal_knows_of_the_last(
    rigs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_RECORDS_AT_ONCE", 2)
    rig = rigs()
    for number in range(1, 6):
        rig.see(*WHOLE, number=number)
    rig.deliver()
    for count in (2, 4, 5):
        rig.shard.write_records()
        rig.shard.write_records()
        assert len(rig.lines()) == count
        rig.commit()
    assert len({x["call_id"] for x in rig.lines()}) == 5
    assert rig.agent.metrics.totals["records.written"] == 5


def test_a_file_that_fails_is_told_counted_and_written_later(
    rigs: Any, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_RECORDS", 3)
    rig = rigs()
    for number in range(1, 6):
        rig.see(*WHOLE, number=number)
    rig.deliver()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(agent, "_write_all", full)
        assert rig.shard.write_records() is False and rig.shard.write_records() is False
    rig.shard.write_records()
    rig.commit()
    assert [x["call_id"] for x in rig.lines()] == ["call-3@host", "call-4@host", "call-5@host"]
    totals = rig.agent.metrics.totals
    assert (totals["records.errors"], totals["records.lost"], totals["records.written"]) == (
        2,
        2,
        3,
    )
    told = [x["event"] for x in log()]
    assert told.count("records_failed") == 2 and told.count("records_back") == 1
    assert told.count("records_lost") == 1


def test_the_event_loop_does_not_wait_for_a_file_that_hangs(
    rigs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = gevent.monkey.get_original("threading", "Event")()
    write_all = agent._write_all

    def hang(file: int, octets: bytes) -> None:
        gone.wait(harness.DEADLINE)
        write_all(file, octets)

    rig = rigs()
    rig.see(*WHOLE)
    rig.deliver()
    monkeypatch.setattr(agent, "_write_all", hang)
    writer = gevent.spawn(rig.shard.write_records)
    rig.see(*WHOLE, number=2)
    rig.deliver()
    assert not writer.ready() and rig.lines() == []
    gone.set()
    writer.join(harness.DEADLINE)
    assert [x["call_id"] for x in rig.lines()] == ["call-1@host"]


def test_the_option_needs_a_journal(tmp_path: Path) -> None:
    with pytest.raises(agent.ConfigError, match="call_records: without a state_dir; allowed: "):
        agent.load_configuration(["--call-records=-"], {})
    argv = ["--call-records=-", f"--state-dir={tmp_path}"]
    assert agent.load_configuration(argv, {}).settings.call_records == "-"


# The process


def options(tmp_path: Path, url: str, file: str) -> list[str]:
    return [
        f"--rating-api-url={url}",
        f"--state-dir={tmp_path / 'state'}",
        f"--call-records={file}",
        f"--sip-local-domains={LOCAL}",
        "--reorder-window=0",
    ]


def packets(number: int, messages: list[bytes]) -> list[bytes]:
    return [
        hepbuild.hep3(numbered(payload, number), time_us=START + place * 1_000)
        for place, payload in enumerate(messages)
    ]


def test_exactly_one_line_for_each_call_whenever_the_agent_is_killed(tmp_path: Path) -> None:
    path, chance = tmp_path / "records", random.Random(5)
    calls = range(1, 301)
    with harness.RatingServer() as api:
        for first in range(1, 301, 60):
            with harness.AgentProcess(*options(tmp_path, api.url, str(path))) as process:
                for number in range(first, first + 60):
                    harness.send_udp(process.udp, packets(number, WHOLE))
                gevent.sleep(chance.random())
                assert process.stop(signal.SIGKILL) == -signal.SIGKILL
        with harness.AgentProcess(*options(tmp_path, api.url, str(path))) as process:
            # What was on its way to a dead agent is sent again; what was taken in is a copy.
            for number in calls:
                harness.send_udp(process.udp, packets(number, WHOLE))
                if number % 20 == 0:
                    gevent.sleep(0.05)
            harness.wait_until(lambda: path.read_bytes().count(b"\n") >= len(calls), "all is there")
            assert process.stop() == 0
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    assert sorted(x["call_id"] for x in lines) == sorted(f"call-{n}@host" for n in calls)
    assert len({x["call_record"] for x in lines}) == len(calls)
    assert {x["outcome"] for x in lines} == {"charged"}


def test_a_file_that_is_moved_away_and_a_stop_that_writes_what_is_whole(tmp_path: Path) -> None:
    path, moved = tmp_path / "records", tmp_path / "records.1"
    with (
        harness.RatingServer() as api,
        harness.AgentProcess(*options(tmp_path, api.url, str(path))) as process,
    ):
        harness.send_udp(process.udp, packets(1, WHOLE))
        harness.wait_until(lambda: path.stat().st_size, "the first call is there")
        path.rename(moved)
        process.kill(signal.SIGHUP)
        harness.wait_until(lambda: process.events("reloaded"), "it has heard")
        harness.send_udp(process.udp, packets(2, WHOLE))
        harness.wait_until(lambda: len(api.requests) == 4, "the second call is charged")
        assert process.stop() == 0
        ids = [json.loads(x.read_text())["call_id"] for x in (moved, path)]
    assert ids == ["call-1@host", "call-2@host"]


def test_records_on_the_standard_output_are_lines_between_those_of_the_log(tmp_path: Path) -> None:
    with (
        harness.RatingServer() as api,
        harness.AgentProcess(*options(tmp_path, api.url, "-")) as process,
    ):
        for number in range(1, 4):
            harness.send_udp(process.udp, packets(number, WHOLE))
        harness.wait_until(lambda: len(api.requests) == 6, "the calls are charged")
        assert process.stop() == 0
        found = [x["call_id"] for x in process.lines if "call_record" in x]
    assert sorted(found) == [f"call-{number}@host" for number in range(1, 4)]


def test_the_page_names_each_field() -> None:
    page = (harness.ROOT / "docs" / "call-records.md").read_text(encoding="utf-8")
    (record,) = played(WHOLE, restarts=False)
    fields = ["call_record", *agent.record_fields(record)]
    fields += ["begin_attempts", "end_attempts", "delivery"]
    table = page.partition("| field |")[2].partition("| outcome |")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == fields
    for outcome in agent.OUTCOMES:
        assert f"`{outcome}`" in page
    assert f"{agent.MAX_RECORDS:,} " in page and f"{agent.MAX_RECORDS_IN_MEMORY:,} " in page
