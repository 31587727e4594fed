"""The journal: what is put away and taken back, files that are refused, disks that fail."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
import hepbuild
import rating_agent_hep as agent
from dialog import (
    REFUSED_CALLS,
    WHOLE_CALLS,
    Scene,
    ack,
    bye,
    bye_reply,
    in_dialog,
    invite,
    numbered,
    reply,
)
from hep_replay import frames, read_capture
from ratings import Server, event, fill

OFFSET = 1_700_000_000.0  # UNIX time less the monotonic clock


# What a call table gives away, and takes back


class Restarting(Scene):
    """A scene whose agent may die after any step; `disk` is what a journal would have by then."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.disk: dict[int, str] = {}
        self.table.changed = {}

    def save(self) -> None:
        assert self.table.changed is not None
        for row, call in self.table.changed.items():
            self.disk.pop(row, None)
            if call is not None:
                self.disk[row] = agent.pack_call(call, OFFSET)
        self.table.changed = {}

    def restart(self, down: float = 0.0) -> None:
        self.save()
        # The monotonic clock starts anew with the machine.
        self.now += down
        table = agent.CallTable(self.settings, self.table.rules)
        serial = self.table.next_serial()
        table.restore(list(self.disk.items()), serial, self.now, OFFSET)
        self.table = table
        self.save()

    def _note(self, events: list[agent.RatingEvent]) -> list[str]:
        self.save()
        return super()._note(events)


def play(messages: list[tuple[int, bytes]], restarts: set[int], **options: Any) -> Restarting:
    scene = Restarting(**options)
    for index, (place, payload) in enumerate(messages):
        scene.see(payload, at=place * 0.01)
        if index in restarts:
            scene.restart()
    scene.wait(40)
    return scene


@pytest.mark.parametrize("name", WHOLE_CALLS)
def test_a_restart_after_each_message_of_any_order_changes_nothing(name: str) -> None:
    messages = list(enumerate(WHOLE_CALLS[name]))
    chance = random.Random(name)
    for _ in range(60):
        chance.shuffle(messages)
        doubled = [message for message in messages for _ in range(chance.choice((1, 1, 2)))]
        for restarts in ({chance.randrange(len(doubled))}, set(range(len(doubled)))):
            scene = play(doubled, restarts)
            assert [event.kind for event in scene.events] == ["begin", "end"]


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_no_restart_makes_a_refused_call_begin(name: str) -> None:
    messages = list(enumerate(REFUSED_CALLS[name]))
    chance = random.Random(name)
    for _ in range(60):
        chance.shuffle(messages)
        assert play(messages, set(range(len(messages)))).events == []


def test_an_earlier_ack_is_kept_over_a_restart() -> None:
    """It is no evidence by itself, and yet begins the call once the INVITE comes."""
    messages = [(6, reply(200)), (7, ack()), (5, ack()), (0, invite())]
    for restarts in (set(), {0, 1, 2}):
        scene = play(messages, restarts, begin_on="ack")
        assert [event.kind for event in scene.events] == ["begin"]
        assert scene.seconds() == 0.05


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_with_restarts_whatever_comes_is_what_came_without(data: st.DataObject) -> None:
    messages = data.draw(st.sampled_from([*WHOLE_CALLS.values(), *REFUSED_CALLS.values()]))
    picked = data.draw(st.lists(st.sampled_from(list(enumerate(messages))), max_size=20))
    restarts = data.draw(st.sets(st.integers(0, 20)))
    begin_on = data.draw(st.sampled_from(["answer", "ack"]))
    plain = play(picked, set(), begin_on=begin_on)
    broken = play(picked, restarts, begin_on=begin_on)
    assert [(x.kind, x.body) for x in broken.events] == [(x.kind, x.body) for x in plain.events]


def test_captures_with_a_restart_after_each_message() -> None:
    """The events are the same to the octet, whatever the restarts."""
    folder = harness.captures_folder()
    names = [name for name in harness.expected(folder) if "burst" not in name]
    assert len(names) > 50
    for name in names:
        told = []
        for restarting in (False, True):
            scene = Restarting()
            for _, frame in frames(read_capture(str(folder / name))):
                packet = agent.decode_hep(frame, 0)
                if packet.protocol_type != 1:
                    continue
                try:
                    message = agent.parse_sip(packet.payload, packet.time)
                except agent.SipError:
                    continue
                if message is not None:
                    sighting = agent.Sighting(packet, message)
                    scene._note(scene.table.handle(sighting, scene.now))
                    if restarting:
                        scene.restart()
            scene.wait(40)
            told.append([(x.kind, x.body) for x in scene.events])
        assert told[0] == told[1], name


