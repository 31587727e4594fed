#!/usr/bin/env python3
"""The Canyan rating API on SQLite, for a demonstration, for tests and for small installations.

One port serves what the real stack spreads over two services:

* the agent's REST interface, ``POST /v1/begin_transaction`` and its siblings, ``GET /status``;
* ``POST /graphql`` with the agent's mutations and the storage service's schema together;
* ``GET /``, a page for a browser that lists the transactions.

It answers as the real service was seen to answer, including what is awkward there: a business
failure is status 200 with ``"ok": false`` and no reason, and a begin that is repeated with another
time stamp is a second running entry. Where the real service was not observed, a comment says what
was chosen here.

The layers, from the inside out: requests and time stamps, the rate of a call, storage
(`Sandbox`, which takes the time as an argument), GraphQL, the page, WSGI, the command line.
"""

from __future__ import annotations

# The server is a gevent program: sockets must give way to other connections wherever they are
# opened, so the standard library is patched before anything that might bind its names.
from gevent import monkey

monkey.patch_all()

import argparse
import hmac
import html
import json
import re
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from typing import Any

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIServer
from graphql import DocumentNode, GraphQLError, build_schema, execute_sync, parse, validate

MAX_BODY = 4 * 1024 * 1024  # bytes; a begin takes some hundreds, 32 of them in GraphQL about 20 KiB
MAX_PAGE = 10_000  # rows of one GraphQL answer
HTML_ROWS = 200  # rows of each table of the page: what a browser shows at once without a pause
CACHED_QUERY = 64 * 1024  # characters; a longer GraphQL document is parsed each time it comes
DAY = 86_400  # seconds; the real service keeps a duration modulo a day
MAX_MONEY = 10**13  # the smallest units; times the steps of a day it still fits SQLite's 64 bits

Row = dict[str, Any]


class Refused(ValueError):
    """A request that the service answers with 422: a field is missing or of the wrong kind."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))",
    re.ASCII,
)


def read_timestamp(text: object) -> int:
    """Return the seconds since 1970 of an RFC 3339 time stamp, its fraction cut off.

    An offset or Z is needed and up to 9 fractional digits are allowed. Raises ValueError for all
    else: an empty string, a bare date, a day that does not exist, and the year 0001, which is how
    several languages write "no time".
    """
    found = _TIMESTAMP.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError("not an RFC 3339 time stamp")
    *numbers, sign, hours, minutes = found.groups()
    moment = datetime(*(int(number) for number in numbers), tzinfo=timezone.utc)  # type: ignore[misc,arg-type]
    if moment.year == 1:
        raise ValueError("the year is out of range")
    seconds = int(moment.timestamp())
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError("the offset is out of range")
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds += offset if sign == "-" else -offset
    write_timestamp(seconds)  # an offset can carry the year 9999 over its end
    return seconds


def write_timestamp(seconds: int) -> str:
    """Return seconds since 1970 in ISO 8601, in UTC. Raises ValueError beyond the year 9999."""
    try:
        return (datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)).isoformat()
    except OverflowError:
        raise ValueError("the time is out of range") from None


# Outside the Basic Multilingual Plane; a lone surrogate is not a character and goes the same way.
_BEYOND_BMP = re.compile("[\ud800-\udfff\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Request:
    """What a transaction request says. Time stamps are seconds since 1970, None means now."""

    transaction_tag: str
    tenant: str = "default"
    account_tag: str | None = None
    destination_account_tag: str | None = None
    source: str | None = None
    source_ip: str | None = None
    destination: str | None = None
    carrier_ip: str | None = None
    tags: tuple[str, ...] = ()
    timestamp_auth: int | None = None
    timestamp_begin: int | None = None
    timestamp_end: int | None = None
    failed: bool = False
    failed_reason: str | None = None

    def legs(self) -> list[tuple[str, bool]] | None:
        """Return (account tag, inbound) of the one or two legs, the caller's first.

        An empty tag names no leg, so the list may be empty: that request succeeds and does
        nothing. None means that the service can't carry the request out at all: no account is
        named, or a string has characters that its storage does not take.
        """
        pair = (self.account_tag, self.destination_account_tag)
        if pair == (None, None) or any(_BEYOND_BMP.search(text) for text in self._strings()):
            return None
        return [(tag, inbound) for tag, inbound in zip(pair, (False, True), strict=True) if tag]

    def _strings(self) -> Iterable[str]:
        for value in vars(self).values():
            if isinstance(value, str):
                yield value
        yield from self.tags


_WHO = "tenant transaction_tag account_tag destination_account_tag".split()
_CALL = [*_WHO, *"source source_ip destination carrier_ip tags".split()]
# The fields that each operation reads. All others are ignored whatever they hold, product_tag
# among them. `failed` is not in the observed contract; a record of a failed call needs it.
OPERATIONS = {
    "begin_transaction": [*_CALL, "timestamp_begin"],
    "end_transaction": [*_WHO, "timestamp_end"],
    "rollback_transaction": _WHO,
    "record_transaction": [
        *_CALL,
        *"timestamp_auth timestamp_begin timestamp_end failed failed_reason".split(),
    ],
    "authorization": [*_CALL, "timestamp_auth"],
}


def read_request(operation: str, body: Mapping[str, Any]) -> Request:
    """Return the request that a decoded JSON object holds; raise Refused for a wrong field.

    Nothing is converted: a number is no string here. The real service was only seen to refuse a
    list for a string, and a client that sends numbers is better told so.
    """
    values: Row = {}
    for field in OPERATIONS[operation]:
        value = body.get(field)
        if value is None:
            if field == "transaction_tag" or (field == "tenant" and field in body):
                raise Refused(field, "field required" if field not in body else "none not allowed")
        elif field == "tags":
            if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
                raise Refused(field, "list of strings expected")
            values[field] = tuple(value)
        elif field.startswith("timestamp_"):
            try:
                values[field] = read_timestamp(value)
            except ValueError as error:
                raise Refused(field, str(error)) from None
        elif not isinstance(value, bool if field == "failed" else str):
            raise Refused(field, "bool expected" if field == "failed" else "str type expected")
        else:
            values[field] = value
    return Request(**values)


def call_duration(begin: int, end: int) -> int:
    """Return the seconds that are charged, from two times in seconds.

    The fractions are gone by then, so there is nothing left to round up. An end that is not after
    the begin gives 0, and 25 hours give 3,600: the real service drops whole days.
    """
    return max(0, end - begin) % DAY


def call_fee(rate: Mapping[str, Any] | None, duration: int) -> int:
    """Return the fee of `duration` seconds at a rate, in the unit of its `rate`. No rate: 0.

    The first `interval_start` steps of `rate_increment` seconds are covered by the connect fee.
    """
    if rate is None:
        return 0
    steps = -(-duration // rate["rate_increment"]) - rate["interval_start"]
    return int(rate["connect_fee"] + max(0, steps) * rate["rate"])


def units_for(rate: Mapping[str, Any], balance: int) -> int:
    """Return for how many seconds a balance pays at a rate: at most a day, and 0 for none."""
    left = balance - rate["connect_fee"]
    if left < 0:
        return 0
    if rate["rate"] <= 0:
        return DAY
    steps = left // rate["rate"] + rate["interval_start"]
    return int(min(DAY, steps * rate["rate_increment"]))


# Marks the file as ours: SQLite would let us create our tables in the database of any program.
APPLICATION_ID = 0x52415445

_TABLES = """
CREATE TABLE IF NOT EXISTS account (
    id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, account_tag TEXT NOT NULL, name TEXT,
    type TEXT NOT NULL DEFAULT 'PREPAID', active INTEGER NOT NULL DEFAULT 1,
    balance INTEGER NOT NULL DEFAULT 0, max_concurrent_transactions INTEGER,
    pricelist_tags TEXT NOT NULL DEFAULT '[]', carrier_tags TEXT NOT NULL DEFAULT '[]',
    tags TEXT NOT NULL DEFAULT '[]', UNIQUE (tenant, account_tag));
