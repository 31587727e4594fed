"""The status: health, JSON, metrics, calls and the page in a browser; signals and sd_notify."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import gevent
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import browser
import harness
import hepbuild
import rating_agent_hep as agent
from dialog import ack, bye, bye_reply, call, invite, numbered, reply
from harness import LOCAL

HOSTILE = """<script>document.title="owned"</script></script>'"&<img/src=x/onerror=owned()>"""


def get(url: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    """Status, body and headers of an answer, whatever the status is."""
    request = urllib.request.Request(url, method=method)
    try:
        answer = urllib.request.urlopen(request, timeout=harness.DEADLINE)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode(), dict(answer.headers)


def status(process: harness.AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{process.status}/status")[1])
    return found


def calls(process: harness.AgentProcess, query: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{process.status}/calls?{query}")[1])
    return found


def live(*payloads: bytes, number: int) -> list[bytes]:
    """Packets with the time of now."""
    stamp = round(time.time() * 1_000_000)
    return [hepbuild.hep3(numbered(payload, number), time_us=stamp) for payload in payloads]


@pytest.fixture
def running(api: harness.RatingServer) -> Any:
    options = ("--rating-api-url", api.url, LOCAL, "--listen-status=:0")
    with harness.AgentProcess(*options) as process:
        yield process


# What it says


def test_status_of_a_busy_agent(api: harness.RatingServer, running: harness.AgentProcess) -> None:
    assert running.status.startswith("http://127.0.0.1:"), "loopback where only a port is given"
    whole = live(invite(), reply(200), ack(), bye(), bye_reply(), number=1)
    harness.send_udp(running.udp, [*whole, b"junk"])
    harness.send_tcp(running.tcp, live(invite(), reply(200), number=2))
    harness.send_udp(running.udp, live(invite(), number=3))
    harness.wait_until(lambda: status(running)["counters"].get("calls.end.bye") == 1, "the end")
    found = status(running)
    assert found["version"] == agent.__version__ and 0 < found["uptime"] < harness.DEADLINE
    assert abs(found["time"] - time.time()) < 5 and abs(found["heard"] - time.time()) < 10
    assert {x["transport"]: x["address"] for x in found["listeners"]} == {
        "udp": "{}:{}".format(*running.udp),
        "tcp": "{}:{}".format(*running.tcp),
        "status": running.status.removeprefix("http://"),
    }
    assert found["calls"] == {"orphan": 0, "trying": 1, "failed": 0, "answered": 1, "ended": 1}
    (sender,) = found["senders"]
    assert (sender["address"], sender["packets"], found["known_senders"]) == ("127.0.0.1", 9, 1)
    assert sender["dropped"] == {"hep_magic": 1} and "6a756e6b" in sender["last_fault"]
    assert abs(sender["last_seen"] - time.time()) < 10 and abs(sender["clock_skew_ms"]) < 5000
    (row,) = found["apis"]
    assert (row["url"], row["state"], row["last_error_at"]) == (api.url, "up", None)
    (error,) = found["last_errors"]
    assert (error["event"], error["count"]) == ("malformed_hep_magic", 1)
    assert found["journal"] is None and found["healthy"] and found["faults"] == []
    assert found["counters"]["packets.received.udp"] == 7
    assert found["counters"]["calls.begun"] == 2


def test_calls_filtered_and_in_pages(running: harness.AgentProcess) -> None:
    for number in range(1, 24):
        harness.send_udp(running.udp, live(invite(), number=number))
    harness.send_udp(running.udp, live(reply(200), number=7))
    harness.wait_until(lambda: status(running)["calls"]["trying"] == 22, "the calls ring")
    names = [f"call-{number}@host" for number in range(23, 0, -1)]
    assert [x["call_id"] for x in calls(running)["calls"]] == names
    seen, after = [], 0
    for _ in range(3):
        page = calls(running, f"limit=10&after={after}")
        seen += [x["call_id"] for x in page["calls"]]
        after = page["next"]
    assert seen == names and after is None
    (answered,) = calls(running, "state=answered")["calls"]
    assert answered["call_id"] == "call-7@host" and answered["rated"]
    assert (answered["account_tag"], answered["destination_account_tag"]) == ("2000", "2001")
    assert len(calls(running, "state=answered,trying")["calls"]) == 23
    assert {x["call_id"] for x in calls(running, "call_id=call-2")["calls"]} == {
        f"call-{number}@host" for number in (2, 20, 21, 22, 23)
    }
    assert len(calls(running, "account=2001&limit=99999")["calls"]) == 23
    assert calls(running, "account=2002") == {"calls": [], "next": None}
    assert calls(running, "tenant=other")["calls"] == []
    for bad in ("state=gone", "limit=x", "after=-1", "colour=red", "limit"):
        code, text, _ = get(f"{running.status}/calls?{bad}")
        assert code == 400 and "allowed: state=" in text, bad


def test_metrics_by_the_parser_of_prometheus(running: harness.AgentProcess) -> None:
    harness.send_udp(running.udp, [*call(1), b"junk", hepbuild.hep3(b"x", protocol_type=100)])

    def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        _, text, headers = get(f"{running.status}/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(text))
        names = [family.name for family in families]
        assert len(names) == len(set(names)) > 5
        assert all(family.type in ("counter", "gauge", "summary") for family in families)
        return {
            (sample.name, tuple(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    name = "rating_agent_hep_"
    harness.wait_until(lambda: samples().get((f"{name}calls_ended_total", ())) == 1, "the end")
    found = samples()
    assert found[f"{name}packets_received_total", (("transport", "udp"),)] == 7
    assert found[f"{name}calls_end_total", (("reason", "bye"),)] == 1
    assert found[f"{name}packets_malformed_total", (("reason", "hep_magic"),)] == 1
    assert found[f"{name}packets_dropped_total", (("reason", "not_sip"),)] == 1
    assert found[f"{name}calls", (("state", "ended"),)] == 1
    assert found[f"{name}api_time_seconds_count", ()] == 2
    assert 0 < found[f"{name}api_time_seconds_sum", ()] < harness.DEADLINE
    assert found[f"{name}healthy", ()] == 1


def test_labels_are_those_of_the_statsd_mapping() -> None:
    mapping = yaml.safe_load((harness.ROOT / "conf" / "statsd" / "mapping.yaml").read_text())
    shown = {
        entry["match"]: (entry["name"], *entry["labels"].items()) for entry in mapping["mappings"]
    }
    assert shown == {
        f"rating_agent_hep.{head}.*": (f"rating_agent_hep_{family}", (label, "$1"))
        for head, (family, label) in agent.LABELS.items()
    }


def test_odd_names_become_metrics_that_the_parser_takes() -> None:
    odd = {'packets.malformed.a"b\\c\nd': 1, "packets.malformed.e": 2, "x-y.z w": 3}
    text = agent.prometheus_text(odd, {}, {})
    samples = [x for family in text_string_to_metric_families(text) for x in family.samples]
    values = {(x.name, x.labels.get("reason")): x.value for x in samples}
    assert values == {
        ("rating_agent_hep_packets_malformed_total", 'a"b\\c\nd'): 1,
        ("rating_agent_hep_packets_malformed_total", "e"): 2,
        ("rating_agent_hep_x_y_z_w_total", None): 3,
    }


# Health


def a_whole_agent(**options: Any) -> agent.Agent:
    settings = agent.Settings(**options)
    return agent.Agent(settings, agent.load_rules(settings), agent.WarningLimiter())


def test_an_api_that_is_down_for_long_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = a_whole_agent()
    lane = whole.delivery._lane("http://127.0.0.1:1")
    now = time.monotonic()
    assert whole.faults(now + 1e6) == []
    lane.was_down, lane.since, lane.fault = True, now, "status 503"
    assert whole.faults(now + agent.API_DOWN_UNHEALTHY - 1) == []
    (fault,) = whole.faults(now + agent.API_DOWN_UNHEALTHY + 1)
    assert fault == "rating API http://127.0.0.1:1 is down for 61 s: status 503"
    whole.delivery.kill()


def test_silence_is_a_fault_where_it_is_configured() -> None:
    whole = a_whole_agent(status_max_silence=30.0)
    start = time.monotonic()
    sender = whole.senders.of("192.0.2.1")
    packet = hepbuild.hep3(numbered(invite(), 1))
    assert whole.faults(start + 29) == []
    assert whole.faults(start + 31) == ["no SIP over HEP came for 31 s"]
    whole.receive(packet, "udp", sender)
    whole.flush(start + 100)
    assert whole.faults(start + 129) == []
    # A port scan is no mirror.
    whole.receive(b"junk", "udp", sender)
    whole.flush(start + 129)
    assert whole.faults(start + 131) == ["no SIP over HEP came for 31 s"]
    assert a_whole_agent().faults(start + 1e6) == []


def test_healthz_says_503_and_why(api: harness.RatingServer) -> None:
    options = ("--rating-api-url", api.url, "--listen-status=127.0.0.1:0")
    with harness.AgentProcess(*options, "--status-max-silence=0.5") as process:
        url = f"{process.status}/healthz"
        harness.wait_until(lambda: get(url)[0] == 503, "it has heard nothing")
        assert json.loads(get(url)[1])["faults"][0].startswith("no SIP over HEP came for")
        harness.send_udp(process.udp, live(invite(), number=1))
        harness.wait_until(lambda: get(url)[0] == 200, "it has heard something")
    with harness.AgentProcess(*options) as process:
        code, text, _ = get(f"{process.status}/healthz")
        assert (code, json.loads(text)) == (200, {"healthy": True, "faults": []})


def test_a_journal_that_fails_is_a_fault(tmp_path: Path) -> None:
    settings = agent.Settings(state_dir=str(tmp_path))
    journal = agent.Journal(settings.state_dir)
    whole = agent.Agent(settings, agent.load_rules(settings), agent.WarningLimiter(), journal)
    now = time.monotonic()
    assert whole.faults(now) == [] and whole.status(now, 1, 1)["journal"] == "ok"
    journal.failure = "database or disk is full"
    assert whole.faults(now) == ["the journal cannot be written: database or disk is full"]
    assert whole.status(now, 1, 1)["journal"] == "database or disk is full"
    journal.close(1.0)


def test_calls_that_change_while_they_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "CALLS_SLICE", 10)
    table = agent.CallTable(agent.Settings(), agent.load_rules(agent.Settings()))

    def take(payload: bytes, number: int) -> None:
        packet = agent.decode_hep(hepbuild.hep3(numbered(payload, number)), 0)
        message = agent.parse_sip(packet.payload, packet.time)
        assert message is not None
        table.handle(agent.Sighting(packet, message), 0.0)

    for number in range(1, 31):
        take(invite(), number)
    looking = table.slices()
    rows = [call.row for call in next(looking)]
    assert rows == list(range(30, 20, -1))
    # The oldest go, and others come.
    for number in range(1, 16):
        table._leave(*table._calls[f"call-{number}@host"])
    take(invite(), 31)
    rows += [call.row for part in looking for call in part]
    assert rows == list(range(30, 15, -1))


def test_calls_are_newest_first_after_a_restart_too() -> None:
    settings = agent.Settings()
    tables = [agent.CallTable(settings, agent.load_rules(settings)) for _ in range(2)]
    for now, payload, number in (
        (0.0, invite(), 1),
        (1.0, invite(), 2),
        (2.0, invite(), 3),
        (3.0, reply(200), 1),
    ):
        packet = agent.decode_hep(hepbuild.hep3(numbered(payload, number)), 0)
        message = agent.parse_sip(packet.payload, packet.time)
        assert message is not None
        tables[0].handle(agent.Sighting(packet, message), now)
    kept = [(call.row, agent.pack_call(call, 0.0)) for part in tables[0].slices() for call in part]
    tables[1].restore(sorted(kept), 100, 4.0, 0.0)
    seen = [[call.call_id for part in table.slices() for call in part] for table in tables]
    assert seen[0] == seen[1] == ["call-3@host", "call-2@host", "call-1@host"]


# The server


def test_methods_paths_and_headers(running: harness.AgentProcess) -> None:
    for path in ("/", "/healthz", "/status", "/calls", "/metrics"):
        code, text, headers = get(running.status + path)
        assert code == 200 and len(text) == int(headers["Content-Length"]) or path == "/"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert get(running.status + path, "HEAD")[:2] == (200, "")
        code, _, headers = get(running.status + path, "POST")
        assert (code, headers["Allow"]) == (405, "GET, HEAD")
    assert get(f"{running.status}/nothing")[0] == 404
    assert get(f"{running.status}/status?x=1")[0] == 200


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *((host, 200) for host in ("127.0.0.1", "127.0.0.1:9061", "[::1]:9061", "192.0.2.1:80")),
        *((host, 200) for host in ("localhost", "LocalHost:9061", "localhost.")),
        *((host, 200) for host in ("this-host", "This-Host:9061", "this-host.example:9061")),
        *((host, 421) for host in ("evil.example", "evil.example:9061", "127.0.0.1.evil.example")),
        *((host, 421) for host in ("localhost.evil.example", "this-host.evil.example", "", "[::1")),
    ],
)
def test_a_name_that_is_not_of_this_machine_is_refused(
    host: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a web page could let its own name point here, and read what the browser reaches."""
    monkeypatch.setattr(socket, "gethostname", lambda: "This-Host")
    monkeypatch.setattr(socket, "getfqdn", lambda name: f"{name}.example")
    with socket.socket() as sock:
        server = agent.StatusServer(sock, a_whole_agent())
        for path in ("/", "/status", "/calls", "/metrics", "/healthz"):
            request = f"GET {path} HTTP/1.1\r\nA: b\r\nHOST: {host}\r\n\r\n".encode()
            answer = server._answer(request)
            assert answer.startswith(f"HTTP/1.1 {code} ".encode()), path
            assert code == 200 or answer.endswith(
                b"\r\n\r\nallowed as Host: an address, or a name of this machine\n"
            )


def test_the_name_that_the_status_listens_on_is_allowed() -> None:
    with socket.socket() as sock:
        server = agent.StatusServer(sock, a_whole_agent(listen_status="Agent.example:9061"))
        answer = server._answer(b"GET /healthz HTTP/1.1\r\nHost: agent.example:9061\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_text",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"\x16\x03\x01\x00\xff" * 20]
    + [b"GET /" + b"x" * 20_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5_000],
)
def test_what_is_no_request_is_answered_and_costs_nothing_else(
    running: harness.AgentProcess, request_text: bytes
) -> None:
    host, _, port = running.status.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), harness.DEADLINE) as sock:
        sock.sendall(request_text)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert get(f"{running.status}/healthz")[0] == 200
    assert running.events("internal_error") == []


def test_readers_that_say_nothing_hold_no_place_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "STATUS_TIMEOUT", 0.5)
    server = agent.StatusServer(agent.bind("127.0.0.1:0", socket.SOCK_STREAM), a_whole_agent())
    server.start()
    port = server.socket.getsockname()[1]
    idle = [
        socket.create_connection(("127.0.0.1", port)) for _ in range(agent.MAX_STATUS_CONNECTIONS)
    ]
    harness.wait_until(server.full, "all places are taken")
    # An octet now and then does not help.
    idle[0].sendall(b"G")
    assert get(f"http://127.0.0.1:{port}/healthz")[0] == 200
    assert idle[0].recv(1) == b"", "closed"
    for sock in idle:
        sock.close()
    server.stop()


def test_a_fault_of_ours_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as sock:
        server = agent.StatusServer(sock, a_whole_agent())
        server._agent.started = None  # type: ignore[assignment]
        answer = server._answer(b"GET /status HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500 ")


def test_half_a_million_calls_do_not_hold_the_loop() -> None:
    whole = a_whole_agent(max_calls=1_000_000)
    message = agent.parse_sip(numbered(invite(), 1))
    assert message is not None
    for row in range(1, 500_001):
        one = agent.Call()
        one.call_id, one.row, one.state, one.entered = f"call-{row}@host", row, agent.TRYING, 0.0
        whole.shards[0].table._calls[one.call_id] = (one,)
    pauses = []

    def watch() -> None:
        while True:
            before = time.monotonic()
            gevent.sleep(0)
            pauses.append(time.monotonic() - before)

    watcher = gevent.spawn(watch)
    with socket.socket() as sock:
        server = agent.StatusServer(sock, whole)
        started = time.monotonic()
        code, text = server._calls("call_id=no-such-call")
    watcher.kill()
    assert (code, json.loads(text)) == (200, {"calls": [], "next": None})
    assert time.monotonic() - started < agent.CALLS_SECONDS
    assert len(pauses) > 200
    # Far above the 10 ms or so that it takes, for the machine may be busy.
    assert sorted(pauses)[-3] < 0.1


# The log's last errors


def record(event: str, level: int = logging.WARNING, text: str = "x", **more: Any) -> Any:
    made = logging.LogRecord("agent", level, "", 0, text, None, None)
    vars(made).update(event=event, **more)
    return made


def test_last_errors_are_bounded_and_a_storm_pushes_nothing_out() -> None:
    limiter = agent.WarningLimiter()
    limiter.filter(record("journal_failed", logging.ERROR, "disk full", api="http://a"))
    limiter.filter(record("started", logging.INFO))
    for _ in range(10_000):
        limiter.filter(record("malformed_hep_magic", text="y" * 5_000, sender="192.0.2.1"))
    now = float(limiter._second)
    assert limiter.holds("malformed_hep_magic", now)
    storm, first = limiter.last_errors()
    assert (storm["event"], storm["count"]) == ("malformed_hep_magic", 10_001)
    assert len(storm["text"]) == agent.MAX_ERROR_TEXT
    assert (first["event"], first["level"]) == ("journal_failed", "error")
    assert first["text"] == "disk full api=http://a"
    for number in range(1_000):
        limiter.filter(record(f"kind_{number}"))
    assert len(limiter.last_errors()) == agent.MAX_LAST_ERRORS


# Signals and systemd


def test_sigusr1_logs_the_status(running: harness.AgentProcess) -> None:
    harness.send_udp(running.udp, live(invite(), reply(200), number=1))
    harness.wait_until(lambda: status(running)["calls"]["answered"] == 1, "the call runs")
    running.kill(signal.SIGUSR1)
    harness.wait_until(lambda: running.events("status"), "it is logged")
    (line,) = running.events("status")
    assert line["level"] == "INFO" and line["status"]["calls"]["answered"] == 1
    assert set(line["status"]) == set(status(running))


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(api: harness.RatingServer, tmp_path: Path, abstract: bool) -> None:
    name = f"@rating-agent-{tmp_path.name}-{time.monotonic_ns()}"
    name = name if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0", 1) if abstract else name)
        systemd.settimeout(harness.DEADLINE)
        env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000"}
        with harness.AgentProcess("--rating-api-url", api.url, env=env) as process:
            assert systemd.recv(4096) == b"READY=1"
            started = time.monotonic()
            for _ in range(3):
                said = systemd.recv(4096)
                assert said == b"WATCHDOG=1\nSTATUS=healthy: 0 calls, 0 events wait"
            assert 0.2 < time.monotonic() - started < 10
            process.kill(signal.SIGHUP)
            said_all = []
            while b"READY=1" not in said_all:
                said_all.append(systemd.recv(4096))
            (reloading,) = (said for said in said_all if said.startswith(b"RELOADING=1\n"))
            stamp = int(reloading.partition(b"MONOTONIC_USEC=")[2])
            assert abs(stamp / 1_000_000 - time.monotonic()) < harness.DEADLINE
            assert process.stop() == 0
            while systemd.recv(4096) != b"STOPPING=1":
                pass


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    theirs = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"}
    assert agent.Notifier(theirs).interval == agent.NOTIFY_INTERVAL
    assert agent.Notifier({**theirs, "WATCHDOG_USEC": "junk"}).interval == agent.NOTIFY_INTERVAL
    # Nobody listens there: nothing is raised.
    agent.Notifier(theirs).say("READY=1")


# The page


def test_page_asks_nobody_else_and_pastes_nothing() -> None:
    assert re.findall(r"https?://", agent.PAGE) == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", agent.PAGE)
    assert 'src="' not in agent.PAGE and agent.PAGE.count("<script>") == 1


def test_page_shows_targets_of_hep_forward_and_nothing_of_them_without(
    api: harness.RatingServer, running: harness.AgentProcess
) -> None:
    options = ("--rating-api-url", api.url, "--listen-status=127.0.0.1:0")
    shown = "getComputedStyle(document.getElementById('forwarding')).display"
    rows = "[...document.querySelectorAll('#targets tbody td')].map(x => x.innerText)"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
        browser.Browser() as page,
    ):
        sink.bind(("127.0.0.1", 0))
        target = f"udp://127.0.0.1:{sink.getsockname()[1]}"
        with harness.AgentProcess(*options, f"--hep-forward={target}") as process:
            harness.send_udp(process.udp, live(invite(), reply(200), number=1))
            page.open(process.status)
            harness.wait_until(
                lambda: page.run(rows)[:4] == [target, "2", "0", "0"], "the target is shown"
            )
            assert page.run(shown) == "block"
        page.open(running.status)
        harness.wait_until(
            lambda: page.run("document.getElementById('word')?.innerText") == "Healthy", "filled"
        )
        assert page.run(shown) == "none"


def test_page_in_a_browser(api: harness.RatingServer, running: harness.AgentProcess) -> None:
    hostile = numbered(invite(), 7).replace(b"call-7@host", HOSTILE.encode())
    hostile = hostile.replace(b"sip:2000@", b"sip:%3Cscript%3Ex@")
    harness.send_udp(running.udp, live(invite(), reply(200), number=1))
    harness.send_udp(running.udp, [hepbuild.hep3(hostile), HOSTILE.encode()])
    harness.wait_until(lambda: status(running)["calls"]["trying"] == 1, "the calls are there")
    with browser.Browser() as page:
        page.open(running.status)
        text = "document.body?.innerText ?? ''"

        def word() -> str:
            return str(page.run("document.getElementById('word')?.innerText ?? ''"))

        harness.wait_until(lambda: word() == "Healthy", "the page shows the health")
        shown = page.run(text)
        for part in ("call-1@host", "<script>document.title", "malformed_hep_magic", api.url):
            assert part in shown, part
        assert "<script>x" in shown, "the account as text"
        assert page.run("document.title") == "rating agent"
        assert page.run("document.querySelectorAll('script, img').length") == 1
        # Live: what comes now is there two seconds later.
        harness.send_udp(running.udp, live(invite(), reply(200), number=2))
        harness.wait_until(lambda: "call-2@host" in page.run(text), "the page refreshes itself")
        page.run("$('find').value = 'call-2'")
        page.run("$('find').dispatchEvent(new Event('input'))")
        harness.wait_until(lambda: "call-1@host" not in page.run(text), "only what was looked for")
        for width in (390, 320, 768, 1100):
            page.open(running.status, width)
            harness.wait_until(lambda: "call-1@host" in page.run(text), "the page is filled")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("innerWidth") == width
        running.stop()
        harness.wait_until(lambda: word() == "No answer", "the page says that it has no news")
        assert "What is below is" in page.run(text)