def test_what_a_restart_takes_back_is_what_was_put_away() -> None:
    scene = Restarting(routes="- {name: a, tenant: t, tags: [x], account_match: '(.*)'}\n")
    scene.see(invite())
    scene.see(reply(180))
    scene.see(bye())
    scene.see(ack())
    scene.save()
    before = dict(scene.disk)
    scene.restart()
    assert scene.disk == before, "nothing has changed by it"
    (call,) = (call for calls in scene.table._calls.values() for call in calls)
    (text,) = before.values()
    assert json.loads(agent.pack_call(call, OFFSET)) == json.loads(text)
    assert call.shown is not None
    assert call.shown.route.account_match is not None and call.shown.route.tags == ("x",)


def test_running_calls_go_on_with_what_is_left_of_their_time() -> None:
    scene = Restarting(max_call_duration=100.0, invite_timeout=50.0)
    scene.see(invite())
    scene.see(reply(200))
    scene.wait(60)
    scene.restart(down=30)
    assert scene.wait(9.9) == []
    assert scene.wait(0.2) == ["end"]
    assert (scene.events[-1].reason, scene.seconds()) == ("deadline", 100.0)


@pytest.mark.parametrize(("how", "when"), [("deadline", 100.0), ("last-seen", 7.0)])
def test_a_deadline_that_passed_meanwhile_ends_the_call_as_configured(
    how: str, when: float
) -> None:
    scene = Restarting(max_call_duration=100.0, expired_call_end=how)
    scene.see(invite())
    scene.see(reply(200))
    scene.wait(7)
    scene.see(in_dialog("INVITE"))
    scene.restart(down=5000)
    assert scene.wait(0.1) == ["end"]
    assert scene.seconds() == when
    scene.restart()
    assert scene.wait(100) == [], "nor is it ended twice"


def test_a_session_timer_gets_a_new_interval_for_refreshes_may_have_been_missed() -> None:
    scene = Restarting()
    scene.see(invite())
    scene.see(reply(200, headers=[("Session-Expires", "100;refresher=uac")]))
    scene.restart(down=500)
    assert scene.wait(100 + agent.SESSION_GRACE - 1) == []
    assert scene.wait(3) == ["end"]
    assert (scene.events[-1].reason, scene.seconds()) == ("session", 100.0)


def test_ended_calls_are_remembered_and_then_leave_the_disk() -> None:
    scene = Restarting()
    copies = [(invite(), 0), (reply(200), 1), (bye(), 2), (bye_reply(), 2)]
    for payload, at in copies:
        scene.see(payload, at=at)
    scene.wait(3)
    scene.restart(down=agent.REMEMBERED - 10)
    for payload, at in copies:
        assert scene.see(payload, at=at) == [], "a whole copy that comes late begins nothing"
    scene.restart(down=11)
    scene.wait(1)
    assert scene.disk == {} and len(scene.table) == 0


def test_a_clock_that_was_set_back_keeps_no_call_longer() -> None:
    scene = Restarting(max_call_duration=100.0)
    scene.see(invite())
    scene.see(reply(200))
    scene.save()
    table = agent.CallTable(scene.settings, scene.table.rules)
    table.restore(scene.disk.items(), 100, 5.0, OFFSET)
    assert [event.kind for event in table.expire(105.0)] == ["end"]


def test_tied_legs_stay_tied() -> None:
    routes = "- {name: sbc, transaction_tag: 'header:X-Leg'}\n"
    leg = [("X-Leg", "one")]
    other = [m.replace(b"call-1@", b"call-2@") for m in (invite(headers=leg), reply(200), bye())]
    scene = Restarting(routes=routes)
    scene.see(invite(headers=leg))
    scene.see(reply(200))
    scene.restart()
    for payload in other[:2]:
        assert scene.see(payload) == []
    scene.restart()
    scene.wait(3)
    scene.see(bye())
    scene.restart()
    assert scene.see(bye_reply()) == ["end"]


# The file


