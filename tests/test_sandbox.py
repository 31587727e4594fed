"""The sandbox keeps the observed contract of the rating API: a table, run over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rating_sandbox as rs

SCRIPT = Path(rs.__file__)
DEADLINE = 10.0  # seconds for the process to start or to stop; it takes some tenths
Body = dict[str, Any]


class Server:
    """A sandbox process on a free port of the loopback, and one connection to it."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(SCRIPT), "--listen", "127.0.0.1:0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], DEADLINE)[0]:
            self.process.kill()
            raise AssertionError("the sandbox does not start")
        self.line = self.process.stdout.readline().decode()
        found = re.fullmatch(r"rating sandbox listening on http://127\.0\.0\.1:(\d+)\n", self.line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"unexpected: {self.line!r} {self.process.communicate()}")
        self.port = int(found[1])
        self.connection = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, named)
        answer = self.connection.getresponse()
        return answer.status, answer.read()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, answer = self.ask("POST", path, json.dumps(body).encode(), **headers)
        return status, json.loads(answer)

    def graphql(self, query: str, **variables: Any) -> Any:
        status, answer = self.post("/graphql", {"query": query, "variables": variables})
        assert status == 200 and not answer.get("errors"), answer
        return answer["data"]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, bytes, bytes]:
        self.connection.close()
        self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    assert running.stop() == (0, b"", b"")  # no log, no traceback: no test made it stumble


_tenants = (f"tenant-{number}" for number in count())

ACCOUNTS = """mutation($t: ID) {
  upsertCarrier(tenant: $t, carrier_tag: "c", protocol: UDP, host: "h", port: 5060) {id}
  upsertPricelist(tenant: $t, pricelist_tag: "p", name: "p", currency: EUR) {id}
  upsertPricelistRate(tenant: $t, pricelist_tag: "p", carrier_tag: "c", prefix: "sip:49",
    description: "d", rate: 1, rate_increment: 1, connect_fee: 5, interval_start: 0) {id}
  a: upsertAccount(tenant: $t, account_tag: "2000", type: PREPAID, balance: 1000,
    pricelist_tags: ["p"], tags: ["own"]) {id}
  b: upsertAccount(tenant: $t, account_tag: "2001", type: PREPAID, balance: 1000,
    pricelist_tags: ["p"], tags: ["own"]) {id}
  c: upsertAccount(tenant: $t, account_tag: "off", type: PREPAID, active: false, balance: 1000) {id}
  d: upsertAccount(tenant: $t, account_tag: "post", type: POSTPAID, balance: 1000,
    pricelist_tags: ["p"], tags: ["own"]) {id}
  e: upsertAccount(tenant: $t, account_tag: "any", type: PREPAID, balance: 1000, tags: []) {id}
}"""


@pytest.fixture
def tenant(server: Server) -> str:
    """A tenant of the test's own with the accounts of ACCOUNTS."""
    name = next(_tenants)
    server.graphql(ACCOUNTS, t=name)
    return name


STORED = """query($t: ID) {
  allAccounts(filter: {tenant: $t}, sortField: "account_tag") {
    account_tag balance running_transactions { transaction_tag inbound timestamp_begin }
  }
  allTransactions(filter: {tenant: $t}, sortField: "account_tag", perPage: 100) {
    account_tag transaction_tag inbound duration fee tags authorized
  }
}"""


def written(record: Body) -> str:
    """A record as "account tag in|out seconds fee", its tags, and what an authorization said."""
    way = "in" if record["inbound"] else "out"
    text = f"{record['account_tag']} {record['transaction_tag']} {way}"
    text += "" if record["duration"] is None else f" {record['duration']} s, {record['fee']}"
    text += f" {'+'.join(record['tags'])}" if record["tags"] != ["own"] else ""
    said = {None: "", True: " authorized", False: " refused"}
    return text + said[record["authorized"]]


def stored(server: Server, tenant: str) -> tuple[list[str], list[str], dict[str, int]]:
    """What a tenant has running, as "account tag in|out minute", its records, and what it paid."""
    data = server.graphql(STORED, t=tenant)
    running = [
        f"{account['account_tag']} {leg['transaction_tag']} {'in' if leg['inbound'] else 'out'} "
        + leg["timestamp_begin"][11:16]
        for account in data["allAccounts"]
        for leg in account["running_transactions"]
    ]
    records = [written(record) for record in data["allTransactions"]]
    spent = {row["account_tag"]: 1000 - row["balance"] for row in data["allAccounts"]}
    return running, records, {tag: amount for tag, amount in spent.items() if amount}


def begin(minute: int = 0, **fields: Any) -> tuple[str, Body]:
    body = {"transaction_tag": "c1", "account_tag": "2000", "destination_account_tag": "2001"}
    stamp = {"destination": "sip:4930@x", "timestamp_begin": f"2026-11-23T10:{minute:02}:00.250Z"}
    return "begin_transaction", {**body, **stamp, **fields}


def end(minute: int = 1, **fields: Any) -> tuple[str, Body]:
    body = {"transaction_tag": "c1", "account_tag": "2000", "destination_account_tag": "2001"}
    stamp = f"2026-11-23T10:{minute:02}:00.750Z"
    return "end_transaction", {**body, "timestamp_end": stamp, **fields}


def rollback(**fields: Any) -> tuple[str, Body]:
    body = {"transaction_tag": "c1", "account_tag": "2000", "destination_account_tag": "2001"}
    return "rollback_transaction", {**body, **fields}


def record(**fields: Any) -> tuple[str, Body]:
    stamps = {
        "timestamp_begin": "2026-11-23T10:00:00Z",
        "timestamp_end": "2026-11-23T10:01:30Z",
    }
    return "record_transaction", {**begin()[1], "tags": ["asked"], **stamps, **fields}


def authorization(**fields: Any) -> tuple[str, Body]:
    body = {**begin()[1], "timestamp_auth": "2026-11-23T09:59:00Z", **fields}
    return "authorization", {name: body[name] for name in body if name != "timestamp_begin"}


def caller(request: tuple[str, Body]) -> tuple[str, Body]:
    """The request with the caller's tag alone."""
    return request[0], {**request[1], "destination_account_tag": None}


def callee(request: tuple[str, Body]) -> tuple[str, Body]:
    return request[0], {**request[1], "account_tag": None}


def nobody(operation: str, **fields: Any) -> tuple[str, Body]:
    """A request that says no more than which call it is."""
    return operation, {"transaction_tag": "c1", **fields}


@dataclass
class Case:
    """Requests with what each is answered, then what is stored and who paid how much."""

    name: str
    steps: list[tuple[tuple[str, Body], bool]]
    running: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    spent: dict[str, int] = field(default_factory=dict)
    rest: bool = False  # the case can't be said in GraphQL
    # The real services differ, see the table at the head of the sandbox; so they do in all records
    # over GraphQL.
    here: bool = False


