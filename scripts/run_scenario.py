#!/usr/bin/env python3
"""Run call scenarios: make accounts, make calls with SIPp, compare what was rated.

    run_scenario.py tests/scenarios/test_kamailio_call.yaml \\
        --api-url http://127.0.0.1:8000 --target 127.0.0.1:5060

A scenario is a YAML file with four lists, in the format of the Canyan tutorial's tester:

    setup     API calls before the SIP calls: uri, method (POST), payload, expected_response, host
    workers   SIPp: scenario (an XML file beside this one), values for its %(name)s, number of
              instances (1), repeat (1), timeout in s, call_rate (1) in call_rate_period ms (1000),
              call_limit (1) at one time, call_number (1) of calls, delay in ms
    check     API calls after them, each after its delay in s; the answer must be expected_response,
              at the latest after `within` s (0): until then the call is repeated
    teardown  API calls at the end, whatever happened before

`host` is a base URL that takes the place of --api-url; an XML file may also name %(target)s and
%(basedir)s. Beyond the tutorial: `within`; %(run)s anywhere in the YAML file is a number that
differs between runs, so that a check sees the calls of its own run only; and with --replay a
recorded mirror is sent to the agent in the place of the workers, where there is no SIP server.

Exit status: 0 all is as expected, 1 a step failed (the difference is shown), 2 usage or file.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

API_TIMEOUT = 30.0  # seconds for one API call
REPEAT = 0.5  # seconds between two calls of a check that is repeated
# Seconds for one run of SIPp where its worker says nothing: a scenario that hangs must end.
WORKER_TIMEOUT = 600.0
ERROR_LINES = 12  # of SIPp's error file, shown for a failed worker
HEP_REPLAY = Path(__file__).resolve().parent / "hep_replay.py"


class ScenarioError(Exception):
    """A file that can't be run: status 2, one line."""


class StepError(Exception):
    """A step that failed: status 1. The text may have several lines."""


@dataclass(frozen=True)
class ApiCall:
    """One entry of `setup`, `check` or `teardown`."""

    uri: str
    method: str = "POST"
    payload: Any = None
    # Compared as JSON, so that blanks and the order of keys do not matter. None: not compared.
    expected_response: Any = None
    host: str = ""
    delay: float = 0.0
    within: float = 0.0


@dataclass(frozen=True)
class Worker:
    """One entry of `workers`."""

    scenario: Path
    values: dict[str, str] = field(default_factory=dict)
    number: int = 1
    repeat: int = 1
    timeout: float = WORKER_TIMEOUT
    call_rate: int = 1
    call_rate_period: int = 1000
    call_limit: int = 1
    call_number: int = 1
    delay: int = 0


@dataclass(frozen=True)
class Scenario:
    """A scenario file, checked."""

    path: Path
    setup: list[ApiCall]
    workers: list[Worker]
    check: list[ApiCall]
    teardown: list[ApiCall]


_COUNTS = "number repeat call_rate call_rate_period call_limit call_number".split()


def load(path: Path, run: str) -> Scenario:
    """Read a scenario file. Raises ScenarioError that names the file and the entry."""
    try:
        text = path.read_text(encoding="utf-8").replace("%(run)s", run)
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    parts = ("setup", "workers", "check", "teardown")
    if not isinstance(document, dict) or not set(document) <= set(parts):
        raise ScenarioError(f"{path}: its keys are {', '.join(parts)}")
    lists: dict[str, list[Any]] = {}
    for part in parts:
        entries = document.get(part) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ScenarioError(f"{path}: {part} is a list of entries")
        read = _read_worker if part == "workers" else _read_api_call
        lists[part] = []
        for number, entry in enumerate(entries, 1):
            try:
                lists[part].append(read(entry, path.parent))
            except (TypeError, ValueError) as error:
                raise ScenarioError(f"{path}: {part} {number}: {error}") from None
    return Scenario(path, **lists)


def _take(entry: dict[str, Any], kind: str, allowed: Sequence[str]) -> dict[str, Any]:
    """The entry without its `type`. Raises ValueError for a type or a key that is not known."""
    if entry.get("type", kind) != kind:
        raise ValueError(f"type {entry['type']!r} is not supported, only {kind!r}")
    unknown = [key for key in entry if key not in ("type", *allowed)]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, allowed: {', '.join(allowed)}")
    return {key: value for key, value in entry.items() if key != "type" and value is not None}


