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
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
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
        assert status == 200 and "errors" not in answer, answer
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

ACCOUNTS = """mutation($t: String!) {
  a: upsertAccount(tenant: $t, account_tag: "2000", active: true, balance: 1000) {id}
  b: upsertAccount(tenant: $t, account_tag: "2001", active: true, balance: 1000) {id}
  c: upsertAccount(tenant: $t, account_tag: "off", active: false) {id}
}"""


@pytest.fixture
def tenant(server: Server) -> str:
    """A tenant of the test's own with the accounts 2000, 2001 and the inactive `off`."""
    name = next(_tenants)
    server.graphql(ACCOUNTS, t=name)
    return name


STORED = """query($t: ID!) {
  allAccounts(filter: {tenant: $t}, sortField: "account_tag") {
    account_tag running_transactions { transaction_tag inbound timestamp_begin in_progress }
  }
  allTransactions(filter: {tenant: $t}, sortField: "account_tag", perPage: 100) {
    account_tag transaction_tag inbound duration
  }
}"""


def stored(server: Server, tenant: str) -> tuple[list[str], list[str]]:
    """What a tenant has running, as "account tag in|out minute", and its records with seconds."""
    data = server.graphql(STORED, t=tenant)
    running = [
        f"{account['account_tag']} {leg['transaction_tag']} {'in' if leg['inbound'] else 'out'} "
        + leg["timestamp_begin"][11:16]
        for account in data["allAccounts"]
        for leg in account["running_transactions"]
    ]
    records = [
        f"{record['account_tag']} {record['transaction_tag']} "
        f"{'in' if record['inbound'] else 'out'} {record['duration']}"
        for record in data["allTransactions"]
    ]
    return running, records


def begin(minute: int = 0, **fields: Any) -> tuple[str, Body]:
    body = {"transaction_tag": "c1", "account_tag": "2000", "destination_account_tag": "2001"}
    stamp = f"2026-11-23T10:{minute:02}:00.250Z"
    return "begin_transaction", {**body, "timestamp_begin": stamp, **fields}


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
    return "record_transaction", {**begin()[1], **stamps, **fields}


@dataclass
class Case:
    """Requests with what each is answered, then what is stored. `rest`: not said in GraphQL."""

    name: str
    steps: list[tuple[tuple[str, Body], bool]]
    running: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    rest: bool = False


