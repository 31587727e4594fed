"""Scenarios against a real Kamailio, the OpenSIPS scenario by captures, and the runner itself."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import harness
import run_scenario
import sipservers

NAMES = sorted(path.stem for path in sipservers.SCENARIOS.glob("test_*.yaml"))
CAPTURES = harness.SELECTION / "opensips-3.6"
# Seconds after which a call without a BYE ends here; every scenario's calls are shorter.
MAX_CALL_DURATION = 20


def graphql(url: str, query: str) -> Any:
    """The sandbox's answer to a query."""
    request = urllib.request.Request(
        f"{url}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["data"]


def transactions(url: str) -> list[dict[str, Any]]:
    """All legs that were rated."""
    query = """{ allTransactions(page: 0, perPage: 1000, sortField: "timestamp_begin",
        sortOrder: "asc", filter: {}) { account_tag transaction_tag inbound duration } }"""
    return list(graphql(url, query)["allTransactions"])


@dataclass
class Stack:
    """What runs, and the scenarios that were started in it."""

    api_url: str
    agent: harness.AgentProcess
    runs: dict[str, sipservers.ScenarioRun]


@pytest.fixture(scope="module", params=["answers mirrored", "requests only"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Stack]:
    """Carrier, Kamailio, agent and sandbox, in which all scenarios run side by side."""
    folder = tmp_path_factory.mktemp("stack")
    defines = ["REQUESTS_ONLY"] if request.param == "requests only" else []
    with contextlib.ExitStack() as cleanup:
        api_url = cleanup.enter_context(sipservers.sandbox(folder))
        options = [f"--rating-api-url={api_url}", harness.LOCAL]
        options += [f"--max-call-duration={MAX_CALL_DURATION}"]
        agent = cleanup.enter_context(harness.AgentProcess(*options))
        target = cleanup.enter_context(sipservers.proxy(agent.udp, folder, *defines))
        runs = {}
        for name in NAMES:
            runs[name] = sipservers.ScenarioRun(
                str(sipservers.SCENARIOS / f"{name}.yaml"), "-a", api_url, "-t", target
            )
            cleanup.callback(runs[name].stop)
        yield Stack(api_url, agent, runs)


@pytest.mark.parametrize("name", NAMES)
def test_scenario_through_kamailio(stack: Stack, name: str) -> None:
    status, output = stack.runs[name].result()
    assert status == 0, output
    assert "check 1: POST /graphql: ok" in output and "worker 1" in output


def test_every_call_is_rated_once_and_by_what_was_mirrored(stack: Stack) -> None:
    """Also the call without a BYE, which its deadline ends."""
    for run in stack.runs.values():
        assert run.result()[0] == 0
    # 200 calls, and five that are answered and hung up, on two sides; then the one without a BYE.
    harness.wait_until(lambda: len(transactions(stack.api_url)) >= 412, "the deadline ends a call")
    rated = transactions(stack.api_url)
    legs = {(leg["transaction_tag"], leg["account_tag"], leg["inbound"]) for leg in rated}
    assert len(rated) == len(legs) == 412
    without_bye = [leg["duration"] for leg in rated if leg["account_tag"].startswith("3007")]
    assert without_bye == [MAX_CALL_DURATION]
    begins = [line["reason"] for line in stack.agent.events("call_begin")]
    assert len(begins) == 206 and set(begins) in ({"answer"}, {"ack"})
    assert stack.agent.events("internal_error") == []


def test_both_ways_of_mirroring_were_run(stack: Stack, request: pytest.FixtureRequest) -> None:
    """What the mirror carries is what the name of the run says."""
    for run in stack.runs.values():
        run.result()
    reasons = {line["reason"] for line in stack.agent.events("call_begin")}
    expected = {"ack"} if "requests only" in request.node.name else {"answer"}
    assert reasons == expected


# The lines that mirror what the proxy sends itself.
OWN_REQUESTS = "event_route[tm:local-request] {\n    sip_trace();\n}\n"
CALL_LIMIT = 2  # seconds after which the proxy ends a call, give or take a tick of its timer
# Seconds after which the agent does, where it sees no end; later than the scenario's checks.
DEADLINE = 12
# What is mirrored of calls that the proxy ends: the defines, and whether with OWN_REQUESTS.
MIRRORS = {
    "answers and own requests": ([], True),
    "own requests, no answers": (["REQUESTS_ONLY"], True),
    "answers, no own requests": ([], False),
    "neither": (["REQUESTS_ONLY"], False),
}


@pytest.fixture(scope="module")
def ended_by_the_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The scenario through each of MIRRORS, side by side, with one agent and one sandbox."""
    folder = tmp_path_factory.mktemp("ended")
    text = sipservers.CONFIGURATION.read_text(encoding="utf-8")
    assert text.count(OWN_REQUESTS) == 1
    without = folder / "without.cfg"
    without.write_text(text.replace(OWN_REQUESTS, ""), encoding="utf-8")
    with contextlib.ExitStack() as cleanup:
        api_url = cleanup.enter_context(sipservers.sandbox(folder))
        options = [f"--rating-api-url={api_url}", harness.LOCAL]
        agent = cleanup.enter_context(
            harness.AgentProcess(*options, f"--max-call-duration={DEADLINE}")
        )
        runs = {}
        for number, (name, (defines, own)) in enumerate(MIRRORS.items()):
            place = folder / str(number)
            place.mkdir()
            target = cleanup.enter_context(
                sipservers.proxy(
                    agent.udp,
                    place,
                    f"CALL_LIMIT={CALL_LIMIT}",
                    *defines,
                    configuration=sipservers.CONFIGURATION if own else without,
                )
            )
            runs[name] = sipservers.ScenarioRun(
                str(sipservers.SCENARIOS / "proxy_ends_call.yaml"), "-a", api_url, "-t", target
            )
            cleanup.callback(runs[name].stop)
        yield Stack(api_url, agent, runs)


@pytest.mark.parametrize("mirror", [name for name in MIRRORS if name != "neither"])
def test_the_proxy_ends_the_call(ended_by_the_proxy: Stack, mirror: str) -> None:
    """By its BYEs, or where these are not mirrored by the replies to them (rule 13)."""
    status, output = ended_by_the_proxy.runs[mirror].result()
    assert status == 0, output


def test_an_end_that_no_mirror_shows_is_the_deadline(ended_by_the_proxy: Stack) -> None:
    """The limit that docs/kamailio.md names: neither the proxy's BYEs nor replies to them."""
    runs, api_url = ended_by_the_proxy.runs, ended_by_the_proxy.api_url
    status, output = runs["neither"].result()
    assert status == 1 and '"in_progress": true' in output
    assert "worker 1: proxy_ends_call.xml" in output and "FAILED: sipp" not in output
    harness.wait_until(lambda: len(transactions(api_url)) >= 2 * len(MIRRORS), "all have ended")
    durations = sorted(leg["duration"] for leg in transactions(api_url))
    assert len(durations) == 2 * len(MIRRORS)
    # A started second counts.
    assert durations[-2:] == [DEADLINE] * 2 and durations[-3] <= CALL_LIMIT + 1


def test_calls_go_through_where_the_mirror_cannot(tmp_path: Path) -> None:
    """A name of the agent that does not resolve: each sip_trace() fails, and no call does."""
    scenario = run_scenario.load(sipservers.SCENARIOS / "test_kamailio_call.yaml", "1")
    sipp = sipservers.program("sipp")
    with sipservers.proxy(("agent.invalid", 9060), tmp_path) as target:
        run_scenario.run_worker(scenario.workers[0], target, sipp)
    assert "could not resolve hostname" in (tmp_path / "kamailio.log").read_text(errors="replace")


def test_a_call_through_kamailio_mirrored_over_tcp(tmp_path: Path) -> None:
    """What docs/kamailio.md changes for it."""
    text = sipservers.CONFIGURATION.read_text(encoding="utf-8")
    scenario = run_scenario.load(sipservers.SCENARIOS / "test_kamailio_call.yaml", "1")
    sipp = sipservers.program("sipp")
    with harness.RatingServer() as api:
        options = [f"--rating-api-url={api.url}", harness.LOCAL]
        with harness.AgentProcess(*options) as agent:
            host, port = agent.tcp
            own = sipservers.free_port(socket.SOCK_STREAM)
            for line, changed in (
                ("disable_tcp=yes\n", "disable_tcp=no\n"),
                ("listen=LISTEN\n", f"listen=LISTEN\nlisten=tcp:127.0.0.1:{own}\n"),
                ("AGENT_URI)\n", f'"sip:{host}:{port};transport=tcp")\n'),
            ):
                assert text.count(line) == 1
                text = text.replace(line, changed)
            configuration = tmp_path / "tcp.cfg"
            configuration.write_text(text, encoding="utf-8")
            with sipservers.proxy(agent.udp, tmp_path, configuration=configuration) as target:
                run_scenario.run_worker(scenario.workers[0], target, sipp)
                harness.wait_until(lambda: len(api.requests) >= 2, "the call is charged")
    assert [path for path, _ in api.requests] == ["/v1/begin_transaction", "/v1/end_transaction"]


@pytest.mark.parametrize("name", ["README.md", "docs/kamailio.md", "conf/kamailio/kamailio.cfg"])
def test_what_users_are_told_to_write_can_stop_no_call(name: str) -> None:
    """The lines that the tests above run are in each document: they are copied from there."""
    text = (harness.ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"^ *#(?!!).*\n", "", text, flags=re.M) if name.endswith(".cfg") else text
    reply_routes = re.findall(r"^onreply_route \{\n    sip_trace\(.*\n(.*)\n\}", text, re.M)
    assert reply_routes == ["    return 1;"]
    assert OWN_REQUESTS in text
    assert re.findall(r'"duplicate_uri", "?([^")]+)', text) in (
        ["sip:192.0.2.10:9060"],
        ["AGENT_URI"],
    )


@pytest.mark.parametrize(
    "capture",
    ["requests-only-tcp/01t_tutorial_call", "transaction-tcp/01_answered_caller_bye"],
)
def test_opensips_scenario_with_a_recorded_opensips(capture: str, tmp_path: Path) -> None:
    """OpenSIPS is no package of Debian's: its own recorded mirror takes its place."""
    with sipservers.sandbox(tmp_path) as api_url:
        options = [f"--rating-api-url={api_url}", harness.LOCAL]
        with harness.AgentProcess(*options) as agent:
            host, port = agent.tcp
            status, output = sipservers.ScenarioRun(
                str(sipservers.SCENARIOS / "test_opensips_call.yaml"),
                *("-a", api_url, "-t", f"{host}:{port}"),
                *("--replay", str(CAPTURES / f"{capture}.hepl")),
            ).result()
        assert status == 0, output
        assert [leg["account_tag"] for leg in transactions(api_url)] == ["2000", "2001"]


# The runner, with an API of the tests' own and a stand-in for SIPp.

WORKER = "workers:\n  - {scenario: call.xml, values: {from_user: '1000', call_duration: 5}}\n"


def write(folder: Path, text: str, sipp: str = "exit 0") -> tuple[str, str]:
    """A scenario file and a stand-in for SIPp in the folder; both paths."""
    (folder / "call.xml").write_text("<!-- %(from_user)s %(call_duration)s %(target)s 100%% -->")
    (folder / "scenario.yaml").write_text(text)
    stand_in = folder / "sipp"
    stand_in.write_text(f'#!/bin/sh\nfolder="{folder}"\n{sipp}\n')
    stand_in.chmod(0o755)
    return str(folder / "scenario.yaml"), str(stand_in)


def start(api: harness.RatingServer, file: str, sipp: str) -> tuple[int, str]:
    return sipservers.ScenarioRun(file, "-a", api.url, "-t", "127.0.0.1:5060", "-e", sipp).result()


def test_steps_run_in_order_and_values_reach_sipp(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    text = """
setup: [{uri: /one, payload: {n: 1}}]
check: [{uri: /two, payload: {n: 2}, expected_response: '{"ok":  true}'}]
teardown: [{uri: /three, payload: {run: "%(run)s"}}]
workers:
  - {scenario: call.xml, values: {from_user: '1000', call_duration: 5}, number: 2, repeat: 2,
     call_rate: 50, call_rate_period: 2000, call_limit: 200, call_number: 100, timeout: 9,
     delay: 10}
"""
    file, sipp = write(tmp_path, text, 'echo "$@" >> $folder/calls; cat "$3" >> $folder/xml')
    status, output = start(api, file, sipp)
    assert status == 0, output
    assert [path for path, _ in api.requests] == ["/one", "/two", "/three"]
    assert api.requests[2][1]["run"].isdigit()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4
    assert "127.0.0.1:5060 -sf" in calls[0] and "-i 127.0.0.1" in calls[0]
    assert "-l 200 -m 100 -r 50 -rp 2000" in calls[0]
    assert (tmp_path / "xml").read_text().startswith("<!-- 1000 5 127.0.0.1:5060 100% -->")


def test_a_failed_check_shows_the_difference_and_teardown_runs(
    api: harness.RatingServer, tmp_path: Path
) -> None:
    text = f"""
{WORKER}
check:
  - {{uri: /first, payload: 1, expected_response: '{{"ok": false}}'}}
  - {{uri: /second, payload: 1, expected_response: {{ok: true}}}}
teardown: [{{uri: /last, payload: 1}}]
"""
    status, output = start(api, *write(tmp_path, text))
    assert status == 1
    assert '-  "ok": false' in output and '+  "ok": true' in output
    assert "check 2: POST /second: ok" in output and "teardown 1: POST /last: ok" in output
    assert "1 steps failed" in output


@pytest.mark.parametrize(
    ("within", "needed", "status"), [(20, 3, 0), (0, 2, 1), (0.7, 1_000_000, 1)]
)
def test_a_check_is_repeated_until_its_answer_is_the_expected_one(
    api: harness.RatingServer, tmp_path: Path, within: float, needed: int, status: int
) -> None:
    api.answer = lambda path, body: ("200 OK", {"ok": len(api.requests) >= needed})
    text = f"check: [{{uri: /x, payload: 1, within: {within}, expected_response: {{ok: true}}}}]\n"
    result, output = start(api, *write(tmp_path, text))
    assert result == status, output
    assert 1 <= len(api.requests) <= needed and (within or len(api.requests) == 1)
    assert ('-  "ok": true' in output) == (status == 1)


def test_a_failed_setup_makes_no_calls(api: harness.RatingServer, tmp_path: Path) -> None:
    api.answer = lambda path, body: ("200 OK", {"errors": [{"message": "no such field"}]})
    text = f"setup: [{{uri: /graphql, payload: 1}}]\n{WORKER}"
    status, output = start(api, *write(tmp_path, text, "touch $folder/called"))
    assert status == 1 and "no such field" in output
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("sipp", "worker", "shown"),
    [
        ("echo no answer >&2; exit 1", "", "status 1\nno answer"),
        ("exec sleep 30", ", timeout: 0.2", "was stopped after 0.2 s"),
    ],
)
def test_a_worker_that_fails_or_hangs(
    api: harness.RatingServer, tmp_path: Path, sipp: str, worker: str, shown: str
) -> None:
    text = WORKER.replace("}}\n", f"}}{worker}}}\n")
    status, output = start(api, *write(tmp_path, text, sipp))
    assert status == 1 and shown in output


def test_what_is_missing_is_a_failed_step(api: harness.RatingServer, tmp_path: Path) -> None:
    file, _ = write(tmp_path, WORKER)
    status, output = start(api, file, str(tmp_path / "no-sipp"))
    assert status == 1 and "No such file" in output
    file, sipp = write(tmp_path, WORKER.replace("from_user: '1000', ", ""))
    status, output = start(api, file, sipp)
    assert status == 1 and "value 'from_user' is missing" in output
    text = "check: [{uri: /x, host: 'http://127.0.0.1:1', method: GET, expected_response: {}}]\n"
    status, output = start(api, *write(tmp_path, text))
    assert status == 1 and "http://127.0.0.1:1/x: " in output and "refused" in output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("setup: {}\nchecks: []\n", "its keys are setup, workers, check, teardown"),
        ("setup: [1]\n", "setup is a list of entries"),
        ("setup: [{uri: /x, verb: PUT}]\n", "setup 1: unknown key 'verb'"),
        ("setup: [{payload: 1}]\n", "uri is missing"),
        ("setup: [{type: kamailio_xhttp, uri: /}]\n", "type 'kamailio_xhttp' is not supported"),
        ("check: [{uri: /x, expected_response: '{'}]\n", "expected_response is no JSON"),
        ("check: [{uri: /x, delay: soon}]\n", "delay is a number of 0 or more"),
        ("check: [{uri: /x, within: -1}]\n", "within is a number of 0 or more"),
        ("workers: [{scenario: none.xml}]\n", "'none.xml' is no file"),
        ("workers: [{scenario: call.xml, number: 0}]\n", "number is a whole number of 1 or more"),
        ("workers: [{scenario: call.xml, values: [1]}]\n", "values are texts and whole numbers"),
        ("a: [\n", "scenario.yaml"),
    ],
)
def test_a_file_that_cannot_be_run(tmp_path: Path, text: str, shown: str) -> None:
    (tmp_path / "call.xml").write_text("")
    (tmp_path / "scenario.yaml").write_text(text)
    with pytest.raises(run_scenario.ScenarioError, match="scenario.yaml") as caught:
        run_scenario.load(tmp_path / "scenario.yaml", "1")
    assert shown in str(caught.value)
    assert run_scenario.main([str(tmp_path / "scenario.yaml")]) == 2