def _read_api_call(entry: dict[str, Any], folder: Path) -> ApiCall:
    given = _take(entry, "api", list(ApiCall.__dataclass_fields__))
    if not str(given.get("uri", "")).startswith("/"):
        raise ValueError("uri is missing, or does not begin with /")
    expected = given.get("expected_response")
    if isinstance(expected, str):
        try:
            given["expected_response"] = json.loads(expected)
        except ValueError as error:
            raise ValueError(f"expected_response is no JSON: {error}") from None
    for key in ("delay", "within"):
        given[key] = _number(given.get(key, 0), key)
    return ApiCall(**given)


def _read_worker(entry: dict[str, Any], folder: Path) -> Worker:
    given = _take(entry, "sipp", list(Worker.__dataclass_fields__))
    scenario = folder / str(given.get("scenario", ""))
    if not scenario.is_file():
        raise ValueError(f"scenario {given.get('scenario')!r} is no file beside it")
    values = given.get("values", {})
    if not isinstance(values, dict) or not all(isinstance(v, str | int) for v in values.values()):
        raise ValueError("values are texts and whole numbers")
    for key in _COUNTS:
        if key in given and (type(given[key]) is not int or given[key] < 1):
            raise ValueError(f"{key} is a whole number of 1 or more")
    given["timeout"] = _number(given.get("timeout", WORKER_TIMEOUT), "timeout")
    given["delay"] = int(_number(given.get("delay", 0), "delay"))
    texts = {str(key): str(value) for key, value in values.items()}
    return Worker(**{**given, "scenario": scenario, "values": texts})


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key} is a number of 0 or more")
    return float(value)


def ask(call: ApiCall, api_url: str) -> Any:
    """Make an API call and return the decoded answer, None for an empty one.

    Raises StepError where there is none, where it is no success, or where it is not the expected
    one.
    """
    url = (call.host or api_url).rstrip("/") + call.uri
    body = None if call.payload is None else json.dumps(call.payload).encode()
    request = urllib.request.Request(url, body, method=call.method)
    if body is not None:
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=API_TIMEOUT) as answer:
            text = answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        with error:
            raise StepError(f"{url}: status {error.code}: {error.read().decode()}") from None
    except (OSError, ValueError) as error:
        raise StepError(f"{url}: {error}") from None
    try:
        got = json.loads(text) if text else None
    except ValueError:
        raise StepError(f"{url}: the answer is no JSON: {text[:200]}") from None
    if call.expected_response is not None:
        if got != call.expected_response:
            raise StepError(f"{url}: not the expected answer\n{difference(call, got)}")
    # GraphQL tells of errors with status 200; a set-up that was refused would show much later.
    elif isinstance(got, dict) and got.get("errors"):
        raise StepError(f"{url}: {json.dumps(got['errors'])}")
    return got


def ask_until_expected(call: ApiCall, api_url: str) -> None:
    """Make an API call, again and again for as long as it allows. Raises the last StepError."""
    deadline = time.monotonic() + call.within
    while True:
        try:
            ask(call, api_url)
            return
        except StepError:
            if time.monotonic() + REPEAT > deadline:
                raise
        time.sleep(REPEAT)


def difference(call: ApiCall, got: Any) -> str:
    """The expected and the given answer, line by line: - is missing, + was not expected."""
    expected, given = (
        json.dumps(value, indent=2, sort_keys=True).splitlines()
        for value in (call.expected_response, got)
    )
    return "\n".join(difflib.unified_diff(expected, given, "expected", "given", "", "", 3, ""))


def local_address(target: str) -> str:
    """The address from which the target is reached: SIPp puts it into Via and Contact.

    Raises StepError where the target's name is not known.
    """
    host, _, port = target.rpartition(":")
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except (OSError, ValueError) as error:
        raise StepError(f"target {target}: {error}") from None


def run_worker(worker: Worker, target: str, sipp: str) -> None:
    """Run SIPp as often as the worker says. Raises StepError for the first run that fails."""
    values = {**worker.values, "target": target, "basedir": str(worker.scenario.parent)}
    try:
        text = worker.scenario.read_text(encoding="utf-8") % values
    except (KeyError, ValueError, TypeError) as error:
        raise StepError(f"{worker.scenario}: value {error} is missing, or a % is not %%") from None
    time.sleep(worker.delay / 1000)
    # SIPp leaves files where it runs and beside its scenario.
    with tempfile.TemporaryDirectory(prefix="scenario-") as folder:
        script, errors = Path(folder, "scenario.xml"), Path(folder, "errors")
        script.write_text(text, encoding="utf-8")
        command = [sipp, target, "-sf", str(script), "-i", local_address(target)]
        command += ["-l", str(worker.call_limit), "-m", str(worker.call_number)]
        command += ["-r", str(worker.call_rate), "-rp", str(worker.call_rate_period)]
        command += ["-nostdin", "-trace_err", "-error_file", str(errors)]
        for _ in range(worker.repeat):
            _run(command, folder, worker.timeout, errors)