CREATE TABLE IF NOT EXISTS carrier (
    id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, carrier_tag TEXT NOT NULL, host TEXT,
    port INTEGER, protocol TEXT, active INTEGER NOT NULL DEFAULT 1, UNIQUE (tenant, carrier_tag));
CREATE TABLE IF NOT EXISTS pricelist (
    id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, pricelist_tag TEXT NOT NULL, name TEXT,
    currency TEXT, UNIQUE (tenant, pricelist_tag));
CREATE TABLE IF NOT EXISTS rate (
    id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, pricelist_tag TEXT NOT NULL,
    carrier_tag TEXT NOT NULL, prefix TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 1,
    description TEXT, rate INTEGER NOT NULL DEFAULT 0, rate_increment INTEGER NOT NULL DEFAULT 1,
    connect_fee INTEGER NOT NULL DEFAULT 0, interval_start INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, pricelist_tag, carrier_tag, prefix));
CREATE TABLE IF NOT EXISTS running (
    number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, account_tag TEXT NOT NULL,
    transaction_tag TEXT NOT NULL, inbound INTEGER NOT NULL, source TEXT, source_ip TEXT,
    destination TEXT, carrier_ip TEXT, tags TEXT NOT NULL, timestamp_begin INTEGER NOT NULL,
    destination_rate TEXT);
CREATE INDEX IF NOT EXISTS running_by_call ON running (tenant, account_tag, transaction_tag);
CREATE TABLE IF NOT EXISTS record (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    account_tag TEXT NOT NULL, transaction_tag TEXT NOT NULL, inbound INTEGER NOT NULL,
    source TEXT, source_ip TEXT, destination TEXT, carrier_ip TEXT, tags TEXT NOT NULL,
    timestamp_begin INTEGER NOT NULL, destination_rate TEXT, timestamp_auth INTEGER,
    timestamp_end INTEGER NOT NULL, duration INTEGER NOT NULL, fee INTEGER NOT NULL,
    failed INTEGER NOT NULL, failed_reason TEXT NOT NULL,
    UNIQUE (tenant, account_tag, transaction_tag));
CREATE INDEX IF NOT EXISTS record_by_begin ON record (timestamp_begin);
"""

# One leg of a call as both tables keep it, and what a record adds.
_LEG = (
    "tenant account_tag transaction_tag inbound source source_ip destination carrier_ip tags "
    "timestamp_begin destination_rate"
).split()
_RECORD = ["id", *_LEG, *"timestamp_auth timestamp_end duration fee failed failed_reason".split()]
_RATE = (
    "pricelist_tag carrier_tag prefix description rate rate_increment connect_fee interval_start"
).split()
_BY_CALL = "tenant = :tenant AND account_tag = :account_tag AND transaction_tag = :transaction_tag"

_SELECT_ACCOUNT = "SELECT * FROM account WHERE tenant = ? AND account_tag = ?"
# Every active rate of the account's lists competes; neither its carrier nor the account's carriers
# were seen to matter. Of two equal prefixes the cheaper one wins.
_SELECT_RATE = f"""
SELECT {", ".join(_RATE)} FROM rate
WHERE tenant = ? AND active AND pricelist_tag IN (SELECT value FROM json_each(?))
    AND substr(?, 1, length(prefix)) = prefix
