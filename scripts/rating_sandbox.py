#!/usr/bin/env python3
"""The Canyan rating API on SQLite, for a demonstration, for tests and for small installations.

One port serves what the real stack spreads over two services:

* the agent's REST interface, ``POST /v1/begin_transaction`` and its siblings, ``GET /status``;
* ``POST /graphql`` with the agent's mutations and the storage service's schema together;
* ``GET /``, a page for a browser that lists the transactions.

It answers as the real services were seen to answer, including what is awkward there: a business
failure is status 200 with ``"ok": false`` and no reason, a begin that is repeated with another
time stamp is a second running entry, and an end stops at the first leg that was not begun. Where
they have a fault, or leave something to chance, that no client may rely on, this differs:

=================================================== ============================ =================
request                                             real services                here
=================================================== ============================ =================
record_transaction where request or account has no  500                          no tags
tags
authorization without destination                   500                          not reachable
authorization with no tag but empty ones            500                          not authorized
half a surrogate pair in a text                     500                          ok: false
time stamp beyond the year 9999                     500                          422
infinite time stamp                                 never answered               422
authorization: the record's source_ip               holds the source             as asked
begin, end, rollback with neither tag after an      one of the two, by chance    both legs
authorization of both legs
record_transaction without time stamps              1 s                          0 s
GraphQL recordTransaction: begin and end            both timestamp_auth, or now  as asked
GraphQL: literal null                               syntax error                 taken
GraphQL: numbers beyond 32 bits                     1e12 as a float, fees fail   whole numbers
POST /graphql with a body that is no JSON object    500                          400
POST /graphql, content type                         must say JSON                not looked at
two rates with the same prefix                      as MongoDB finds them        the older one
GET /v1/openapi.json                                the description              404
=================================================== ============================ =================

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
import math
import re
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIServer
from graphql import (
    DocumentNode,
    GraphQLError,
    build_schema,
    execute_sync,
    parse,
    validate,
)

MAX_BODY = 4 * 1024 * 1024  # bytes; a begin takes some hundreds, the set-up of a scenario 2 KiB
MAX_PAGE = 10_000  # rows of one GraphQL answer
HTML_ROWS = 200  # rows of each table of the page: what a browser shows at once without a pause
DAY = 86_400  # seconds; the real services drop the whole days of a duration
MAX_UNITS = 14_400  # seconds that an authorization allows at most
MAX_PREFIX = 9  # characters of a destination that are compared with prefixes
OLDEST = -30_610_224_000  # the year 1000 in seconds; see Request.legs
MILLISECONDS = 2e10  # a time stamp that is a larger number is in milliseconds
MAX_MONEY = 10**13  # the smallest units; times the steps of a day it still fits SQLite's 64 bits

Row = dict[str, Any]


class Refused(ValueError):
    """A request that the services answer with 422: `detail` names each wrong field."""

    def __init__(self, *detail: Row) -> None:
        super().__init__("; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in detail))
        self.detail = detail


_MESSAGES = {
    "value_error.missing": "field required",
    "value_error.datetime": "invalid datetime format",
    "type_error": "invalid type; expected datetime, string, bytes, int or float",
    "type_error.none.not_allowed": "none is not an allowed value",
    "type_error.str": "str type expected",
    "type_error.list": "value is not a valid list",
    "type_error.dict": "value is not a valid dict",
}


def _wrong(kind: str, *where: str | int) -> Row:
    return {"loc": ["body", "request", *where], "msg": _MESSAGES[kind], "type": kind}


_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d?)-(\d\d?)[T ](\d\d?):(\d\d?)(?::(\d\d?)(?:\.\d{1,12})?)?"
    r"(?:Z|([+-])(\d\d)(?::?(\d\d))?)?",
    re.ASCII,
)


def read_timestamp(value: object) -> int:
    """Return the seconds since 1970 of a time stamp, its fraction cut off.

    It is a text as in RFC 3339, where seconds and offset may be left out (then it is UTC), or a
    number, or the text of one: seconds, or milliseconds where it is too large for seconds. Raises
    ValueError for all else (an empty string, a bare date, a day that does not exist), TypeError
    for what is neither text nor number.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _read_date(str(value))
    if not isinstance(value, int | float):
        raise TypeError("neither text nor number")
    if not abs(value) < sys.float_info.max:
        raise ValueError("not a number, or infinite")
    while abs(value) > MILLISECONDS:
        value /= 1000
    return math.floor(value)


def _read_date(text: str) -> int:
    found = _TIMESTAMP.fullmatch(text)
    if found is None:
        raise ValueError("not a time stamp")
    *numbers, sign, hours, minutes = found.groups(default="0")
    moment = datetime(*map(int, numbers), tzinfo=timezone.utc)  # type: ignore[misc,arg-type]
    offset = int(hours) * 3600 + int(minutes) * 60
    if offset >= DAY:
        raise ValueError("the offset is out of range")
    seconds = int(moment.timestamp()) + (offset if sign == "-" else -offset)
    write_timestamp(seconds)  # an offset can carry the first and the last year over their ends
    return seconds


