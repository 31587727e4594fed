"""The main job for the eye: real captured calls through the agent into the rating sandbox.

Starts sandbox and agent, makes accounts and rates, replays an answered OpenSIPS call over TCP, an
answered Kamailio call over UDP and a busy one, prints what the agent said and what was rated, and
stops both. With --stay the pair runs on, on the default ports, until Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = ROOT / "tests" / "captures"
CALLS = [
    ("OpenSIPS, answered", "tcp", "opensips-3.6/transaction-tcp/01_answered_caller_bye"),
    ("Kamailio, answered", "udp", "kamailio-5.6/transaction-udp/02_answered_callee_bye"),
    ("OpenSIPS, busy", "tcp", "opensips-3.6/transaction-tcp/03_busy_486"),
]
ACCOUNTS = """mutation {
  a1: upsertAccount(name: "Alex", account_tag: "2000", type: PREPAID, balance: 1000000,
    active: true, max_concurrent_transactions: 100, pricelist_tags: ["world"]) { id }
  a2: upsertAccount(name: "Fabio", account_tag: "2001", type: PREPAID, balance: 1000000,
    active: true, max_concurrent_transactions: 100, pricelist_tags: ["world"]) { id }
  upsertCarrier(carrier_tag: "carrier", active: true, protocol: UDP, host: "carrier", port: 5060)
    { id }
  upsertPricelist(pricelist_tag: "world", currency: EUR) { id }
  upsertPricelistRate(carrier_tag: "carrier", pricelist_tag: "world", prefix: "sip:", active: true,
    description: "all calls", rate: 1, rate_increment: 1, connect_fee: 5, interval_start: 0) { id }
}"""
TRANSACTIONS = """{ allTransactions(page: 0, perPage: 50, sortField: "timestamp_begin",
  sortOrder: "asc", filter: {}) { transaction_tag account_tag inbound source destination
  timestamp_begin duration fee } }"""
# Seconds for anything that has to happen.
DEADLINE = 15.0


class Program:
    """A program of ours that prints lines; stopped by its own process id."""

    def __init__(self, *command: str) -> None:
        self.lines: list[str] = []
        self._name = command[0]
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, number: int, text: str) -> list[str]:
        """Wait until so many lines hold the text. Raises SystemExit when the time is over."""
        deadline = time.monotonic() + DEADLINE
        while len(found := [line for line in self.lines if text in line]) < number:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit(f"demo: no {text!r} from {self._name}: {self.lines[-3:]}")
            time.sleep(0.02)
        return found

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()

    def stop(self) -> int:
        """Ask it to end, and wait."""
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(timeout=DEADLINE)


@contextmanager
def running(*command: str) -> Iterator[Program]:
    """A program that is stopped in the end, whatever happens."""
    program = Program(*command)
    try:
        yield program
    finally:
        program.stop()


def graphql(url: str, query: str) -> dict[str, Any]:
    """Ask the sandbox; returns the data. Raises SystemExit for what it refuses."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(
        f"{url}/graphql", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        result: dict[str, Any] = json.load(answer)
    if result.get("errors"):
        raise SystemExit(f"demo: the sandbox refuses: {result['errors']}")
    data: dict[str, Any] = result["data"]
    return data


def print_table(rows: list[dict[str, Any]]) -> None:
    """Dictionaries of the same keys as a table, as wide as it must be."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(padded).rstrip())


def address_of(agent: Program, transport: str) -> str:
    """Where the agent listens, from its own log."""
    lines = [json.loads(line) for line in agent.wait_for(2, '"listening"')]
    return next(str(x["address"]) for x in lines if x.get("transport") == transport)


def demo() -> None:
    """Start, replay, print, stop."""
    with running("scripts/rating_sandbox.py", "--listen", "127.0.0.1:0") as sandbox:
        url = sandbox.wait_for(1, "listening on")[0].rpartition(" ")[2]
        graphql(url, ACCOUNTS)
        options = ["--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0"]
        options += [f"--rating-api-url={url}", "--sip-local-domains=sip.canyan.io"]
        with running("rating_agent_hep.py", *options) as agent:
            print(f"rating sandbox on {url}, agent on", address_of(agent, "udp"), "(UDP) and",
                  address_of(agent, "tcp"), "(TCP)\n")  # fmt: skip
            for name, transport, capture in CALLS:
                print(f"replaying: {name} ({capture}.hepl)", flush=True)
                to = address_of(agent, transport)
                command = ["scripts/hep_replay.py", "--quiet", "--now", "--fresh", "--to", to]
                subprocess.run(
                    [sys.executable, *command, str(CAPTURES / f"{capture}.hepl")], check=True
                )
            said = [json.loads(x) for x in agent.wait_for(4, '"outcome": "ok"')]
        print("\nwhat the agent said:")
        for line in said:
            when = line.get("timestamp_begin") or line.get("timestamp_end")
            print(f"  {line['message']}: {line['call_id']} at {when} ({line['reason']})")
        rows = graphql(url, TRANSACTIONS)["allTransactions"]
        print("\nrated transactions (the busy call is not among them):")
        print_table(rows)
    if len(rows) != 4:
        raise SystemExit(f"demo: {len(rows)} transactions, 4 were expected")


def stay() -> None:
    """The same pair on the default ports, until Ctrl-C."""
    database = str(Path(tempfile.mkdtemp(prefix="rating-")) / "rating.sqlite")
    command = ["scripts/rating_sandbox.py", "--listen", "127.0.0.1:8000", "--database", database]
    with running(*command) as sandbox:
        url = sandbox.wait_for(1, "listening on")[0].rpartition(" ")[2]
        graphql(url, ACCOUNTS)
        options = [f"--rating-api-url={url}", "--sip-local-domains=sip.canyan.io"]
        with running("rating_agent_hep.py", "--log-format=text", *options) as agent:
            agent.wait_for(2, "listening")
            print(f"""\
The agent listens on port 9060, UDP and TCP; transactions: {url}/ (in {database})
Accounts 2000 and 2001 of domain sip.canyan.io are rated.

OpenSIPS: modparam("proto_hep", "hep_id", "[hid] THIS_HOST:9060; transport=tcp; version=3")
          modparam("tracer", "trace_id", "[tid]uri=hep:hid")
          trace("tid", "m", "sip");              # in the request route and in the reply route
Kamailio: modparam("siptrace", "hep_mode_on", 1)
          modparam("siptrace", "hep_version", 3)
          modparam("siptrace", "duplicate_uri", "sip:THIS_HOST:9060")
          sip_trace();                           # in the request route and in the reply route
A capture: {sys.executable} scripts/hep_replay.py --now --fresh tests/captures/...

Ctrl-C stops both. The agent says:""", flush=True)  # fmt: skip
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            shown = 0
            try:
                while True:
                    for line in agent.lines[shown:]:
                        print(line, flush=True)
                        shown += 1
                    time.sleep(0.2)
            except KeyboardInterrupt:
                print("stopping")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stay", action="store_true", help="run on until Ctrl-C")
    os.chdir(ROOT)
    stay() if parser.parse_args().stay else demo()