ORDER BY length(prefix) DESC, rate, pricelist_tag, carrier_tag LIMIT 1"""
# The rate is not part of the comparison: the same bytes are one entry even if a price list was
# edited between them.
_INSERT_RUNNING = f"""
INSERT INTO running ({", ".join(_LEG)}) SELECT {", ".join(":" + name for name in _LEG)}
WHERE NOT EXISTS (SELECT 1 FROM running WHERE {_BY_CALL} AND inbound = :inbound
    AND timestamp_begin = :timestamp_begin AND tags = :tags AND source IS :source
    AND source_ip IS :source_ip AND destination IS :destination AND carrier_ip IS :carrier_ip)"""
_SELECT_RUNNING = f"SELECT * FROM running WHERE {_BY_CALL} ORDER BY number LIMIT 1"
_DELETE_RUNNING = f"DELETE FROM running WHERE {_BY_CALL}"
_UPSERT_RECORD = f"""
INSERT INTO record ({", ".join(_RECORD)}) VALUES ({", ".join(":" + name for name in _RECORD)})
ON CONFLICT (tenant, account_tag, transaction_tag) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in _RECORD if name != "id")}"""
_CHARGE = """
UPDATE account SET balance = balance - ? WHERE tenant = ? AND account_tag = ? AND type = 'PREPAID'
"""

# What identifies a row, for the four upserts; everything else of the row is what they set.
_KEYS = {
    "account": ("tenant", "account_tag"),
    "carrier": ("tenant", "carrier_tag"),
    "pricelist": ("tenant", "pricelist_tag"),
    "rate": ("tenant", "pricelist_tag", "carrier_tag", "prefix"),
}
_AT_LEAST = {"rate_increment": 1, "interval_start": 0, "rate": 0, "connect_fee": 0}
_JSON_COLUMNS = ("tags", "pricelist_tags", "carrier_tags", "destination_rate")
_BOOLEAN_COLUMNS = ("active", "inbound", "failed")
_TIME_COLUMNS = ("timestamp_auth", "timestamp_begin", "timestamp_end")


class Sandbox:
    """Accounts, rates, running transactions and records on one SQLite connection.

    Times are passed in, in seconds since 1970. Each method is one database transaction, and none
    gives way to another greenlet: SQLite is called directly, so no two requests interleave.
    """

    def __init__(self, database: str = ":memory:") -> None:
        """Open or create a database file. Raises sqlite3.Error for one that is not a sandbox's."""
        self._db = sqlite3.connect(database)
        self._db.row_factory = sqlite3.Row
        foreign = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if foreign and self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            self._db.close()
            raise sqlite3.DatabaseError("the file is the database of another program")
        self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # A record survives the end of this process at once, and a power cut after a moment.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_TABLES)

    def close(self) -> None:
        """Close the database; nothing may be called afterwards."""
        self._db.close()

    def _account(self, tenant: str, account_tag: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(
            _SELECT_ACCOUNT, (tenant, account_tag)
        ).fetchone()
        return row

    def _rate(self, account: sqlite3.Row, destination: str | None) -> Row | None:
        if not destination or account["pricelist_tags"] == "[]":
            return None
        row = self._db.execute(
            _SELECT_RATE, (account["tenant"], account["pricelist_tags"], destination)
        ).fetchone()
        return dict(row) if row else None

    def _new_legs(self, request: Request, now: int) -> list[Row] | None:
        """Return the rows of both legs, or None if an account is not there or not active."""
        legs = request.legs()
        if legs is None:
            return None
        rows = []
        for account_tag, inbound in legs:
            account = self._account(request.tenant, account_tag)
            if account is None or not account["active"]:
                return None
            # Only the caller pays. The observed contract has one record for each leg and says
            # nothing of a fee on the callee's, so that one has neither rate nor fee.
            rate = None if inbound else self._rate(account, request.destination)
            begin = now if request.timestamp_begin is None else request.timestamp_begin
            leg = {
                **vars(request),
                "account_tag": account_tag,
                "inbound": inbound,
                "tags": json.dumps(request.tags),
                "timestamp_begin": begin,
                "destination_rate": json.dumps(rate) if rate else None,
            }
            rows.append({name: leg[name] for name in _LEG})
        return rows

    def _write_record(self, leg: Row, end: int, request: Request) -> None:
        duration = call_duration(leg["timestamp_begin"], end)
        rate = json.loads(leg["destination_rate"]) if leg["destination_rate"] else None
        fee = 0 if request.failed else call_fee(rate, duration)
        record = {
            **leg,
            "id": str(uuid.uuid4()),
            "timestamp_auth": request.timestamp_auth,
            "timestamp_end": end,
            "duration": duration,
            "fee": fee,
            "failed": request.failed,
            "failed_reason": request.failed_reason or "",
        }
        self._db.execute(_UPSERT_RECORD, record)
        if fee:
            self._db.execute(_CHARGE, (fee, leg["tenant"], leg["account_tag"]))

    def begin(self, request: Request, now: int) -> bool:
        """Store a running entry for each leg; the same request again adds none.

        False, with nothing stored for either leg, if one of the accounts is not there.
        """
        legs = self._new_legs(request, now)
        if legs is None:
            return False
        with self._db:
            self._db.executemany(_INSERT_RUNNING, legs)
        return True

    def end(self, request: Request, now: int) -> bool:
        """Turn the running entries of each leg into its record and charge it.

        False if one leg was not running, though the other's record is written. Of several entries
        of one leg the first makes the record, and all go. The account's state is not looked at:
        a call that was begun ends, even if its account was switched off meanwhile.
        """
        legs = request.legs()
        if legs is None:
            return False
        end = now if request.timestamp_end is None else request.timestamp_end
        ok = True
        with self._db:
            for account_tag, _ in legs:
                key = {**vars(request), "account_tag": account_tag}
                leg = self._db.execute(_SELECT_RUNNING, key).fetchone()
                if leg is None:
                    ok = False
                    continue
                self._db.execute(_DELETE_RUNNING, key)
                self._write_record(dict(leg), end, request)
        return ok

    def rollback(self, request: Request) -> bool:
        """Drop the running entries of each leg without a record; False if a leg had none."""
        legs = request.legs()
        if legs is None:
            return False
        ok = True
        with self._db:
            for account_tag, _ in legs:
                key = {**vars(request), "account_tag": account_tag}
                ok = self._db.execute(_DELETE_RUNNING, key).rowcount > 0 and ok
        return ok

    def record(self, request: Request, now: int) -> bool:
        """Write and charge the record of each leg, as a begin and an end at once would.

        False, with nothing written for either leg, if one of the accounts is not there. A failed
        call costs nothing.
        """
        legs = self._new_legs(request, now)
        if legs is None:
            return False
        end = now if request.timestamp_end is None else request.timestamp_end
        with self._db:
            for leg in legs:
                self._write_record(leg, end, request)
        return True

    def authorize(self, request: Request) -> Row:
        """Say whether a call may begin; nothing is stored.

        The answer has ok, authorized, authorized_destination, unauthorized_account_tag,
        unauthorized_reason, balance, max_available_units (seconds) and carriers. The observed
        contract names the call but no answer; names and reasons (one spelt so) are Canyan's.
        """
        nothing: Row = {
            **{"ok": False, "authorized": False, "authorized_destination": False},
            **{"unauthorized_account_tag": None, "unauthorized_reason": None},
            **{"balance": 0, "max_available_units": 0, "carriers": []},
        }
        answer, units = dict(nothing), DAY
        for account_tag, inbound in request.legs() or ():
            account = self._account(request.tenant, account_tag)
            reason, rate = None, None
            if account is None:
                reason = "NOT_FOUND"
            elif not account["active"]:
                reason = "NOT_ACTIVE"
            elif self._is_busy(account):
                reason = "TOO_MANY_RUNNING_TRANSACTIONS"
            elif not inbound:
                rate = self._rate(account, request.destination)
                if rate is None:
                    reason = "UNREACHEABLE_DESTINATION"
                elif account["type"] == "PREPAID":
                    units = units_for(rate, account["balance"])
                    reason = None if units else "BALANCE_INSUFFICIENT"
            if reason or account is None:
                refusal = {"unauthorized_account_tag": account_tag, "unauthorized_reason": reason}
                return {**nothing, **refusal}
            answer["authorized_destination" if inbound else "authorized"] = True
            if not inbound:
                answer["balance"] = account["balance"]
                answer["carriers"] = self._carriers(request.tenant, rate)
        answer["ok"] = answer["authorized"] or answer["authorized_destination"]
        return {**answer, "max_available_units": units if answer["ok"] else 0}

    def _is_busy(self, account: sqlite3.Row) -> bool:
        running = self._db.execute(
            "SELECT count(*) FROM running WHERE tenant = ? AND account_tag = ?",
            (account["tenant"], account["account_tag"]),
        ).fetchone()[0]
        limit = account["max_concurrent_transactions"]
        return limit is not None and running >= limit

    def _carriers(self, tenant: str, rate: Row | None) -> list[str]:
        rows = self._db.execute(
            "SELECT * FROM carrier WHERE tenant = ? AND carrier_tag = ? AND active",
            (tenant, rate["carrier_tag"] if rate else None),
        )
        return [f"{row['protocol']}:{row['host']}:{row['port']}" for row in rows]

    def upsert(self, table: str, values: Mapping[str, Any]) -> str:
        """Create a row or change the given columns of it, and return its id.

        `table` is account, carrier, pricelist or rate. A None leaves the column as it is. Raises
        ValueError for a number out of its range. A rate may come before its list and its carrier.
        """
        for name in ("balance", "rate", "connect_fee", "rate_increment", "interval_start"):
            value = values.get(name)
            least = _AT_LEAST.get(name, -MAX_MONEY)
            if value is not None and (type(value) is not int or not least <= value <= MAX_MONEY):
                raise ValueError(f"{name} must be a whole number from {least} to {MAX_MONEY}")
        keys = _KEYS[table]
        row = {
            name: json.dumps(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }
        same = " AND ".join(f"{name} = :{name}" for name in keys)
        changes = [f"{name} = :{name}" for name in row if name not in keys]
        with self._db:
            found = self._db.execute(f"SELECT id FROM {table} WHERE {same}", row).fetchone()
            if found is None:
                row["id"] = str(uuid.uuid4())
                columns, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
                self._db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", row)
            elif changes:
                self._db.execute(f"UPDATE {table} SET {', '.join(changes)} WHERE {same}", row)
        return row["id"] if found is None else str(found["id"])

    def find(
        self,
        table: str,
        where: Sequence[tuple[str, Any]] = (),
        order: str = "id",
        descending: bool = False,
        limit: int = -1,
        offset: int = 0,
    ) -> list[Row]:
        """Return rows of account, record or running, as plain values.

        `where` holds conditions with one mark and its value each: they are written in this file,
        never by a client, as is `order`, a column. Rows that are equal there keep the order in
        which they were stored, turned round with it if `descending`.
        """
        conditions = " AND ".join(condition for condition, _ in where) or "1"
        way = "DESC" if descending else "ASC"
        rows = self._db.execute(
            f"SELECT * FROM {table} WHERE {conditions} "
            f"ORDER BY {order} {way}, rowid {way} LIMIT ? OFFSET ?",
            [*(value for _, value in where), limit, offset],
        )
        return [_plain(row) for row in rows]

    def count(self, table: str, where: Sequence[tuple[str, Any]] = ()) -> int:
        """Return how many rows `find` would give without a limit."""
        conditions = " AND ".join(condition for condition, _ in where) or "1"
        values = [value for _, value in where]
        row = self._db.execute(f"SELECT count(*) FROM {table} WHERE {conditions}", values)
        return int(row.fetchone()[0])


def _plain(row: sqlite3.Row) -> Row:
    """Return a row with its lists, booleans and time stamps as an answer shows them."""
    values = dict(row)
    for name, value in values.items():
        if value is None:
            continue
        if name in _JSON_COLUMNS:
            values[name] = json.loads(value)
        elif name in _BOOLEAN_COLUMNS:
            values[name] = bool(value)
        elif name in _TIME_COLUMNS:
            values[name] = write_timestamp(value)
    return values


def carry_out(sandbox: Sandbox, operation: str, request: Request, now: int) -> Row:
    """Carry one agent operation out, a key of OPERATIONS, and return the answer to the client."""
    result: Row
    if operation == "authorization":
        result = sandbox.authorize(request)
    elif operation == "begin_transaction":
        result = {"ok": sandbox.begin(request, now)}
    elif operation == "end_transaction":
        result = {"ok": sandbox.end(request, now)}
    elif operation == "rollback_transaction":
        result = {"ok": sandbox.rollback(request)}
    else:
        result = {"ok": sandbox.record(request, now)}
    return {"ok": result["ok"], **{name: getattr(request, name) for name in _WHO}, **result}


_WHO_ARGUMENTS = """tenant: String! = "default", transaction_tag: String!,
    account_tag: String, destination_account_tag: String"""
_CALL_ARGUMENTS = f"""{_WHO_ARGUMENTS}, source: String, source_ip: String,
    destination: String, carrier_ip: String, tags: [String!]"""
_LIST_ARGUMENTS = """sortField: String! = "id", sortOrder: String! = "asc",
    page: Int! = 0, perPage: Int! = 25"""
_ANSWER_FIELDS = """ok: Boolean! tenant: String! transaction_tag: String! account_tag: String
  destination_account_tag: String"""
# Time stamps are strings here, checked by the same function as those of REST. BigInt goes through
# graphql-core as any literal, and `Sandbox.upsert` looks at its kind and range: GraphQL's own Int
# ends at 32 bits, which a balance in cents or less does not.
SCHEMA = build_schema(f"""
scalar BigInt
enum AccountType {{ PREPAID POSTPAID }}
enum CarrierProtocol {{ UDP TCP TLS }}
enum Currency {{ AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF INR JPY KRW MXN NOK NZD PLN RON SEK
  SGD TRY USD ZAR }}
type DestinationRate {{
  pricelist_tag: String carrier_tag: String prefix: String description: String
  rate: BigInt rate_increment: BigInt connect_fee: BigInt interval_start: BigInt
}}
type RunningTransaction {{
  transaction_tag: String! source: String source_ip: String destination: String carrier_ip: String
  tags: [String] in_progress: Boolean inbound: Boolean timestamp_begin: String
  timestamp_end: String destination_rate: DestinationRate
}}
type Account {{
  id: ID! tenant: ID! account_tag: String! name: String type: AccountType active: Boolean
  balance: BigInt max_concurrent_transactions: Int pricelist_tags: [String] carrier_tags: [String]
  tags: [String] running_transactions: [RunningTransaction]
}}
# An authorization is answered and not kept, so authorized and unauthorized_reason stay null.
type Transaction {{
  id: ID! tenant: ID! transaction_tag: String! account_tag: String account: Account
  source: String source_ip: String destination: String carrier_ip: String tags: [String]
  authorized: Boolean unauthorized_reason: String destination_rate: DestinationRate
  timestamp_auth: String timestamp_begin: String timestamp_end: String primary: Boolean
  inbound: Boolean duration: Int fee: BigInt failed: Boolean failed_reason: String
}}
type ListMetadata {{ count: Int! }}
type Stored {{ id: ID! }}
type Answer {{ {_ANSWER_FIELDS} }}
type Authorization {{ {_ANSWER_FIELDS}
  authorized: Boolean! authorized_destination: Boolean! unauthorized_account_tag: String
  unauthorized_reason: String balance: BigInt max_available_units: Int carriers: [String]
}}
input AccountFilter {{
  q: String id: ID ids: [ID!] tenant: ID = "default" account_tag: String type: AccountType
  active: Boolean with_running_transactions: Boolean
}}
input TransactionFilter {{
  q: String id: ID ids: [ID!] tenant: ID = "default" transaction_tag: String account_tag: String
  primary: Boolean inbound: Boolean
}}
type Query {{
  Account(id: ID, tenant: ID = "default", account_tag: String): Account
  allAccounts({_LIST_ARGUMENTS}, filter: AccountFilter): [Account]
  _allAccountsMeta({_LIST_ARGUMENTS}, filter: AccountFilter): ListMetadata
  Transaction(id: ID, tenant: ID = "default", transaction_tag: String,
    account_tag: String): Transaction
  allTransactions({_LIST_ARGUMENTS}, filter: TransactionFilter): [Transaction]
  _allTransactionsMeta({_LIST_ARGUMENTS}, filter: TransactionFilter): ListMetadata
}}
type Mutation {{
  beginTransaction({_CALL_ARGUMENTS}, timestamp_begin: String): Answer
  endTransaction({_WHO_ARGUMENTS}, timestamp_end: String): Answer
  rollbackTransaction({_WHO_ARGUMENTS}): Answer
  recordTransaction({_CALL_ARGUMENTS}, timestamp_auth: String, timestamp_begin: String,
    timestamp_end: String, failed: Boolean, failed_reason: String): Answer
  authorization({_CALL_ARGUMENTS}, timestamp_auth: String): Authorization
  upsertAccount(tenant: String! = "default", account_tag: String!, name: String,
    type: AccountType, active: Boolean, balance: BigInt, max_concurrent_transactions: Int,
    pricelist_tags: [String!], carrier_tags: [String!], tags: [String!]): Account
  upsertCarrier(tenant: String! = "default", carrier_tag: String!, host: String, port: Int,
    protocol: CarrierProtocol, active: Boolean): Stored
  upsertPricelist(tenant: String! = "default", pricelist_tag: String!, name: String,
    currency: Currency): Stored
  upsertPricelistRate(tenant: String! = "default", pricelist_tag: String!, carrier_tag: String!,
    prefix: String!, active: Boolean, description: String, rate: BigInt, rate_increment: BigInt,
    connect_fee: BigInt, interval_start: BigInt): Stored
}}
""")

_SORTABLE = {
    "account": "id tenant account_tag name type active balance".split(),
    "record": _RECORD,
}
_SEARCHED = {
    "account": ("tenant", "account_tag", "name"),
    "record": ("tenant", "account_tag", "transaction_tag"),
}


def _conditions(table: str, given: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return a GraphQL filter as conditions for `Sandbox.find`.

    Without a filter every tenant is listed; with one the schema sets the tenant to "default".
    """
    where: list[tuple[str, Any]] = []
    for name, value in (given or {}).items():
        if value is None or value == "":
            continue
        if name == "q":
            text = " || char(10) || ".join(f"ifnull({column}, '')" for column in _SEARCHED[table])
            where.append((f"instr(lower({text}), lower(?)) > 0", value))
        elif name == "ids":
            where.append(("id IN (SELECT value FROM json_each(?))", json.dumps(value)))
        elif name == "primary":  # no account is linked to another here, so every leg is primary
            where.append(("1 = ?", int(value)))
        elif name == "with_running_transactions":
            some = "SELECT 1 FROM running r WHERE r.tenant = account.tenant"
            some += " AND r.account_tag = account.account_tag"
            where.append((f"EXISTS ({some}) = ?", int(value)))
        else:
            where.append((f"{name} = ?", value))
    return where


def _roots(sandbox: Sandbox, clock: Callable[[], float]) -> dict[str, Callable[..., Any]]:
    """Return the resolver of each field of Query and Mutation, by name.

    A row may hold functions as well, for what is rarely asked for; see `_resolve`.
    """

    def running(account: Row, _info: Any) -> list[Row]:
        where = [("tenant = ?", account["tenant"]), ("account_tag = ?", account["account_tag"])]
        rows = sandbox.find("running", where, "number")
        return [{**row, "in_progress": True, "timestamp_end": None} for row in rows]

    def with_running(account: Row) -> Row:
        return {**account, "running_transactions": partial(running, account)}

    def one(table: str, where: list[tuple[str, Any]]) -> Row | None:
        rows = sandbox.find(table, where, limit=1)
        if not rows:
            return None
        return with_running(rows[0]) if table == "account" else with_account(rows[0])

    def with_account(record: Row) -> Row:
        where = [("tenant = ?", record["tenant"]), ("account_tag = ?", record["account_tag"])]
        return {**record, "primary": True, "account": lambda _info: one("account", where)}

    def get(table: str, _info: Any, id: str | None = None, **tags: str | None) -> Row | None:
        if id is not None:
            return one(table, [("id = ?", id)])
        wanted = ["tenant", "account_tag", *(["transaction_tag"] if table == "record" else [])]
        if any(tags.get(name) is None for name in wanted):
            raise GraphQLError(f"Provide either the id or {', '.join(wanted)}.")
        return one(table, [(f"{name} = ?", tags[name]) for name in wanted])

    def listing(table: str, _info: Any, **given: Any) -> list[Row]:
        page, size, field = given["page"], given["perPage"], given["sortField"]
        if page < 0 or not 1 <= size <= MAX_PAGE:
            raise GraphQLError(f"page must be 0 or more, perPage 1 to {MAX_PAGE}.")
        if field not in _SORTABLE[table] or given["sortOrder"].lower() not in ("asc", "desc"):
            raise GraphQLError(f"sortField is one of {', '.join(_SORTABLE[table])}, asc or desc.")
        where = _conditions(table, given.get("filter"))
        descending = given["sortOrder"].lower() == "desc"
        rows = sandbox.find(table, where, field, descending, size, page * size)
        return [with_running(row) if table == "account" else with_account(row) for row in rows]

    def meta(table: str, _info: Any, **given: Any) -> Row:
        return {"count": sandbox.count(table, _conditions(table, given.get("filter")))}

    def agent(operation: str, _info: Any, **arguments: Any) -> Row:
        try:
            request = read_request(operation, arguments)
        except Refused as error:
            raise GraphQLError(str(error)) from None
        return carry_out(sandbox, operation, request, int(clock()))

    def upsert(table: str, _info: Any, **arguments: Any) -> Row | None:
        identity = sandbox.upsert(table, arguments)
        return one("account", [("id = ?", identity)]) if table == "account" else {"id": identity}

    return {
        "Account": partial(get, "account"),
        "allAccounts": partial(listing, "account"),
        "_allAccountsMeta": partial(meta, "account"),
        "Transaction": partial(get, "record"),
        "allTransactions": partial(listing, "record"),
        "_allTransactionsMeta": partial(meta, "record"),
        "beginTransaction": partial(agent, "begin_transaction"),
        "endTransaction": partial(agent, "end_transaction"),
        "rollbackTransaction": partial(agent, "rollback_transaction"),
        "recordTransaction": partial(agent, "record_transaction"),
        "authorization": partial(agent, "authorization"),
        "upsertAccount": partial(upsert, "account"),
        "upsertCarrier": partial(upsert, "carrier"),
        "upsertPricelist": partial(upsert, "pricelist"),
        "upsertPricelistRate": partial(upsert, "rate"),
    }


def _resolve(parent: Row, info: Any, /, **arguments: Any) -> Any:
    """Return a field of a dictionary, called if it is a function.

    graphql-core's own default does the same, but an argument named `source` clashes with its
    parameter of that name.
    """
    value = parent.get(info.field_name)
    return value(info, **arguments) if callable(value) else value


def _prepare(query: str) -> DocumentNode | list[GraphQLError]:
    """Return the parsed query, or what is wrong with it."""
    try:
        document = parse(query)
        return validate(SCHEMA, document) or document
    except GraphQLError as error:
        return [error]
    except RecursionError:
        return [GraphQLError("The query is nested too deeply.")]


# Parsing and checking a batch takes several times as long as carrying it out. A client that sends
# its values as variables sends the same few documents again and again.
_prepare_cached = lru_cache(maxsize=128)(_prepare)

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Rating sandbox</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222 }}
table {{ border-collapse: collapse; margin-bottom: 2rem }}
th, td {{ border-bottom: 1px solid #ccc; padding: .25rem .75rem .25rem 0; text-align: left }}
</style></head><body><h1>Rating sandbox</h1>
<h2>Running ({running_count})</h2>{running}
<h2>Transactions ({record_count})</h2>{records}
</body></html>
"""
_RUNNING_SHOWN = (
    "timestamp_begin tenant account_tag inbound source destination transaction_tag"
).split()
_RECORDS_SHOWN = ["timestamp_end", *_RUNNING_SHOWN, "duration", "fee", "failed_reason"]


def _html_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)
    body = ""
    for row in rows:
        texts = ("" if row[name] is None else html.escape(str(row[name])) for name in columns)
        body += "<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def render_page(sandbox: Sandbox) -> str:
    """Return the HTML page: running entries and records of every tenant, the newest first."""
    running = sandbox.find("running", order="timestamp_begin", descending=True, limit=HTML_ROWS)
    records = sandbox.find("record", order="timestamp_begin", descending=True, limit=HTML_ROWS)
    return _PAGE.format(
        running_count=sandbox.count("running"),
        running=_html_table(_RUNNING_SHOWN, running),
        record_count=sandbox.count("record"),
        records=_html_table(_RECORDS_SHOWN, records),
    )


class HttpError(Exception):
    """An answer other than 200, with its `detail` for the body and further headers."""

    def __init__(self, status: str, detail: object, *headers: tuple[str, str]) -> None:
        super().__init__(status)
        self.status = status
        self.detail = detail
        self.headers = headers


Answered = tuple[str, str, bytes]  # status line, content type, body
Application = Callable[[dict[str, Any], Callable[..., Any]], list[bytes]]


def _json(value: object, status: str = "200 OK") -> Answered:
    return status, "application/json", json.dumps(value, separators=(",", ":")).encode()


def _read_json(environ: dict[str, Any]) -> Any:
    """Return the decoded body. Raises HttpError for one that is too long or no JSON."""
    if int(environ.get("CONTENT_LENGTH") or 0) > MAX_BODY:
        raise HttpError("413 Content Too Large", "The body is larger than 4 MiB")
    body = environ["wsgi.input"].read(MAX_BODY + 1)  # the length of a chunked body shows only here
    if len(body) > MAX_BODY:
        raise HttpError("413 Content Too Large", "The body is larger than 4 MiB")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # ValueError is that of UTF-8, too
        raise HttpError("400 Bad Request", "There was an error parsing the body") from None


def make_app(
    sandbox: Sandbox, token: str = "", clock: Callable[[], float] = time.time
) -> Application:
    """Return the WSGI application for a sandbox.

    With a token each request but `GET /status` must carry `Authorization: Bearer <token>`.
    `clock` gives the time of a request that names none, in seconds since 1970.
    """
    roots = _roots(sandbox, clock)
    expected = f"Bearer {token}".encode()

    def status(_environ: dict[str, Any]) -> Answered:
        return "204 No Content", "", b""

    def page(_environ: dict[str, Any]) -> Answered:
        return "200 OK", "text/html; charset=utf-8", render_page(sandbox).encode()

    def agent(operation: str, environ: dict[str, Any]) -> Answered:
        body = _read_json(environ)
        try:
            if not isinstance(body, dict):
                raise Refused("body", "value is not a valid dict")
            request = read_request(operation, body)
        except Refused as error:
            where = ["body"] if error.field == "body" else ["body", error.field]
            detail = {"loc": where, "msg": error.message, "type": "value_error"}
            raise HttpError("422 Unprocessable Entity", [detail]) from None
        return _json(carry_out(sandbox, operation, request, int(clock())))

    def graphql(environ: dict[str, Any]) -> Answered:
        body = _read_json(environ)
        query = body.get("query") if isinstance(body, dict) else None
        variables = body.get("variables") if isinstance(body, dict) else None
        name = body.get("operationName") if isinstance(body, dict) else None
        if not isinstance(query, str) or not isinstance(variables, dict | None):
            return _json({"errors": [{"message": "No GraphQL query found."}]}, "400 Bad Request")
        document = _prepare_cached(query) if len(query) <= CACHED_QUERY else _prepare(query)
        if isinstance(document, list):
            errors = [error.formatted for error in document]
            return _json({"errors": errors}, "400 Bad Request")
        result = execute_sync(
            SCHEMA,
            document,
            root_value=roots,
            field_resolver=_resolve,
            variable_values=variables,
            operation_name=name if isinstance(name, str) else None,
        )
        answer: Row = {"data": result.data}
        if result.errors:
            answer["errors"] = [error.formatted for error in result.errors]
        return _json(answer)

    routes: dict[str, tuple[str, Callable[[dict[str, Any]], Answered]]] = {
        "/": ("GET", page),
        "/status": ("GET", status),
        "/graphql": ("POST", graphql),
        **{f"/v1/{name}": ("POST", partial(agent, name)) for name in OPERATIONS},
    }

    def answer(environ: dict[str, Any]) -> Answered:
        path = environ.get("PATH_INFO", "")
        if token and path != "/status":
            given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, expected):
                challenge = ("WWW-Authenticate", "Bearer")
                raise HttpError("401 Unauthorized", "Unauthorized", challenge)
        if path not in routes:
            raise HttpError("404 Not Found", "Not Found")
        method, handler = routes[path]
        if environ["REQUEST_METHOD"] != method:
            raise HttpError("405 Method Not Allowed", "Method Not Allowed", ("Allow", method))
        return handler(environ)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        extra: tuple[tuple[str, str], ...] = ()
        try:
            status, content_type, body = answer(environ)
        except HttpError as error:
            status, content_type, body = _json({"detail": error.detail}, error.status)
            extra = error.headers
        headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), *extra]
        if content_type:
            headers += [("Content-Type", content_type), ("Content-Length", str(len(body)))]
        if content_type.startswith("text/html"):
            policy = "default-src 'none'; style-src 'unsafe-inline'"
            headers.append(("Content-Security-Policy", policy))
        start_response(status, headers)
        return [body] if body else []

    return app