def _run(command: list[str], folder: str, timeout: float, errors: Path) -> None:
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise StepError(f"{command[0]}: {error.strerror}") from None
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise StepError(f"{command[0]} was stopped after {timeout:g} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode:
        with contextlib.suppress(OSError):
            said += errors.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in said.splitlines() if line.strip()][-ERROR_LINES:]
        raise StepError("\n".join([f"{command[0]}: status {process.returncode}", *lines]))


def replay(captures: Sequence[Path], agent: str) -> None:
    """Send recorded mirrors to an agent, as calls of now. Raises StepError where that fails."""
    command = [sys.executable, str(HEP_REPLAY), "--now", "--fresh", "--quiet", "--to", agent]
    done = subprocess.run([*command, *map(str, captures)], capture_output=True, text=True)
    if done.returncode:
        raise StepError(f"hep_replay.py: status {done.returncode}\n{done.stderr.strip()}")


class Report:
    """Prints one line for each step, from several threads; knows whether all was well."""

    def __init__(self) -> None:
        self.failed = 0
        self._lock = threading.Lock()

    def step(self, name: str, action: Callable[[], object]) -> bool:
        """Carry a step out and print how it went."""
        began = time.monotonic()
        try:
            action()
        # Whatever it is, the step failed; in a thread it would be lost, and the run be green.
        except Exception as error:
            with self._lock:
                self.failed += 1
                text = error if isinstance(error, StepError) else repr(error)
                print(f"  {name}: FAILED: {text}", flush=True)
            return False
        with self._lock:
            print(f"  {name}: ok ({time.monotonic() - began:.1f} s)", flush=True)
        return True


def run(
    scenario: Scenario,
    report: Report,
    api_url: str,
    target: str,
    sipp: str,
    captures: Sequence[Path],
) -> None:
    """Run one scenario. What failed is in the report."""

    def api_calls(part: str, calls: list[ApiCall]) -> bool:
        done = True
        for number, call in enumerate(calls, 1):
            time.sleep(call.delay)
            name = f"{part} {number}: {call.method} {call.uri}"
            done &= report.step(name, partial(ask_until_expected, call, api_url))
        return done

    try:
        if not api_calls("setup", scenario.setup):
            return  # calls of accounts that are not there would only hide the reason
        if captures:
            names = ", ".join(capture.name for capture in captures)
            report.step(f"replay to {target}: {names}", lambda: replay(captures, target))
        else:
            run_workers(scenario.workers, report, target, sipp)
        api_calls("check", scenario.check)
    finally:
        api_calls("teardown", scenario.teardown)


def run_workers(workers: list[Worker], report: Report, target: str, sipp: str) -> None:
    """Run all workers side by side, and wait for them."""
    threads = []
    for number, worker in enumerate(workers, 1):
        calls = worker.call_number * worker.repeat
        name = f"worker {number}: {worker.scenario.name} to {target}, calls: {calls}"
        action = partial(run_worker, worker, target, sipp)
        threads += [
            threading.Thread(target=report.step, args=(name, action)) for _ in range(worker.number)
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the files one after the other. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Run call scenarios: accounts, SIPp calls, and what must be rated.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="scenario, YAML")
    parser.add_argument(
        "-a", "--api-url", default="http://127.0.0.1:8000", metavar="URL", help="the rating API"
    )
    parser.add_argument(
        "-t",
        "--target",
        default="127.0.0.1:5060",
        metavar="HOST:PORT",
        help="the SIP server; with --replay, where the agent listens for HEP",
    )
    parser.add_argument("-e", "--sipp", default="sipp", metavar="PROGRAM", help="default: sipp")
    parser.add_argument(
        "--replay",
        action="append",
        default=[],
        type=Path,
        metavar="CAPTURE",
        help="send this recorded mirror to the agent in the place of the workers",
    )
    options = parser.parse_args(arguments)
    started = f"{int(time.time()) % 100_000:05}{os.getpid() % 1000:03}"
    try:
        scenarios = [load(path, f"{started}{n}") for n, path in enumerate(options.files)]
    except ScenarioError as error:
        print(f"run_scenario.py: {error}", file=sys.stderr)
        return 2
    report = Report()
    for scenario in scenarios:
        print(scenario.path, flush=True)
        run(scenario, report, options.api_url, options.target, options.sipp, options.replay)
    print(f"{report.failed} steps failed" if report.failed else "all as expected", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