def write_timestamp(seconds: int) -> str:
    """Return seconds since 1970 in ISO 8601, in UTC, without an offset, as the storage service.

    Raises ValueError before the year 1 and beyond 9999.
    """
    try:
        return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat()
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
    source: str = ""
    source_ip: str = ""
    destination: str = ""
    carrier_ip: str = ""
    tags: tuple[str, ...] = ()
    timestamp_auth: int | None = None
    timestamp_begin: int | None = None
    timestamp_end: int | None = None

    def legs(self) -> list[tuple[str, bool]] | None:
        """Return (account tag, inbound) of the one or two legs, the caller's first.

        An empty tag names no leg, so the list may be empty: that request succeeds and does
        nothing. None means that the services can't carry the request out at all: no account is
        named, or it holds something that they do not bring into their storage.
        """
        pair = (self.account_tag, self.destination_account_tag)
        if pair == (None, None) or not self.storable():
            return None
        return [(tag, inbound) for tag, inbound in zip(pair, (False, True), strict=True) if tag]

    def storable(self) -> bool:
        """Say whether storage takes every text and every time.

        It takes no characters beyond the Basic Multilingual Plane. The services write a year
        before 1000 with fewer than four digits, and then can't read it.
        """
        values = [*vars(self).values(), *self.tags]
        return not any(
            _BEYOND_BMP.search(value) if isinstance(value, str) else value < OLDEST
            for value in values
            if isinstance(value, str | int)
        )


_WHO = "tenant transaction_tag account_tag destination_account_tag".split()
_CALL = [*_WHO, *"source source_ip destination carrier_ip".split()]
# The fields that each operation reads. All others are ignored whatever they hold: product_tag, and
# `tags` of a begin. Of a record, authorized and unauthorized_reason are taken and not stored.
OPERATIONS = {
    "begin_transaction": [*_CALL, "timestamp_begin"],
    "end_transaction": [*_WHO, "timestamp_end"],
    "rollback_transaction": _WHO,
    "record_transaction": [*_CALL, "tags", "timestamp_begin", "timestamp_end"],
    "authorization": [*_CALL, "tags", "timestamp_auth"],
}


def read_request(operation: str, body: object) -> Request:
    """Return the request that a decoded JSON value holds; raise Refused for wrong fields."""
    if not isinstance(body, dict):
        raise Refused(_wrong("value_error.missing" if body is None else "type_error.dict"))
    values: Row = {}
    wrong: list[Row] = []
    for field in OPERATIONS[operation]:
        value = body.get(field)
        try:
            if value is not None:
                values[field] = _read_field(field, value)
            elif field == "transaction_tag" and field not in body:
                raise Refused(_wrong("value_error.missing", field))
            elif field == "transaction_tag" or (field == "tenant" and field in body):
                raise Refused(_wrong("type_error.none.not_allowed", field))
        except Refused as error:
            wrong += error.detail
    if wrong:
        raise Refused(*wrong)
    return Request(**values)


def _read_field(field: str, value: object) -> object:
    if field == "tags":
        return _read_tags(value)
    if not field.startswith("timestamp_"):
        return _read_text(value, field)
    try:
        return read_timestamp(value)
    except TypeError:
        raise Refused(_wrong("type_error", field)) from None
    except ValueError:
        raise Refused(_wrong("value_error.datetime", field)) from None