BOTH_RUN = ["2000 c1 out 10:00", "2001 c1 in 10:00"]
BOTH_DONE = ["2000 c1 out 60", "2001 c1 in 60"]
CONTRACT = [
    Case("begin and end write one record for each leg",
         [(begin(), True), (end(), True)], [], BOTH_DONE),
    Case("before its end a call is only running", [(begin(), True)], BOTH_RUN),
    Case("unknown caller", [(begin(account_tag="nobody"), False)]),
    Case("unknown callee: nothing begun for the caller either",
         [(begin(destination_account_tag="nobody"), False)]),
    Case("inactive caller", [(begin(account_tag="off"), False)]),
    Case("inactive callee", [(begin(destination_account_tag="off"), False)]),
    Case("other tenant", [(begin(tenant="elsewhere"), False)]),
    Case("begin twice with the same body", [(begin(), True), (begin(), True)], BOTH_RUN),
    Case("begin twice with another time stamp: two running entries",
         [(begin(0), True), (begin(1), True)],
         ["2000 c1 out 10:00", "2000 c1 out 10:01", "2001 c1 in 10:00", "2001 c1 in 10:01"]),
    Case("the end of such a call takes both entries; the first makes the record",
         [(begin(0), True), (begin(1), True), (end(2), True)],
         [], ["2000 c1 out 120", "2001 c1 in 120"]),
    Case("begin twice with other tags: two running entries",
         [(begin(tags=["a"], destination_account_tag=None), True),
          (begin(tags=["b"], destination_account_tag=None), True)],
         ["2000 c1 out 10:00", "2000 c1 out 10:00"]),
    Case("end without begin", [(end(), False)]),
    Case("end twice", [(begin(), True), (end(), True), (end(), False)], [], BOTH_DONE),
    Case("rollback leaves nothing", [(begin(), True), (rollback(), True)]),
    Case("end after rollback", [(begin(), True), (rollback(), True), (end(), False)]),
    Case("rollback without begin", [(rollback(), False)]),
    Case("rollback after end keeps the record",
         [(begin(), True), (end(), True), (rollback(), False)], [], BOTH_DONE),
    Case("rollback of one leg leaves the other",
         [(begin(), True), (rollback(destination_account_tag=None), True)],
         ["2001 c1 in 10:00"]),
    Case("a tag used again after its end overwrites the record",
         [(begin(0), True), (end(1), True), (begin(2), True), (end(5), True)],
         [], ["2000 c1 out 180", "2001 c1 in 180"]),
    Case("end with both tags where the callee was not begun",
         [(begin(destination_account_tag=None), True), (end(), False)], [], ["2000 c1 out 60"]),
    Case("end of another call",
         [(begin(), True), (end(transaction_tag="c2"), False)], BOTH_RUN),
    Case("caller only", [(begin(destination_account_tag=None), True)], ["2000 c1 out 10:00"]),
    Case("callee only", [(begin(account_tag=None), True)], ["2001 c1 in 10:00"]),
    Case("an empty callee is like none",
         [(begin(destination_account_tag=""), True), (end(destination_account_tag=""), True)],
         [], ["2000 c1 out 60"]),
    Case("an empty caller is like none",
         [(begin(account_tag=""), True), (end(account_tag=""), True)], [], ["2001 c1 in 60"]),
    Case("both tags empty: fine, nothing stored",
         [(begin(account_tag="", destination_account_tag=""), True),
          (end(account_tag="", destination_account_tag=""), True)]),
    Case("both tags null",
         [(begin(account_tag=None, destination_account_tag=None), False),
          (end(account_tag=None, destination_account_tag=None), False),
          (rollback(account_tag=None, destination_account_tag=None), False)]),
    Case("characters beyond the BMP in the tag", [(begin(transaction_tag="\U0001f4de"), False)]),
    Case("characters beyond the BMP in the source", [(begin(source="sip:\U0001f4de@x"), False)]),
    Case("characters beyond the BMP in the tags", [(begin(tags=["\U0001f4de"]), False)]),
    Case("half a character", [(begin(transaction_tag="\ud800"), False)]),
    Case("characters of the BMP", [(begin(transaction_tag="ü€\uffff"), True)],
         ["2000 ü€\uffff out 10:00", "2001 ü€\uffff in 10:00"]),
    Case("an empty transaction_tag is a tag like others",
         [(begin(transaction_tag=""), True)], ["2000  out 10:00", "2001  in 10:00"]),
    Case("SQL in a tag is text", [(begin(transaction_tag="' OR 1=1 --"), True),
         (end(transaction_tag="x' OR '1'='1"), False)],
         ["2000 ' OR 1=1 -- out 10:00", "2001 ' OR 1=1 -- in 10:00"]),
    Case("25 hours wrap to 3,600 s",
         [(begin(), True), (end(timestamp_end="2026-11-24T11:00:00Z"), True)],
         [], ["2000 c1 out 3600", "2001 c1 in 3600"]),
    Case("an end before the begin lasts 0 s", [(begin(5), True), (end(1), True)],
         [], ["2000 c1 out 0", "2001 c1 in 0"]),
    Case("fractions are cut, not rounded",
         [(begin(timestamp_begin="2026-11-23T10:00:00.999999999Z"), True),
          (end(timestamp_end="2026-11-23T10:00:02.1Z"), True)],
         [], ["2000 c1 out 2", "2001 c1 in 2"]),
    Case("offsets count",
         [(begin(timestamp_begin="2026-11-23T12:00:00+02:00"), True),
          (end(timestamp_end="2026-11-23T05:30:30-04:30"), True)],
         [], ["2000 c1 out 30", "2001 c1 in 30"]),
    Case("record is begin and end in one", [(record(), True)],
         [], ["2000 c1 out 90", "2001 c1 in 90"]),
    Case("record with an unknown callee writes nothing",
         [(record(destination_account_tag="nobody"), False)]),
    Case("product_tag and unknown fields are ignored, whatever they hold",
         [(begin(product_tag=["VOICE"], timestamp_end=7, nonsense={"a": 1}), True)],
         BOTH_RUN, rest=True),
    Case("tags are accepted", [(begin(tags=["a", "b"]), True)], BOTH_RUN),
]  # fmt: skip


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.name)
def test_contract_over_rest(server: Server, tenant: str, case: Case) -> None:
    for (operation, body), expected in case.steps:
        body = {"tenant": tenant, **body}
        status, answer = server.post(f"/v1/{operation}", body)
        assert status == 200
        names = ("tenant", "transaction_tag", "account_tag", "destination_account_tag")
        assert answer == {"ok": expected, **{name: body.get(name) for name in names}}
    assert stored(server, tenant) == (case.running, case.records)