@pytest.fixture
def journals(tmp_path: Path) -> Iterator[Callable[..., agent.Journal]]:
    made: list[agent.Journal] = []

    def make(folder: Path = tmp_path / "state") -> agent.Journal:
        made.append(agent.Journal(str(folder)))
        return made[-1]

    yield make
    for journal in made:
        journal.close(harness.DEADLINE)


def rows(folder: Path, table: str = "calls") -> list[tuple[Any, ...]]:
    db = sqlite3.connect(folder / agent.JOURNAL_FILE)
    try:
        return db.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        db.close()


def test_events_come_back_in_order_and_leave_when_answered(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    fill(journal, 3)
    assert journal.commit()
    journal.close(9)
    journal = journals()
    assert journal.count_events() == {"http://127.0.0.1:1": 6} and journal.last_serial == 9
    url = "http://127.0.0.1:1"
    loaded = journal.load_events(url, 0, 100)
    assert [x.serial for x in loaded] == [2, 3, 5, 6, 8, 9]
    assert [x.serial for x in journal.load_events(url, 3, 2)] == [5, 6]
    assert journal.load_events("http://127.0.0.1:2", 0, 100) == []
    assert loaded[1].body == event("end", "c0").body and loaded[1].unknown
    loaded[0].attempts, loaded[0].answer = 3, "status 503"
    journal.put_attempt(loaded[0])
    assert journal.commit()
    begin, end = journal.load_events(url, 0, 2)
    assert (begin.attempts, begin.answer) == (3, "status 503")
    assert (end.attempts, end.answer) == (0, ""), "attempts are of the event that goes next"
    for each in loaded:
        journal.drop_event(each)
    assert journal.commit()
    assert rows(tmp_path / "state") == []


def test_a_call_that_came_and_went_is_not_written(journals: Any) -> None:
    journal = journals()
    journal.put_call(1, '{"a":1}')
    journal.drop_call(1)
    assert journal._pending == {}
    assert journal.commit()


def test_rejected_events_are_kept_until_they_are_taken_up(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    fill(journal, 1)
    begin, end = event("begin", "c0", row=1, serial=2), event("end", "c0", row=1, serial=3)
    begin.answer = "status 422"
    journal.put_call(1, '{"running":true}')
    journal.reject_event(begin)
    assert journal.commit()
    assert journal.load_given_up() == [begin.key]
    journal.reject_event(end)
    assert journal.commit()
    assert journal.count_rejected() == 2 and journal.load_retries() == []
    db = sqlite3.connect(tmp_path / "state" / agent.JOURNAL_FILE, isolation_level=None)
    db.execute("UPDATE rejected SET retry = 1")
    db.close()
    again = journal.load_retries()
    assert [(x.kind, x.answer) for x in again] == [("begin", "status 422"), ("end", "")]
    for serial, each in enumerate(again, 10):
        journal.retry_event(each, serial)
    assert journal.commit()
    assert journal.load_retries() == [] and journal.load_given_up() == []
    assert [x.serial for x in journal.load_events(begin.api_url, 0, 9)] == [10, 11]


def test_rejected_events_are_bounded(journals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_REJECTED", 10)
    journal = journals()
    for serial in range(1, 101):
        journal.reject_event(event("end", str(serial), row=serial, serial=serial))
        if serial % 7 == 0:
            assert journal.commit()
    assert journal.commit()
    assert journal.count_rejected() == 10


def test_large_groups_are_written_in_pieces(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    fill(journal, 3 * agent.JOURNAL_GROUP + 1)
    written: list[int] = []
    write = journal._write
    width = 1 + len(agent._COLUMNS)

    def note(values: list[Any], *texts: str) -> Any:
        written.append(sum(row is not None for row in values[::width]))
        return write(values, *texts)

    journal._write = note
    assert journal.commit()
    assert max(written) == agent.JOURNAL_GROUP and sum(written) == 3 * agent.JOURNAL_GROUP + 1
    assert len(rows(tmp_path / "state")) == 3 * agent.JOURNAL_GROUP + 1


# Files and folders that are refused


def refused(folder: Path) -> str:
    """Both the start and `check` refuse it, with one line, and touch nothing."""
    path = folder / agent.JOURNAL_FILE
    before = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
    messages = []
    for refuse in (agent.Journal, agent.inspect_journal):
        with pytest.raises(agent.ConfigError) as caught:
            refuse(str(folder))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and messages[0].isprintable()
    assert messages[0].startswith("state_dir: ") and "allowed: " in messages[0]
    assert before == (hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return messages[0]


def test_a_folder_that_is_a_file_or_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(tmp_path / "file")
    assert "cannot be made" in refused(tmp_path / "no" / "such")


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so that the system's answer is put in its place."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert "not writable" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 200, "sqlite"])
def test_a_file_of_another_program(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / agent.JOURNAL_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE calls (id)")
        db.close()
    assert "another program" in refused(tmp_path)


def test_a_file_of_a_newer_version(journals: Any, tmp_path: Path) -> None:
    journals().close(9)
    db = sqlite3.connect(tmp_path / "state" / agent.JOURNAL_FILE)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA user_version = 99")
    db.close()
    assert "version 99" in refused(tmp_path / "state")


def test_a_damaged_file(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    fill(journal, 300)
    assert journal.commit()
    journal.close(9)
    path = tmp_path / "state" / agent.JOURNAL_FILE
    content = bytearray(path.read_bytes())
    for start in range(4096 * 3, len(content), 4096 * 2):
        content[start : start + 200] = os.urandom(200)
    path.write_bytes(content)
    assert "damaged" in refused(tmp_path / "state")
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in refused(tmp_path / "state")


def test_a_second_agent(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    with pytest.raises(agent.ConfigError, match=f"in use by another agent, process {os.getpid()}"):
        agent.Journal(str(tmp_path / "state"))
    agent.inspect_journal(str(tmp_path / "state"))  # `check` is no second agent
    fill(journal, 1)
    assert journal.commit()


def test_no_room_for_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(agent.Journal, "_create", staticmethod(full))
    with pytest.raises(agent.ConfigError, match=r"state_dir: .*disk is full; allowed: "):
        agent.Journal(str(tmp_path / "state"))
    monkeypatch.undo()
    agent.Journal(str(tmp_path / "state")).close(9)


def test_a_half_made_file_is_none(tmp_path: Path) -> None:
    (tmp_path / (agent.JOURNAL_FILE + ".new")).write_bytes(b"half")
    agent.Journal(str(tmp_path)).close(9)
    assert oct((tmp_path / agent.JOURNAL_FILE).stat().st_mode)[-3:] == "600"


# Versions


@pytest.mark.parametrize(("version", "writer"), [(3, "an earlier tree"), (5, "a newer agent")])
def test_a_file_of_another_version_is_left_untouched(
    version: int, writer: str, tmp_path: Path, journals: Any
) -> None:
    """Versions 1 to 3 were of trees before the first release."""
    journals().close(9)
    path = tmp_path / "state" / agent.JOURNAL_FILE
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    expected = f"version {version}, written by {writer}, left untouched; allowed: version 4"
    assert expected in refused(tmp_path / "state")
    assert path.read_bytes() == before


# A write-ahead log that was cut


def torn_journal(folder: Path) -> tuple[bytes, bytes, list[int]]:
    """A file, its log as a kill leaves it, and where in the log each of 40 commits ended."""
    journal = agent.Journal(str(folder))
    path = folder / agent.JOURNAL_FILE
    ends = []
    for number in range(40):
        journal.put_event(event("begin", f"c{number}", row=number + 1, serial=number + 1))
        assert journal.commit()
        ends.append((folder / (agent.JOURNAL_FILE + "-wal")).stat().st_size)
    found = path.read_bytes(), (folder / (agent.JOURNAL_FILE + "-wal")).read_bytes(), ends
    journal.close(9)
    return found


def test_a_torn_log_loses_nothing_that_was_committed_before_the_tear(tmp_path: Path) -> None:
    main, log, ends = torn_journal(tmp_path / "whole")
    chance = random.Random(3)
    cuts = [(chance.randrange(len(log)), False) for _ in range(25)]
    cuts += [(ends[-1], True), (ends[20], True), (ends[0], False), (20, False), (len(log), False)]
    for number, (length, zero) in enumerate(cuts):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / agent.JOURNAL_FILE).write_bytes(main)
        torn = log[:length]
        if zero:
            torn = torn[:-4096] + bytes(4096)
        (folder / (agent.JOURNAL_FILE + "-wal")).write_bytes(torn)
        journal = agent.Journal(str(folder))
        left = [x.serial for x in journal.load_events("http://127.0.0.1:1", 0, 1000)]
        expected = sum(end <= length for end in ends)
        if zero:
            expected -= 1
        assert left == list(range(1, expected + 1)), (length, zero)
        whole = length in ends and not zero
        assert bool(journal.torn) is not whole, (length, zero, journal.torn)
        journal.close(9)


# Disks that fail


@pytest.fixture
def agents(journals: Any) -> Iterator[Callable[..., agent.Agent]]:
    """Makes agents that have no listeners, with the greenlets that `run` gives them."""
    made: list[tuple[agent.Agent, list[gevent.Greenlet]]] = []

    def make(journal: agent.Journal | None, url: str, **options: Any) -> agent.Agent:
        options = {"rating_api_url": url, "rating_api_timeout": 1.0, "reorder_window": 0} | options
        chosen = agent.Settings(sip_local_domains=("sip.canyan.io",), **options)
        rules = agent.load_rules(chosen)
        new = agent.Agent(chosen, rules, agent.WarningLimiter(), journal)

        def tick() -> None:
            while True:
                gevent.sleep(0.02)
                new.tick()

        jobs = [gevent.spawn(tick)]
        if journal:
            jobs.append(gevent.spawn(new.shards[0].commit_forever))
        made.append((new, jobs))
        return new

    yield make
    for new, jobs in made:
        new.delivery.kill()
        gevent.killall(jobs)


def packets(*numbers: int) -> Iterator[bytes]:
    for number in numbers:
        for payload in (invite(), reply(200), ack(), bye(), bye_reply()):
            yield hepbuild.hep3(numbered(payload, number))


def feed(to: agent.Agent, *numbers: int) -> None:
    for packet in packets(*numbers):
        to.receive(packet, "udp", to.senders.of("127.0.0.1"))


def slow(seconds: float, write: Any) -> Any:
    """A disk that takes its time, in the thread: the real sleep, not gevent's."""
    sleep = gevent.monkey.get_original("time", "sleep")

    def wait(*texts: str) -> Any:
        sleep(seconds)
        return write(*texts)

    return wait


def test_the_loop_never_waits_for_a_slow_disk(journals: Any, agents: Any, server: Server) -> None:
    journal = journals()
    journal._write = slow(1.0, journal._write)
    on = agents(journal, server.url)
    longest, last = 0.0, time.monotonic()
    started = last
    number = 0
    while time.monotonic() - started < 2.0 or len(server.requests) < 20:
        number += 1
        if number <= 100:
            feed(on, number)
        gevent.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert last - started < harness.DEADLINE
    assert longest < 0.5, f"the loop stood still for {longest:.3f} s"
    assert server.requests, "what is on disk is delivered"


def test_what_is_put_down_in_steps_is_never_newer_than_its_events(
    journals: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls go on while they are put down: none may be over on disk without its end."""
    monkeypatch.setattr(agent, "STORE_STEP", 3)
    chosen = agent.Settings(
        sip_local_domains=("sip.canyan.io",), rating_api_url=server.url, reorder_window=0
    )
    limiter = agent.WarningLimiter()
    on = agent.Agent(chosen, agent.load_rules(chosen), limiter, journals())
    sender = on.senders.of("127.0.0.1")
    numbers = range(1, 41)
    for payload in (invite(), reply(200), ack()):
        for number in numbers:
            on.receive(hepbuild.hep3(numbered(payload, number)), "udp", sender)
    ended = iter(numbers)

    def end_some() -> None:
        for number in ended:
            for payload in (bye(), bye_reply()):
                on.receive(hepbuild.hep3(numbered(payload, number)), "udp", sender)
            gevent.sleep(0)
            if number == 20:
                return

    ending = gevent.spawn(end_some)
    assert on.commit()
    over = 0
    kept = [row[2:7] for row in rows(tmp_path / "state")]
    for call, begin, begin_serial, end, end_serial in kept:
        assert begin and begin_serial
        state = agent.unpack_call(1, call, OFFSET, {}).state
        assert (state == agent.ENDED) == bool(end and end_serial), state
        over += state == agent.ENDED
    assert 0 < over <= 20, "some ended between two steps"
    ending.join()
    assert on.commit()
    on.delivery.kill()


def test_nothing_is_delivered_before_it_is_on_disk(
    journals: Any, agents: Any, server: Server
) -> None:
    journal = journals()
    write, opened = journal._write, []

    def wait(*texts: str) -> Any:
        while not opened:
            gevent.monkey.get_original("time", "sleep")(0.01)
        return write(*texts)

    journal._write = wait
    on = agents(journal, server.url)
    feed(on, 1)
    gevent.sleep(0.3)
    assert server.requests == []
    opened.append(True)
    harness.wait_until(lambda: len(server.requests) == 2, "both are sent then")


def test_the_end_is_not_sent_before_its_begins_answer_is_on_disk(
    journals: Any, agents: Any, server: Server, tmp_path: Path
) -> None:
    """Begun again after its end, which a crash in between would bring, a call is charged twice."""
    journal = journals()
    on = agents(journal, server.url)
    seen: list[Any] = []

    def behave(_: Any, request: Any) -> bytes:
        if "end_transaction" in request.path:
            seen.extend(row[4] for row in rows(tmp_path / "state"))
        return b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'

    server.behave = behave
    feed(on, 1)
    harness.wait_until(lambda: len(seen) == 1, "the call has ended")
    assert seen == [0], "the begin waits no more"


def test_tcp_is_not_read_while_the_journal_is_far_behind(
    journals: Any, agents: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_UNWRITTEN", 50)
    journal, closed = journals(), [True]
    write = journal._write

    def wait(*texts: str) -> Any:
        while closed:
            gevent.monkey.get_original("time", "sleep")(0.01)
        return write(*texts)

    journal._write = wait
    on = agents(journal, server.url)
    tcp = agent.TcpServer(agent.bind("127.0.0.1:0", socket.SOCK_STREAM), on)
    tcp.start()
    with socket.create_connection(tcp.socket.getsockname()) as sock:
        sender = gevent.spawn(lambda: [sock.sendall(packet) for packet in packets(*range(5_000))])
        harness.wait_until(lambda: on.behind, "the journal is behind")
        gevent.sleep(0.2)
        read = on.metrics.totals["packets.received.tcp"]
        gevent.sleep(0.2)
        assert on.metrics.totals["packets.received.tcp"] == read < 5_000
        closed.clear()
        sender.get(timeout=harness.DEADLINE)
        harness.wait_until(
            lambda: on.metrics.totals["packets.received.tcp"] == 25_000, "all is read in the end"
        )
    tcp.stop()


@pytest.mark.parametrize("kind", ["error", "stall"])
def test_a_disk_that_fails_and_comes_back(
    kind: str, journals: Any, agents: Any, server: Server, log: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(agent, "JOURNAL_RETRY", 0.2)
    monkeypatch.setattr(agent, "JOURNAL_STALL", 0.2)
    journal = journals()
    write, broken = journal._write, [True]

    def fail(*texts: str) -> Any:
        while broken and kind == "stall":
            gevent.monkey.get_original("time", "sleep")(0.01)
        return "database or disk is full" if broken else write(*texts)

    journal._write = fail
    on = agents(journal, server.url)
    feed(on, *range(1, 6))
    harness.wait_until(lambda: len(server.requests) == 10, "it goes on from memory")
    assert journal.failure
    failed = [line for line in log() if line.get("event") == "journal_failed"]
    assert failed and failed[0]["level"] == "ERROR"
    assert on.metrics.totals["journal.errors"] > 0
    server.behave = b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"
    feed(on, *range(6, 9))
    broken.clear()
    harness.wait_until(lambda: not journal.failure, "it returns to the journal by itself")
    assert [line for line in log() if line.get("event") == "journal_back"]
    harness.wait_until(lambda: len(rows(tmp_path / "state")) >= 8, "the rows are there")
    waiting = [row for row in rows(tmp_path / "state") if row[4] or row[6]]
    assert len(waiting) == 3, "what waits is on disk now"


def test_a_failing_journal_keeps_nothing_of_calls_that_are_over(journals: Any) -> None:
    journal = journals()
    journal._write = lambda *_: "disk I/O error"
    for number in range(1, 5_000):
        journal.put_call(number, '{"x":1}')
        each = event("begin", str(number), row=number, serial=number)
        journal.put_event(each)
        assert journal.commit() is False
        journal.drop_event(each)
        journal.drop_call(number)
    assert len(journal._pending) <= agent.JOURNAL_GROUP + 1


def test_events_beyond_the_limit_wait_on_disk_and_go_in_order(
    journals: Any, agents: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_EVENTS_IN_MEMORY", 20)
    monkeypatch.setattr(agent, "MAX_LOADED", 7)
    monkeypatch.setattr(agent, "RETRY_FIRST", 0.02)
    monkeypatch.setattr(agent, "RETRY_LAST", 0.05)
    down = [True]
    begun: list[str] = []
    ended: list[str] = []
    rude = b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n"
    fine = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'

    def behave(_: Any, request: Any) -> bytes:
        if down:
            return rude
        tag = json.loads(request.body)["transaction_tag"]
        (begun if "begin" in request.path else ended).append(tag)
        return fine

    server.behave = behave
    on = agents(journals(), server.url, rating_api_concurrency=1)
    for number in range(1, 101):
        feed(on, number)
        gevent.sleep(0.001)
    harness.wait_until(lambda: on.waiting == 200 and not on.shards[0].fresh, "all wait")
    (lane,) = on.delivery._lanes.values()
    assert len(lane.outbox) <= 20 and lane.stored >= 180
    down.clear()
    harness.wait_until(lambda: len(ended) == 100, "all are delivered")
    # The first is the probe that found the API up again.
    rest = [f"call-{number}@host" for number in range(1, 101)]
    rest.remove(begun[0])
    assert begun[1:] == rest, "in order of time"
    assert sorted(ended) == sorted(begun)
    assert on.waiting == 0


def test_overflow_while_the_journal_fails_is_delivered_in_order(
    journals: Any, agents: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events wait on disk, then the disk fails: later ones wait behind them in memory."""
    for name, value in {"MAX_EVENTS_IN_MEMORY": 10, "MAX_LOADED": 4, "RETRY_FIRST": 0.02,
                        "RETRY_LAST": 0.05, "JOURNAL_RETRY": 0.1}.items():  # fmt: skip
        monkeypatch.setattr(agent, name, value)
    for returns in (False, True):
        state, ledger = {"down": True, "full": False}, []

        def behave(_: Any, request: Any, state: Any = state, ledger: Any = ledger) -> bytes:
            if state["down"]:
                return b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n"
            ledger.append((request.path[4:7], json.loads(request.body)["transaction_tag"]))
            return b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'

        server.behave = behave
        journal = journals(tmp_path / str(returns))
        write = journal._write
        journal._write = lambda *x, state=state, write=write: (
            "disk is full" if state["full"] else write(*x)
        )
        on = agents(journal, server.url)
        feed(on, *range(1, 21))
        harness.wait_until(
            lambda on=on: not on.shards[0].fresh and on.waiting == 40, "they wait on disk"
        )
        state["full"] = True
        feed(on, *range(21, 41))
        harness.wait_until(
            lambda on=on: not on.shards[0].fresh and on.waiting == 80, "these in memory"
        )
        if returns:
            state["full"] = False
            harness.wait_until(lambda journal=journal: not journal.failure, "the disk is back")
        state["down"] = False
        harness.wait_until(lambda ledger=ledger: len(ledger) >= 80, "all are delivered")
        gevent.sleep(0.2)
        assert len(ledger) == len(set(ledger)) == 80
        for number in range(1, 41):
            tag = f"call-{number}@host"
            assert ledger.index(("beg", tag)) < ledger.index(("end", tag))
        on.delivery.kill()
        state["full"] = False


# Several shards


def test_shards_share_delivery_and_have_stores_of_their_own(
    journals: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one store alone has is loaded from it, and a store that fails holds up its own only."""
    monkeypatch.setattr(agent, "MAX_EVENTS_IN_MEMORY", 4)
    monkeypatch.setattr(agent, "MAX_LOADED", 3)
    stores = [journals(tmp_path / name) for name in "ab"]
    chosen = agent.Settings(
        sip_local_domains=("sip.canyan.io",), rating_api_url=server.url, reorder_window=0
    )
    rules = agent.load_rules(chosen)
    on = agent.Agent(chosen, rules, agent.WarningLimiter(), stores[0])
    table = agent.CallTable(chosen, rules)
    on.shards.append(agent.Shard(table, on.delivery, on.metrics, stores[1]))
    for number in range(1, 41):
        for data in packets(number):
            packet = agent.decode_hep(data, 0)
            message = agent.parse_sip(packet.payload, packet.time)
            assert message is not None
            on.shards[number % 2].handle(agent.Sighting(packet, message), time.monotonic())
    assert on.sizes()[agent.ENDED] == 40 and on.waiting == 80
    write, stores[1]._write = stores[1]._write, lambda *_: "disk I/O error"
    assert [shard.commit() for shard in on.shards] == [True, False]
    assert on.store_failure == "disk I/O error" and on.commit(0.1) is False
    (lane,) = on.delivery._lanes.values()
    assert [lane.backlogs[store].count > 0 for store in stores] == [True, False]
    stores[1]._write = write

    def done() -> bool:
        on.tick()
        on.commit(harness.DEADLINE)
        return len(server.requests) >= 80

    harness.wait_until(done, "all are delivered")
    assert on.commit(harness.DEADLINE) and on.store_failure == "" and on.waiting == 0
    told = [(x.path[4:7], json.loads(x.body)["transaction_tag"]) for x in server.requests]
    assert len(told) == len(set(told)) == 80
    for number in range(1, 41):
        tag = f"call-{number}@host"
        assert told.index(("beg", tag)) < told.index(("end", tag))
    for name in "ab":
        kept = rows(tmp_path / name)
        assert len(kept) == 20 and not any(row[4] or row[6] for row in kept)
    on.delivery.kill()


# The command


def outbox(folder: Path, *words: str) -> tuple[int, list[str]]:
    out = io.StringIO()
    return agent.outbox(
        agent.Settings(state_dir=str(folder)), words, out
    ), out.getvalue().splitlines()


def test_outbox_lists_what_waits_and_what_was_rejected(journals: Any, tmp_path: Path) -> None:
    journal = journals()
    fill(journal, agent.MAX_LOADED)
    bad = event("end", "bad@\x1bhost", row=90_000, serial=90_000, answer="status 404")
    bad.attempts = 1
    journal.reject_event(bad)
    assert journal.commit()
    status, lines = outbox(tmp_path / "state")
    assert (status, len(lines)) == (0, 1 + 2 * agent.MAX_LOADED + 1)
    assert lines[0].split() == "STATE KIND TIME ATTEMPTS TENANT API CALL ANSWER".split()
    assert lines[1].split() == [
        "waiting", "begin", "2026-09-21T14:13:20.000Z", "0", "default", "http://127.0.0.1:1", "c0",
    ]  # fmt: skip
    assert lines[-1].split()[:4] == ["rejected", "end", "2026-09-21T14:13:20.000Z", "1"]
    assert lines[-1].endswith("status 404") and "\x1b" not in lines[-1]


def test_outbox_retry_and_drop_while_the_agent_runs(
    journals: Any, agents: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "JOURNAL_POLL", 0.05)
    folder = tmp_path / "state"
    server.behave = b"HTTP/1.1 422 no\r\nContent-Length: 0\r\n\r\n"
    on = agents(journals(), server.url)
    feed(on, 1, 2)
    for packet in itertools.islice(packets(3), 3):
        on.receive(packet, "udp", on.senders.of("127.0.0.1"))
    harness.wait_until(lambda: on.waiting == 0 and len(rows(folder, "rejected")) == 5, "rejected")
    assert outbox(folder, "drop", "call-1@host") == (0, ["2 events dropped"])
    assert outbox(folder, "drop", "call-1@host")[0] == 2
    server.behave = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'
    server.requests.clear()
    status, (line,) = outbox(folder, "retry")
    assert status == 0 and line.startswith("3 events to be sent again")
    harness.wait_until(lambda: len(server.requests) == 3, "they are sent again")
    told = [(x.path[4:7], json.loads(x.body)["transaction_tag"]) for x in server.requests]
    assert sorted(told) == [("beg", "call-2@host"), ("beg", "call-3@host"), ("end", "call-2@host")]
    for packet in packets(3):
        on.receive(packet, "udp", on.senders.of("127.0.0.1"))
    harness.wait_until(lambda: len(server.requests) == 4, "the running call ends after all")
    harness.wait_until(lambda: rows(folder, "rejected") == [], "nothing is rejected any more")


@pytest.mark.parametrize("words", [["x"], ["list", "a"], ["drop"], ["Retry"]])
def test_outbox_refuses_other_words(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(agent.ConfigError, match="allowed: list, retry"):
        outbox(tmp_path, *words)


def test_outbox_without_a_journal(tmp_path: Path) -> None:
    with pytest.raises(agent.ConfigError, match="no journal"):
        outbox(tmp_path)
    with pytest.raises(agent.ConfigError, match="state_dir: empty"):
        agent.outbox(agent.Settings(), [], io.StringIO())