def _read_tags(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Refused(_wrong("type_error.list", "tags"))
    tags: list[str] = []
    wrong: list[Row] = []
    for number, tag in enumerate(value):
        try:
            tags.append(_read_text(tag, "tags", number))
        except Refused as error:
            wrong += error.detail
    if wrong:
        raise Refused(*wrong)
    return tuple(tags)


def _read_text(value: object, *where: str | int) -> str:
    """Return a text; a number or a boolean becomes one, as Python writes it."""
    if value is None:
        raise Refused(_wrong("type_error.none.not_allowed", *where))
    if not isinstance(value, str | int | float):
        raise Refused(_wrong("type_error.str", *where))
    return str(value)


def rate_call(rate: Mapping[str, Any] | None, begin: float, end: float) -> tuple[int, int]:
    """Return the duration of a call in whole seconds, and its fee in the unit of the `rate`.

    Begin and end are seconds since 1970. A call that does not end after its begin has no length
    and costs nothing. Else the duration is rounded up and whole days are dropped, so that 25
    hours give 3,600; the connect fee covers the first `interval_start` steps of `rate_increment`
    seconds. Without a rate the fee is 0.
    """
    length = end - begin
    if length <= 0:
        return 0, 0
    duration = int(length) % DAY + (length % 1 > 0)
    if rate is None:
        return duration, 0
    steps = -(-duration // rate["rate_increment"]) - rate["interval_start"]
    return duration, rate["connect_fee"] + max(0, steps) * rate["rate"]


def units_for(rate: Mapping[str, Any], balance: int) -> tuple[bool, int]:
    """Return whether a balance admits a call at a rate, and the seconds that it is said to pay.

    This is the services' own formula. It adds `interval_start` as seconds, not as steps, and a
    positive balance admits a call even where it does not pay for one second.
    """
    units = MAX_UNITS
    if rate["rate"]:
        steps = int((balance - rate["connect_fee"]) / rate["rate"])
        units = steps * rate["rate_increment"]
    if units:
        units = max(0, min(units + rate["interval_start"], MAX_UNITS))
    return balance > 0 or rate["connect_fee"] == rate["rate"] == 0, units


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
    destination TEXT, carrier_ip TEXT, timestamp_begin INTEGER NOT NULL, destination_rate TEXT);
CREATE INDEX IF NOT EXISTS running_by_call ON running (tenant, account_tag, transaction_tag);
CREATE TABLE IF NOT EXISTS record (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    account_tag TEXT NOT NULL, transaction_tag TEXT NOT NULL, inbound INTEGER NOT NULL,
    source TEXT, source_ip TEXT, destination TEXT, carrier_ip TEXT, tags TEXT NOT NULL,
    authorized INTEGER, unauthorized_reason TEXT, destination_rate TEXT, timestamp_auth INTEGER,
    timestamp_begin INTEGER, timestamp_end INTEGER, duration INTEGER, fee INTEGER,
    UNIQUE (tenant, transaction_tag, account_tag));
CREATE INDEX IF NOT EXISTS record_by_begin ON record (timestamp_begin);
PRAGMA user_version = 1;
"""
# Version 0 kept no authorizations, but the tags of begins and failures that no service knows.
_UPGRADE = f"""
BEGIN;
CREATE TEMP TABLE old_running AS SELECT * FROM running;
CREATE TEMP TABLE old_record AS SELECT * FROM record;
DROP TABLE running;
DROP TABLE record;
{_TABLES}
INSERT INTO running SELECT number, tenant, account_tag, transaction_tag, inbound, source,
    source_ip, destination, carrier_ip, timestamp_begin, destination_rate FROM old_running;
INSERT INTO record SELECT number, id, tenant, account_tag, transaction_tag, inbound, source,
    source_ip, destination, carrier_ip, tags, NULL, NULL, destination_rate, timestamp_auth,
    timestamp_begin, timestamp_end, duration, fee FROM old_record;
DROP TABLE old_running;
DROP TABLE old_record;
COMMIT;
"""

_LEG = (
    "tenant account_tag transaction_tag inbound source source_ip destination carrier_ip "
    "timestamp_begin destination_rate"
).split()
_RATE = (
    "pricelist_tag carrier_tag prefix description rate rate_increment connect_fee interval_start"
).split()
_BY_CALL = "tenant = :tenant AND account_tag = :account_tag AND transaction_tag = :transaction_tag"

_SELECT_ACCOUNT = "SELECT * FROM account WHERE tenant = ? AND account_tag = ?"
# An account without price lists, or without carriers, may use those of its whole tenant.
_SELECT_RATE = f"""
SELECT {", ".join(_RATE)} FROM rate
WHERE tenant = :tenant AND active AND prefix IN (SELECT value FROM json_each(:prefixes))
    AND (:pricelists = '[]' OR pricelist_tag IN (SELECT value FROM json_each(:pricelists)))
    AND (:carriers = '[]' OR carrier_tag IN (SELECT value FROM json_each(:carriers)))
ORDER BY length(prefix) DESC, rowid LIMIT 1"""
# The carriers of an authorization, the cheapest first: those of any price list.
_SELECT_CARRIERS = """
SELECT protocol || ':' || host || ':' || port FROM rate JOIN carrier USING (tenant, carrier_tag)
WHERE tenant = :tenant AND rate.active AND prefix IN (SELECT value FROM json_each(:prefixes))
    AND (:carriers = '[]' OR carrier_tag IN (SELECT value FROM json_each(:carriers)))
ORDER BY rate.rate, rate.rowid"""
_INSERT_RUNNING = f"""
INSERT INTO running ({", ".join(_LEG)}) SELECT {", ".join(":" + name for name in _LEG)}
WHERE NOT EXISTS (SELECT 1 FROM running
    WHERE {" AND ".join(f"{name} IS :{name}" for name in _LEG)})"""
_SELECT_RUNNING = f"SELECT * FROM running WHERE {_BY_CALL} ORDER BY number LIMIT 1"
_DELETE_RUNNING = f"DELETE FROM running WHERE {_BY_CALL}"
_CHARGE = "UPDATE account SET balance = balance - ? WHERE tenant = ? AND account_tag = ?"

# What identifies a row; everything else of it is what an upsert sets.
_KEYS = {
    "account": ("tenant", "account_tag"),
    "carrier": ("tenant", "carrier_tag"),
    "pricelist": ("tenant", "pricelist_tag"),
    "rate": ("tenant", "pricelist_tag", "carrier_tag", "prefix"),
    "record": ("tenant", "transaction_tag", "account_tag"),
}
_AT_LEAST = {"rate_increment": 1, "interval_start": 0, "rate": 0, "connect_fee": 0}
_JSON_COLUMNS = ("tags", "pricelist_tags", "carrier_tags", "destination_rate")
_BOOLEAN_COLUMNS = ("active", "inbound", "authorized")
_TIME_COLUMNS = ("timestamp_auth", "timestamp_begin", "timestamp_end")


class Sandbox:
    """Accounts, rates, running transactions and records on one SQLite connection.

    Times are passed in, in seconds since 1970, `now` with its fraction. Each method is one database
    transaction, and none gives way to another greenlet: SQLite is called directly, so no two
    requests interleave.
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
        old = foreign and self._db.execute("PRAGMA user_version").fetchone()[0] == 0
        self._db.executescript(_UPGRADE if old else _TABLES)

    def close(self) -> None:
        """Close the database; nothing may be called afterwards."""
        self._db.close()

    def _account(self, tenant: str, account_tag: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(
            _SELECT_ACCOUNT, (tenant, account_tag)
        ).fetchone()
        return row

    def _rate(self, account: sqlite3.Row, destination: str) -> Row | None:
        row = self._db.execute(_SELECT_RATE, _matching(account, destination)).fetchone()
        return dict(row) if row else None

    def _parties(self, request: Request, active: bool) -> list[tuple[sqlite3.Row, bool]] | None:
        """Return account and direction of each leg.

        None if the request can't be carried out, or if an account is not there or, where that
        is asked for, is not active.
        """
        legs = request.legs()
        if legs is None:
            return None
        found = []
        for account_tag, inbound in legs:
            account = self._account(request.tenant, account_tag)
            if account is None or (active and not account["active"]):
                return None
            found.append((account, inbound))
        return found

    def _completed(self, request: Request) -> Request:
        """Return the request; if it names no account, with what the records of its tag say.

        An authorization writes such records, so that a begin can leave everything else out.
        """
        unnamed = (request.account_tag, request.destination_account_tag) == (None, None)
        if not unnamed or not request.storable():
            return request
        select = "SELECT * FROM record WHERE tenant = ? AND transaction_tag = ? ORDER BY number"
        for row in self._db.execute(select, (request.tenant, request.transaction_tag)).fetchall():
            side = "destination_account_tag" if row["inbound"] else "account_tag"
            call = {
                name: row[name] for name in ("source", "source_ip", "destination", "carrier_ip")
            }
            request = replace(request, **{side: row["account_tag"], **call})
        return request

    def begin(self, request: Request, now: float) -> bool:
        """Store a running entry for each leg; the same request again adds none.

        False, with nothing stored for either leg, if one of the accounts is not there or not
        active. Only the caller pays: the callee's leg has no rate.
        """
        request = self._completed(request)
        parties = self._parties(request, active=True)
        if parties is None:
            return False
        begin = int(now) if request.timestamp_begin is None else request.timestamp_begin
        with self._db:
            for account, inbound in parties:
                rate = None if inbound else self._rate(account, request.destination)
                leg = {
                    **vars(request),
                    "account_tag": account["account_tag"],
                    "inbound": inbound,
                    "timestamp_begin": begin,
                    "destination_rate": json.dumps(rate) if rate else None,
                }
                self._db.execute(_INSERT_RUNNING, {name: leg[name] for name in _LEG})
        return True

    def end(self, request: Request, now: float) -> bool:
        """Turn the running entries of each leg into its record and charge it.

        False, with nothing done, if one of the accounts is not there; they need not be active.
        False also at the first leg that is not running: the legs before it are done, those
        behind it run on. Of several entries of one leg the first makes the record, and all go.
        """
        request = self._completed(request)
        parties = self._parties(request, active=False)
        if parties is None:
            return False
        end = now if request.timestamp_end is None else request.timestamp_end
        with self._db:
            for account, _ in parties:
                key = {**vars(request), "account_tag": account["account_tag"]}
                leg = self._db.execute(_SELECT_RUNNING, key).fetchone()
                if leg is None:
                    return False
                rate = json.loads(leg["destination_rate"]) if leg["destination_rate"] else None
                duration, fee = rate_call(rate, leg["timestamp_begin"], end)
                record = {**{name: leg[name] for name in _LEG}, "tags": account["tags"]}
                record |= {"timestamp_end": int(end), "duration": duration, "fee": fee}
                self._put("record", record)
                self._db.execute(_DELETE_RUNNING, key)
                self._db.execute(_CHARGE, (fee, leg["tenant"], leg["account_tag"]))
        return True

    def rollback(self, request: Request) -> bool:
        """Drop the running entries of each leg without a record; False if a leg had none."""
        request = self._completed(request)
        if request.legs() is None:
            return False
        ok = True
        with self._db:
            for account_tag in (request.account_tag, request.destination_account_tag):
                if account_tag is not None:  # an empty one is a leg here, and never runs
                    key = {**vars(request), "account_tag": account_tag}
                    ok = self._db.execute(_DELETE_RUNNING, key).rowcount > 0 and ok
        return ok

    def record(self, request: Request, now: float) -> bool:
        """Write the record of each leg, as a begin and an end at once, but charge nobody.

        False, with nothing written for either leg, if one of the accounts is not there or not
        active. Both legs are marked as the caller's.
        """
        parties = self._parties(request, active=True)
        if parties is None:
            return False
        begin = now if request.timestamp_begin is None else request.timestamp_begin
        end = now if request.timestamp_end is None else request.timestamp_end
        with self._db:
            for account, inbound in parties:
                rate = None if inbound else self._rate(account, request.destination)
                duration, fee = rate_call(rate, begin, end)
                record = {**_new_record(request, account), "inbound": False}
                record |= {"destination_rate": json.dumps(rate) if rate else None}
                record |= {"timestamp_begin": int(begin), "timestamp_end": int(end)}
                self._put("record", {**record, "duration": duration, "fee": fee})
        return True

    def authorize(self, request: Request, now: float) -> Row:
        """Say whether a call may begin.

        The answer has authorized, authorized_destination, unauthorized_account_tag,
        unauthorized_reason (one is spelt so), max_available_units (seconds), balance (of the leg
        looked at last, less its running calls) and carriers. It is kept as a record of each leg,
        but for an account that is not there or not active, or a destination without a rate.
        """
        parties = []
        for account_tag, inbound in request.legs() or ():
            account = self._account(request.tenant, account_tag)
            if account is None:
                return _refusal(account_tag, "NOT_FOUND")
            if not account["active"]:
                return _refusal(account_tag, "NOT_ACTIVE")
            rate = None if inbound else self._rate(account, request.destination)
            if not inbound and rate is None:
                return _refusal(account_tag, "UNREACHEABLE_DESTINATION")
            parties.append((account, inbound, rate))
        answer = self._judge(parties, request.destination, now)
        auth = int(now) if request.timestamp_auth is None else request.timestamp_auth
        with self._db:
            for account, inbound, _ in parties:
                side = "authorized_destination" if inbound else "authorized"
                record = {**_new_record(request, account), "inbound": inbound}
                record |= {"timestamp_auth": auth, "authorized": answer[side]}
                self._put("record", {**record, "unauthorized_reason": ""})
        return answer

    def _judge(
        self, parties: list[tuple[sqlite3.Row, bool, Row | None]], destination: str, now: float
    ) -> Row:
        """Return the answer to an authorization, by the running calls and the money of the legs."""
        answer, units = _refusal(None, None), MAX_UNITS
        for account, inbound, rate in parties:
            where = [("tenant = ?", account["tenant"]), ("account_tag = ?", account["account_tag"])]
            running = self.find("running", where, "number")
            balance = account["balance"]
            for leg in running:
                begin = read_timestamp(leg["timestamp_begin"])
                balance -= rate_call(leg["destination_rate"], begin, now)[1]
            limit = account["max_concurrent_transactions"]
            if limit is not None and len(running) >= limit:
                return _refusal(account["account_tag"], "TOO_MANY_RUNNING_TRANSACTIONS")
            if rate and account["type"] == "PREPAID":
                enough, units = units_for(rate, balance)
                if not enough:
                    return _refusal(account["account_tag"], "BALANCE_INSUFFICIENT")
            answer["authorized_destination" if inbound else "authorized"] = True
            answer["balance"] = balance
            if not inbound:
                matching = _matching(account, destination)
                found = self._db.execute(_SELECT_CARRIERS, matching).fetchall()
                answer["carriers"] = [row[0] for row in found]
        return {**answer, "max_available_units": units if parties else 0}

    def upsert(self, table: str, values: Mapping[str, Any]) -> str:
        """Create a row or change the given columns of it, and return its id.

        `table` is account, carrier, pricelist or rate. A None leaves the column as it is. Raises
        ValueError for a number out of its range, and for a rate before its list and its carrier.
        """
        for name in ("balance", "rate", "connect_fee", "rate_increment", "interval_start"):
            value = values.get(name)
            least = _AT_LEAST.get(name, -MAX_MONEY)
            if value is not None and (type(value) is not int or not least <= value <= MAX_MONEY):
                raise ValueError(f"{name} must be a whole number from {least} to {MAX_MONEY}")
        for parent in ("pricelist", "carrier") if table == "rate" else ():
            key = [(f"{name} = ?", values[name]) for name in _KEYS[parent]]
            if not self.count(parent, key):
                raise ValueError(f"{parent} {values[f'{parent}_tag']!r} is not there")
        with self._db:
            return self._put(table, values)

    def _put(self, table: str, values: Mapping[str, Any]) -> str:
        keys = _KEYS[table]
        row = {
            name: json.dumps(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }
        same = " AND ".join(f"{name} = :{name}" for name in keys)
        changes = [f"{name} = :{name}" for name in row if name not in keys]
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


def _matching(account: sqlite3.Row, destination: str) -> Row:
    """Return what the choice of a rate and of carriers depends on.

    A prefix is shorter than the destination and has at most MAX_PREFIX characters.
    """
    longest = min(MAX_PREFIX, len(destination) - 1)
    return {
        "tenant": account["tenant"],
        "prefixes": json.dumps([destination[:length] for length in range(1, longest + 1)]),
        "pricelists": account["pricelist_tags"],
        "carriers": account["carrier_tags"],
    }


def _new_record(request: Request, account: sqlite3.Row) -> Row:
    """Return what a record without a begin has of its request; else only the account has tags."""
    return {
        **{name: getattr(request, name) for name in _CALL if name != "destination_account_tag"},
        "account_tag": account["account_tag"],
        "tags": [*request.tags, *json.loads(account["tags"])],
    }


def _refusal(account_tag: str | None, reason: str | None) -> Row:
    return {
        **{"authorized": False, "authorized_destination": False},
        **{"unauthorized_account_tag": account_tag, "unauthorized_reason": reason},
        **{"max_available_units": 0, "balance": 0, "carriers": []},
    }


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


def carry_out(sandbox: Sandbox, operation: str, request: Request, now: float) -> Row:
    """Carry one agent operation out, a key of OPERATIONS, and return the answer to the client."""
    who = {name: getattr(request, name) for name in _WHO}
    if operation == "authorization":
        return {**who, **sandbox.authorize(request, now)}
    if operation == "begin_transaction":
        ok = sandbox.begin(request, now)
    elif operation == "end_transaction":
        ok = sandbox.end(request, now)
    elif operation == "rollback_transaction":
        ok = sandbox.rollback(request)
    else:
        ok = sandbox.record(request, now)
    return {"ok": ok, **who}


_WHO_ARGUMENTS = """tenant: ID = "default", transaction_tag: String!,
    account_tag: String, destination_account_tag: String"""
_CALL_ARGUMENTS = f"""{_WHO_ARGUMENTS}, source: String, source_ip: String,
    destination: String, carrier_ip: String"""
_LIST_ARGUMENTS = """sortField: String = "id", sortOrder: String = "asc",
    page: Int = 0, perPage: Int = 25"""
_ANSWER_FIELDS = """tenant: ID transaction_tag: String! account_tag: String
  destination_account_tag: String"""
# BigInt goes through graphql-core as any literal, and `Sandbox.upsert` looks at its kind and range:
# GraphQL's own Int ends at 32 bits, which a balance does not.
SCHEMA = build_schema(f"""
scalar BigInt
scalar DateTime
enum AccountType {{ PREPAID POSTPAID }}
enum CarrierProtocol {{ UDP TCP }}
enum PricelistCurrency {{ EUR USD }}
type DestinationRate {{
  pricelist_tag: String carrier_tag: String prefix: String description: String
  rate: Int rate_increment: Int connect_fee: Int interval_start: Int
}}
type RunningTransaction {{
  transaction_tag: String! source: String source_ip: String destination: String carrier_ip: String
  tags: [String] in_progress: Boolean inbound: Boolean timestamp_begin: DateTime
  timestamp_end: DateTime destination_rate: DestinationRate
}}
type Account {{
  id: ID! tenant: ID! account_tag: String! name: String type: AccountType active: Boolean
  balance: BigInt max_concurrent_transactions: Int pricelist_tags: [String] carrier_tags: [String]
  tags: [String] running_transactions: [RunningTransaction]
}}
type Transaction {{
  id: ID! tenant: ID! transaction_tag: String! account_tag: String account: Account
  source: String source_ip: String destination: String carrier_ip: String tags: [String]
  authorized: Boolean unauthorized_reason: String destination_rate: DestinationRate
  timestamp_auth: DateTime timestamp_begin: DateTime timestamp_end: DateTime primary: Boolean
  inbound: Boolean duration: Int fee: BigInt
}}
type ListMetadata {{ count: Int! }}
type Stored {{ id: ID! }}
type Answer {{ ok: Boolean {_ANSWER_FIELDS} }}
type Authorization {{ {_ANSWER_FIELDS}
  authorized: Boolean authorized_destination: Boolean unauthorized_account_tag: String
  unauthorized_reason: String max_available_units: Int balance: BigInt carriers: [String]
}}
input AccountFilter {{
  q: String id: ID ids: [ID] tenant: ID = "default" account_tag: String type: AccountType
  active: Boolean with_running_transactions: Boolean
}}
input TransactionFilter {{
  q: String id: ID ids: [ID] tenant: ID = "default" transaction_tag: String account_tag: String
  primary: Boolean inbound: Boolean
}}
type Query {{
  version: Int
  Account(id: ID, tenant: ID = "default", account_tag: String): Account
  allAccounts({_LIST_ARGUMENTS}, filter: AccountFilter): [Account]
  _allAccountsMeta({_LIST_ARGUMENTS}, filter: AccountFilter): ListMetadata
  Transaction(id: ID, tenant: ID = "default", transaction_tag: String,
    account_tag: String): Transaction
  allTransactions({_LIST_ARGUMENTS}, filter: TransactionFilter): [Transaction]
  _allTransactionsMeta({_LIST_ARGUMENTS}, filter: TransactionFilter): ListMetadata
}}
type Mutation {{
  beginTransaction({_CALL_ARGUMENTS}, tags: [String], timestamp_begin: DateTime): Answer
  endTransaction({_WHO_ARGUMENTS}, timestamp_end: DateTime): Answer
  rollbackTransaction({_WHO_ARGUMENTS}): Answer
  recordTransaction({_CALL_ARGUMENTS}, tags: [String], authorized: Boolean,
    unauthorized_reason: String, timestamp_auth: DateTime, timestamp_begin: DateTime,
    timestamp_end: DateTime): Answer
  authorization({_CALL_ARGUMENTS}, timestamp_auth: DateTime): Authorization
  upsertAccount(tenant: ID! = "default", account_tag: String!, name: String,
    type: AccountType!, active: Boolean = true, balance: BigInt, max_concurrent_transactions: Int,
    pricelist_tags: [String], carrier_tags: [String], tags: [String]): Account
  upsertCarrier(tenant: ID! = "default", carrier_tag: String!, host: String, port: Int,
    protocol: CarrierProtocol, active: Boolean = true): Stored
  upsertPricelist(tenant: ID! = "default", pricelist_tag: String!, name: String,
    currency: PricelistCurrency): Stored
  upsertPricelistRate(tenant: ID! = "default", pricelist_tag: String!, carrier_tag: String!,
    prefix: String!, active: Boolean = true, description: String, rate: Int,
    rate_increment: Int, connect_fee: Int, interval_start: Int): Stored
}}
""")


def _read_argument(value: object) -> str:
    """Return a time stamp of GraphQL, which is a text; `read_request` reads it again."""
    if not isinstance(value, str):
        raise GraphQLError("DateTime is a text.")
    try:
        read_timestamp(value)
    except ValueError as error:
        raise GraphQLError(f"{value!r}: {error}") from None
    return value


# Without this a wrong literal would be found only when its mutation runs, not before all others.
# graphql-core 3.3 has another name for what 3.2 calls parse_value.
for _name in ("parse_value", "coerce_input_value"):
    setattr(SCHEMA.type_map["DateTime"], _name, _read_argument)

_SORTABLE = {
    "account": "id tenant account_tag name type active balance".split(),
    "record": "id tenant account_tag transaction_tag inbound timestamp_auth timestamp_begin "
    "timestamp_end duration fee".split(),
}
_SEARCHED = {
    "account": ("tenant", "account_tag", "name"),
    "record": ("tenant", "account_tag", "transaction_tag"),
}


def _conditions(table: str, given: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return a GraphQL filter as conditions for `Sandbox.find`.

    Without a filter every tenant is listed; with one the schema sets the tenant to "default". What
    is empty is no condition, nor is `false` but for `primary` and `inbound`.
    """
    where: list[tuple[str, Any]] = []
    for name, value in (given or {}).items():
        if not value and (value is None or name not in ("primary", "inbound")):
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
            some += " AND r.account_tag = account.account_tag AND NOT r.inbound"
            where.append((f"EXISTS ({some}) = ?", 1))
        else:
            where.append((f"{name} = ?", value))
    return where


class GraphQL:
    """Answers GraphQL documents from a sandbox.

    A row may hold functions as well, for what is rarely asked for; see `_resolve`.
    """

    def __init__(self, sandbox: Sandbox, clock: Callable[[], float]) -> None:
        self._sandbox = sandbox
        self._clock = clock
        self._fields: dict[str, Callable[..., Any]] = {
            "version": lambda _info: 1,
            "Account": partial(self._get, "account"),
            "allAccounts": partial(self._list, "account"),
            "_allAccountsMeta": partial(self._meta, "account"),
            "Transaction": partial(self._get, "record"),
            "allTransactions": partial(self._list, "record"),
            "_allTransactionsMeta": partial(self._meta, "record"),
            "beginTransaction": partial(self._agent, "begin_transaction"),
            "endTransaction": partial(self._agent, "end_transaction"),
            "rollbackTransaction": partial(self._agent, "rollback_transaction"),
            "recordTransaction": partial(self._agent, "record_transaction"),
            "authorization": partial(self._agent, "authorization"),
            "upsertAccount": partial(self._upsert, "account"),
            "upsertCarrier": partial(self._upsert, "carrier"),
            "upsertPricelist": partial(self._upsert, "pricelist"),
            "upsertPricelistRate": partial(self._upsert, "rate"),
        }

    def answer(self, query: str, variables: object, name: object) -> tuple[bool, Row]:
        """Return whether all went well, and the body of the answer, done in part or not."""
        document = _prepare(query)
        if isinstance(document, list):
            return False, {"data": None, "errors": [error.formatted for error in document]}
        context: Row = {}  # an agent's mutation sets "agent"
        result = execute_sync(
            SCHEMA,
            document,
            root_value=self._fields,
            field_resolver=_resolve,
            context_value=context,
            variable_values=variables if isinstance(variables, dict) else None,
            operation_name=name if isinstance(name, str) else None,
        )
        if result.errors:
            errors = [error.formatted for error in result.errors]
            return False, {"data": result.data, "errors": errors}
        # The agent service, not the storage service, says besides that there are no errors.
        return True, {"data": result.data, **({"errors": None} if context else {})}

    def _running(self, account: Row, _info: Any) -> list[Row]:
        where = [("tenant = ?", account["tenant"]), ("account_tag = ?", account["account_tag"])]
        rows = self._sandbox.find("running", where, "number")
        return [{**row, "in_progress": True, "timestamp_end": None} for row in rows]

    def _complete(self, table: str, row: Row) -> Row:
        """Return an account with its running transactions, or a record with its account."""
        if table == "account":
            return {**row, "running_transactions": partial(self._running, row)}
        where = [("tenant = ?", row["tenant"]), ("account_tag = ?", row["account_tag"])]
        return {**row, "primary": True, "account": lambda _info: self._one("account", where)}

    def _one(self, table: str, where: list[tuple[str, Any]]) -> Row | None:
        rows = self._sandbox.find(table, where, limit=1)
        return self._complete(table, rows[0]) if rows else None

    def _get(self, table: str, _info: Any, id: str | None = None, **tags: str | None) -> Row | None:
        if id is not None:
            return self._one(table, [("id = ?", id)])
        wanted = ["tenant", "account_tag", *(["transaction_tag"] if table == "record" else [])]
        if any(tags.get(name) is None for name in wanted):
            raise GraphQLError(f"Provide either the id or {', '.join(wanted)}.")
        return self._one(table, [(f"{name} = ?", tags[name]) for name in wanted])

    def _list(self, table: str, _info: Any, **given: Any) -> list[Row]:
        page, size, field = given["page"], given["perPage"], given["sortField"]
        if page < 0 or not 1 <= size <= MAX_PAGE:
            raise GraphQLError(f"page must be 0 or more, perPage 1 to {MAX_PAGE}.")
        if field not in _SORTABLE[table] or given["sortOrder"].lower() not in ("asc", "desc"):
            raise GraphQLError(f"sortField is one of {', '.join(_SORTABLE[table])}, asc or desc.")
        where = _conditions(table, given.get("filter"))
        descending = given["sortOrder"].lower() == "desc"
        rows = self._sandbox.find(table, where, field, descending, size, page * size)
        return [self._complete(table, row) for row in rows]

    def _meta(self, table: str, _info: Any, **given: Any) -> Row:
        return {"count": self._sandbox.count(table, _conditions(table, given.get("filter")))}

    def _agent(self, operation: str, info: Any, **arguments: Any) -> Row:
        info.context["agent"] = True
        # A null is like nothing here, for the tenant too.
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            request = read_request(operation, given)
        except Refused as error:
            raise GraphQLError(str(error)) from None
        return carry_out(self._sandbox, operation, request, self._clock())

    def _upsert(self, table: str, _info: Any, **arguments: Any) -> Row | None:
        identity = self._sandbox.upsert(table, arguments)
        return self._one(table, [("id = ?", identity)]) if table == "account" else {"id": identity}


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
_RECORDS_SHOWN = ["timestamp_end", *_RUNNING_SHOWN, "duration", "fee"]


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


def _json(value: object, status: str = "200 OK") -> Answered:
    return status, "application/json", json.dumps(value, separators=(",", ":")).encode()


def _read_json(environ: dict[str, Any]) -> Any:
    """Return the decoded body, None for none. Raises HttpError for one too long or no JSON."""
    if int(environ.get("CONTENT_LENGTH") or 0) > MAX_BODY:
        raise HttpError("413 Content Too Large", "The body is larger than 4 MiB")
    body = environ["wsgi.input"].read(MAX_BODY + 1)  # the length of a chunked body shows only here
    if len(body) > MAX_BODY:
        raise HttpError("413 Content Too Large", "The body is larger than 4 MiB")
    if not body:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # ValueError is that of UTF-8, too
        raise HttpError("400 Bad Request", "There was an error parsing the body") from None


class App:
    """The WSGI application for a sandbox."""

    def __init__(
        self, sandbox: Sandbox, token: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """With a token each request but `GET /status` must carry `Authorization: Bearer <token>`.

        `clock` gives the time of a request that names none, in seconds since 1970.
        """
        self._sandbox = sandbox
        self._expected = f"Bearer {token}".encode() if token else b""
        self._clock = clock
        self._graphql = GraphQL(sandbox, clock)
        self._routes: dict[str, tuple[str, Callable[[dict[str, Any]], Answered]]] = {
            "/": ("GET", self._page),
            "/status": ("GET", lambda _environ: ("204 No Content", "", b"")),
            "/graphql": ("GET, POST", self._query),
            **{f"/v1/{name}": ("POST", partial(self._agent, name)) for name in OPERATIONS},
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer one request, as WSGI has it."""
        extra: tuple[tuple[str, str], ...] = ()
        try:
            status, content_type, body = self._answer(environ)
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

    def _answer(self, environ: dict[str, Any]) -> Answered:
        path = environ.get("PATH_INFO", "")
        if self._expected and path != "/status":
            given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, self._expected):
                challenge = ("WWW-Authenticate", "Bearer")
                raise HttpError("401 Unauthorized", "Unauthorized", challenge)
        if path not in self._routes:
            raise HttpError("404 Not Found", "Not Found")
        methods, handler = self._routes[path]
        if environ["REQUEST_METHOD"] not in methods.split(", "):
            raise HttpError("405 Method Not Allowed", "Method Not Allowed", ("Allow", methods))
        return handler(environ)

    def _page(self, _environ: dict[str, Any]) -> Answered:
        return "200 OK", "text/html; charset=utf-8", render_page(self._sandbox).encode()

    def _agent(self, operation: str, environ: dict[str, Any]) -> Answered:
        try:
            request = read_request(operation, _read_json(environ))
        except Refused as error:
            raise HttpError("422 Unprocessable Entity", error.detail) from None
        return _json(carry_out(self._sandbox, operation, request, self._clock()))

    def _query(self, environ: dict[str, Any]) -> Answered:
        body = _read_json(environ) if environ["REQUEST_METHOD"] == "POST" else {}
        if not isinstance(body, dict):
            raise HttpError("400 Bad Request", "The body is no JSON object")
        query, variables, name = map(body.get, ("query", "variables", "operationName"))
        if not isinstance(query, str):
            return "400 Bad Request", "text/plain", b"No GraphQL query found in the request"
        well, answer = self._graphql.answer(query, variables, name)
        return _json(answer, "200 OK" if well else "400 Bad Request")


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
    server = Server(options.listen, App(sandbox, options.token), log=log)
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