BOTH_RUN = ["2000 c1 out 10:00", "2001 c1 in 10:00"]
BOTH_DONE = ["2000 c1 out 60 s, 65", "2001 c1 in 60 s, 0"]
PAID = {"2000": 65}
BAD = "\U0001f4de"
CONTRACT = [
    Case("begin and end write one record for each leg, and the caller pays",
         [(begin(), True), (end(), True)], [], BOTH_DONE, PAID),
    Case("before its end a call is only running, and costs nothing", [(begin(), True)], BOTH_RUN),
    # What stops a begin
    Case("unknown caller", [(begin(account_tag="nobody"), False)]),
    Case("unknown callee: nothing begun for the caller either",
         [(begin(destination_account_tag="nobody"), False)]),
    Case("inactive caller", [(begin(account_tag="off"), False)]),
    Case("inactive callee", [(begin(destination_account_tag="off"), False)]),
    Case("other tenant", [(begin(tenant="elsewhere"), False)]),
    Case("both tags null",
         [(begin(account_tag=None, destination_account_tag=None), False),
          (end(account_tag=None, destination_account_tag=None), False),
          (rollback(account_tag=None, destination_account_tag=None), False)]),
    Case("characters beyond the BMP in the tag", [(begin(transaction_tag=BAD), False)]),
    Case("characters beyond the BMP in the tag alone",
         [(nobody("begin_transaction", transaction_tag=BAD), False)]),
    Case("characters beyond the BMP in the source", [(begin(source=f"sip:{BAD}@x"), False)]),
    Case("characters beyond the BMP in a record's tags", [(record(tags=[BAD]), False)]),
    Case("half a character", [(begin(transaction_tag="\ud800"), False)], here=True),
    Case("a year before 1000",
         [(begin(timestamp_begin="0001-01-01T00:00:00Z"), False), (begin(), True),
          (end(timestamp_end="0999-12-31T23:59:59Z"), False)], BOTH_RUN),
    # One leg
    Case("caller only", [(caller(begin()), True)], ["2000 c1 out 10:00"]),
    Case("callee only: nobody pays", [(callee(begin()), True), (callee(end()), True)],
         [], ["2001 c1 in 60 s, 0"]),
    Case("an empty callee is like none",
         [(begin(destination_account_tag=""), True), (end(destination_account_tag=""), True)],
         [], ["2000 c1 out 60 s, 65"], PAID),
    Case("an empty caller is like none",
         [(begin(account_tag=""), True), (end(account_tag=""), True)],
         [], ["2001 c1 in 60 s, 0"]),
    Case("both tags empty: fine, nothing stored",
         [(begin(account_tag="", destination_account_tag=""), True),
          (end(account_tag="", destination_account_tag=""), True)]),
    Case("an empty callee is none that a rollback finds",
         [(begin(destination_account_tag=""), True),
          (rollback(destination_account_tag=""), False)]),
    # Twice
    Case("begin twice with the same body", [(begin(), True), (begin(), True)], BOTH_RUN),
    Case("begin twice with another time stamp: two running entries",
         [(begin(0), True), (begin(1), True)],
         ["2000 c1 out 10:00", "2000 c1 out 10:01", "2001 c1 in 10:00", "2001 c1 in 10:01"]),
    Case("the end of such a call takes both entries; the first makes the record",
         [(begin(0), True), (begin(1), True), (end(2), True)],
         [], ["2000 c1 out 120 s, 125", "2001 c1 in 120 s, 0"], {"2000": 125}),
    Case("begin twice with another source: two running entries",
         [(caller(begin(source="a")), True), (caller(begin(source="b")), True)],
         ["2000 c1 out 10:00", "2000 c1 out 10:00"]),
    Case("begin twice with other tags: they are dropped, so it is the same body",
         [(begin(tags=["a"]), True), (begin(tags=["b"]), True)], BOTH_RUN),
    Case("end without begin", [(end(), False)]),
    Case("end twice", [(begin(), True), (end(), True), (end(), False)], [], BOTH_DONE, PAID),
    Case("a tag used again after its end overwrites the record, and is paid again",
         [(begin(0), True), (end(1), True), (begin(2), True), (end(5), True)],
         [], ["2000 c1 out 180 s, 185", "2001 c1 in 180 s, 0"], {"2000": 65 + 185}),
    Case("end of another call", [(begin(), True), (end(transaction_tag="c2"), False)], BOTH_RUN),
    Case("one account on both sides: two entries, of which the end finds one",
         [(begin(destination_account_tag="2000"), True),
          (end(destination_account_tag="2000"), False)],
         [], ["2000 c1 out 60 s, 65"], PAID),
    # A leg that is not there at the end
    Case("end with both tags where the caller only was begun: the caller's record is written",
         [(caller(begin()), True), (end(), False)], [], ["2000 c1 out 60 s, 65"], PAID),
    Case("end with both tags where the callee only was begun: it runs on",
         [(callee(begin()), True), (end(), False)], ["2001 c1 in 10:00"]),
    Case("end with an unknown callee: the caller runs on",
         [(begin(), True), (end(destination_account_tag="nobody"), False)], BOTH_RUN),
    Case("end with an unknown caller: the callee runs on",
         [(begin(), True), (end(account_tag="nobody"), False)], BOTH_RUN),
    Case("rollback of the caller, then end of both: the callee runs on",
         [(begin(), True), (caller(rollback()), True), (end(), False)], ["2001 c1 in 10:00"]),
    # Rollback
    Case("rollback leaves nothing", [(begin(), True), (rollback(), True)]),
    Case("end after rollback", [(begin(), True), (rollback(), True), (end(), False)]),
    Case("rollback without begin", [(rollback(), False)]),
    Case("rollback after end keeps the record",
         [(begin(), True), (end(), True), (rollback(), False)], [], BOTH_DONE, PAID),
    Case("rollback of one leg leaves the other",
         [(begin(), True), (caller(rollback()), True)], ["2001 c1 in 10:00"]),
    Case("rollback with an unknown caller still drops the callee",
         [(begin(), True), (rollback(account_tag="nobody"), False)], ["2000 c1 out 10:00"]),
    # Tags
    Case("a record has the account's tags, not those of the begin",
         [(begin(tags=["asked", BAD]), True), (end(), True)], [], BOTH_DONE, PAID),
    Case("a recorded call has the request's tags, then the account's", [(caller(record()), True)],
         [], ["2000 c1 out 90 s, 95 asked+own"]),
    # Texts
    Case("characters of the BMP", [(begin(transaction_tag="ü€\uffff"), True)],
         ["2000 ü€\uffff out 10:00", "2001 ü€\uffff in 10:00"]),
    Case("an empty transaction_tag is a tag like others",
         [(begin(transaction_tag=""), True)], ["2000  out 10:00", "2001  in 10:00"]),
    Case("SQL in a tag is text", [(begin(transaction_tag="' OR 1=1 --"), True),
         (end(transaction_tag="x' OR '1'='1"), False)],
         ["2000 ' OR 1=1 -- out 10:00", "2001 ' OR 1=1 -- in 10:00"]),
    Case("product_tag and unknown fields are ignored, whatever they hold",
         [(begin(product_tag=["VOICE"], timestamp_end=[], nonsense={"a": 1}), True)],
         BOTH_RUN, rest=True),
    # Time
    Case("24 hours wrap to 0 s, and cost the connect fee",
         [(begin(), True), (end(timestamp_end="2026-11-24T10:00:00Z"), True)],
         [], ["2000 c1 out 0 s, 5", "2001 c1 in 0 s, 0"], {"2000": 5}),
    Case("25 hours wrap to 3,600 s",
         [(begin(), True), (end(timestamp_end="2026-11-24T11:00:00Z"), True)],
         [], ["2000 c1 out 3600 s, 3605", "2001 c1 in 3600 s, 0"], {"2000": 3605}),
    Case("a call of 0 s is free, of the connect fee too", [(begin(), True), (end(0), True)],
         [], ["2000 c1 out 0 s, 0", "2001 c1 in 0 s, 0"]),
    Case("an end before the begin is 0 s", [(begin(5), True), (end(1), True)],
         [], ["2000 c1 out 0 s, 0", "2001 c1 in 0 s, 0"]),
    Case("fractions are cut, not rounded",
         [(begin(timestamp_begin="2026-11-23T10:00:00.999999999Z"), True),
          (end(timestamp_end="2026-11-23T10:00:02.1Z"), True)],
         [], ["2000 c1 out 2 s, 7", "2001 c1 in 2 s, 0"], {"2000": 7}),
    Case("offsets count",
         [(begin(timestamp_begin="2026-11-23T12:00:00+02:00"), True),
          (end(timestamp_end="2026-11-23T05:30:30-04:30"), True)],
         [], ["2000 c1 out 30 s, 35", "2001 c1 in 30 s, 0"], {"2000": 35}),
    # Money
    Case("a POSTPAID account pays too",
         [(caller(begin(account_tag="post")), True), (caller(end(account_tag="post")), True)],
         [], ["post c1 out 60 s, 65"], {"post": 65}),
    Case("an account without price lists has those of its tenant",
         [(caller(begin(account_tag="any")), True), (caller(end(account_tag="any")), True)],
         [], ["any c1 out 60 s, 65 "], {"any": 65}),
    Case("no rate: no fee",
         [(begin(destination="sip:1@x"), True), (end(), True)],
         [], ["2000 c1 out 60 s, 0", "2001 c1 in 60 s, 0"]),
    # Record
    Case("record is begin and end in one, but nobody pays, and both legs are the caller's",
         [(record(), True)],
         [], ["2000 c1 out 90 s, 95 asked+own", "2001 c1 out 90 s, 0 asked+own"]),
    Case("record twice is stored once", [(caller(record()), True), (caller(record()), True)],
         [], ["2000 c1 out 90 s, 95 asked+own"]),
    Case("record with an unknown callee writes nothing",
         [(record(destination_account_tag="nobody"), False)]),
    Case("record of an inactive account writes nothing", [(record(account_tag="off"), False)]),
    Case("record with neither tag", [(nobody("record_transaction"), False)]),
    Case("record of a failure is a record like others",
         [(caller(record(failed=True, failed_reason="486", authorized=False)), True)],
         [], ["2000 c1 out 90 s, 95 asked+own"], rest=True),
    Case("record without tags has the account's",
         [(caller(record(tags=None)), True)], [], ["2000 c1 out 90 s, 95"], here=True),
    # Neither tag: what the records of the call say, such as those of an authorization
    Case("an authorization is a record",
         [(authorization(tags=["asked"]), True)], [],
         ["2000 c1 out asked+own authorized", "2001 c1 in asked+own authorized"], rest=True),
    Case("begin and end of an authorized call need no accounts",
         [(caller(authorization()), True),
          (nobody("begin_transaction", timestamp_begin="2026-11-23T10:00:00Z"), True),
          (nobody("end_transaction", timestamp_end="2026-11-23T10:01:00Z"), True)],
         [], ["2000 c1 out 60 s, 65 authorized"], PAID),
    Case("the same of the callee",
         [(callee(authorization()), True),
          (nobody("begin_transaction", timestamp_begin="2026-11-23T10:00:00Z"), True)],
         ["2001 c1 in 10:00"], ["2001 c1 in authorized"]),
    Case("the same of both",
         [(authorization(), True),
          (nobody("begin_transaction", timestamp_begin="2026-11-23T10:00:00Z"), True)],
         BOTH_RUN, ["2000 c1 out authorized", "2001 c1 in authorized"], here=True),
    Case("rollback of such a call",
         [(caller(authorization()), True), (caller(begin()), True),
          (nobody("rollback_transaction"), True)],
         [], ["2000 c1 out authorized"]),
    Case("an authorization after the end leaves the rest of the record",
         [(begin(), True), (end(), True), (caller(authorization()), True)],
         [], ["2000 c1 out 60 s, 65 authorized", "2001 c1 in 60 s, 0"], PAID),
    Case("authorization of a rejected kind is no record",
         [(authorization(account_tag="nobody"), False), (authorization(account_tag="off"), False),
          (authorization(destination="sip:1@x"), False),
          (authorization(destination_account_tag="off"), False),
          (nobody("authorization", destination="sip:1@x"), False)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.name)
def test_contract_over_rest(server: Server, tenant: str, case: Case) -> None:
    for (operation, body), expected in case.steps:
        body = {"tenant": tenant, **body}
        status, answer = server.post(f"/v1/{operation}", body)
        assert status == 200
        names = ("tenant", "transaction_tag", "account_tag", "destination_account_tag")
        assert {name: answer.pop(name) for name in names} == {
            name: body.get(name) for name in names
        }
        if operation == "authorization":
            assert expected == (answer["authorized"] or answer["authorized_destination"])
        else:
            assert answer == {"ok": expected}
    assert stored(server, tenant) == (case.running, case.records, case.spent)


def mutation(operation: str, body: Body) -> tuple[str, Body]:
    """The GraphQL twin of a REST request, every value in a variable."""
    kinds = {"tenant": "ID", "transaction_tag": "String!", "tags": "[String]"}
    kinds |= dict.fromkeys(("timestamp_auth", "timestamp_begin", "timestamp_end"), "DateTime")
    declared = ", ".join(f"${name}: {kinds.get(name, 'String')}" for name in body)
    arguments = ", ".join(f"{name}: ${name}" for name in body)
    verb = operation.replace("_t", "T")
    said = "authorized authorized_destination" if operation == "authorization" else "ok"
    return f"mutation({declared}) {{ {verb}({arguments}) {{ {said} }} }}", body


@pytest.mark.parametrize(
    "case", [case for case in CONTRACT if not case.rest], ids=lambda case: case.name
)
def test_contract_over_graphql(server: Server, tenant: str, case: Case) -> None:
    for (operation, body), expected in case.steps:
        query, variables = mutation(operation, {"tenant": tenant, **body})
        status, answer = server.post("/graphql", {"query": query, "variables": variables})
        assert status == 200 and answer["errors"] is None
        (said,) = answer["data"].values()
        assert any(said.values()) == expected
    assert stored(server, tenant) == (case.running, case.records, case.spent)


TAKEN = [
    # field, value, what is stored of it
    ("transaction_tag", 1, "1"),
    ("transaction_tag", 1.5, "1.5"),
    ("transaction_tag", True, "True"),
    ("transaction_tag", float("nan"), "nan"),
    ("transaction_tag", "x" * 100_000, "x" * 100_000),
    ("source", 7, "7"),
    ("source", None, ""),
    ("source_ip", None, ""),
    ("destination", None, ""),
    ("carrier_ip", None, ""),
    ("carrier_ip", "\x00\n", "\x00\n"),
    ("account_tag", 2000, None),
    ("tags", [1, True], None),
    *(("timestamp_begin", value, "2026-11-23T10:00:00") for value in [
        "2026-11-23T10:00:00.999999Z", "2026-11-23T10:00:00", "2026-11-23 10:00:00Z",
        "2026-11-23T10:00Z", "2026-11-23T10:00", "2026-11-23T04:30:00-0530", "2026-11-23T12:00+02",
        "2026-11-23T10:00:00.0123456789Z", 1795428000, 1795428000.9, 1795428000000, "1795428000",
        "1795428000000.5",
    ]),
    ("timestamp_begin", True, "1970-01-01T00:00:01"),
    ("timestamp_begin", -0.5, "1969-12-31T23:59:59"),
    ("timestamp_begin", "1900-01-01T00:00:00Z", "1900-01-01T00:00:00"),
    ("timestamp_begin", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "expected"), TAKEN)
def test_a_value_that_is_taken(
    server: Server, tenant: str, field: str, value: object, expected: str | None
) -> None:
    _, body = begin(**{field: value})
    status, answer = server.post("/v1/begin_transaction", {"tenant": tenant, **body})
    assert status == 200 and answer["ok"]
    query = """query($t: ID) { Account(tenant: $t, account_tag: "2000") { running_transactions {
      transaction_tag source source_ip destination carrier_ip timestamp_begin } } }"""
    (leg,) = server.graphql(query, t=tenant)["Account"]["running_transactions"]
    assert expected is None or leg[field] == expected


MISSING = ("value_error.missing", "field required")
NO_NULL = ("type_error.none.not_allowed", "none is not an allowed value")
NO_TEXT = ("type_error.str", "str type expected")
NO_TIME = ("value_error.datetime", "invalid datetime format")
REFUSED: dict[str, tuple[Any, list[str | int], tuple[str, str]]] = {
    # body, where it is wrong, and how
    "transaction_tag is missing": ({"account_tag": "2000"}, ["transaction_tag"], MISSING),
    "transaction_tag is null": (begin(transaction_tag=None)[1], ["transaction_tag"], NO_NULL),
    "transaction_tag is a list": (begin(transaction_tag=["c1"])[1], ["transaction_tag"], NO_TEXT),
    "tenant is null": (begin(tenant=None)[1], ["tenant"], NO_NULL),
    "account_tag is a list": (begin(account_tag=["2000"])[1], ["account_tag"], NO_TEXT),
    "source is an object": (begin(source={})[1], ["source"], NO_TEXT),
    **{
        f"time stamp: {name}": (begin(timestamp_begin=value)[1], ["timestamp_begin"], NO_TIME)
        for name, value in {
            "empty": "", "bare date": "2026-11-23", "no such day": "2026-02-30T10:00:00Z",
            "small t": "2026-11-23t10:00:00Z", "small z": "2026-11-23T10:00:00z",
            "13 digits": "2026-11-23T10:00:00.0123456789012Z", "words": "yesterday",
            "year 0": "0000-01-01T00:00:00Z", "hour 24": "2026-11-23T24:00:00Z",
        }.items()
    },
    "time stamp: list": (
        begin(timestamp_begin=[])[1], ["timestamp_begin"],
        ("type_error", "invalid type; expected datetime, string, bytes, int or float"),
    ),
    "body is text": ("text", [], ("type_error.dict", "value is not a valid dict")),
    "body is null": (None, [], MISSING),
}  # fmt: skip


@pytest.mark.parametrize("body, where, how", REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_field_is_422_and_stores_nothing(
    server: Server, tenant: str, body: Any, where: list[str | int], how: tuple[str, str]
) -> None:
    if isinstance(body, dict):
        body = {"tenant": tenant, **body}
    status, answer = server.post("/v1/begin_transaction", body)
    assert status == 422
    wrong = {"loc": ["body", "request", *where], "type": how[0], "msg": how[1]}
    assert answer == {"detail": [wrong]}
    assert stored(server, tenant) == ([], [], {})


def test_every_wrong_field_is_named(server: Server, tenant: str) -> None:
    body = record(tenant=tenant, account_tag=[], tags=["a", None, {}], timestamp_end="never")[1]
    status, answer = server.post("/v1/record_transaction", body)
    assert status == 422
    assert [(wrong["loc"][2:], wrong["type"]) for wrong in answer["detail"]] == [
        (["account_tag"], NO_TEXT[0]),
        (["tags", 1], NO_NULL[0]),
        (["tags", 2], NO_TEXT[0]),
        (["timestamp_end"], NO_TIME[0]),
    ]
    status, answer = server.post("/v1/record_transaction", {**body, "tags": "a"})
    assert status == 422 and answer["detail"][1]["type"] == "type_error.list"


@pytest.mark.parametrize(
    "value",
    [
        *("inf", "-inf", "nan", float("inf"), 10**400),
        *("9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00", "2026-11-23T10:00:00+24:00"),
    ],
)
def test_a_time_out_of_range_is_422(server: Server, tenant: str, value: object) -> None:
    body = {"tenant": tenant, **begin(timestamp_begin=value)[1]}
    assert server.post("/v1/begin_transaction", body)[0] == 422


BAD_HTTP: list[tuple[str, str, bytes | None, int]] = [
    ("POST", "/v1/begin_transaction", b"{", 400),
    ("POST", "/v1/begin_transaction", b"", 422),
    ("POST", "/v1/begin_transaction", b'"\xff"', 400),
    ("POST", "/v1/begin_transaction", b"[" * 100_000, 400),
    ("POST", "/graphql", b"{", 400),
    ("POST", "/graphql", b"[]", 400),
    ("POST", "/graphql", b'{"query": 1}', 400),
    ("POST", "/graphql", b'{"query": "{"}', 400),
    ("POST", "/graphql", b'{"query": "{ nothing }"}', 400),
    ("POST", "/graphql", b'{"query": "' + b"{a" * 50_000 + b'"}', 400),
    ("GET", "/v1/begin_transaction", None, 405),
    ("PUT", "/v1/end_transaction", b"{}", 405),
    ("GET", "/graphql", None, 400),
    ("PUT", "/graphql", b"{}", 405),
    ("POST", "/status", b"", 405),
    ("POST", "/v1/nothing", b"{}", 404),
    ("POST", "/begin_transaction", b"{}", 404),
    ("GET", "/v1/", None, 404),
    ("GET", "/status", None, 204),
]


@pytest.mark.parametrize(("method", "path", "body", "expected"), BAD_HTTP)
def test_http_status(
    server: Server, method: str, path: str, body: bytes | None, expected: int
) -> None:
    status, answer = server.ask(method, path, body)
    assert status == expected
    if expected == 204:
        assert answer == b""
    elif answer != b"No GraphQL query found in the request":
        assert json.loads(answer).keys() & {"detail", "errors"}
    assert server.ask("GET", "/status")[0] == 204  # the connection and the server are well


def test_a_body_of_4_mib_is_read_and_a_longer_one_is_413(server: Server) -> None:
    limit = rs.MAX_BODY
    assert server.ask("POST", "/v1/begin_transaction", b"[" + b" " * (limit - 2) + b"]")[0] == 422
    assert server.ask("POST", "/v1/begin_transaction", b" " * (limit + 1))[0] == 413

    def chunks(size: int) -> Iterator[bytes]:
        yield b"["
        for _ in range(size // 65_536):
            yield b" " * 65_536
        yield b"]"

    for size, expected in ((65_536, 422), (limit, 413)):
        connection = server.connect()
        connection.request("POST", "/v1/begin_transaction", chunks(size), encode_chunked=True)
        assert connection.getresponse().status == expected
        connection.close()


def test_the_answer_is_the_recorded_one_byte_for_byte(server: Server) -> None:
    server.graphql(SETUP)
    body = begin(transaction_tag="call-1@host")[1]
    assert server.ask("POST", "/v1/begin_transaction", json.dumps(body).encode()) == (
        200,
        b'{"ok":true,"tenant":"default","transaction_tag":"call-1@host","account_tag":"2000",'
        b'"destination_account_tag":"2001"}',
    )
    assert server.post("/v1/rollback_transaction", body)[1]["ok"]


def test_an_absent_time_stamp_is_the_services_now(server: Server, tenant: str) -> None:
    body = {"tenant": tenant, "transaction_tag": "now", "account_tag": "2000"}
    before = int(time.time())
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    assert server.post("/v1/end_transaction", {**body, "timestamp_end": None})[1]["ok"]
    after = int(time.time())
    query = """query($t: ID) { allTransactions(filter: {tenant: $t}) {
      timestamp_begin timestamp_end duration } }"""
    (made,) = server.graphql(query, t=tenant)["allTransactions"]
    assert before <= rs.read_timestamp(made["timestamp_begin"]) <= after
    assert before <= rs.read_timestamp(made["timestamp_end"]) <= after
    assert made["duration"] >= 1, "the begin is cut to its second, the end is not"


SETUP = """mutation { a1:upsertAccount(name:"Alex",account_tag:"2000",type:PREPAID,balance:1000000,\
active:true,max_concurrent_transactions:100){id} a2:upsertAccount(name:"Fabio",account_tag:"2001",\
type:PREPAID,balance:1000000,active:true,max_concurrent_transactions:100){id} upsertCarrier(\
carrier_tag:"carrier",active:true,protocol:UDP,host:"carrier",port:5060){id} upsertPricelist(\
pricelist_tag:"pricelist",currency:EUR){id} upsertPricelistRate(carrier_tag:"carrier",\
pricelist_tag:"pricelist",prefix:"sip:49",active:true,description:"pricelist rate",rate:1,\
rate_increment:1,connect_fee:0,interval_start:0){id} }"""
CHECK = """{ allTransactions(page:0, perPage:1, sortField:"timestamp_begin", sortOrder:"desc", \
filter:{account_tag:"%s"}) { tenant account_tag source destination inbound fee } }"""


def test_the_tutorial_runs_unchanged(server: Server) -> None:
    status, answer = server.post("/graphql", {"query": SETUP})
    assert status == 200
    assert list(answer["data"]) == [
        *("a1", "a2", "upsertCarrier", "upsertPricelist", "upsertPricelistRate"),
    ]
    again = server.graphql(SETUP)
    assert again == answer["data"], "an upsert finds what it made"
    who: Body = {"source": "sip:2000@sip.canyan.io", "destination": "sip:2001@sip.canyan.io"}
    assert server.post("/v1/begin_transaction", begin(**who)[1])[1]["ok"]
    assert server.post("/graphql", {"query": CHECK % "2000"})[1] == {
        "data": {"allTransactions": []}
    }
    assert server.post("/v1/end_transaction", end()[1])[1]["ok"]
    for account_tag, inbound in (("2000", "false"), ("2001", "true")):
        body = json.dumps({"query": CHECK % account_tag}).encode()
        expected = (
            '{"data":{"allTransactions":[{"tenant":"default","account_tag":"%s",'
            '"source":"sip:2000@sip.canyan.io","destination":"sip:2001@sip.canyan.io",'
            '"inbound":%s,"fee":0}]}}'
        )
        answered = server.ask("POST", "/graphql", body, Content_Type="application/json")
        assert answered == (200, (expected % (account_tag, inbound)).encode())


def test_one_failing_mutation_leaves_the_others(server: Server, tenant: str) -> None:
    query = """mutation($t: ID) {
      one: beginTransaction(tenant: $t, transaction_tag: "x", account_tag: "2000") {ok}
      upsertPricelistRate(pricelist_tag: "nowhere", carrier_tag: "c", prefix: "4") {id}
      two: beginTransaction(tenant: $t, transaction_tag: "y", account_tag: "nobody") {ok}
    }"""
    status, answer = server.post("/graphql", {"query": query, "variables": {"t": tenant}})
    assert status == 400
    done = {"one": {"ok": True}, "upsertPricelistRate": None, "two": {"ok": False}}
    assert answer["data"] == done
    assert [error["path"] for error in answer["errors"]] == [["upsertPricelistRate"]]
    assert "'nowhere' is not there" in answer["errors"][0]["message"]


REFUSED_QUERIES = {
    "a wrong time stamp as a literal": ('beginTransaction(%s, timestamp_begin: "soon") {ok}', {}),
    "a number for a time stamp": ("beginTransaction(%s, timestamp_begin: 1) {ok}", {}),
    "a wrong time stamp as a variable": (
        "beginTransaction(%s, timestamp_begin: $d) {ok}",
        {"d": "soon"},
    ),
    "String for a tenant": ("beginTransaction(%s, tenant: $s) {ok}", {"s": "default"}),
    "String for a time stamp": ("beginTransaction(%s, timestamp_begin: $s) {ok}", {"s": "1"}),
    "authorization with tags": ('authorization(%s, tags: ["a"]) {authorized}', {}),
    "authorization has no ok": ("authorization(%s) {ok}", {}),
    "a field of other services": ("recordTransaction(%s, failed: true) {ok}", {}),
    "an account without a type": ('upsertAccount(account_tag: "2000") {id}', {}),
}


@pytest.mark.parametrize(
    ("field", "variables"), REFUSED_QUERIES.values(), ids=REFUSED_QUERIES.keys()
)
def test_a_refused_query_does_nothing(
    server: Server, tenant: str, field: str, variables: Body
) -> None:
    field = field.replace("%s", 'transaction_tag: "x", account_tag: "2000"')
    declared = "".join(
        f", ${name}: {'DateTime' if name == 'd' else 'String'}" for name in variables
    )
    query = f"""mutation($t: ID{declared}) {{
      ok: beginTransaction(tenant: $t, transaction_tag: "c1", account_tag: "2000") {{ok}}
      {field} }}"""
    status, answer = server.post(
        "/graphql", {"query": query, "variables": {"t": tenant, **variables}}
    )
    assert status == 400 and answer["data"] is None and answer["errors"][0]["message"]
    assert stored(server, tenant) == ([], [], {})


def test_graphql_as_the_agent_service_answers_it(server: Server, tenant: str) -> None:
    assert server.graphql("{version}") == {"version": 1}
    query = """mutation($t: ID, $d: DateTime) { beginTransaction(tenant: $t, transaction_tag: "x",
      account_tag: "", timestamp_begin: $d) {ok tenant} }"""
    status, answer = server.post("/graphql", {"query": query, "variables": {"t": None, "d": None}})
    assert status == 200
    begun = {"ok": True, "tenant": "default"}
    assert answer == {"data": {"beginTransaction": begun}, "errors": None}
    query = "mutation { authorization(transaction_tag: 1) {authorized} }"
    assert server.post("/graphql", {"query": query})[0] == 400
    assert "errors" not in server.post("/graphql", {"query": "{allAccounts {id}}"})[1]


# Rates of the tests of fees: list, carrier, prefix, active and the four numbers.
RATES = [
    ("p", "c", "sip:49", True, (1, 1, 0, 0)),
    ("p", "c", "sip:4930", True, (7, 60, 10, 1)),
    ("p", "c", "sip:4989", False, (1000, 1, 0, 0)),
    ("q", "c", "sip:493", True, (2, 30, 5, 0)),
    ("other", "c", "sip:49301", True, (500, 1, 0, 0)),
    ("p", "dear", "sip:44", True, (9, 1, 0, 0)),
    ("p", "cheap", "sip:44", True, (3, 1, 0, 0)),
    ("p", "c", "sip:33111", True, (1, 1, 0, 0)),
    ("p", "c", "sip:331112", True, (100, 1, 0, 0)),
]
FEES = [
    # price lists, destination, seconds, prefix that rates the call, fee
    (["p"], "sip:4912345@x", 30, "sip:49", 30),  # the observed one
    (["p"], "sip:4912345@x", 0, "sip:49", 0),
    (["p"], "sip:4912345@x", -30, "sip:49", 0),
    (["p"], "sip:49301@x", 60, "sip:4930", 10),
    (["p"], "sip:49301@x", 61, "sip:4930", 17),
    (["p"], "sip:49301@x", 180, "sip:4930", 24),
    (["p"], "sip:49301@x", 0, "sip:4930", 0),
    (["p"], "sip:4989@x", 5, "sip:49", 5),
    (["p", "q"], "sip:4935@x", 31, "sip:493", 9),
    (["q", "p"], "sip:49301@x", 61, "sip:4930", 17),
    (["p"], "sip:44@x", 10, "sip:44", 90),  # of two the older
    (["p"], "sip:331112@x", 10, "sip:33111", 10),  # 10 characters never match
    (["p"], "sip:49301", 60, "sip:4930", 10),
    (["p"], "sip:4930", 60, "sip:49", 60),  # a prefix is shorter than the destination
    (["p"], "sip:49", 10, None, 0),
    (["p"], "sip:4", 10, None, 0),
    (["p"], "tel:+49", 10, None, 0),
    (["p"], "", 10, None, 0),
    (["p"], None, 10, None, 0),
    (["missing"], "sip:49@x", 10, None, 0),
    ([], "sip:4930@x", 10, "sip:4930", 10),  # every list of the tenant
    ([], "sip:49301@x", 10, "sip:49301", 5000),
]


@pytest.fixture(scope="module")
def rated(server: Server) -> str:
    name = next(_tenants)
    for pricelist, carrier, prefix, active, numbers in RATES:
        server.graphql(
            """mutation($t: ID!, $p: String!, $c: String!, $x: String!, $a: Boolean,
              $r: Int, $i: Int, $f: Int, $s: Int) {
              upsertPricelist(tenant: $t, pricelist_tag: $p) {id}
              upsertCarrier(tenant: $t, carrier_tag: $c, protocol: TCP, host: $c, port: 5061) {id}
              upsertPricelistRate(tenant: $t, pricelist_tag: $p, carrier_tag: $c, prefix: $x,
                active: $a, description: "d", rate: $r, rate_increment: $i, connect_fee: $f,
                interval_start: $s) {id} }""",
            **{"t": name, "p": pricelist, "c": carrier, "x": prefix, "a": active},
            **dict(zip("rifs", numbers, strict=True)),
        )
    return name


@pytest.mark.parametrize("kind", ["PREPAID", "POSTPAID"])
@pytest.mark.parametrize(("lists", "destination", "seconds", "prefix", "fee"), FEES)
def test_fees(
    server: Server,
    rated: str,
    kind: str,
    lists: list[str],
    destination: str | None,
    seconds: int,
    prefix: str | None,
    fee: int,
) -> None:
    tag = f"call-{next(_numbers)}"
    balance = 10**12
    server.graphql(
        """mutation($t: ID!, $a: String!, $b: String!, $k: AccountType!, $l: [String],
          $m: BigInt) {
          a: upsertAccount(tenant: $t, account_tag: $a, type: $k, balance: $m,
            pricelist_tags: $l) {id}
          b: upsertAccount(tenant: $t, account_tag: $b, type: $k, balance: $m,
            pricelist_tags: $l) {id} }""",
        **{"t": rated, "a": f"a-{tag}", "b": f"b-{tag}", "k": kind, "l": lists, "m": balance},
    )
    tags = {"account_tag": f"a-{tag}", "destination_account_tag": f"b-{tag}"}
    call = {"tenant": rated, "transaction_tag": tag, **tags, "destination": destination}
    start = rs.read_timestamp("2026-11-23T10:00:00Z")
    stamp = rs.write_timestamp(start)
    assert server.post("/v1/begin_transaction", {**call, "timestamp_begin": stamp})[1]["ok"]
    stamp = rs.write_timestamp(start + seconds)
    assert server.post("/v1/end_transaction", {**call, "timestamp_end": stamp})[1]["ok"]
    data = server.graphql(
        """query($t: ID!, $c: String!) { allTransactions(sortField: "inbound",
          filter: {tenant: $t, transaction_tag: $c}) { fee duration inbound primary
          destination_rate {prefix pricelist_tag} account {balance} } }""",
        **{"t": rated, "c": tag},
    )
    caller, callee = data["allTransactions"]
    assert (caller["inbound"], callee["inbound"]) == (False, True)
    assert caller["fee"] == fee and caller["duration"] == max(0, seconds)
    assert (caller["destination_rate"] or {}).get("prefix") == prefix
    assert caller["account"]["balance"] == balance - fee
    assert (callee["fee"], callee["destination_rate"]) == (0, None)
    assert callee["account"]["balance"] == balance


_numbers = count()


def test_the_carriers_of_an_account_are_those_that_rate_its_calls(
    server: Server, rated: str
) -> None:
    query = """mutation($t: ID!, $c: [String]) { upsertAccount(tenant: $t, account_tag: "carried",
      type: PREPAID, pricelist_tags: ["p"], carrier_tags: $c, tags: []) {id} }"""
    body: Body = {"tenant": rated, "account_tag": "carried", "destination": "sip:44@x"}
    for carriers, fee in ((["cheap"], 30), (["dear", "cheap"], 90), (["c"], 0)):
        server.graphql(query, t=rated, c=carriers)
        call = {**body, "transaction_tag": "-".join(carriers)}
        call |= {"timestamp_begin": "2026-11-23T10:00:00Z", "timestamp_end": "2026-11-23T10:00:10Z"}
        assert server.post("/v1/record_transaction", {**call, "tags": []})[1]["ok"]
        found = server.graphql(
            """query($t: ID, $c: String) { Transaction(tenant: $t, transaction_tag: $c,
              account_tag: "carried") {fee} }""",
            **{"t": rated, "c": call["transaction_tag"]},
        )
        assert found == {"Transaction": {"fee": fee}}


def test_the_rate_is_that_of_the_begin(server: Server, tenant: str) -> None:
    def price(rate: int) -> None:
        server.graphql(
            """mutation($t: ID!, $r: Int) { upsertPricelistRate(tenant: $t, pricelist_tag: "p",
              carrier_tag: "c", prefix: "sip:49", rate: $r) {id} }""",
            **{"t": tenant, "r": rate},
        )

    price(2)
    body = caller(begin(tenant=tenant))[1]
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    price(50)
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    query = """query($t: ID!) { Account(tenant: $t, account_tag: "2000") {
      balance running_transactions { destination_rate { rate connect_fee description } } } }"""
    account = server.graphql(query, t=tenant)["Account"]
    rates = [{"rate": rate, "connect_fee": 5, "description": "d"} for rate in (2, 50)]
    assert account == {
        "balance": 1000,
        "running_transactions": [{"destination_rate": rate} for rate in rates],
    }, "a price list that was edited between a begin and its retry makes a second entry"
    assert server.post("/v1/end_transaction", {"tenant": tenant, **caller(end())[1]})[1]["ok"]
    assert server.graphql(query, t=tenant)["Account"]["balance"] == 1000 - 125


def test_a_record_without_a_rate_keeps_that_of_an_earlier_call_of_its_tag(
    server: Server, tenant: str
) -> None:
    for destination in ("sip:4930@x", "sip:1@x"):
        body = caller(begin(tenant=tenant, destination=destination))[1]
        assert server.post("/v1/begin_transaction", body)[1]["ok"]
        assert server.post("/v1/end_transaction", {"tenant": tenant, **caller(end())[1]})[1]["ok"]
    query = """query($t: ID!) { Transaction(tenant: $t, transaction_tag: "c1",
      account_tag: "2000") { destination fee destination_rate {prefix} } }"""
    assert server.graphql(query, t=tenant)["Transaction"] == {
        **{"destination": "sip:1@x", "fee": 0, "destination_rate": {"prefix": "sip:49"}}
    }


def test_an_account_switched_off_during_a_call_is_still_charged(
    server: Server, tenant: str
) -> None:
    body = {"tenant": tenant, **begin()[1]}
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    off = """mutation($t: ID!) { upsertAccount(tenant: $t, account_tag: "2000", type: PREPAID,
      active: false) {id} }"""
    server.graphql(off, t=tenant)
    assert not server.post("/v1/begin_transaction", {**body, "transaction_tag": "c2"})[1]["ok"]
    assert server.post("/v1/end_transaction", {"tenant": tenant, **end()[1]})[1]["ok"]
    assert stored(server, tenant) == ([], BOTH_DONE, PAID)


def test_an_upsert_changes_what_it_names_and_makes_active(server: Server, tenant: str) -> None:
    answer = server.graphql(
        """mutation($t: ID!) {
          one: upsertAccount(tenant: $t, account_tag: "n", name: "N", type: POSTPAID,
            active: false, balance: -9000000000, max_concurrent_transactions: 3,
            pricelist_tags: ["p", "q"], carrier_tags: ["c"], tags: ["x"]) {id}
          two: upsertAccount(tenant: $t, account_tag: "n", type: POSTPAID, balance: 9000000000) {
            id tenant name account_tag type active balance max_concurrent_transactions
            pricelist_tags carrier_tags tags running_transactions {inbound} } }""",
        t=tenant,
    )
    expected: Body = {"tenant": tenant, "name": "N", "account_tag": "n", "type": "POSTPAID"}
    expected |= {"active": True, "balance": 9_000_000_000, "max_concurrent_transactions": 3}
    expected |= {"pricelist_tags": ["p", "q"], "carrier_tags": ["c"], "tags": ["x"]}
    assert answer["two"] == {**expected, **answer["one"], "running_transactions": []}
    query = "query($i: ID!) { Account(id: $i) { account_tag } }"
    assert server.graphql(query, i=answer["one"]["id"]) == {"Account": {"account_tag": "n"}}


@pytest.mark.parametrize(
    "arguments",
    [
        *("balance: 1.5", 'balance: "5"', "balance: true", "balance: 10000000000001"),
        "max_concurrent_transactions: 3000000000",
    ],
)
def test_a_wrong_value_of_an_account_is_an_error(
    server: Server, tenant: str, arguments: str
) -> None:
    query = f"""mutation {{ upsertAccount(tenant: "{tenant}", account_tag: "w", type: PREPAID,
      {arguments}) {{id}} }}"""
    status, answer = server.post("/graphql", {"query": query})
    assert status == 400 and answer["errors"]
    query = 'query($t: ID!) { Account(tenant: $t, account_tag: "w") {id} }'
    assert server.graphql(query, t=tenant) == {"Account": None}


LIST = """query($t: ID!, $page: Int = 0, $size: Int = 25, $by: String = "id",
  $way: String = "asc", $q: String, $tag: String, $account: String, $inbound: Boolean,
  $primary: Boolean, $ids: [ID]) {
  allTransactions(page: $page, perPage: $size, sortField: $by, sortOrder: $way, filter: {tenant: $t,
    q: $q, transaction_tag: $tag, account_tag: $account, inbound: $inbound, primary: $primary,
    ids: $ids}) { id transaction_tag account_tag }
  _allTransactionsMeta(filter: {tenant: $t, q: $q, transaction_tag: $tag, account_tag: $account,
    inbound: $inbound, primary: $primary, ids: $ids}) { count } }"""


def test_paging_sorting_and_filter_of_transactions(server: Server, tenant: str) -> None:
    for minute, tag in enumerate(["Bravo", "alpha", "charlie"]):
        for request in (begin(minute, transaction_tag=tag), end(minute + 10, transaction_tag=tag)):
            body = {"tenant": tenant, **request[1]}
            assert server.post(f"/v1/{request[0]}", body)[1]["ok"]

    def listed(**variables: Any) -> tuple[list[str], int]:
        data = server.graphql(LIST, t=tenant, **variables)
        rows = [row["transaction_tag"][0] + row["account_tag"] for row in data["allTransactions"]]
        return rows, data["_allTransactionsMeta"]["count"]

    newest = {"by": "timestamp_begin", "way": "desc"}
    assert listed(**newest) == (["c2001", "c2000", "a2001", "a2000", "B2001", "B2000"], 6)
    assert listed(**newest, size=2, page=1) == (["a2001", "a2000"], 6)
    assert listed(**newest, size=4, page=1) == (["B2001", "B2000"], 6)
    assert listed(**newest, page=1) == ([], 6)
    assert listed(by="timestamp_begin", way="ASC", account="2000") == (
        ["B2000", "a2000", "c2000"],
        3,
    )
    assert listed(by="transaction_tag", inbound=True) == (["B2001", "a2001", "c2001"], 3)
    assert listed(tag="alpha", inbound=False) == (["a2000"], 1)
    assert listed(q="RAV", inbound=False) == (["B2000"], 1)
    assert listed(q="2001", tag="Bravo") == (["B2001"], 1)
    assert listed(q="%") == ([], 0)
    assert listed(primary=True)[1] == 6 and listed(primary=False) == ([], 0)
    ids = [row["id"] for row in server.graphql(LIST, t=tenant)["allTransactions"]]
    assert ids == sorted(ids)
    assert listed(ids=ids[:2])[1] == 2 and listed(ids=[])[1] == 6
    query = """query($i: ID!, $t: ID!) {
      Transaction(id: $i) {id}
      named: Transaction(tenant: $t, transaction_tag: "alpha", account_tag: "2001") {inbound}
      none: Transaction(tenant: $t, transaction_tag: "alpha", account_tag: "nobody") {inbound} }"""
    assert server.graphql(query, i=ids[0], t=tenant) == {
        "Transaction": {"id": ids[0]},
        "named": {"inbound": True},
        "none": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        *("page: -1", "perPage: 0", "perPage: 10001", 'sortOrder: "sideways"'),
        *('sortField: "id; DROP TABLE record"', 'sortField: "nothing"'),
    ],
)
def test_a_wrong_page_is_an_error(server: Server, arguments: str) -> None:
    answer = server.post("/graphql", {"query": f"{{ allTransactions({arguments}) {{id}} }}"})[1]
    assert answer["data"] == {"allTransactions": None} and answer["errors"]


def test_filter_of_accounts(server: Server, tenant: str) -> None:
    query = """query($t: ID!, $active: Boolean, $busy: Boolean, $q: String) {
      allAccounts(sortField: "account_tag", filter: {tenant: $t, active: $active, q: $q,
        with_running_transactions: $busy}) {account_tag}
      _allAccountsMeta(filter: {tenant: $t, active: $active, q: $q,
        with_running_transactions: $busy}) {count} }"""

    def listed(**variables: Any) -> list[str]:
        data = server.graphql(query, t=tenant, **variables)
        tags = [row["account_tag"] for row in data["allAccounts"]]
        assert data["_allAccountsMeta"] == {"count": len(tags)}
        return tags

    assert server.post("/v1/begin_transaction", begin(tenant=tenant)[1])[1]["ok"]
    everyone = ["2000", "2001", "any", "off", "post"]
    assert listed() == listed(active=False) == listed(busy=False) == everyone
    assert listed(active=True) == ["2000", "2001", "any", "post"]
    assert listed(busy=True) == ["2000"], "the callee's running calls do not count"
    assert listed(q="OF") == ["off"]


def test_without_a_filter_all_tenants_with_one_the_default(server: Server, tenant: str) -> None:
    body = {"tenant": tenant, **record(transaction_tag="mine")[1]}
    assert server.post("/v1/record_transaction", body)[1]["ok"]
    tenants = {
        row["tenant"]
        for row in server.graphql("{allTransactions(perPage: 10000) {tenant}}")["allTransactions"]
    }
    assert tenant in tenants
    query = '{allTransactions(filter: {transaction_tag: "mine"}) {tenant}}'
    assert server.graphql(query) == {"allTransactions": []}


def test_every_field_of_a_record_and_of_a_running_transaction(server: Server, tenant: str) -> None:
    fields: Body = {"source": "sip:a@x", "source_ip": "192.0.2.1", "destination": "sip:b@x"}
    fields |= {"carrier_ip": "192.0.2.2"}
    query, body = mutation(*begin(tenant=tenant, tags=["asked"], **fields))
    assert server.graphql(query, **body)["beginTransaction"]["ok"]
    query = """query($t: ID!) { Account(tenant: $t, account_tag: "2000") { running_transactions {
      transaction_tag source source_ip destination carrier_ip tags in_progress inbound
      timestamp_begin timestamp_end destination_rate {rate} } } }"""
    (leg,) = server.graphql(query, t=tenant)["Account"]["running_transactions"]
    common = {**fields, "transaction_tag": "c1", "inbound": False, "destination_rate": None}
    common["timestamp_begin"] = "2026-11-23T10:00:00"
    assert leg == {**common, "tags": None, "in_progress": True, "timestamp_end": None}
    assert server.post("/v1/end_transaction", {"tenant": tenant, **end()[1]})[1]["ok"]
    query = """query($t: ID!) { Transaction(tenant: $t, transaction_tag: "c1", account_tag: "2000")
      { id tenant transaction_tag account_tag account {name} source source_ip destination
      carrier_ip tags authorized unauthorized_reason destination_rate {rate} timestamp_auth
      timestamp_begin timestamp_end primary inbound duration fee } }"""
    made = server.graphql(query, t=tenant)["Transaction"]
    assert re.fullmatch(r"[0-9a-f-]{36}", made.pop("id"))
    assert made == {
        **common,
        **{"tenant": tenant, "account_tag": "2000", "account": {"name": None}, "tags": ["own"]},
        **{"authorized": None, "unauthorized_reason": None, "timestamp_auth": None},
        **{"timestamp_end": "2026-11-23T10:01:00", "primary": True, "duration": 60, "fee": 0},
    }


def test_the_record_of_an_authorization(server: Server, tenant: str) -> None:
    body = {"tenant": tenant, **authorization(source="sip:a@x", tags=["asked"])[1]}
    assert server.post("/v1/authorization", body)[1] == {
        **{name: body[name] for name in ("tenant", "transaction_tag", "account_tag")},
        **{"destination_account_tag": "2001", "authorized": True, "authorized_destination": True},
        **{"unauthorized_account_tag": None, "unauthorized_reason": None},
        **{"max_available_units": 995, "balance": 1000, "carriers": ["UDP:h:5060"]},
    }
    query = """query($t: ID!) { Transaction(tenant: $t, transaction_tag: "c1", account_tag: "2000")
      { source destination carrier_ip tags authorized unauthorized_reason timestamp_auth
      timestamp_begin timestamp_end primary inbound duration fee destination_rate {rate} } }"""
    found = server.graphql(query, t=tenant)["Transaction"]
    assert found == {
        **{"source": "sip:a@x", "destination": "sip:4930@x", "carrier_ip": ""},
        **{"tags": ["asked", "own"], "authorized": True, "unauthorized_reason": ""},
        **{"timestamp_auth": "2026-11-23T09:59:00", "timestamp_begin": None, "primary": True},
        **{"timestamp_end": None, "inbound": False, "duration": None, "fee": None},
        "destination_rate": None,
    }


AUTHORIZED = [
    # changes to the account, fields of the request, reason, seconds
    ("", {}, None, 50),
    ("balance: 1000000", {}, None, 14_400),
    ("type: POSTPAID, balance: 0", {}, None, 14_400),
    ("balance: 0", {}, "BALANCE_INSUFFICIENT", 0),
    ("balance: 5", {"destination": "sip:4930@x"}, None, 0),  # not even the connect fee
    ("balance: 24", {"destination": "sip:4930@x"}, None, 121),  # two steps of 60 s, and 1
    ("active: false", {}, "NOT_ACTIVE", 0),
    ("max_concurrent_transactions: 0", {}, "TOO_MANY_RUNNING_TRANSACTIONS", 0),
    ("", {"account_tag": "nobody"}, "NOT_FOUND", 0),
    ("", {"destination": "sip:1"}, "UNREACHEABLE_DESTINATION", 0),
    ("", {"destination_account_tag": "off"}, "NOT_ACTIVE", 0),
    ("", {"destination_account_tag": "nobody"}, "NOT_FOUND", 0),
]
KEPT = (None, "BALANCE_INSUFFICIENT", "TOO_MANY_RUNNING_TRANSACTIONS")


@pytest.mark.parametrize(("changes", "fields", "reason", "seconds"), AUTHORIZED)
def test_authorization(
    server: Server,
    rated: str,
    changes: str,
    fields: Body,
    reason: str | None,
    seconds: int,
) -> None:
    tag = f"auth-{time.time_ns()}"
    changes = changes if "type" in changes else f"type: PREPAID {changes}"
    server.graphql(
        f"""mutation($t: ID!, $a: String!) {{
          off: upsertAccount(tenant: $t, account_tag: "off", type: PREPAID, active: false) {{id}}
          one: upsertAccount(tenant: $t, account_tag: $a, type: PREPAID, balance: 50,
            pricelist_tags: ["p"]) {{id}}
          two: upsertAccount(tenant: $t, account_tag: $a, {changes}) {{id}} }}""",
        **{"t": rated, "a": tag},
    )
    body = {"tenant": rated, "transaction_tag": tag, "account_tag": tag, "destination": "sip:491@x"}
    body |= {"timestamp_auth": "2026-11-23T10:00:00Z", **fields}
    status, answer = server.post("/v1/authorization", body)
    assert status == 200 and "ok" not in answer
    assert (answer["authorized"], answer["unauthorized_reason"]) == (reason is None, reason)
    assert answer["max_available_units"] == seconds
    assert answer["carriers"][:1] == ([] if reason else ["TCP:c:5061"])
    found = server.graphql(
        """query($t: ID!, $c: String!) {
          allTransactions(filter: {tenant: $t, transaction_tag: $c}) {authorized} }""",
        **{"t": rated, "c": tag},
    )
    kept = [{"authorized": reason is None}] if reason in KEPT else []
    assert found == {"allTransactions": kept}


def test_an_authorization_counts_what_runs(server: Server, tenant: str) -> None:
    """The balance is that of the leg looked at last, less its running calls."""
    now = int(time.time())
    body = begin(tenant=tenant, timestamp_begin=now - 100)[1]
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    body = {**authorization(tenant=tenant, transaction_tag="c2")[1]}
    answer = server.post("/v1/authorization", {**body, "destination_account_tag": None})[1]
    spent = 1000 - answer["balance"]
    assert 105 <= spent <= 105 + DEADLINE and answer["max_available_units"] == 1000 - spent - 5
    answer = server.post("/v1/authorization", body)[1]
    assert answer["balance"] == 1000 and answer["max_available_units"] <= 1000 - spent - 5
    query = """mutation($t: ID!) { upsertAccount(tenant: $t, account_tag: "2001", type: PREPAID,
      max_concurrent_transactions: 1) {id} }"""
    server.graphql(query, t=tenant)
    answer = server.post("/v1/authorization", body)[1]
    assert answer["unauthorized_account_tag"] == "2001" and answer["balance"] == 0
    assert answer["unauthorized_reason"] == "TOO_MANY_RUNNING_TRANSACTIONS"
    assert stored(server, tenant)[1] == ["2000 c2 out refused", "2001 c2 in refused"]


def test_the_carriers_are_the_cheapest_first(server: Server, rated: str) -> None:
    query = """mutation($t: ID!) { upsertAccount(tenant: $t, account_tag: "routed", type: PREPAID,
      balance: 1000, pricelist_tags: ["p"]) {id} }"""
    server.graphql(query, t=rated)
    body = {"tenant": rated, "transaction_tag": "routed", "account_tag": "routed"}
    answer = server.post("/v1/authorization", {**body, "destination": "sip:44@x"})[1]
    assert answer["carriers"] == ["TCP:cheap:5061", "TCP:dear:5061"]


def test_the_page_lists_calls_and_escapes_what_came_from_the_network(
    server: Server, tenant: str
) -> None:
    evil = "<script>alert('x')</script>&\"{0}{running}"
    body: Body = {"tenant": tenant, "transaction_tag": evil, "source": evil, "destination": evil}
    body |= {"account_tag": "2000", "timestamp_begin": "2030-01-01T00:00:00Z", "tags": []}
    assert server.post("/v1/record_transaction", body)[1]["ok"]
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    server.connection.request("GET", "/")
    answer = server.connection.getresponse()
    page = answer.read().decode()
    assert answer.status == 200 and answer.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "default-src 'none'" in (answer.getheader("Content-Security-Policy") or "")
    escaped = "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;{0}{running}"
    assert page.count(escaped) == 6 and "<script" not in page
    assert "http" not in page.replace("listening on http", "")  # it loads nothing from elsewhere
    rows = page.split("<tbody>")[2].split("<tr>")
    assert "2030-01-01" in rows[1], "the newest comes first"


def test_the_page_shows_200_rows_at_most(server: Server, tenant: str) -> None:
    fields = " ".join(
        f'a{n}: recordTransaction(tenant: "{tenant}", transaction_tag: "many-{n}", '
        f'account_tag: "2000", timestamp_begin: "2026-11-23T10:00:00Z") {{ok}}'
        for n in range(210)
    )
    server.graphql(f"mutation {{ {fields} }}")
    page = server.ask("GET", "/")[1].decode()
    assert page.split("<tbody>")[2].count("<tr>") == rs.HTML_ROWS
    count = server.graphql("{_allTransactionsMeta {count}}")["_allTransactionsMeta"]["count"]
    assert f"Transactions ({count})" in page


def test_32_connections_are_kept_alive(server: Server, tenant: str) -> None:
    def work(worker: int) -> set[int]:
        connection = server.connect()
        ports = set()
        for number in range(20):
            body = begin(tenant=tenant, transaction_tag=f"{worker}-{number}")[1]
            connection.request("POST", "/v1/begin_transaction", json.dumps(body).encode())
            ports.add(connection.sock.getsockname()[1])
            answer = connection.getresponse()
            assert answer.version == 11 and json.loads(answer.read())["ok"]
        connection.close()
        return ports

    started = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        ports = list(pool.map(work, range(32)))
    took = time.monotonic() - started
    assert all(len(used) == 1 for used in ports)
    assert len(stored(server, tenant)[0]) == 2 * 32 * 20
    # An answer sent in two parts costs 40 ms for each request, 0.8 s a connection, if the second
    # part waits for the client's acknowledgement; 640 requests take about 0.4 s otherwise.
    assert took < DEADLINE


def test_no_answer_waits_for_an_acknowledgement(server: Server) -> None:
    connection = server.connect()
    times = []
    for _ in range(9):
        started = time.perf_counter()
        connection.request("POST", "/graphql", b'{"query": "{__typename}"}')
        connection.getresponse().read()
        times.append(time.perf_counter() - started)
    connection.close()
    assert sorted(times)[4] < 0.03


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    request = b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as connection:
        connection.sendall(request + request + last)
        answers = b""
        while data := connection.recv(65_536):
            answers += data
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"204", b"204", b"404"]


def test_a_token_is_asked_for_everywhere_but_at_status() -> None:
    server = Server("--token", "s3cret")
    try:
        assert server.ask("GET", "/status")[0] == 204
        for method, path in (("GET", "/"), ("POST", "/graphql"), ("POST", "/v1/begin_transaction")):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                assert server.ask(method, path, b"{}", **given)[0] == 401
        assert server.ask("GET", "/", Authorization="Bearer s3cret")[0] == 200
        body = begin()[1]
        headers = {"Authorization": "Bearer s3cret"}
        assert server.post("/v1/begin_transaction", body, **headers)[0] == 200
    finally:
        assert server.stop(signal.SIGINT)[0] == 0


def test_a_database_file_outlives_the_process(tmp_path: Path) -> None:
    file = tmp_path / "rating.db"
    first = Server("--database", str(file), "--verbose")
    first.graphql(ACCOUNTS, t="kept")
    assert first.post("/v1/begin_transaction", {"tenant": "kept", **begin()[1]})[1]["ok"]
    code, out, err = first.stop()
    assert (code, out) == (0, b"") and err.count(b"POST /") == 2
    second = Server("--database", str(file))
    try:
        assert stored(second, "kept") == (BOTH_RUN, [], {})
        assert second.post("/v1/end_transaction", {"tenant": "kept", **end()[1]})[1]["ok"]
        second.process.kill()
    finally:
        second.stop(signal.SIGKILL)
    third = Server("--database", str(file))
    try:
        assert stored(third, "kept") == ([], BOTH_DONE, PAID)
    finally:
        assert third.stop()[0] == 0


def test_a_file_of_the_earlier_version_keeps_its_calls(tmp_path: Path) -> None:
    file = tmp_path / "rating.db"
    leg = """number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, account_tag TEXT NOT NULL,
        transaction_tag TEXT NOT NULL, inbound INTEGER NOT NULL, source TEXT, source_ip TEXT,
        destination TEXT, carrier_ip TEXT, tags TEXT NOT NULL, timestamp_begin INTEGER NOT NULL,
        destination_rate TEXT"""
    values = "1, 'default', '1', 'c', 0, 'a', NULL, 'b', NULL, '[\"asked\"]', 1000, NULL"
    with sqlite3.connect(file) as db:
        db.executescript(f"""
            PRAGMA application_id = {rs.APPLICATION_ID};
            CREATE TABLE running ({leg});
            CREATE INDEX running_by_call ON running (tenant, account_tag, transaction_tag);
            CREATE TABLE record ({leg}, id TEXT NOT NULL UNIQUE, timestamp_auth INTEGER,
                timestamp_end INTEGER NOT NULL, duration INTEGER NOT NULL, fee INTEGER NOT NULL,
                failed INTEGER NOT NULL, failed_reason TEXT NOT NULL,
                UNIQUE (tenant, account_tag, transaction_tag));
            CREATE INDEX record_by_begin ON record (timestamp_begin);
            INSERT INTO running VALUES ({values.replace("'c'", "'d'")});
            INSERT INTO record VALUES ({values}, 'x', NULL, 1060, 60, 65, 0, '');""")
    db.close()
    for _ in range(2):
        sandbox = rs.Sandbox(str(file))
        (made,), (runs,) = sandbox.find("record"), sandbox.find("running", order="number")
        assert (made["transaction_tag"], made["duration"], made["fee"]) == ("c", 60, 65)
        assert made["tags"] == ["asked"] and made["timestamp_end"] == "1970-01-01T00:17:40"
        assert (runs["transaction_tag"], runs["source"]) == ("d", "a")
        sandbox.close()
    sandbox = rs.Sandbox(str(file))
    sandbox.upsert("account", {"tenant": "default", "account_tag": "1"})
    assert sandbox.end(rs.Request("d", account_tag="1"), 1030)
    assert sandbox.authorize(rs.Request("e", destination_account_tag="1"), 1030)
    assert sandbox.count("record") == 3 and sandbox.count("running") == 0
    sandbox.close()


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def test_the_database_of_another_program_is_refused_untouched(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE account (x)")
    db.close()
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to look like one" * 100)
    for file in (other, text):
        before = file.read_bytes()
        ended = run("--listen", "127.0.0.1:0", "--database", str(file))
        assert ended.returncode == 1 and str(file) in ended.stderr
        assert "Traceback" not in ended.stderr and file.read_bytes() == before


def test_an_address_in_use_or_wrong_is_a_clear_error(server: Server) -> None:
    ended = run("--listen", f"127.0.0.1:{server.port}")
    assert ended.returncode == 1 and "in use" in ended.stderr and "Traceback" not in ended.stderr
    for address in ("8000", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"):
        assert run("--listen", address).returncode == 2


def test_as_a_library_the_time_is_an_argument() -> None:
    sandbox = rs.Sandbox()
    sandbox.upsert("account", {"tenant": "default", "account_tag": "1", "balance": 100})
    request = rs.Request("c", account_tag="1")
    assert sandbox.begin(request, 1_000) and sandbox.end(request, 1_090)
    (made,) = sandbox.find("record")
    assert made["duration"] == 90 and made["timestamp_end"] == "1970-01-01T00:18:10"
    assert sandbox.count("running") == 0 and sandbox.count("record") == 1
    sandbox.close()


@given(st.datetimes(timezones=st.timezones()))
@settings(deadline=None)
def test_any_time_stamp_that_python_writes_is_read(moment: datetime) -> None:
    text = moment.isoformat()
    try:
        expected = datetime.fromisoformat(rs.write_timestamp(rs.read_timestamp(text)))
    except ValueError:
        odd = re.search(r"[+-]\d\d:\d\d:", text)  # local mean times have offsets with seconds
        assert odd or moment.year in (1, 9999)
        return
    found = moment.replace(microsecond=0).astimezone(timezone.utc).replace(tzinfo=None)
    assert found == expected


@given(st.text().filter(lambda text: not any(character.isdigit() for character in text)))
@settings(deadline=None)
def test_other_text_is_no_time_stamp(text: str) -> None:
    with pytest.raises(ValueError):
        rs.read_timestamp(text)