def mutation(operation: str, body: Body) -> tuple[str, Body]:
    """The GraphQL twin of a REST request, every value in a variable."""
    kinds = {"tenant": "String!", "transaction_tag": "String!", "tags": "[String!]"}
    declared = ", ".join(f"${name}: {kinds.get(name, 'String')}" for name in body)
    arguments = ", ".join(f"{name}: ${name}" for name in body)
    verb = operation.split("_")[0] + "Transaction"
    return f"mutation({declared}) {{ {verb}({arguments}) {{ ok account_tag }} }}", body


@pytest.mark.parametrize(
    "case", [case for case in CONTRACT if not case.rest], ids=lambda case: case.name
)
def test_contract_over_graphql(server: Server, tenant: str, case: Case) -> None:
    for (operation, body), expected in case.steps:
        query, variables = mutation(operation, {"tenant": tenant, **body})
        (answer,) = server.graphql(query, **variables).values()
        assert answer == {"ok": expected, "account_tag": body["account_tag"]}
    assert stored(server, tenant) == (case.running, case.records)


REFUSED: dict[str, Any] = {
    "transaction_tag is missing": {"account_tag": "2000"},
    "transaction_tag is null": begin(transaction_tag=None)[1],
    "transaction_tag is a list": begin(transaction_tag=["c1"])[1],
    "transaction_tag is a number": begin(transaction_tag=1)[1],
    "tenant is null": begin(tenant=None)[1],
    "account_tag is a list": begin(account_tag=["2000"])[1],
    "source is an object": begin(source={})[1],
    "tags is a string": begin(tags="a")[1],
    "tags holds a number": begin(tags=[1])[1],
    "time stamp: empty": begin(timestamp_begin="")[1],
    "time stamp: bare date": begin(timestamp_begin="2026-11-23")[1],
    "time stamp: year 0001": begin(timestamp_begin="0001-01-01T00:00:00Z")[1],
    "time stamp: no offset": begin(timestamp_begin="2026-11-23T10:00:00")[1],
    "time stamp: no such day": begin(timestamp_begin="2026-02-30T10:00:00Z")[1],
    "time stamp: ten digits": begin(timestamp_begin="2026-11-23T10:00:00.0123456789Z")[1],
    "time stamp: number": begin(timestamp_begin=1795428000)[1],
    "time stamp: after the last year": begin(timestamp_begin="9999-12-31T23:59:59-01:00")[1],
    "body is a list": [],
    "body is null": None,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_field_is_422_and_stores_nothing(server: Server, tenant: str, body: Any) -> None:
    if isinstance(body, dict):
        body = {"tenant": tenant, **body}
    status, answer = server.post("/v1/begin_transaction", body)
    assert status == 422
    assert answer["detail"][0]["loc"][0] == "body" and answer["detail"][0]["msg"]
    assert stored(server, tenant) == ([], [])


BAD_HTTP: list[tuple[str, str, bytes | None, int]] = [
    ("POST", "/v1/begin_transaction", b"{", 400),
    ("POST", "/v1/begin_transaction", b"", 400),
    ("POST", "/v1/begin_transaction", b'"\xff"', 400),
    ("POST", "/v1/begin_transaction", b"[" * 100_000, 400),
    ("POST", "/graphql", b"{", 400),
    ("POST", "/graphql", b"[]", 400),
    ("POST", "/graphql", b'{"query": 1}', 400),
    ("POST", "/graphql", b'{"query": "{"}', 400),
    ("POST", "/graphql", b'{"query": "{ nothing }"}', 400),
    ("POST", "/graphql", b'{"query": "{ __typename }", "variables": []}', 400),
    ("POST", "/graphql", b'{"query": "' + b"{a" * 50_000 + b'"}', 400),
    ("GET", "/v1/begin_transaction", None, 405),
    ("PUT", "/v1/end_transaction", b"{}", 405),
    ("GET", "/graphql", None, 405),
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
    else:
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
    query = "query($t: ID!) { allTransactions(filter: {tenant: $t}) %s }"
    found = server.graphql(query % "{ timestamp_begin timestamp_end duration }", t=tenant)
    (made,) = found["allTransactions"]
    assert before <= rs.read_timestamp(made["timestamp_begin"]) <= after
    assert before <= rs.read_timestamp(made["timestamp_end"]) <= after


SETUP = """mutation { a1:upsertAccount(name:"Alex",account_tag:"2000",type:PREPAID,balance:1000000,\
active:true,max_concurrent_transactions:100){id} a2:upsertAccount(name:"Fabio",account_tag:"2001",\
type:PREPAID,balance:1000000,active:true,max_concurrent_transactions:100){id} upsertCarrier(\
carrier_tag:"carrier",active:true,protocol:UDP,host:"carrier",port:5060){id} upsertPricelist(\
pricelist_tag:"pricelist",currency:EUR){id} upsertPricelistRate(carrier_tag:"carrier",\
pricelist_tag:"pricelist",prefix:"sip:49",active:true,description:"pricelist rate",rate:1,\
rate_increment:1,connect_fee:0,interval_start:0){id} }"""
CHECK = """{ allTransactions(page:0, perPage:1, sortField:"timestamp_begin", sortOrder:"desc", \
filter:{account_tag:"%s"}) { tenant account_tag source destination inbound failed failed_reason } \
}"""


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
            '"inbound":%s,"failed":false,"failed_reason":""}]}}'
        )
        answered = server.ask("POST", "/graphql", body, Content_Type="application/json")
        assert answered == (200, (expected % (account_tag, inbound)).encode())


def test_a_batch_of_aliases_with_variables_runs_in_order(server: Server, tenant: str) -> None:
    fields, declared, variables = [], ["$t: String!"], {"t": tenant}
    for number in range(16):
        declared.append(f"$c{number}: String!")
        variables[f"c{number}"] = f"batch-{number:02}"
        for verb, stamp in (("begin", "10:00:00"), ("end", "10:00:30")):
            fields.append(
                f"{verb}{number}: {verb}Transaction(tenant: $t, transaction_tag: $c{number}, "
                f'account_tag: "2000", timestamp_{verb}: "2026-11-23T{stamp}Z") {{ ok }}'
            )
    query = f"mutation({', '.join(declared)}) {{ {' '.join(fields)} }}"
    answers = server.graphql(query, **variables)
    assert len(answers) == 32 and all(answer == {"ok": True} for answer in answers.values())
    running, records = stored(server, tenant)
    assert running == [] and sorted(records) == [f"2000 batch-{n:02} out 30" for n in range(16)]


def test_one_failing_alias_leaves_the_others(server: Server, tenant: str) -> None:
    query = """mutation($t: String!) {
      bad: beginTransaction(tenant: $t, transaction_tag: "x", account_tag: "2000",
        timestamp_begin: "yesterday") {ok}
      good: beginTransaction(tenant: $t, transaction_tag: "y", account_tag: "2000",
        timestamp_begin: "2026-11-23T10:00:00Z") {ok}
    }"""
    status, answer = server.post("/graphql", {"query": query, "variables": {"t": tenant}})
    assert status == 200 and answer["data"] == {"bad": None, "good": {"ok": True}}
    assert [error["path"] for error in answer["errors"]] == [["bad"]]
    assert "RFC 3339" in answer["errors"][0]["message"]
    assert stored(server, tenant)[0] == ["2000 y out 10:00"]


# Rates of the tests of fees: list, carrier, prefix, active and the four numbers.
RATES = [
    ("p", "c", "sip:49", True, (1, 1, 0, 0)),
    ("p", "c", "sip:4930", True, (7, 60, 10, 1)),
    ("p", "c", "sip:4989", False, (1000, 1, 0, 0)),
    ("q", "c", "sip:493", True, (2, 30, 5, 0)),
    ("other", "c", "sip:49301", True, (500, 1, 0, 0)),
    ("p", "dear", "sip:44", True, (9, 1, 0, 0)),
    ("p", "cheap", "sip:44", True, (3, 1, 0, 0)),
]
FEES = [
    # price lists, destination, seconds, prefix that rates the call, fee
    (["p"], "sip:4912345@x", 30, "sip:49", 30),  # the observed one
    (["p"], "sip:4912345@x", 0, "sip:49", 0),
    (["p"], "sip:4912345@x", -30, "sip:49", 0),
    (["p"], "sip:49301@x", 60, "sip:4930", 10),
    (["p"], "sip:49301@x", 61, "sip:4930", 17),
    (["p"], "sip:49301@x", 180, "sip:4930", 24),
    (["p"], "sip:49301@x", 0, "sip:4930", 10),
    (["p"], "sip:4989@x", 5, "sip:49", 5),
    (["p", "q"], "sip:4935@x", 31, "sip:493", 9),
    (["q", "p"], "sip:49301@x", 61, "sip:4930", 17),
    (["p"], "sip:44@x", 10, "sip:44", 30),
    (["p"], "sip:4", 10, None, 0),
    (["p"], "tel:+49", 10, None, 0),
    (["p"], "", 10, None, 0),
    (["p"], None, 10, None, 0),
    (["missing"], "sip:49@x", 10, None, 0),
    ([], "sip:49@x", 10, None, 0),
]


@pytest.fixture(scope="module")
def rated(server: Server) -> str:
    name = next(_tenants)
    for pricelist, carrier, prefix, active, numbers in RATES:
        server.graphql(
            """mutation($t: String!, $p: String!, $c: String!, $x: String!, $a: Boolean,
              $r: BigInt, $i: BigInt, $f: BigInt, $s: BigInt) {
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
        """mutation($t: String!, $a: String!, $b: String!, $k: AccountType, $l: [String!],
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
    assert caller["account"]["balance"] == balance - (fee if kind == "PREPAID" else 0)
    assert (callee["fee"], callee["destination_rate"]) == (0, None)
    assert callee["account"]["balance"] == balance


_numbers = count()


def test_the_rate_is_that_of_the_begin(server: Server, tenant: str) -> None:
    def price(rate: int) -> None:
        server.graphql(
            """mutation($t: String!, $r: BigInt) {
              upsertAccount(tenant: $t, account_tag: "2000", pricelist_tags: ["p"]) {id}
              upsertPricelistRate(tenant: $t, pricelist_tag: "p", carrier_tag: "c",
                prefix: "sip:", rate: $r) {id} }""",
            **{"t": tenant, "r": rate},
        )

    price(2)
    body = begin(destination="sip:1@x", tenant=tenant)[1]
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    price(50)
    assert server.post("/v1/begin_transaction", body)[1]["ok"]  # the retry adds no second entry
    query = """query($t: ID!) { Account(tenant: $t, account_tag: "2000") {
      balance running_transactions { destination_rate { rate connect_fee description } } } }"""
    account = server.graphql(query, t=tenant)["Account"]
    rate = {"rate": 2, "connect_fee": 0, "description": None}
    assert account == {"balance": 1000, "running_transactions": [{"destination_rate": rate}]}
    assert server.post("/v1/end_transaction", {"tenant": tenant, **end()[1]})[1]["ok"]
    assert server.graphql(query, t=tenant)["Account"]["balance"] == 1000 - 120


def test_an_account_switched_off_during_a_call_is_still_charged(
    server: Server, tenant: str
) -> None:
    body = {"tenant": tenant, **begin()[1]}
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    off = (
        'mutation($t: String!) {upsertAccount(tenant: $t, account_tag: "2000", active: false){id}}'
    )
    server.graphql(off, t=tenant)
    assert not server.post("/v1/begin_transaction", {**body, "transaction_tag": "c2"})[1]["ok"]
    assert server.post("/v1/end_transaction", {"tenant": tenant, **end()[1]})[1]["ok"]
    assert stored(server, tenant) == ([], BOTH_DONE)


def test_an_upsert_changes_only_what_it_names(server: Server, tenant: str) -> None:
    answer = server.graphql(
        """mutation($t: String!) {
          one: upsertAccount(tenant: $t, account_tag: "n", name: "N", type: POSTPAID,
            balance: -9000000000, max_concurrent_transactions: 3, pricelist_tags: ["p", "q"],
            carrier_tags: ["c"], tags: ["x"]) {id}
          two: upsertAccount(tenant: $t, account_tag: "n", balance: 9000000000) { id tenant name
            account_tag type active balance max_concurrent_transactions pricelist_tags
            carrier_tags tags running_transactions {inbound} } }""",
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
        *("max_concurrent_transactions: 3000000000", "type: FREE"),
    ],
)
def test_a_wrong_value_of_an_account_is_an_error(
    server: Server, tenant: str, arguments: str
) -> None:
    query = (
        f'mutation {{ upsertAccount(tenant: "{tenant}", account_tag: "w", {arguments}) {{id}} }}'
    )
    assert server.post("/graphql", {"query": query})[1]["errors"]
    query = 'query($t: ID!) { Account(tenant: $t, account_tag: "w") {id} }'
    assert server.graphql(query, t=tenant) == {"Account": None}


LIST = """query($t: ID!, $page: Int! = 0, $size: Int! = 25, $by: String! = "id",
  $way: String! = "asc", $q: String, $tag: String, $account: String, $inbound: Boolean,
  $primary: Boolean, $ids: [ID!]) {
  allTransactions(page: $page, perPage: $size, sortField: $by, sortOrder: $way, filter: {tenant: $t,
    q: $q, transaction_tag: $tag, account_tag: $account, inbound: $inbound, primary: $primary,
    ids: $ids}) { id transaction_tag account_tag }
  _allTransactionsMeta(filter: {tenant: $t, q: $q, transaction_tag: $tag, account_tag: $account,
    inbound: $inbound, primary: $primary, ids: $ids}) { count } }"""


def test_paging_sorting_and_filter_of_transactions(server: Server, tenant: str) -> None:
    for minute, tag in enumerate(["Bravo", "alpha", "charlie"]):
        stamps = {
            "timestamp_begin": f"2026-11-23T10:0{minute}:00Z",
            "timestamp_end": f"2026-11-23T10:1{minute}:00Z",
        }
        body = {"tenant": tenant, **record(transaction_tag=tag, **stamps)[1]}
        assert server.post("/v1/record_transaction", body)[1]["ok"]

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
    assert listed(ids=ids[:2])[1] == 2 and listed(ids=[]) == ([], 0)
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

    body = begin(destination_account_tag=None, tenant=tenant)[1]
    assert server.post("/v1/begin_transaction", body)[1]["ok"]
    assert listed() == ["2000", "2001", "off"]
    assert listed(active=True) == ["2000", "2001"] and listed(active=False) == ["off"]
    assert listed(busy=True) == ["2000"] and listed(busy=False) == ["2001", "off"]
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
    fields |= {"carrier_ip": "192.0.2.2", "tags": ["t1", "t2"]}
    query, body = mutation(*begin(tenant=tenant, **fields))
    assert server.graphql(query, **body)["beginTransaction"]["ok"]
    query = """query($t: ID!) { Account(tenant: $t, account_tag: "2000") { running_transactions {
      transaction_tag source source_ip destination carrier_ip tags in_progress inbound
      timestamp_begin timestamp_end destination_rate {rate} } } }"""
    (leg,) = server.graphql(query, t=tenant)["Account"]["running_transactions"]
    common = {**fields, "transaction_tag": "c1", "inbound": False, "destination_rate": None}
    common["timestamp_begin"] = "2026-11-23T10:00:00+00:00"
    assert leg == {**common, "in_progress": True, "timestamp_end": None}
    assert server.post("/v1/end_transaction", {"tenant": tenant, **end()[1]})[1]["ok"]
    query = """query($t: ID!) { Transaction(tenant: $t, transaction_tag: "c1", account_tag: "2000")
      { id tenant transaction_tag account_tag account {name} source source_ip destination
      carrier_ip tags authorized unauthorized_reason destination_rate {rate} timestamp_auth
      timestamp_begin timestamp_end primary inbound duration fee failed failed_reason } }"""
    made = server.graphql(query, t=tenant)["Transaction"]
    assert re.fullmatch(r"[0-9a-f-]{36}", made.pop("id"))
    assert made == {
        **common,
        **{"tenant": tenant, "account_tag": "2000", "account": {"name": None}},
        **{"authorized": None, "unauthorized_reason": None, "timestamp_auth": None},
        **{"timestamp_end": "2026-11-23T10:01:00+00:00", "primary": True, "duration": 60},
        **{"fee": 0, "failed": False, "failed_reason": ""},
    }


def test_a_failed_call_is_recorded_without_a_fee(server: Server, rated: str) -> None:
    query = """mutation($t: String!) { upsertAccount(tenant: $t, account_tag: "f", balance: 5,
      pricelist_tags: ["p"]) {id}
      recordTransaction(tenant: $t, transaction_tag: "f", account_tag: "f", failed: true,
        failed_reason: "486", destination: "sip:49", timestamp_begin: "2026-11-23T10:00:00Z",
        timestamp_end: "2026-11-23T10:00:30Z") {ok} }"""
    assert server.graphql(query, t=rated)["recordTransaction"] == {"ok": True}
    query = """query($t: ID!) { Transaction(tenant: $t, transaction_tag: "f", account_tag: "f") {
      failed failed_reason fee account {balance} } }"""
    made = server.graphql(query, t=rated)["Transaction"]
    assert made == {"failed": True, "failed_reason": "486", "fee": 0, "account": {"balance": 5}}


AUTHORIZED = [
    # changes to the account, fields of the request, reason, seconds
    ("", {}, None, 50),
    ("balance: 1000000", {}, None, 86_400),
    ("type: POSTPAID, balance: 0", {}, None, 86_400),
    ("balance: 0", {}, "BALANCE_INSUFFICIENT", 0),
    ("active: false", {}, "NOT_ACTIVE", 0),
    ("max_concurrent_transactions: 0", {}, "TOO_MANY_RUNNING_TRANSACTIONS", 0),
    ("", {"account_tag": "nobody"}, "NOT_FOUND", 0),
    ("", {"destination": "sip:1"}, "UNREACHEABLE_DESTINATION", 0),
    ("", {"destination_account_tag": "off"}, "NOT_ACTIVE", 0),
]


@pytest.mark.parametrize(("changes", "fields", "reason", "seconds"), AUTHORIZED)
def test_authorization(
    server: Server,
    rated: str,
    changes: str,
    fields: Body,
    reason: str | None,
    seconds: int,
) -> None:
    tag = f"auth-{next(_numbers)}"
    server.graphql(
        f"""mutation($t: String!, $a: String!) {{
          upsertCarrier(tenant: $t, carrier_tag: "c", protocol: TLS, host: "h", port: 5061) {{id}}
          off: upsertAccount(tenant: $t, account_tag: "off", active: false) {{id}}
          one: upsertAccount(tenant: $t, account_tag: $a, balance: 50, pricelist_tags: ["p"]) {{id}}
          two: upsertAccount(tenant: $t, account_tag: $a, {changes}) {{id}} }}""",
        **{"t": rated, "a": tag},
    )
    body = {"tenant": rated, "transaction_tag": tag, "account_tag": tag, "destination": "sip:491"}
    body |= {"timestamp_auth": "2026-11-23T10:00:00Z", **fields}
    status, answer = server.post("/v1/authorization", body)
    assert status == 200
    assert (answer["ok"], answer["authorized"]) == (reason is None, reason is None)
    assert answer["unauthorized_reason"] == reason
    assert answer["max_available_units"] == seconds
    assert answer["carriers"] == ([] if reason else ["TLS:h:5061"])
    query = """mutation($t: String!, $c: String!) { authorization(tenant: $t, transaction_tag: $c) {
      ok authorized transaction_tag max_available_units carriers } }"""
    none = {"ok": False, "authorized": False, "transaction_tag": tag}
    none |= {"max_available_units": 0, "carriers": []}
    assert server.graphql(query, t=rated, c=tag) == {"authorization": none}
    found = server.graphql(
        """query($t: ID!, $c: String!) {
          allTransactions(filter: {tenant: $t, transaction_tag: $c}) {id} }""",
        **{"t": rated, "c": tag},
    )
    assert found == {"allTransactions": []}, "an authorization is no record"


def test_the_page_lists_calls_and_escapes_what_came_from_the_network(
    server: Server, tenant: str
) -> None:
    evil = "<script>alert('x')</script>&\"{0}{running}"
    body = {"tenant": tenant, "transaction_tag": evil, "source": evil, "destination": evil}
    body |= {"account_tag": "2000", "timestamp_begin": "2030-01-01T00:00:00Z"}
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
        assert stored(second, "kept") == (BOTH_RUN, [])
        assert second.post("/v1/end_transaction", {"tenant": "kept", **end()[1]})[1]["ok"]
        second.process.kill()
    finally:
        second.stop(signal.SIGKILL)
    third = Server("--database", str(file))
    try:
        assert stored(third, "kept") == ([], BOTH_DONE)
    finally:
        assert third.stop()[0] == 0


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
    assert made["duration"] == 90 and made["timestamp_end"] == "1970-01-01T00:18:10+00:00"
    assert sandbox.count("running") == 0 and sandbox.count("record") == 1
    sandbox.close()


@given(st.datetimes(timezones=st.timezones()))
def test_any_time_stamp_that_python_writes_is_read(moment: datetime) -> None:
    text = moment.isoformat()
    try:
        expected = rs.write_timestamp(rs.read_timestamp(text))
    except ValueError:
        odd = re.search(r"[+-]\d\d:\d\d:", text)  # local mean times have offsets with seconds
        assert odd or moment.year in (1, 9999)
        return
    found = moment.replace(microsecond=0) - datetime.fromisoformat(expected)
    assert found == timedelta(0)


@given(st.text())
def test_other_text_is_no_time_stamp(text: str) -> None:
    with pytest.raises(ValueError):
        rs.read_timestamp(text)


@given(
    st.integers(1, 3_600), st.integers(0, 1_000), st.integers(0, 50), st.integers(0, 9),
    st.integers(0, 10**6),
)  # fmt: skip
def test_a_balance_pays_for_the_seconds_it_is_said_to(
    increment: int, price: int, connect: int, start: int, balance: int
) -> None:
    rate = {"rate": price, "rate_increment": increment, "connect_fee": connect}
    rate["interval_start"] = start
    seconds = rs.units_for(rate, balance)
    if seconds:
        assert rs.call_fee(rate, seconds) <= balance
    if seconds < rs.DAY and balance >= connect:
        assert rs.call_fee(rate, seconds + 1) > balance