class Server(WSGIServer):
    """pywsgi's server with answers that leave at once."""

    def handle(self, sock: socket.socket, address: object) -> None:
        """Serve one connection until it closes."""
        # The head and the body of an answer are two writes. Without this the second one waits
        # for the client to acknowledge the first, which a client delays by 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle(sock, address)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 1 if it could not start."""
    parser = argparse.ArgumentParser(description="The Canyan rating API on SQLite.")
    parser.add_argument(
        "--listen",
        type=_address,
        default=("127.0.0.1", 8000),
        metavar="HOST:PORT",
        help="where to listen; port 0 takes a free one (127.0.0.1:8000)",
    )
    parser.add_argument("--database", default=":memory:", metavar="FILE", help="default: in memory")
    parser.add_argument("--token", default="", help="the bearer token that clients must send")
    parser.add_argument("--verbose", action="store_true", help="log each request to stderr")
    options = parser.parse_args(arguments)

    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopping.set)
    try:
        sandbox = Sandbox(options.database)
    except sqlite3.Error as error:
        print(f"rating sandbox: {options.database}: {error}", file=sys.stderr)
        return 1
    log = sys.stderr if options.verbose else None
    server = Server(options.listen, make_app(sandbox, options.token), log=log)
    try:
        server.start()
    except OSError as error:
        print(f"rating sandbox: {error}", file=sys.stderr)
        sandbox.close()
        return 1
    host = f"[{server.server_host}]" if ":" in server.server_host else server.server_host
    print(f"rating sandbox listening on http://{host}:{server.server_port}", flush=True)
    stopping.wait()
    # A request is answered without giving way, so what is open by now are idle connections.
    server.stop(timeout=0.1)
    sandbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
