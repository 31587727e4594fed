#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "gevent>=23.9", "urllib3>=2.2", "ConfigArgParse>=1.7", "PyYAML>=6",
#   "python-json-logger>=3.1", "statsd>=4", "google-re2>=1.1.20251105",
# ]
# ///
"""Rate telephone calls from a mirror of their signalling.

SIP servers send copies of their messages as HEP packets. This agent decodes them, follows
each call and tells a rating API when the call begins and when it ends:

    OpenSIPS --HEP/TCP--+
    Kamailio --HEP/UDP--+-> decode -> parse -> facts -> judge -> outbox -> rating API (HTTP)
                        +------- pure: bytes, settings, now -----+   +- in order, per call -+

Two rules keep the file readable. A room uses only names of its own or of rooms above it. The rooms
from the types to the outbox are pure: they take bytes, settings and ``now`` and touch no socket,
clock, logger or global.

What is promised: at most one begin and one end for a call, the end only after its begin was
answered, a retry with the same octets; no charge without an answer; with a journal or a cluster
nothing that was taken in is lost; nothing grows without bound; one bad packet costs only itself;
everything dropped is counted and says why.

The rooms: imports; limits; errors and types; options; HEP; SIP; routes; the call: facts and a
judge; call table; call records; outbox; configuration; logs and metrics; store; Redis; rating API;
delivery; cluster; forwarding; agent; servers; recordings; command line.
"""

# Room: imports

# Before anything else is imported: this module is a program that runs on gevent's loop, and
# urllib3 binds its queue class at import, which must be the co-operative one.
from gevent import monkey

monkey.patch_all()

import csv
import difflib
import errno
import fcntl
import gc
import gzip
import hashlib
import heapq
import hmac
import http.client
import io
import ipaddress
import json
import logging
import os
import random
import re
import resource
import select
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import time
import traceback
import zlib
from base64 import b64decode, b64encode
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cache, cached_property, lru_cache, partial
from itertools import accumulate, chain, islice, takewhile
from math import inf
from operator import attrgetter
from stat import S_ISREG
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

import configargparse
import gevent
import gevent.event
import gevent.lock
import gevent.pool
import gevent.server
import gevent.threadpool
import re2
import statsd
import urllib3
import yaml
from pythonjsonlogger.json import JsonFormatter

__version__ = "0.1.0"

# Room: limits

# These are the limits that an operator feels. All others stand beside their use.

# Octets. What a compressed payload may inflate to; a SIP message over UDP is never larger.
MAX_INFLATED = 65_536
# Characters. A Call-ID, a tag, an account or an address: servers keep 255, and each goes into log
# lines, the journal and the API's requests.
MAX_TEXT = 1_024
# Events for one API that wait in memory where there is no journal, or it fails; about 1 kB each.
MAX_WAITING_EVENTS = 100_000
# Events for one API that wait in memory where a journal has them too; the later ones stay on disk.
MAX_EVENTS_IN_MEMORY = 10_000
# Attempts of an event that the API answers with ``ok: false`` before that is believed. With the
# delays below they spread over two minutes: a storage service that restarts answers exactly so.
MAX_REFUSALS = 10
# Seconds for which a party that the API does not know is left out of further begins.
UNKNOWN_PAUSE = 60.0
# Seconds. Delays between attempts: the first, doubled each time, up to the last.
RETRY_FIRST = 1.0
RETRY_LAST = 30.0
# Seconds. The longest Retry-After that is obeyed; a server that says more is asked again.
MAX_RETRY_AFTER = 300.0
# Failures in a row after which an API counts as down and is asked by one probe at a time.
DOWN_AFTER = 3
# Octets asked for as socket receive buffer; the kernel grants up to net.core.rmem_max, and to a
# process with CAP_NET_ADMIN all of it.
RECEIVE_BUFFER = 16 * 1024 * 1024
# Connections of the TCP listener at one time, and of the TLS listener. OpenSIPS opens one for each
# of its workers; each may hold MAX_HEP_FRAME octets, that is 64 MB.
MAX_CONNECTIONS = 1_024
# Connections of one sender at one time, over both: it must not take all places.
MAX_CONNECTIONS_PER_SENDER = 256
# Seconds from the first octet of a frame to its last: a frame has at most 64 kB.
FRAME_TIMEOUT = 30.0
# Senders of which something is known. Forged source addresses must not take memory; more than the
# connections of both listeners, for one with an open connection is not forgotten.
MAX_SENDERS = 4_096
# Log lines a second for one kind of warning; what is held back is counted on the next line.
MAX_WARNINGS_PER_SECOND = 3
# Seconds between two commits of the journal: what a power cut or kill -9 may cost.
JOURNAL_INTERVAL = 0.01
# Rows not written yet, some 1 kB each, over which no more is read from TCP: a sender waits, then.
MAX_UNWRITTEN = 10_000
# Seconds that a commit may take before the agent goes on from memory as if it had failed.
JOURNAL_STALL = 5.0
# Rejected events that are kept for an operator; older ones are in the log, ready for replay.
MAX_REJECTED = 100_000
# Seconds that a rating API may be down before the agent calls itself unhealthy; restarts take less.
API_DOWN_UNHEALTHY = 60.0

# Room: errors and types

_compact_json = json.JSONEncoder(separators=(",", ":")).encode


class AgentError(Exception):
    """The base of every error that this module raises on purpose.

    ``kind`` is a short word that names the fault; it ends a metric's name.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class HepError(AgentError):
    """The peer sent octets that are no HEP packet; the text says where, if it is one place."""


class SipError(AgentError):
    """The peer sent a SIP message whose place in a call can't be told."""


class ConfigError(AgentError):
    """The operator wrote something that can't be meant; the text is one line for a person."""

    def __init__(self, text: str) -> None:
        super().__init__("config", text)


class DeliveryError(AgentError):
    """The rating API gave no answer that counts.

    ``unknown`` says that the request may have been carried out all the same. ``wait`` is what
    Retry-After asked for, in seconds.
    """

    def __init__(self, kind: str, text: str, unknown: bool, wait: float = 0.0) -> None:
        super().__init__(kind, text)
        self.unknown = unknown
        self.wait = wait


class StoreError(AgentError):
    """A store can't be read; what it has stays there."""

    def __init__(self, text: str) -> None:
        super().__init__("store", text)


@dataclass(slots=True)
class HepPacket:
    """One decoded HEP packet.

    ``time`` is UNIX time in microseconds (chunks 0x09 and 0x0a, or the arrival). Addresses are
    packed, 4 or 16 octets, or empty where the sender gave none. ``protocol_type`` is 1 for SIP.
    """

    version: int
    time: int
    protocol: int = 0
    protocol_type: int = 0
    source: bytes = b""
    destination: bytes = b""
    source_port: int = 0
    destination_port: int = 0
    capture_id: int = 0
    capture_name: str = ""
    correlation_id: str = ""
    auth_key: bytes = field(default=b"", repr=False)
    payload: bytes = b""

    @property
    def source_ip(self) -> str:
        """The source address of the SIP message as text, "" where unknown."""
        return _ip_text(self.source)

    @property
    def destination_ip(self) -> str:
        """The destination address of the SIP message as text, "" where unknown."""
        return _ip_text(self.destination)


def _ip_text(packed: bytes) -> str:
    return ipaddress.ip_address(packed).compressed if packed else ""


class Uri(NamedTuple):
    """A SIP, SIPS or tel URI (RFC 3261 section 19.1, RFC 3966).

    ``scheme`` and ``host`` are lower case, ``host`` without the brackets of IPv6; ``user`` is as
    written, still escaped, without password; for ``tel:`` it is the number. Other schemes have
    neither user nor host. ``phone`` says that the user is a telephone number (``user=phone``).
    """

    scheme: str
    user: str
    host: str
    port: int | None
    phone: bool = False


# What stands for a text that is no URI.
NO_URI = Uri("", "", "", None)


class Via(NamedTuple):
    """One hop of a message: the ``branch`` and the lower-case sent-by (RFC 3261 section 20.42)."""

    branch: str
    sent_by: str


class Rewrite(NamedTuple):
    """One step that changes ``field`` of what is reported: "source", "account" and so on.

    ``match`` is a compiled regexp of RE2; what it finds first becomes ``replace``, in which
    ``\\0`` stands for all that was found and ``\\1`` to ``\\9`` for the groups, as RE2 has it.
    """

    field: str
    match: Any
    replace: str


@dataclass(frozen=True, eq=False)
class Route:
    """How the calls of one rule are rated; ``routes.yaml`` and the main options fill it.

    ``account`` and ``destination_account`` are ordered sources, None for the order of the former
    agent. ``local_domains`` is None in a rule that sets none.
    """

    name: str
    action: str
    tenant: str
    account: tuple[str, ...] | None
    destination_account: tuple[str, ...] | None
    local_domains: tuple[str, ...] | None
    account_match: Any  # a compiled regexp of RE2, or None
    product_tag: str
    tags: tuple[str, ...]
    destination: str
    transaction_tag: str
    rating_api_url: str
    transaction_match: Any = None  # a compiled regexp of RE2, or None
    rewrite: tuple[Rewrite, ...] = ()
    carrier_ip: bool = False

    @property
    def ties(self) -> bool:
        """Whether calls with other Call-IDs may be legs of one call (rule 17)."""
        return self.transaction_tag != "call-id" or self.transaction_match is not None

    @cached_property
    def packed(self) -> str:
        """The values in order of the fields, as a JSON text for `unpack_route`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _ROUTE_REGEXPS:
            values[name] = values[name].pattern if values[name] else None
        values["rewrite"] = [(x.field, x.match.pattern, x.replace) for x in self.rewrite]
        return _compact_json(list(values.values()))


_ROUTE_REGEXPS = ("account_match", "transaction_match")


def compile_regexp(text: str) -> Any:
    """Compile a regexp of an operator; raises ConfigError.

    RE2 takes time linear in the text, whatever the sender of it wrote. Python's own takes 6.5 s
    for ``(.*)*(.*)*=`` on 22 characters, and twice as long for each further one.
    """
    options = re2.Options()
    # Else it writes to the standard error stream by itself.
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace")
        raise ConfigError(f"{text!r}: {reason}; allowed: a regexp in the syntax of RE2") from None
    except UnicodeError:
        raise ConfigError(f"{text!r}: not UTF-8; allowed: a regexp in the syntax of RE2") from None


def unpack_route(text: str) -> Route:
    """A route from the JSON text that `Route.packed` made of it."""
    kept = zip([item.name for item in fields(Route)], json.loads(text), strict=True)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept
    }
    for name in _ROUTE_REGEXPS:
        values[name] = compile_regexp(values[name]) if values[name] else None
    values["rewrite"] = tuple(Rewrite(x, compile_regexp(y), z) for x, y, z in values["rewrite"])
    return Route(**values)


# Rating API, tenant and transaction tag.
CallKey = tuple[str, str, str]
# The two parties of a call, and which tag an event that names one alone leaves out.
CALLER, CALLEE = "caller", "callee"
_OTHER_TAG = {CALLER: "destination_account_tag", CALLEE: "account_tag"}


@dataclass(slots=True, eq=False)
class RatingEvent:
    """A call began or ended: what the rating API is to be told, as it will be sent.

    ``kind`` is "begin" or "end", ``time`` UNIX time in microseconds, ``reason`` what gave the
    event ("answer", "ack", "bye", "deadline", "session", "evicted"), ``body`` the JSON octets of
    the request: made once, so that a retry sends the same. ``row`` numbers the call, ``serial`` the
    events in the order in which they came about. ``unknown`` says that an attempt may have been
    carried out, ``answer`` what became of the last one. ``party`` is CALLER or CALLEE where that
    one alone is named to the API, ``left_out`` the tag of the other once that is settled. ``store``
    is where it outlives the process, None for nowhere.
    """

    kind: str
    call_id: str
    tenant: str
    transaction_tag: str
    account_tag: str
    destination_account_tag: str
    time: int
    reason: str
    api_url: str
    body: bytes
    row: int = 0
    serial: int = 0
    attempts: int = 0
    failures: int = 0
    refusals: int = 0
    confirmed: int = 0
    refused_at: float = 0.0
    unknown: bool = False
    answer: str = ""
    party: str = ""
    left_out: str = ""
    store: Any = None

    @property
    def key(self) -> CallKey:
        """Events with the same key belong to one call and are delivered in order."""
        return (self.api_url, self.tenant, self.transaction_tag)

    def request(self) -> bytes:
        """The octets to send: ``body``, or what is left of it with one party alone."""
        if not self.party:
            return self.body
        content = json.loads(self.body)
        content.pop(_OTHER_TAG[self.party], None)
        return _compact_json(content).encode()

    def keep_only(self, party: str) -> None:
        """Take the other party out for good."""
        self.party = party
        self.body = self.request()
        self.left_out = getattr(self, _OTHER_TAG[party])
        setattr(self, _OTHER_TAG[party], "")

    def fields(self) -> dict[str, Any]:
        """What a log line says of this event."""
        return {
            "call_id": self.call_id,
            "tenant": self.tenant,
            "transaction_tag": self.transaction_tag,
            "account_tag": self.account_tag,
            "destination_account_tag": self.destination_account_tag,
            f"timestamp_{self.kind}": rfc3339(self.time),
            "reason": self.reason,
            "attempt": self.attempts,
        }

    def replayable(self) -> dict[str, Any]:
        """The event whole, as a log line keeps it when it leaves memory undelivered."""
        return {
            "method": "POST",
            "url": f"{self.api_url}/v1/{self.kind}_transaction",
            "body": json.loads(self.body),
            "maybe_delivered": self.unknown,
        }

    def pack(self) -> list[Any]:
        """What `unpack_event` needs, as the journal keeps it."""
        return [*_EVENT_VALUES(self), self.body.decode("ascii")]


_EVENT = "kind call_id tenant transaction_tag account_tag destination_account_tag time reason"
_EVENT_VALUES = attrgetter(*_EVENT.split())


def unpack_event(values: Sequence[Any], api_url: str, row: int, serial: int) -> RatingEvent:
    """An event from what `pack` made of it. An attempt before may have been carried out."""
    *plain, body = values
    more: dict[str, Any] = dict(zip(_EVENT.split(), plain, strict=True))
    more |= {"api_url": api_url, "body": body.encode("ascii"), "row": row, "serial": serial}
    return RatingEvent(**more, unknown=True)


def rfc3339(time_us: int) -> str:
    """UNIX time in microseconds as RFC 3339 with milliseconds, cut as the rating API cuts."""
    seconds, rest = divmod(time_us, 1_000_000)
    stamp = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{stamp.isoformat()[:19]}.{rest // 1000:03d}Z"


# Room: options

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# RFC 3261 section 25.1: what a method, the name of a header or a parameter is made of.
_TOKEN = r"[A-Za-z0-9.!%*_+`'~-]+"


def flag(text: str) -> bool:
    """true or false in the spellings of YAML and of shells. Raises ConfigError."""
    if text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0", ""):
        return text.lower() in ("true", "yes", "on", "1")
    raise ConfigError(f"{text!r}; allowed: true, false")


def number(least: float, most: float, kind: type = float) -> Callable[[str], Any]:
    """A converter to numbers from least to most, of kind int or float (seconds)."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "seconds"
            raise ConfigError(f"{text!r}; allowed: {what} from {least:g} to {most:g}")
        return value

    return convert


def _choice(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ConfigError(f"{value!r}; allowed: {', '.join(allowed)}")
        return str(value)

    return check


def _one_text(value: Any) -> str:
    text = isinstance(value, str | int) and not isinstance(value, bool) and str(value)
    if not text or not text.isprintable():
        raise ConfigError(f"{value!r}; allowed: a text that is not empty")
    return str(value)


def words(text: str) -> tuple[str, ...]:
    """A list: JSON as the YAML file's reader hands it on, else words split at commas or spaces."""
    if text.startswith("["):
        try:
            return tuple(str(item) for item in json.loads(text))
        except ValueError:
            raise ConfigError(f"{text!r}; allowed: words, or a JSON list") from None
    return tuple(word for word in re.split(r"[,\s]+", text) if word)


def keys(text: str) -> tuple[str, ...]:
    """A list of keys, none of them empty. Raises ConfigError, which quotes none."""
    with suppress(ConfigError):
        listed = words(text)
        if all(key and key.isprintable() for key in listed):
            return listed
    raise ConfigError("it is no list of keys; allowed: words, or a JSON list of texts on one line")


def as_domains(texts: Iterable[str]) -> tuple[str, ...]:
    """Domains as `in_domains` takes them: lower case, IPv6 addresses without brackets."""
    return tuple(text.lower().strip("[]") for text in texts)


def domains(text: str) -> tuple[str, ...]:
    """A list of domains in lower case; ``*.example`` means all subdomains of example."""
    return as_domains(words(text))


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"{text!r}; allowed: networks such as 10.0.0.0/8 or 2001:db8::/32"
        ) from None


def networks(text: str) -> tuple[str, ...]:
    """A list of IPv4 and IPv6 networks. Raises ConfigError."""
    return tuple(str(_network(word)) for word in words(text))


def listener(text: str) -> str:
    """Check HOST:PORT, :PORT or [IPv6]:PORT, or "" for off. Raises ConfigError."""
    if text and not 0 <= split_address(text)[1] <= 65_535:
        raise ConfigError(f"{text!r} is no address; allowed: HOST:PORT, :PORT, [IPv6]:PORT")
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host (without brackets, "" for all) and port of HOST:PORT; port -1 where it is none."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not port.isascii() or not port.isdigit() or (":" in bare and bare == host):
        return "", -1
    return bare, int(port)


# Targets of hep_forward: each costs a system call a packet, and a queue when it is down.
MAX_FORWARD_TARGETS = 8


def forward_targets(text: str) -> tuple[str, ...]:
    """A list of udp://HOST:PORT, tcp://HOST:PORT and tls://HOST:PORT. Raises ConfigError."""
    found = words(text)
    for word in found:
        valid = re.fullmatch(r"(?:udp|tcp|tls)://([\w.-]+|\[[\w:.%]+\]):([0-9]{1,5})", word)
        try:
            if valid:
                valid[1].encode("idna")
        except UnicodeError:
            valid = None
        if not valid or not 1 <= int(valid[2]) <= 65_535:
            allowed = "udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT"
            raise ConfigError(f"{word!r} is no target; allowed: {allowed}")
    if len(found) > MAX_FORWARD_TARGETS or len(found) > len(set(found)):
        raise ConfigError(f"too many; allowed: {MAX_FORWARD_TARGETS} targets, each once")
    return found


def api_url(text: str) -> str:
    """Check the base URL of a rating API and return it without a last slash. Raises ConfigError."""
    if "@" in text:
        raise ConfigError(
            "the URL names a user; allowed: rating_api_username and rating_api_password"
        )
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s?#]", text):
        raise ConfigError(f"{text!r} is no URL; allowed: http://HOST[:PORT][/PATH] or https://...")
    return text.rstrip("/")


def account_regexp(text: str) -> Any:
    """Compile the regexp whose group 1 is the account, None for "". Raises ConfigError."""
    return _grouped_regexp(text, "account") if text else None


def _grouped_regexp(text: str, group: str) -> Any:
    pattern = compile_regexp(text)
    if pattern.groups < 1:
        raise ConfigError(f"{text!r} has no group; allowed: a regexp whose group 1 is the {group}")
    return pattern


def _regexp(text: str) -> str:
    account_regexp(text)
    return text


def _header(text: str) -> str:
    if text and not re.fullmatch(_TOKEN, text):
        raise ConfigError(f"{text!r}; allowed: a header name, or nothing")
    return text


# Shards of one cluster. Each costs its owner a lease to renew and a stream to read.
MAX_SHARDS = 4_096


def redis_url(text: str) -> str:
    """Check the URL of a Redis, or "" for none. Raises ConfigError, which shows no password."""
    with suppress(ValueError):
        parts = urlsplit(text)
        if parts.password is not None:
            # `check` prints the URL.
            raise ConfigError("a password in it; allowed: cluster_password_file")
        known = parts.scheme in ("redis", "rediss", "unix", "sentinel")
        if not text or (known and (parts.netloc or parts.path)):
            return text
    shown = "no URL of Redis" if "@" in text else repr(text)
    raise ConfigError(
        f"{shown}; allowed: redis://HOST:PORT/DB, rediss://..., unix:///PATH, "
        "sentinel://HOST:PORT,HOST:PORT/MASTER/DB"
    )


def key_prefix(text: str) -> str:
    """Check what all keys of a cluster begin with. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text):
        raise ConfigError(f"{text!r}; allowed: letters, digits and _ . -, 64 at most")
    return text


def _printable_ascii(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ConfigError("it has a character that no header may have; allowed: printable ASCII")
    return text


def _option(
    default: Any, convert: Callable[[str], Any], help: str, group: str = "", secret: bool = False
) -> Any:
    metadata = {"group": group, "convert": convert, "help": help, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The table of options: of each its type, default, converter and help.

    A converter takes the text of the file, the environment or the command line and raises
    ConfigError. A ``group`` is the heading of --help over this option and those that follow it. The
    value of a ``secret`` is never shown; a secret NAME has an option NAME_file beside it.
    """

    listen_udp: str = _option(
        ":9060", listener, "address for HEP over UDP; empty: off", group="Listening"
    )
    listen_tcp: str = _option(":9060", listener, "address for HEP over TCP; empty: off")
    listen_tls: str = _option("", listener, "address for HEP over TLS; empty: off")
    tls_cert: str = _option("", str, "PEM file: the certificate and those above it")
    tls_key: str = _option("", str, "PEM file: the key; empty: it is in tls_cert")
    tls_client_ca: str = _option("", str, "PEM file of CAs; a sender needs a certificate of one")
    hep_allow: tuple[str, ...] = _option((), networks, "list of networks that may send; empty: all")
    hep_auth_key: tuple[str, ...] = _option(
        (), keys, "list of keys; each packet needs one of them", secret=True
    )
    hep_auth_key_file: str = _option("", str, "file of such keys, one on each line")
    hep_rate_limit: int = _option(
        0, number(0, 10_000_000, int), "packets a second taken from one sender; 0: all"
    )
    hep_idle_timeout: float = _option(
        0.0, number(0, 604_800), "seconds after which a silent connection is closed; 0: never"
    )
    hep_forward: tuple[str, ...] = _option(
        (),
        forward_targets,
        "list of udp://HOST:PORT, tcp://... and tls://... to which packets go on",
        group="Forwarding",
    )
    hep_forward_ca_file: str = _option(
        "", str, "PEM file of CAs to trust at tls:// targets; empty: the system's"
    )
    listen_status: str = _option(
        "", listener, "address for the status over HTTP; empty: off", group="Status"
    )
    status_max_silence: float = _option(
        0.0, number(0, 86_400), "seconds without a packet that make the agent unhealthy; 0: off"
    )
    rating_api_url: str = _option(
        "http://localhost:8080", api_url, "base URL of the rating API", group="Rating API"
    )
    rating_api_timeout: float = _option(5.0, number(0.1, 300), "seconds that one request may take")
    rating_api_concurrency: int = _option(16, number(1, 1000, int), "requests at one time")
    unknown_party: str = _option(
        "drop",
        _choice("drop", "reject"),
        "if the API knows only one of two accounts: drop the other, or reject the call",
    )
    rating_api_ca_file: str = _option("", str, "PEM file of CAs to trust; empty: the system's")
    rating_api_token: str = _option("", _printable_ascii, "bearer token of requests", secret=True)
    rating_api_token_file: str = _option("", str, "file of that token")
    rating_api_username: str = _option("", str, "user of basic authentication")
    rating_api_password: str = _option("", str, "password of that user", secret=True)
    rating_api_password_file: str = _option("", str, "file of that password")
    tenant: str = _option("default", _one_text, "tenant of the calls", group="Calls")
    product_tag: str = _option("VOICE", str, "product tag of the transactions")
    transaction_tags: tuple[str, ...] = _option((), words, "list of tags of the transactions")
    sip_local_domains: tuple[str, ...] = _option(
        (), domains, "list of domains whose users have accounts"
    )
    sip_header_caller: str = _option("", _header, "header that names the caller's account")
    sip_header_callee: str = _option("", _header, "header that names the callee's account")
    sip_header_history_info: str = _option(
        "History-Info", _header, "header that says who forwarded; empty: ignored"
    )
    sip_header_history_info_index: int = _option(
        1, number(0, 100, int), "entry of that header, counted from the last; 0: the last"
    )
    account_tag_match_regexp: str = _option("", _regexp, "regexp whose group 1 is the account")
    routes: str = _option("", str, "file of rules that send calls to tenants and rating APIs")
    begin_on: str = _option("answer", _choice("answer", "ack"), "what begins a call: answer or ack")
    max_calls: int = _option(200_000, number(1, 100_000_000, int), "calls followed at one time")
    invite_timeout: float = _option(600.0, number(1, 86_400), "seconds that a call may ring")
    max_call_duration: float = _option(
        21_600.0, number(1, 86_400), "seconds after which a call is ended"
    )
    expired_call_end: str = _option(
        "deadline",
        _choice("deadline", "last-seen"),
        "when a call without a BYE has ended: deadline or last-seen",
    )
    unanswered_bye: str = _option(
        "end",
        _choice("end", "ignore"),
        "whether a BYE that nobody answered ends a call: end or ignore",
    )
    reorder_window: float = _option(2.0, number(0, 60), "seconds to wait for an overdue message")
    statsd_host: str = _option(
        "", str, "host of a statsd server; empty: off", group="Metrics and logs"
    )
    statsd_port: int = _option(8125, number(1, 65_535, int), "UDP port of that server")
    statsd_prefix: str = _option("rating_agent_hep", str, "prefix of all metrics")
    log_level: str = _option(
        "info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error"
    )
    log_format: str = _option("json", _choice("json", "text"), "json or text")
    debug: bool = _option(False, flag, "true means log_level debug")
    state_dir: str = _option("", str, "folder of the journal; empty: memory only", group="Running")
    call_records: str = _option(
        "", str, "file for one JSON line for each call that is over; -: standard output"
    )
    shutdown_timeout: float = _option(10.0, number(0, 3_600), "seconds to deliver what waits")
    cluster_url: str = _option(
        "", redis_url, "Redis that several agents share; empty: one agent alone", group="Cluster"
    )
    cluster_password: str = _option("", _printable_ascii, "password of that Redis", secret=True)
    cluster_password_file: str = _option("", str, "file of that password")
    cluster_name: str = _option("rating", key_prefix, "what its keys begin with")
    cluster_shards: int = _option(64, number(1, MAX_SHARDS, int), "parts of the calls, for ever")


class Option(NamedTuple):
    """One row of that table, with the option's name and the heading that it stands under."""

    name: str
    default: Any
    group: str
    convert: Callable[[str], Any]
    help: str
    secret: bool


def _options() -> Iterator[Option]:
    group = ""
    for item in fields(Settings):
        group = item.metadata["group"] or group
        yield Option(item.name, item.default, **{**item.metadata, "group": group})


OPTIONS = tuple(_options())


# Room: HEP

# What a packet looks like. A sender wraps each SIP message that it sees into one packet. HEP3 is
# "HEP3" (older: "EEP3"), the total length as u16, and chunks up to there. A chunk is vendor, type
# and length as u16 each, then the value; the length counts these six octets. All is big-endian.
# Only chunks of vendor 0 are read. Their order is free, and each may be missing:
#
#     0x02 IP protocol          0x07 source port         0x0b protocol type   0x0f payload
#     0x03 source IPv4 (05: 6)  0x08 destination port    0x0c capture id      0x10 payload, deflated
#     0x04 dest. IPv4 (06: 6)   0x09 seconds, 0x0a us    0x0e key             0x11 correlation id
#                                                                            0x13 capture name
#
# HEP1 and HEP2 are one C struct: version, its length, address family, IP protocol, the two ports,
# the two addresses; HEP2 adds time and capture id in the byte order of the machine. The payload
# follows without a length, so these two only come as datagrams.

_CHUNK = struct.Struct(">HHH")
_OLD_HEADER = struct.Struct(">BBBBHH")
_MAGIC = (b"HEP3", b"EEP3")
# Address family octet to octets of an address (the values of Linux, which all senders use).
_ADDRESS_SIZE = {2: 4, 10: 16}
# Protocol, ports, seconds, microseconds, protocol type, capture id: the chunks that are numbers.
_NUMBERS = (0x02, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C)
# With these chunks nearly all packets begin, in one of two orders: OpenSIPS writes the addresses
# last, Kamailio and sngrep first (group 1). To read them at one go instead of one by one leaves
# 0.36 of a packet's CPU, and 0.82 of a call's in decoder, parser and call table.
_ADDRESSES = rb"\0\0\0\x03\0\x0a.{4}\0\0\0\x04\0\x0a.{4}"
_REST = (
    rb"\0\0\0\x07\0\x08..\0\0\0\x08\0\x08..\0\0\0\x09\0\x0a.{4}\0\0\0\x0a\0\x0a.{4}"
    rb"\0\0\0\x0b\0\x07.\0\0\0\x0c\0\x0a.{4}"
)
_USUAL_HEAD = re.compile(
    rb"(?s)\0\0\0\x01\0\x07.\0\0\0\x02\0\x07.(?:(%b)%b|%b%b)"
    % (_ADDRESSES, _REST, _REST, _ADDRESSES)
)
_ADDRESSES_FIRST = struct.Struct(">19xB6x4s6x4s6xH6xH6xI6xI6xB6xI")
_ADDRESSES_LAST = struct.Struct(">19xB6xH6xH6xI6xI6xB6xI6x4s6x4s")
_USUAL_KINDS = frozenset(range(0x01, 0x0D))
# Where a HEP2 time header ends is told by what follows it, so the method must be a known one:
# two octets further on, INVITE reads as a plausible method VITE.
_KNOWN_START = re.compile(
    rb"SIP/2\.0 |(?:INVITE|ACK|BYE|CANCEL|UPDATE|PRACK|OPTIONS|REGISTER|SUBSCRIBE|NOTIFY|PUBLISH"
    rb"|MESSAGE|INFO|REFER) "
)
SIP_PROTOCOL_TYPE = 1
# Seconds of UNIX time. A stamp before 2001 is no time: some senders write 0, some their uptime.
MIN_STAMP = 978_307_200


def decode_hep(data: bytes, arrival: int) -> HepPacket:
    """Decode one datagram or one frame of a stream: HEP version 1, 2 or 3.

    ``arrival`` is UNIX time in microseconds; it stands in for a missing or zero time stamp and
    tells the byte order of HEP2's. Source: HEP3 Network Protocol Specification rev. 37.
    Raises HepError.
    """
    if data[:4] in _MAGIC:
        return _decode_hep3(data, arrival)
    if data[:1] in (b"\x01", b"\x02"):
        return _decode_old_hep(data, arrival)
    raise HepError("magic", f"no HEP packet: it begins with {data[:4].hex() or 'nothing'}")


def _decode_hep3(data: bytes, arrival: int) -> HepPacket:
    size = len(data)
    total = int.from_bytes(data[4:6], "big")
    if size < 6 or total != size:
        raise HepError("length", f"total length says {total} octets, {size} came")
    usual = _USUAL_HEAD.match(data, 6)
    chunks = _read_chunks(data, usual.end() if usual else 6)
    if usual is None or not chunks.keys().isdisjoint(_USUAL_KINDS):
        chunks = _read_chunks(data, 6)
        protocol, *numbers = [_number(chunks, kind) for kind in _NUMBERS]
        source, destination = _address(chunks, 0x03), _address(chunks, 0x04)
    elif usual[1]:
        protocol, source, destination, *numbers = _ADDRESSES_FIRST.unpack_from(data)
    else:
        protocol, *numbers, source, destination = _ADDRESSES_LAST.unpack_from(data)
    source_port, destination_port, seconds, micros, protocol_type, capture_id = numbers
    payload = chunks.get(0x0F, b"")
    if not payload and chunks.get(0x10):
        payload = _inflate(chunks[0x10])
    return HepPacket(
        3,
        # A fraction of a second or more in the microseconds is a sender's slip, worth no call.
        seconds * 1_000_000 + min(micros, 999_999) if seconds >= MIN_STAMP else arrival,
        protocol,
        protocol_type,
        source,
        destination,
        source_port,
        destination_port,
        capture_id,
        # Some senders end a string chunk with a NUL, as C has it.
        chunks.get(0x13, b"").rstrip(b"\0").decode("latin-1"),
        chunks.get(0x11, b"").rstrip(b"\0").decode("latin-1"),
        chunks.get(0x0E, b""),
        payload,
    )


def _read_chunks(data: bytes, offset: int) -> dict[int, bytes]:
    """The values of the chunks from an offset to the end, by type; the last of a type counts."""
    chunks: dict[int, bytes] = {}
    size = len(data)
    while offset < size:
        if size - offset < 6:
            raise HepError("chunk", f"chunk header cut at offset {offset}")
        vendor, kind, length = _CHUNK.unpack_from(data, offset)
        end = offset + length
        if length < 6 or end > size:
            raise HepError("chunk", f"chunk 0x{kind:x} at offset {offset} has length {length}")
        if vendor == 0:
            chunks[kind] = data[offset + 6 : end]
        offset = end
    return chunks


def _number(chunks: dict[int, bytes], kind: int) -> int:
    value = chunks.get(kind, b"\0")
    if not 1 <= len(value) <= 4:
        raise HepError("value", f"chunk 0x{kind:x} holds {len(value)} octets, not 1 to 4")
    return int.from_bytes(value, "big")


def _address(chunks: dict[int, bytes], kind: int) -> bytes:
    value = chunks.get(kind) or chunks.get(kind + 2, b"")
    if len(value) not in (0, 4, 16):
        raise HepError("value", f"an address of {len(value)} octets, not 4 or 16")
    return value


def _inflate(data: bytes) -> bytes:
    # 32 + 15: zlib tells its own format from gzip by the header.
    inflater = zlib.decompressobj(47)
    try:
        payload = inflater.decompress(data, MAX_INFLATED + 1)
    except zlib.error as error:
        raise HepError("inflate", f"compressed payload: {error}") from None
    if len(payload) > MAX_INFLATED:
        raise HepError("inflate", f"compressed payload of more than {MAX_INFLATED} octets")
    if not inflater.eof:
        raise HepError("inflate", "compressed payload is cut")
    return payload


def _decode_old_hep(data: bytes, arrival: int) -> HepPacket:
    if len(data) < _OLD_HEADER.size:
        raise HepError("short", f"HEP{data[0]} packet of {len(data)} octets")
    # The header length octet is not read: some senders count the time header, one sends 0.
    version, _, family, protocol, source_port, destination_port = _OLD_HEADER.unpack_from(data)
    width = _ADDRESS_SIZE.get(family)
    if width is None:
        raise HepError("family", f"HEP{version} address family {family}, not 2 or 10")
    middle = _OLD_HEADER.size + width
    offset = middle + width
    if len(data) < offset:
        raise HepError(
            "short", f"HEP{version} packet of {len(data)} octets, its header has {offset}"
        )
    packet = HepPacket(
        version=version,
        time=arrival,
        protocol=protocol,
        protocol_type=SIP_PROTOCOL_TYPE,
        source=data[_OLD_HEADER.size : middle],
        destination=data[middle:offset],
        source_port=source_port,
        destination_port=destination_port,
    )
    if version == 2:
        if len(data) < offset + 10:
            raise HepError("short", f"HEP2 time header cut at offset {len(data)}")
        packet.time, packet.capture_id = _old_time(data[offset : offset + 10], arrival)
        padded = offset + 12
        # Kamailio and OpenSIPS send the padding of their C struct, some others do not.
        if _KNOWN_START.match(data, offset + 10):
            padded = offset + 10
        offset = padded
    packet.payload = data[offset:]
    return packet


def _old_time(header: bytes, arrival: int) -> tuple[int, int]:
    """Time in microseconds and capture id of a HEP2 time header of either byte order.

    Little-endian from Kamailio, host order from others. Microseconds rule out the wrong order
    (a million of four thousand million values fit); what still fits twice goes to the nearer.
    """
    candidates = []
    for order in "<>":
        seconds, micros, capture_id = struct.unpack(order + "IIH", header)
        if seconds >= MIN_STAMP and micros < 1_000_000:
            stamp = seconds * 1_000_000 + micros
            candidates.append((abs(stamp - arrival), stamp, capture_id))
    if not candidates:
        return arrival, struct.unpack("<H", header[8:])[0]
    return min(candidates)[1:]


# Octets. The total length of a HEP3 frame is a u16 that counts the 6 octets before it ends.
MAX_HEP_FRAME = 65_535


class HepSplitter:
    """Cut a TCP stream into HEP3 frames; their total length is the only framing there is.

    Read at most ``room`` octets at a time and the buffer never exceeds one maximal frame.
    """

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def room(self) -> int:
        """How many octets the next read may bring, never less than 1."""
        return MAX_HEP_FRAME - len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the frames that ``data`` completes, as octets for decode_hep.

        Raises HepError once framing is lost, after the frames before that point were given out;
        the stream is of no more use then. HEP1 and HEP2 have no framing, so they end up here.
        """
        buffer = self._buffer + data
        self._buffer = b""
        start, size = 0, len(buffer)
        while start < size:
            if not buffer.startswith(_MAGIC, start):
                head = buffer[start : start + 4]
                if any(magic.startswith(head) for magic in _MAGIC):
                    break
                raise HepError("framing", f"no HEP3 frame in the stream: {head.hex()}")
            if size - start < 6:
                break
            total = buffer[start + 4] << 8 | buffer[start + 5]
            if total < 6:
                raise HepError("framing", f"a frame with a total length of {total} octets")
            if size - start < total:
                break
            yield buffer[start : start + total]
            start += total
        self._buffer = buffer[start:]


# Room: SIP

# What is read of a message (RFC 3261 section 7). The start line says whether it is a request or a
# reply; Call-ID, the tags of From and To, CSeq and the branch of the lowest Via say of which call,
# dialog and transaction. Every other header is read only when somebody asks for it, and the body
# never: most messages of a mirror are of no call, and of the others each is judged by these alone.
#
# The agent only listens. What the servers take for a call is one, also where a strict parser would
# refuse it, so line ends, folds, white space, header names and dates are read leniently. Where that
# would leave open which call a message belongs to, it is refused with a SipError: two Call-IDs that
# differ, a quote that does not close. Text is Latin-1, octet for octet, so that no two Call-IDs are
# ever confused. Callers write these texts: each takes time linear in its length, so of what a
# pattern repeats no part can begin with what may follow it.

# Seconds. RFC 4028 section 5: no session interval may be shorter.
MIN_SESSION_EXPIRES = 90

# What can matter to the life of a call: RFC 3261, and RFC 3311 for the refresh of a session.
_REQUESTS = frozenset(("INVITE", "ACK", "BYE", "CANCEL", "UPDATE"))
_REPLIES = frozenset(("INVITE", "UPDATE", "BYE"))
# Any other request with a To tag counts by its CSeq only (RFC 3261 12.2.2); these are of no call.
_ELSEWHERE = frozenset(("REGISTER", "PUBLISH"))
# IP protocols that carry a stream: TCP, and 22, by which Kamailio means TLS and WebSocket.
_STREAMS = frozenset((6, 22))
_CONTENT_LENGTH = re.compile(rb"\n(?:content-length|l)[ \t]*:\s*0*([1-9]\d*)\s", re.I)
_EMPTY_LINE = re.compile(rb"\n\r?\n")
_EMPTY_OR_FOLDED_LINE = re.compile(rb"\n(?:\r?\n|([ \t]))")
# A folded tag counts, or a caller could hide the CSeq of a request from the agent.
_TO_TAG = re.compile(rb"\n(?:to|t)[ \t]*:(?:[^\n]|\n[ \t])*;\s*tag\s*=", re.I)
_START = re.compile(rf"[\r\n]*({_TOKEN})(/\d+\.\d+)?[ \t]".encode())
# The next message of a stream, behind keep-alives.
_NEXT = re.compile(
    rf"[\r\n]*({_TOKEN}[ \t]+\S+[ \t]+SIP/2\.0[ \t]*\r?\n|SIP/2\.0[ \t])".encode(), re.I
)
# White space is ASCII's: in Latin-1 text the octets 0x85 and 0xA0, half of a UTF-8 letter, would
# count as well.
_SPACE = " \t\r\n"
_NO_SPACE = str.maketrans("", "", _SPACE)
_START_LINE = re.compile(
    rf"(?:SIP/2\.0[ \t]+([1-6]\d\d)(?:[^\S\n][^\n]*)?"
    rf"|({_TOKEN})[ \t]+([^\s<>]+)[ \t]+SIP/2\.0[^\S\n]*)(?:\n|\Z)",
    re.I | re.A,
)
_CSEQ_METHOD = re.compile(rf"\ncseq[ \t]*:\s*\d+\s+({_TOKEN})".encode(), re.I)
_CSEQ = re.compile(rf"0*(\d{{1,10}})\s+({_TOKEN})", re.A)
# RFC 3261 8.1.1.5 allows half of it; what a proxy forwards all the same is a call all the same.
_MAX_CSEQ = 2**32 - 1
_FOLD = re.compile(r"\r?\n[ \t]+")
# RFC 3261 section 7.3.3 and the RFCs that define each further header.
_COMPACT = dict(
    pair.split("=")
    for pair in "a=accept-contact b=referred-by c=content-type d=request-disposition "
    "e=content-encoding f=from i=call-id j=reject-contact k=supported l=content-length "
    "m=contact n=identity-info o=event r=refer-to s=subject t=to u=allow-events v=via "
    "x=session-expires y=identity".split()
)
_QUOTED = r'"[^"\\]*(?:\\.[^"\\]*)*"'
# One value of a list, up to a comma or a quote that does not close.
_VALUE = re.compile(rf'[^,<"]*(?:(?:{_QUOTED}|<[^>]*>?)[^,<"]*)*', re.S)
# An address, quotes and brackets closed: what stands before the bracket, its inside, parameters.
_ADDRESS = re.compile(
    rf'([^"<;]*(?:{_QUOTED}[^"<;]*)*)(?:<([^>]*)>|(?=;)|\Z)([^"]*(?:{_QUOTED}[^"]*)*)', re.S
)
_VIA = re.compile(r"[^\s/]+\s*/\s*[^\s/]+\s*/\s*[^\s;]+\s+([^;]*)", re.A)
_BRANCH = re.compile(r";\s*branch\s*=\s*([^;\s]*)", re.I | re.A)
# A name-addr without quotes, the tag its first parameter, or without parameters. To read the tag by
# one match leaves 0.93 of a call's CPU in decoder, parser and call table. The tag ends where it
# must, or one with a quote behind it would be tried at each length.
_USUAL_TAG = re.compile(r'[^"<;]*<[^>"]*>(?:;tag=([^;,\s"]+)(?:[;,\s][^"]*)?)?', re.I | re.A)
# A tag, or a quoted string, in which there is none.
_TAG = re.compile(rf"{_QUOTED}|;\s*tag\s*=\s*({_QUOTED}|[^;,\s]*)", re.I | re.A | re.S)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
# Scheme, user, address in brackets or other host, port, parameters: whatever stands there.
_SIP_URI = re.compile(
    r"(sips?):(?:([^@:]*)(?::[^@]*)?@)?[ \t\r\n]*(?:\[([^\];?]*)\]?:*|([^:;?]*):?)"
    r"([^;?]*)([^?]*).*",
    re.I | re.A | re.S,
)
_USER_PHONE = re.compile(r";\s*user=phone\s*(?:;|\Z)", re.I | re.A)


@dataclass(slots=True, eq=False)
class SipMessage:
    """A SIP request or reply, as far as the life of a call needs it.

    ``method`` is "" for a reply, ``status`` 0 for a request, ``to_tag`` "" where there is none.
    ``branch`` is that of the lowest hop, which names the transaction of who sent the request.
    ``headers`` maps lower-case full names to the values of the header lines that were read so far;
    `header` finds all. ``hops`` are the Via values, the latest first: at least one, maybe empty;
    of more than MAX_VIAS those in the middle are left out. ``time`` is that of the HEP packet, in
    microseconds, ``head`` the text of start line and headers, unfolded.
    """

    method: str
    status: int
    request_uri: str
    call_id: str
    from_tag: str
    to_tag: str
    cseq: int
    cseq_method: str
    branch: str
    headers: dict[str, list[str]]
    hops: Sequence[str]
    time: int
    head: str = field(default="", repr=False)
    _vias: tuple[Via, ...] | None = None
    _parties: dict[str, Uri] | None = None

    @property
    def vias(self) -> tuple[Via, ...]:
        """The hops, the latest first (RFC 3261 section 20.42)."""
        if self._vias is None:
            self._vias = tuple(map(_parse_via, self.hops))
        return self._vias

    def party(self, name: str) -> Uri:
        """The URI of "from" or "to", or the "request-uri"; NO_URI where it is none."""
        if self._parties is None:
            self._parties = {}
        if name not in self._parties:
            if name == "request-uri":
                self._parties[name] = parse_uri(self.request_uri)
            else:
                self._parties[name] = address_uri(self.headers[name][0])
        return self._parties[name]

    @property
    def top_branch(self) -> str:
        """The branch of the latest hop, which names the transaction of who sent this copy."""
        return _branch(self.hops[0])

    @property
    def session_interval(self) -> int:
        """Seconds of the session that a 2xx agrees on, 0 for none (RFC 4028 sections 4 and 9).

        Without a refresher nobody refreshes, and nobody hangs up either.
        """
        value = next(iter(self.header("session-expires")), "")
        digits = re.match(r"0*(\d{1,9})", value) if "refresher" in value.lower() else None
        return max(int(digits[1]), MIN_SESSION_EXPIRES) if digits else 0

    @property
    def goes_no_further(self) -> bool:
        """Whether Max-Forwards is 0: a proxy answers it with 483 (RFC 3261 16.3)."""
        values = self.header("max-forwards")
        return bool(values) and re.fullmatch("0+", values[0]) is not None

    @property
    def way(self) -> str:
        """Where a request goes: Request-URI and Route, or a digest of long ones.

        A retransmission goes the same way; what has the same branch and goes another does not.
        """
        return comparable("\n".join([self.request_uri, *self.header("route")]))

    def header(self, name: str) -> list[str]:
        """All values of the header lines of that name, given without case or compact."""
        name = name.lower()
        name = _COMPACT.get(name, name)
        values = self.headers.get(name)
        if values is None:
            # A line without a name must not fill an option that names no header.
            lines = _header_lines(name).findall(self.head) if name else ()
            values = self.headers[name] = [value.strip(_SPACE) for _, value in lines]
        return values


# The names come from the code and from the configuration, never from a sender: this is bounded.
@cache
def _header_lines(*names: str) -> re.Pattern[str]:
    """What finds the lines of headers in an unfolded head, by full name: name and value."""
    spellings = [*names, *(short for short, name in _COMPACT.items() if name in names)]
    choice = "|".join(map(re.escape, spellings))
    return re.compile(rf"\n[ \t\r]*({choice})[ \t\r]*:([^\n]*)", re.I | re.A)


def split_messages(packet: HepPacket) -> Sequence[bytes]:
    """The SIP messages of a packet, in order.

    What sniffs SIP over TCP may put a whole segment into one payload: Content-Length says where a
    message ends (RFC 3261 18.3). Behind the message of a datagram nothing counts, or a caller
    could write there what no proxy reads.
    """
    payload = packet.payload
    if packet.protocol not in _STREAMS:
        return (payload,)
    messages = []
    start = len(payload) - len(payload.lstrip(b"\r\n"))
    while (empty := _EMPTY_LINE.search(payload, start)) is not None:
        end = empty.end()
        if end < len(payload):
            length = _CONTENT_LENGTH.search(payload, start, end)
            if length is not None:
                # A body of more digits than any payload has octets is cut.
                end += int(length[1]) if len(length[1]) < 8 else len(payload)
        following = _NEXT.match(payload, end)
        if following is None:
            break
        messages.append(payload[start:end])
        start = following.start(1)
    return (*messages, payload[start:])


def parse_sip(payload: bytes, time: int = 0) -> SipMessage | None:
    """Parse a SIP message, or return None at once for one that can't matter to a call.

    ``time`` is that of the HEP packet, in microseconds. Source: RFC 3261 sections 7 and 25.
    Raises SipError where it is not clear of which call it is.
    """
    start = _START.match(payload)
    if start is None:
        raise SipError("start-line", f"no SIP message: it begins with {payload[:16]!r}")
    begin = start.start(1)
    end, folded = _head_end(payload, begin)
    if not _may_matter(payload, start, end):
        return None
    head = payload[begin:end].decode("latin-1")
    if folded:
        head = _FOLD.sub(" ", head)
    start_line = _START_LINE.match(head)
    if start_line is None:
        line = head.partition("\n")[0]
        raise SipError("start-line", f"no SIP start line: {line[:40]!r}")
    status, method, request_uri = start_line.groups("")
    headers: dict[str, list[str]] = {}
    for name, value in _JUDGED_LINES.findall(head):
        name = name.lower()
        headers.setdefault(_COMPACT.get(name, name), []).append(value.strip(_SPACE))
    call_id = _single(headers, "call-id")
    cseq, cseq_method = _parse_cseq(_single(headers, "cseq"))
    if method and cseq_method != method:
        raise SipError("cseq", f"CSeq of {cseq_method[:40]!r} in a request with method {method!r}")
    if not method and cseq_method not in _REPLIES:
        return None
    from_tag, to_tag = _tag(_single(headers, "from")), _tag(_single(headers, "to"))
    if method and not to_tag and method not in _REQUESTS:
        return None
    hops = _read_hops(headers.get("via", ()))
    return SipMessage(
        method,
        int(status or 0),
        request_uri,
        _short(call_id),
        _short(from_tag),
        _short(to_tag),
        cseq,
        cseq_method,
        _branch(hops[-1]),
        headers,
        hops,
        time,
        head,
    )


# The headers that every message is judged by.
_JUDGED_LINES = _header_lines("call-id", "cseq", "from", "to", "via")


def _may_matter(payload: bytes, start: re.Match[bytes], end: int) -> bool:
    """Whether a message may matter to a call, by one look at its octets: most do not."""
    if start[2] is not None:
        cseq = _CSEQ_METHOD.search(payload, 0, end)
        return cseq is None or cseq[1].decode("latin-1") in _REPLIES
    method = start[1].decode("latin-1")
    if method in _REQUESTS:
        return True
    # A foreign protocol is told from a method that does not matter by its first line.
    begin = start.start(1)
    known = _KNOWN_START.match(payload, begin)
    if known is None and not _START_LINE.match(payload[begin:end].decode("latin-1")):
        raise SipError("start-line", f"no SIP request: it begins with {payload[:16]!r}")
    return method not in _ELSEWHERE and _TO_TAG.search(payload, 0, end) is not None


def _head_end(payload: bytes, start: int) -> tuple[int, bool]:
    """Where the headers end, at the empty line, and whether one of them may be folded.

    Without that line the message is cut, and so may be its last line with all its folds: only
    lines that another follows count.
    """
    found = _EMPTY_OR_FOLDED_LINE.search(payload, start)
    folded = found is not None and found[1] is not None
    if folded:
        found = _EMPTY_LINE.search(payload, start)
    if found is not None:
        return found.start(), folded
    end = payload.rfind(b"\n", start)
    while end > start and payload[end + 1 : end + 2] in (b" ", b"\t", b""):
        end = payload.rfind(b"\n", start, end)
    return max(end, start), folded


def _single(headers: dict[str, list[str]], name: str) -> str:
    """The value of a header that may stand only once (RFC 3261 section 7.3.1)."""
    values = headers.get(name)
    if not values or not values[0]:
        raise SipError("missing", f"no {name} header")
    if len(values) > 1 and any(value != values[0] for value in values):
        raise SipError("duplicate", f"several {name} headers that differ")
    return values[0]


def _parse_cseq(text: str) -> tuple[int, str]:
    cseq = _CSEQ.fullmatch(text)
    if cseq is None or int(cseq[1]) > _MAX_CSEQ:
        raise SipError("cseq", "CSeq is no number and method")
    return int(cseq[1]), cseq[2]


def _short(text: str) -> str:
    """A text that names a call; of a long one the beginning and a digest.

    RFC 3261 sets no limit, and whoever pays must not be able to choose to be invisible (rule 4).
    """
    # No Call-ID and no tag holds a ^, so nothing can be taken for another's.
    return text if len(text) <= MAX_TEXT else f"{text[:64]}^{comparable(text)}"


# Characters. Branches and Request-URIs are only ever compared: of longer ones a digest is kept.
MAX_COMPARED = 256


def comparable(text: str) -> str:
    """The text, or a digest of a long one: the same for the same text, of bounded length."""
    if len(text) <= MAX_COMPARED:
        return text
    return hashlib.blake2b(text.encode("latin-1"), digest_size=16).hexdigest()


def split_values(line: str) -> list[str]:
    """Split a header at the commas outside quotes and angle brackets (RFC 3261 section 7.3.1).

    Empty values are left out. A line with a quote that does not close is one value.
    """
    if "," not in line:
        return [line] if line.strip(_SPACE) else []
    values, end = [], -1
    while end < len(line):
        start = end + 1
        value = _VALUE.match(line, start)
        end = value.end() if value else start
        if line[end : end + 1] == '"':
            return [line]
        values.append(line[start:end].strip(_SPACE))
    return [value for value in values if value]


# Hops. A message may be forwarded 70 times (RFC 3261 section 8.1.1.6): so many Via values are read.
MAX_VIAS = 70


def _read_hops(lines: Sequence[str]) -> list[str]:
    hops = [hop for line in lines for hop in split_values(line)] or [""]
    if len(hops) > MAX_VIAS:
        hops[MAX_VIAS - 1 : -1] = []
    return hops


def _parse_via(text: str) -> Via:
    hop = _VIA.match(text)
    return Via(_branch(text), comparable(hop[1].translate(_NO_SPACE).lower()) if hop else "")


def _branch(hop: str) -> str:
    found = _BRANCH.search(hop)
    return comparable(found[1]) if found else ""


def _tag(text: str) -> str:
    """The tag of a From or To header, "" where there is none (RFC 3261 section 19.3)."""
    usual = _USUAL_TAG.fullmatch(text)
    if usual is not None:
        return usual[1] or ""
    address = _ADDRESS.fullmatch(text)
    if address is None:
        if text.rfind("<") > text.rfind(">"):
            raise SipError("address", "an angle bracket that does not close")
        raise SipError("quote", "a quoted string that does not end")
    for found in _TAG.finditer(address[3]):
        if found[1] is not None:
            return found[1]
    return ""


def address_uri(text: str) -> Uri:
    """The URI of a name-addr or an addr-spec with parameters (RFC 3261 sections 20.10 and 25.1).

    NO_URI where there is none, or quotes or brackets do not close.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return NO_URI
    # Without brackets a semicolon begins the parameters of the header, not of the URI.
    return parse_uri(found[1] if found[2] is None else found[2])


def parse_uri(text: str) -> Uri:
    """Parse a URI (RFC 3261 section 19.1.1, RFC 3966); NO_URI for what is none."""
    text = text.strip(_SPACE)
    found = _SIP_URI.fullmatch(text)
    if found is not None:
        scheme, user, address, host, port, params = found.groups("")
        port = port.strip(_SPACE)
        return Uri(
            scheme.lower(),
            user.strip(_SPACE),
            (address or host).strip(_SPACE).lower(),
            int(port) if port.isdecimal() and port.isascii() and len(port) <= 5 else None,
            _USER_PHONE.search(params) is not None,
        )
    scheme, colon, rest = text.partition(":")
    if not colon or not _SCHEME.fullmatch(scheme):
        return NO_URI
    if scheme.lower() == "tel":
        return Uri("tel", rest.partition(";")[0].strip(_SPACE), "", None, True)
    return Uri(scheme.lower(), "", "", None)


_ODD_IN_ID = re.compile(r"[^!-\]_-~]")
_ODD_IN_URI = re.compile(r"[^!-~]|[<>\"{}|\\^`]")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
# Three octets of UTF-8 are a character that the API takes, three characters an escaped octet.
_MOST_ESCAPED = 9 * MAX_TEXT
# What means the same escaped or not (RFC 3261 19.1.4), and the + that numbers begin with.
_PLAIN_ESCAPE = re.compile(r"%(?:3[0-9]|[46][1-9A-F]|[57][0-9A]|2[1789ABDE]|5F|7E)", re.I)
# A # can only be written escaped (RFC 3966 section 5.1.3).
_PHONE = re.compile(r"(?:[0-9*#+().-]|%23)+")
_SEPARATORS = str.maketrans("", "", "().-")


def printable_id(text: str) -> str:
    """A Call-ID as printable ASCII, different for different Call-IDs.

    Octets that no Call-ID may hold become ``^`` and two hex digits; ``^`` itself is none of the
    characters of a Call-ID (RFC 3261 section 25.1, ``word``), so nothing can collide with it.
    """
    return _ODD_IN_ID.sub(lambda odd: f"^{ord(odd[0]):02x}", text)


def uri_text(uri: Uri) -> str:
    """``scheme:user@host`` for the rating API, pure ASCII, without port and parameters.

    What is longer than MAX_TEXT is cut: rates are found by how it begins.
    """
    host = f"[{uri.host}]" if ":" in uri.host else uri.host
    user = _number_text(uri)
    text = f"{user}@{host}" if user and host else user or host
    return (f"{uri.scheme}:" + _ODD_IN_URI.sub(_escape, text[:MAX_TEXT]))[:MAX_TEXT]


def _number_text(uri: Uri) -> str:
    """The user of a URI as rates read it: rates compare numbers as text (rule 5).

    Unescaped where that means the same; a telephone number without parameters and without visual
    separators (RFC 3261 19.1.6, RFC 3966 5.1.1).
    """
    user = uri.user
    if "%" in user:
        user = _PLAIN_ESCAPE.sub(lambda escape: chr(int(escape[0][1:], 16)), user)
    number = user.partition(";")[0]
    if not _PHONE.fullmatch(number):
        return user
    return number.translate(_SEPARATORS) if uri.phone else number


def account_text(uri: Uri) -> str:
    """The user of a URI as an account tag: unescaped (RFC 3261 section 19.1.4), "" for none.

    Visual separators leave a telephone number. What is no text the rating
    API takes (not UTF-8, control characters, outside the Basic Multilingual Plane) stays escaped.
    What is longer than MAX_TEXT is no account: cut, it might be another's.
    """
    user = _number_text(uri)
    if len(user) > _MOST_ESCAPED:
        return ""
    octets = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), user) if "%" in user else user
    return _fit_text(octets, user)


def _fit_text(octets: str, escaped: str) -> str:
    """Octets as UTF-8 where that is a text the API takes, else the other with the odd escaped.

    "" where that is longer than MAX_TEXT.
    """
    try:
        decoded = octets.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        decoded = "\0"
    if not decoded.isprintable() or max(decoded, default="") > "\uffff":
        decoded = _ODD_IN_URI.sub(_escape, escaped)
    return decoded if len(decoded) <= MAX_TEXT else ""


def _escape(odd: re.Match[str]) -> str:
    return f"%{ord(odd[0]):02X}"


# Room: routes

_SOURCES = ("history-info", "p-asserted-identity", "remote-party-id", "diversion")
_ADDRESS_SOURCES = ("from", "to", "request-uri")
_NETWORK_KEYS = {
    "sender": attrgetter("sender"),
    "source_network": attrgetter("packet.source"),
    "destination_network": attrgetter("packet.destination"),
}
_DOMAIN_KEYS = {"from_domain": "from", "to_domain": "to", "request_domain": "request-uri"}
_MATCH_KEYS = ("capture_id", "capture_name", *_NETWORK_KEYS, *_DOMAIN_KEYS, "header")


@dataclass(slots=True, eq=False)
class Sighting:
    """A SIP message as one capture agent saw it: the packet, its sender's address, the message."""

    packet: HepPacket
    message: SipMessage
    sender: str = ""


_Condition = Callable[[Sighting], bool]


@dataclass(frozen=True, eq=False)
class Rule:
    """One entry of ``routes.yaml``: conditions that must all hold, and the route they lead to.

    ``keys`` names the conditions: the key of ``match``, or "header NAME".
    """

    route: Route
    conditions: tuple[_Condition, ...]
    keys: tuple[str, ...] = ()


def in_domains(host: str, domains: Sequence[str]) -> bool:
    """Whether a lower-case host is one of the domains; ``*.example`` stands for its subdomains."""
    for domain in domains:
        if host == domain or (domain[:2] == "*." and host.endswith(domain[1:])):
            return True
    return False


def choose_route(rules: Sequence[Rule], sighting: Sighting) -> Route:
    """The route of the first rule whose conditions hold. The last rule has none."""
    for rule in rules:
        if all(condition(sighting) for condition in rule.conditions):
            return rule.route
    raise ValueError("the last rule must be without conditions")


def resolve_account(route: Route, settings: Settings, message: SipMessage, callee: bool) -> str:
    """The account tag of the caller or the callee of an INVITE, "" where there is none."""
    sources = _sources(route, settings, callee)
    tags = (_source_tag(source, domains, settings, message) for source, domains in sources)
    return _finished_account(route, next(filter(None, tags), ""), callee)


def _sources(
    route: Route, settings: Settings, callee: bool
) -> list[tuple[str, Sequence[str] | None]]:
    """The sources of an account in order, each with the domains that it is limited to."""
    named = route.destination_account if callee else route.account
    if named is None:
        return _former_sources(route, settings, callee)
    return [(source, route.local_domains) for source in named]


def _finished_account(route: Route, tag: str, callee: bool) -> str:
    """What ``account_match`` and ``rewrite`` make of what a source gave."""
    found = route.account_match.search(tag) if route.account_match and tag else None
    tag = (found[1] or "") if found else tag
    if not tag or not route.rewrite:
        return tag
    tag = rewritten(route, "destination_account" if callee else "account", tag)
    # Cut, it might be another's.
    return tag if len(tag) <= MAX_TEXT else ""


def rewritten(route: Route, name: str, text: str) -> str:
    """A text after the steps that a route has for this field; of a long one MAX_TEXT + 1."""
    for step in route.rewrite:
        found = step.match.search(text) if step.field == name else None
        if found is not None:
            groups = partial(_group_text, found)
            changed = _GROUP.sub(groups, step.replace)
            # A few steps that double what they find would make a text without end.
            text = (text[: found.start()] + changed + text[found.end() :])[: MAX_TEXT + 1]
    return text


_GROUP = re.compile(r"\\([0-9])")


def _group_text(found: Any, group: re.Match[str]) -> str:
    return found[int(group[1])] or ""


# A URI as `uri_text` writes it: scheme, number or name, host.
_PARTY = re.compile(r"(sips?:|tel:)([^@]*)(@.*)?", re.S)


def rewritten_party(route: Route, name: str, text: str) -> str:
    """The source or the destination of a call as its route has it: scheme and host stay."""
    found = _PARTY.fullmatch(text) if route.rewrite else None
    # A host alone is no number. Of a text that was cut, the host may be gone.
    if found is None or not (found[3] or found[1] == "tel:" or len(text) >= MAX_TEXT):
        return text
    return (found[1] + rewritten(route, name, found[2]) + (found[3] or ""))[:MAX_TEXT]


def _former_sources(
    route: Route, settings: Settings, callee: bool
) -> list[tuple[str, Sequence[str] | None]]:
    """The order of the former agent, so that its configuration keeps its meaning."""
    local = route.local_domains if route.local_domains is not None else settings.sip_local_domains
    name = settings.sip_header_callee if callee else settings.sip_header_caller
    header: list[tuple[str, Sequence[str] | None]] = [(f"header:{name}", None)] if name else []
    if callee:
        return [*header, ("to", local)]
    asserted = ("p-asserted-identity", local or None)
    return [("history-info", None), *header, asserted, ("from", local)]


def _source_tag(
    source: str, domains: Sequence[str] | None, settings: Settings, message: SipMessage
) -> str:
    """What one source says; ``domains`` limits addresses to those hosts, None allows all."""
    if source.startswith("header:"):
        value = next(filter(None, message.header(source[7:])), "")
        if len(value) > _MOST_ESCAPED:
            return ""
        uri = address_uri(value)
        if uri.scheme in ("sip", "sips", "tel"):
            return account_text(uri)
        # Where it is no address, the value itself is the account.
        value = value.strip('"')
        return _fit_text(value, value)
    for uri in _source_uris(source, settings, message):
        # A tel number has no host, so it is not of a local domain.
        if domains is None or in_domains(uri.host, domains):
            tag = account_text(uri)
            if tag:
                return tag
    return ""


# Values of one header, or lines of it, that are looked at for an account or a route.
MAX_VALUES = 256


def _source_uris(source: str, settings: Settings, message: SipMessage) -> Sequence[Uri]:
    if source in _ADDRESS_SOURCES:
        return (message.party(source),)
    if source == "history-info":
        name, index = settings.sip_header_history_info, settings.sip_header_history_info_index
        lines = message.header(name) if name else []
        entries = [value for line in lines for value in split_values(line)]
        # Counted from the last, which is the present target itself (RFC 7044 section 5).
        texts = [entries[-1 - index]] if len(entries) > index else []
    else:
        lines = message.header(source)[:MAX_VALUES]
        texts = [value for line in lines for value in split_values(line)][:MAX_VALUES]
        if source == "diversion":
            # Topmost is the most recent (RFC 5806 section 5.2).
            texts = texts[:1]
    uris = [address_uri(text) for text in texts]
    # RFC 3325 section 9.1: an asserted identity may be one sip and one tel URI; sip goes first.
    return sorted(uris, key=lambda uri: uri.scheme == "tel") if len(uris) > 1 else uris


def transaction_tag(route: Route, sighting: Sighting) -> str:
    """The transaction tag of a call as its route has it; the Call-ID where that does not fit."""
    source = route.transaction_tag
    text = ""
    if source == "correlation-id":
        text = sighting.packet.correlation_id
    elif source.startswith("header:"):
        text = next(iter(sighting.message.header(source[7:])), "")
    elif route.transaction_match is not None:
        # As it was sent: of a long one `call_id` is a digest, in which no part is found.
        text = sighting.message.header("call-id")[0]
    if route.transaction_match is not None:
        found = route.transaction_match.search(text)
        text = (found[1] or "") if found else ""
    return printable_id(text if 0 < len(text) <= MAX_TEXT else sighting.message.call_id)


def party_text(source: str, message: SipMessage) -> str:
    """The source or the destination of a call: the URI of "from", "to" or "request-uri".

    "rn" is the Request-URI with its routing number in place of its number, if it has one.
    """
    if source != "rn":
        uri = message.party(source)
        return uri_text(uri) if uri.scheme else ""
    uri = message.party("request-uri")
    number = next(filter(None, _portability(message)), "").translate(_SEPARATORS)
    uri = uri._replace(user=number) if number else uri
    return uri_text(uri) if uri.scheme else ""


# RFC 4694 sections 4 and 5. The parameters stand behind the number, or behind the host where a
# server treats them as its own.
_PORTABILITY = re.compile(r";\s*(?:npdi|rn\s*=\s*([0-9A-F*#+().-]+))\s*(?=[;@]|\Z)", re.I | re.A)


def _portability(message: SipMessage) -> list[str]:
    """What a look-up of the number left in the Request-URI, empty where there was none.

    The routing number, or "" for npdi, which says that the number was looked up.
    """
    return _PORTABILITY.findall(message.request_uri.partition("?")[0])


def explain_route(
    rules: Sequence[Rule], settings: Settings, copies: Sequence[Sighting]
) -> Iterator[str]:
    """Say which rule takes an INVITE, and where each account comes from, line by line.

    ``copies`` are those of one INVITE, the nearest to the caller first.
    """
    route = choose_route(rules, copies[0])
    for rule in rules:
        pairs = zip(rule.keys, rule.conditions, strict=True)
        failed = [key for key, condition in pairs if not condition(copies[0])]
        if rule.route is route:
            yield f"rule {route.name}: taken"
            break
        seen = ", ".join(f"{key} is {_seen_value(key, copies[0])}" for key in failed)
        yield f"rule {rule.route.name}: not taken: {seen}"
    for callee, name in enumerate(("account", "destination_account")):
        yield from _explain_account(route, settings, copies, bool(callee), name)


def _seen_value(key: str, sighting: Sighting) -> str:
    """What an INVITE has where a condition of ``match`` looks."""
    if key.startswith("header "):
        values = sighting.message.header(key[7:])
        return repr(values[0]) if values else "not there"
    if key in _NETWORK_KEYS:
        address = _NETWORK_KEYS[key](sighting)
        return (_ip_text(address) if isinstance(address, bytes) else address) or "unknown"
    if key in _DOMAIN_KEYS:
        return repr(sighting.message.party(_DOMAIN_KEYS[key]).host)
    return repr(getattr(sighting.packet, key))


def _explain_account(
    route: Route, settings: Settings, copies: Sequence[Sighting], callee: bool, name: str
) -> Iterator[str]:
    lines = []
    for place, copy in enumerate(copies):
        where = f" in copy {place + 1}" if place else ""
        for source, domains in _sources(route, settings, callee):
            tag = _source_tag(source, domains, settings, copy.message)
            if not tag:
                line = f"    {source}: {_why_none(source, domains, settings, copy.message)}"
                lines += [line] if line not in lines else []
                continue
            account = _finished_account(route, tag, callee)
            changed = f", by account_match and rewrite {account!r}" if account != tag else ""
            yield f"{name}: {account or 'none'}"
            yield from [*lines, f"    {source}{where}: gives {tag!r}{changed}"]
            return
    yield f"{name}: none"
    yield from lines or ["    no source is named"]


def _why_none(
    source: str, domains: Sequence[str] | None, settings: Settings, message: SipMessage
) -> str:
    """Why a source gives no account."""
    if source.startswith("header:"):
        values = message.header(source[7:])
        return f"{values[0]!r} is no account" if values else "not there"
    uris = _source_uris(source, settings, message)
    if not uris:
        return "not there"
    outside = [uri for uri in uris if domains is not None and not in_domains(uri.host, domains)]
    told = ", ".join(uri_text(uri) if uri.scheme else "no URI" for uri in outside or uris)
    if not outside:
        return f"{told} has no user"
    return (
        f"{told} is of none of the local domains ({', '.join(domains or ()) or 'there are none'})"
    )


def main_route(settings: Settings) -> Route:
    """The main options as a route: the last rule. Raises ConfigError for a bad regexp."""
    return Route(
        name="main",
        action="rate",
        tenant=settings.tenant,
        account=None,
        destination_account=None,
        local_domains=None,
        account_match=account_regexp(settings.account_tag_match_regexp),
        product_tag=settings.product_tag,
        tags=settings.transaction_tags,
        destination="to",
        transaction_tag="call-id",
        rating_api_url=settings.rating_api_url,
    )


def parse_routes(text: str, name: str, settings: Settings) -> tuple[Rule, ...]:
    """Read ``routes.yaml`` and put the main options behind it as the last rule.

    ``name`` is the file's, for messages. Raises ConfigError, one line that begins ``NAME:LINE``.
    """
    main = main_route(settings)
    node = yaml_node(text, name)
    if node is None:
        return (Rule(main, ()),)
    if not isinstance(node, yaml.SequenceNode):
        allowed = "a list of rules, each with `- name:`"
        raise yaml_error(name, node, f"not a list; allowed: {allowed}")
    return (*(_parse_rule(name, item, main) for item in node.value), Rule(main, ()))


# One reader of YAML for ``routes.yaml`` and the configuration file. It walks PyYAML's nodes, for
# these know their line. Values are built here: PyYAML would make the tenant 010 an 8, and of a
# small file with aliases in aliases a list without end.


def yaml_node(text: str, name: str) -> yaml.Node | None:
    """The node tree of a YAML text, None for an empty one. Raises ConfigError.

    The message does not quote the text: it may hold a secret.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: not YAML; allowed: one YAML document") from None
    empty = node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"))
    return None if empty else node


def yaml_entries(
    name: str, node: yaml.Node, what: str, key_name: Callable[[str], str]
) -> dict[str, yaml.Node]:
    """The nodes of a mapping by what ``key_name`` makes of each key. Raises ConfigError.

    ``what`` begins a message. ``key_name`` raises ConfigError for a key that is none.
    """
    if not isinstance(node, yaml.MappingNode):
        raise yaml_error(name, node, f"{what}not a mapping; allowed: lines of KEY: VALUE")
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        try:
            known = key_name(str(key.value) if isinstance(key, yaml.ScalarNode) else "")
        except ConfigError as error:
            raise yaml_error(name, key, f"{what}unknown key {error}") from None
        if known in entries:
            raise yaml_error(name, key, f"{what}{known!r} stands twice; allowed: once")
        entries[known] = value
    return entries


def yaml_value(node: yaml.Node, nested: bool = False) -> Any:
    """What a node stands for: text, number, truth value, None or a list of such.

    Raises ConfigError.
    """
    if isinstance(node, yaml.SequenceNode) and not nested:
        return [yaml_value(item, True) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError("a list or mapping; allowed: a text")
    text, kind = str(node.value), node.tag.rpartition(":")[2]
    if kind == "int" and re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
        return int(text)
    if kind in ("str", "int"):
        return text
    if kind == "bool":
        return flag(text)
    if kind == "null":
        return None
    raise ConfigError(f"{text!r} looks like no text; allowed: the same in quotes")


def yaml_error(name: str, node: yaml.Node, text: str) -> ConfigError:
    """An error that begins with the file's name and the line of a node."""
    return ConfigError(f"{name}:{node.start_mark.line + 1}: {text}")


def _parse_rule(name: str, node: yaml.Node, main: Route) -> Rule:
    values = {item.name: getattr(main, item.name) for item in fields(Route)}
    values["name"] = f"line {node.start_mark.line + 1}"
    conditions: list[tuple[str, _Condition]] = []
    entries = yaml_entries(name, node, "a rule: ", _choice("match", "rewrite", *_ROUTE_VALUES))
    for key, value in entries.items():
        if key == "match":
            conditions = _parse_match(name, value)
        elif key == "rewrite":
            values[key] = _parse_rewrite(name, value)
        elif key == "transaction_tag" and isinstance(value, yaml.MappingNode):
            source, match = _parse_keys(name, value, key, _TRANSACTION_KEYS)
            values |= {"transaction_tag": source, "transaction_match": match}
        else:
            values[key] = _convert(name, value, key, _ROUTE_VALUES[key])
    names, tests = tuple(key for key, _ in conditions), tuple(test for _, test in conditions)
    return Rule(Route(**values), tests, names)


def _parse_rewrite(name: str, node: yaml.Node) -> tuple[Rewrite, ...]:
    if not isinstance(node, yaml.SequenceNode):
        allowed = f"a list of {{{', '.join(_REWRITE_KEYS)}}}"
        raise yaml_error(name, node, f"rewrite: not a list; allowed: {allowed}")
    steps = []
    for item in node.value:
        step = Rewrite(*_parse_keys(name, item, "rewrite", _REWRITE_KEYS))
        groups = [int(group) for group in _GROUP.findall(step.replace)]
        if max(groups, default=0) > step.match.groups:
            problem = f"rewrite: replace: {step.replace!r} has a group that match has not"
            raise yaml_error(name, item, f"{problem}; allowed: \\0 to \\{step.match.groups}")
        steps.append(step)
    return tuple(steps)


def _parse_keys(
    name: str, node: yaml.Node, what: str, keys: dict[str, Callable[[Any], Any]]
) -> list[Any]:
    """The values of a mapping that must have exactly these keys, in their order."""
    entries = yaml_entries(name, node, f"{what}: ", _choice(*keys))
    for key in keys:
        if key not in entries:
            raise yaml_error(name, node, f"{what}: no {key!r}; allowed: {', '.join(keys)}")
    return [_convert(name, entries[key], f"{what}: {key}", keys[key]) for key in keys]


def _parse_match(name: str, node: yaml.Node) -> list[tuple[str, _Condition]]:
    conditions = []
    for key, value in yaml_entries(name, node, "match: ", _choice(*_MATCH_KEYS)).items():
        what = f"match: {key}"
        if key != "header":
            conditions.append((key, _convert(name, value, what, partial(_condition, key))))
            continue
        headers = yaml_entries(name, value, f"{what}: ", _header_key)
        if not headers:
            raise yaml_error(name, value, f"{what}: empty; allowed: lines of HEADER: REGEXP")
        for header, regexp in headers.items():
            condition = _convert(name, regexp, what, partial(_header_condition, header))
            conditions.append((f"header {header}", condition))
    return conditions


def _convert(name: str, node: yaml.Node, what: str, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(yaml_value(node))
    except ConfigError as error:
        raise yaml_error(name, node, f"{what}: {error}") from None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_one_text(item) for item in (value if isinstance(value, list) else [value]))


def _domains(value: Any) -> tuple[str, ...]:
    return as_domains(_texts(value))


def _header_name(source: str) -> bool:
    return source.startswith("header:") and re.fullmatch(_TOKEN, source[7:]) is not None


def _accounts(value: Any) -> tuple[str, ...]:
    sources = tuple(text.lower() for text in _texts(value))
    for source in sources:
        if source not in _SOURCES + _ADDRESS_SOURCES and not _header_name(source):
            allowed = ", ".join((*_SOURCES, *_ADDRESS_SOURCES, "header:NAME"))
            raise ConfigError(f"{source!r}; allowed: {allowed}")
    return sources


def _transaction_source(value: Any) -> str:
    if value not in ("call-id", "correlation-id") and not _header_name(str(value)):
        allowed = "call-id, correlation-id, header:NAME, {from: one of these, match: REGEXP}"
        raise ConfigError(f"{value!r}; allowed: {allowed}")
    return str(value)


def _replacement(value: Any) -> str:
    text = "" if value == "" else _one_text(value)
    if not text.isascii() or "\\" in _GROUP.sub("", text):
        raise ConfigError(f"{text!r}; allowed: ASCII, and \\0 to \\9 for what was found")
    return text


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r}; allowed: true, false")
    return value


_TRANSACTION_KEYS: dict[str, Callable[[Any], Any]] = {
    "from": _transaction_source,
    "match": lambda value: _grouped_regexp(_one_text(value), "transaction tag"),
}
_REWRITE_KEYS: dict[str, Callable[[Any], Any]] = {
    "field": _choice("source", "destination", "account", "destination_account"),
    "match": lambda value: compile_regexp(_one_text(value)),
    "replace": _replacement,
}


_ROUTE_VALUES: dict[str, Callable[[Any], Any]] = {
    "name": _one_text,
    "action": _choice("rate", "ignore"),
    "tenant": _one_text,
    "account": _accounts,
    "destination_account": _accounts,
    "local_domains": _domains,
    "account_match": lambda value: account_regexp(_one_text(value)),
    "product_tag": _one_text,
    "tags": _texts,
    "destination": _choice("to", "request-uri", "rn"),
    "transaction_tag": _transaction_source,
    "rating_api_url": lambda value: api_url(_one_text(value)),
    "carrier_ip": _truth,
}


def _condition(key: str, value: Any) -> _Condition:
    """The condition for one key of ``match`` other than ``header``. Raises ConfigError."""
    if value == []:
        raise ConfigError("[]; allowed: one value at least")
    if key == "capture_id":
        numbers = value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < 2**32 for item in numbers):
            raise ConfigError(f"{value!r}; allowed: numbers from 0 to {2**32 - 1}")
        return lambda seen: seen.packet.capture_id in numbers
    if key == "capture_name":
        names = _texts(value)
        return lambda seen: seen.packet.capture_name in names
    if key in _NETWORK_KEYS:
        networks, address = [_network(text) for text in _texts(value)], _NETWORK_KEYS[key]
        return lambda seen: _in_networks(address(seen), networks)
    domains, source = _domains(value), _DOMAIN_KEYS[key]
    return lambda seen: in_domains(seen.message.party(source).host, domains)


def _header_key(text: str) -> str:
    if not re.fullmatch(_TOKEN, text):
        raise ConfigError(f"{text!r}; allowed: the name of a header")
    return text.lower()


def _header_condition(name: str, pattern: Any) -> _Condition:
    regexp = compile_regexp("" if pattern == "" else _one_text(pattern))
    return lambda seen: any(map(regexp.search, seen.message.header(name)[:MAX_VALUES]))


def _in_networks(address: bytes | str, networks: Sequence[_Network]) -> bool:
    if not address:
        return False
    host = ipaddress.ip_address(address)
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped:
        host = host.ipv4_mapped
    return any(host.version == network.version and host in network for network in networks)


# Room: the call: facts and a judge

# Theory of operation. A message decides nothing when it comes: it adds a fact to its call (`note`),
# and `judge` says what follows from all facts that are known by now. Facts have no order and a copy
# adds none, so doubled, shuffled and late messages give the same charge. What is not certain yet
# has a moment at which it will be (`Verdict.due`), and then it is judged again. What was reported
# is never taken back: it is one more thing that `judge` is told.
#
# A call is a Call-ID and the caller's From tag (rule 2 of the reference). It has
# - attempts, the caller's INVITE transactions, by CSeq and the branch of the lowest Via. Each keeps
#   whom it names, how far it came, and what its copies look like;
# - dialogs, one for each To tag: the 2xx, the ACKs, the BYEs of both sides with their answers;
# - `replied`: whether the mirror has shown replies of this call. Only then are answers expected.
#
# A caller writes every field of a request; a final reply comes from the other side or from the
# proxy. So where replies are mirrored they decide, and requests alone do not:
#
# evidence                 replies of the call mirrored        requests only             rule
# 2xx to an INVITE         begins at its time, at once                                   6
#   CSeq of no INVITE      begins after the reorder window                               6
#   To tag ended by BYE    begins nothing                                                14
#   sent for 16 s, no ACK  ends the call where it began, after 32 s                      9
# ACK, new branch and URI  proves nothing by itself            begins, at once           7
#   of another hop         proves nothing by itself            begins after the window   7
#   INVITE's URI, CANCEL   proves nothing by itself            proves nothing by itself  7
#   ... and then a BYE     begins if the callee confirms it    begins at the ACK's time  7
# ACK, INVITE's branch     refused                             refused                   7, 8
# 3xx to 6xx               refused; a 2xx may follow           -                         8
# BYE, answered 2xx        ends at its own time                -                         12
#   481, 408               the same, but of an old CSeq        -                         12
#   401, 407               ends if a retry follows within 5 s  -                         12
#   any other              was not carried out, call goes on   -                         12
#   nothing for 32 s       ends, or not: `unanswered_bye`      -                         12
#   no reply mirrored      -                                   ends at once, if in order 12
#   Max-Forwards 0         never carried out                   never carried out         12
# reply to an unseen BYE   ends after the reorder window       -                         13
# BYE of a tied leg        ends as a BYE of the call itself                              17
# CANCEL                   nothing                             makes an ACK doubtful     15, 7
# nothing                  session timer, max_call_duration    the same                  16
#
# So a 481 to a BYE ends the call at the BYE's time, as its sender may take it for over (RFC 3261
# 15.1.1), unless that BYE's CSeq was lower than one seen from its side, which is out of order.
#
# A charge runs from the first answer to the end of the last answered dialog (rule 11). An end is
# reported at the earliest one reorder window after the begin, for the answer of another fork may
# still be on its way.

ORPHAN, TRYING, FAILED, ANSWERED, ENDED = "orphan", "trying", "failed", "answered", "ended"
# An orphan is what is known of a call whose INVITE was not seen (rule 19).
STATES = (ORPHAN, TRYING, FAILED, ANSWERED, ENDED)

# Seconds. 64*T1 of RFC 3261: for so long a request is sent again, a late 200 or a copy may trail.
LINGER = 32.0
# Seconds. A charged call is known for so long after its end: a capture agent that lost its
# connection sends its copies of the whole call then, and its tag is not given again (rules 2, 18).
REMEMBERED = 600.0
# Microseconds. RFC 3261 17.2.1, rule 9: a 2xx repeated for so long was never acknowledged.
UNACKNOWLEDGED = 16_000_000
# Microseconds. T1 of RFC 3261: what a hop sends on leaves before it would be sent again.
SAME_SENDING = 500_000
# Microseconds. T4 of RFC 3261: a user agent that is challenged tries again at once. Who talks on
# between the two BYEs gains no more than this.
CHALLENGE_RETRY = 5_000_000
# Seconds. A refresh sent at the last moment may be retransmitted for 64*T1 before it gives up.
SESSION_GRACE = 32.0
# Request-URIs and hops in all that the INVITE copies of one attempt leave behind, 0.1 kB each.
MAX_COPY_VALUES = 512
# INVITE copies of one attempt that are remembered: proxies in the path times branches.
MAX_INVITE_COPIES = 64
# Copies further on whose text is kept while no copy from the caller's side was seen: rule 3.
MAX_FURTHER = 4
# Other callers whom INVITEs of one transaction name that are remembered.
MAX_NAMED = 16
# Attempts and dialogs of a call that are remembered: retries and forks are few. Each fact that a
# flood leaves behind takes some 0.3 kB.
MAX_ATTEMPTS = 16
MAX_DIALOGS = 16
# ACKs, or BYEs of one side, of a dialog; and ways of one BYE.
MAX_REQUESTS = 8
MAX_WAYS = 4
# Requests of a side whose CSeq and time are remembered: only the reorder window has more than one.
MAX_CSEQS = 4

_CARRIED_OUT = frozenset((*range(200, 300), 408, 481))
_CHALLENGES = frozenset((401, 407))


# The route of a call whose INVITE was not seen.
NO_ROUTE = Route("", "ignore", "", None, None, None, None, "", (), "to", "call-id", "")


@dataclass(slots=True, eq=False)
class Charge:
    """Who is charged for a call, and for what: rules 3 and 5."""

    route: Route
    transaction_tag: str = ""
    account_tag: str = ""
    destination_account_tag: str = ""

    @property
    def rated(self) -> bool:
        """Whether the call is reported: its route rates it and somebody is to be charged."""
        accounts = self.account_tag or self.destination_account_tag
        return self.route.action == "rate" and bool(accounts)


@dataclass(slots=True, eq=False)
class Identity(Charge):
    """What an INVITE says of its charge: that of the copy nearest to the caller.

    That is the copy with the fewest ``hops``. A copy further on only adds what is missing: an
    account, such as an identity that the proxy asserts, or a routing number that it looked up.
    """

    hops: int = 0
    source: str = ""
    source_ip: str = ""
    destination: str = ""
    # The hops of the copies that gave the accounts, and of the one whose number was looked up.
    account_hops: int = 0
    destination_hops: int = 0
    number_hops: int = MAX_VIAS + 1
    # The URI of From as it was sent, which tells apart those who use one branch.
    caller: str = ""

    def add(self, message: SipMessage, hops: int, settings: Settings) -> None:
        """Take what is missing, or what a copy further on gave, from this copy."""
        if self.route.destination == "rn" and hops < self.number_hops and _portability(message):
            self.destination, self.number_hops = _destination(self.route, message), hops
        if not self.account_tag or self.account_hops > hops:
            tag = resolve_account(self.route, settings, message, callee=False)
            if tag:
                self.account_tag, self.account_hops = tag, hops
        if not self.destination_account_tag or self.destination_hops > hops:
            tag = resolve_account(self.route, settings, message, callee=True)
            if tag:
                self.destination_account_tag, self.destination_hops = tag, hops


def identify(sighting: Sighting, route: Route, hops: int, settings: Settings) -> Identity:
    """The identity that an INVITE copy gives by itself."""
    message = sighting.message
    caller = party_text("from", message)
    identity = Identity(
        route,
        transaction_tag(route, sighting),
        hops=hops,
        source=rewritten_party(route, "source", caller),
        source_ip=sighting.packet.source_ip,
        destination=_destination(route, message),
        caller=caller,
    )
    identity.add(message, hops, settings)
    return identity


def _destination(route: Route, message: SipMessage) -> str:
    return rewritten_party(route, "destination", party_text(route.destination, message))


@dataclass(slots=True)
class Ack:
    """An ACK as far as it tells what it is to; two with the same text are copies."""

    cseq: int
    # Of the lowest hop.
    branch: str
    sent_by: str
    # Of the top hop, and the Request-URI.
    top: str
    uri: str
    # HEP time, and seconds of the monotonic clock.
    time: int = field(compare=False)
    arrived: float = field(compare=False)


@dataclass(slots=True, eq=False)
class InviteCopy:
    """How copies of an INVITE with one top branch look: Request-URIs, branches of hops below."""

    branch: str
    uris: set[str] = field(default_factory=set)
    below: set[str] = field(default_factory=set)


# Address and port.
Side = tuple[bytes, int]


@dataclass(slots=True, eq=False)
class Attempt:
    """One INVITE transaction of the caller: a CSeq, and the branch of its lowest Via."""

    cseq: int
    branch: str
    # HEP times of the first copy and of a CANCEL, 0 for none.
    time: int = 0
    cancelled: int = 0
    # Empty while no INVITE was seen; then the sent-by of the lowest hop, and between which
    # addresses and ports the copy went that is nearest to the caller.
    copies: tuple[InviteCopy, ...] = ()
    caller: str = ""
    sender: Side = (b"", 0)
    receiver: Side = (b"", 0)
    # Top branches of final non-2xx replies, and of 1xx.
    refusals: tuple[str, ...] = ()
    rang: tuple[str, ...] = ()
    identity: Identity | None = None
    # A caller may use his branch again for an INVITE with another From: each is kept.
    named: tuple[Identity, ...] = ()
    further: tuple[SipMessage, ...] = ()
    # If a route wants to know: where its copies went, as (top branch, hops, address), and the top
    # branches of 2xx.
    sent_to: tuple[tuple[str, int, str], ...] = ()
    answers: tuple[str, ...] = ()

    def note_target(self, branch: str, hops: int, address: str) -> None:
        """Take in where a copy with this top branch went; no charge depends on it."""
        target = (branch, hops, address)
        if target not in self.sent_to and len(self.sent_to) < MAX_INVITE_COPIES:
            self.sent_to += (target,)

    def note_answer(self, branch: str) -> None:
        """Take in the top branch of a 2xx, where it matters which copy was answered."""
        if any(branch == known for known, _, _ in self.sent_to) and branch not in self.answers:
            self.answers += (branch,)

    @property
    def carrier_ip(self) -> str:
        """Where the INVITE left what is mirrored, "" where that is not certain.

        Of the copies that were answered, or else of those that were not refused, it is where those
        with the most hops went, if all went to one address. The caller's own copy left no proxy.
        """
        nearest = self.identity.hops if self.identity else 0
        copies = [x for x in self.sent_to if x[1] > nearest]
        answered = [x for x in copies if x[0] in self.answers]
        left = answered or [x for x in copies if x[0] not in self.refusals]
        most = max([hops for _, hops, _ in left], default=0)
        addresses = {address for _, hops, address in left if hops == most}
        return addresses.pop() if len(addresses) == 1 else ""

    def copy(self, branch: str) -> InviteCopy | None:
        """How the copies with this top branch look."""
        for copy in self.copies:
            if copy.branch == branch:
                return copy
        return None

    def note_copy(self, invite: SipMessage) -> bool:
        """Take in how a copy looks; whether that was new."""
        top, *lower = [via.branch for via in invite.vias]
        uri, copy = comparable(invite.request_uri), self.copy(top)
        if copy and uri in copy.uris and copy.below.issuperset(lower):
            return False
        size = sum(len(known.uris) + len(known.below) for known in self.copies)
        if (not copy and len(self.copies) >= MAX_INVITE_COPIES) or size >= MAX_COPY_VALUES:
            return False
        if copy is None:
            copy = InviteCopy(top)
            self.copies += (copy,)
        copy.uris.add(uri)
        copy.below.update(lower)
        self.caller = self.caller or invite.vias[-1].sent_by
        return True

    def choose(self, caller: str) -> None:
        """The From of a 2xx is that of the INVITE which was answered (RFC 3261 8.2.6.2)."""
        same = next((x for x in self.named if x.caller == caller), None)
        if same is not None and self.identity is not None and self.identity.caller != caller:
            self.named = (*(x for x in self.named if x is not same), self.identity)
            self.identity = same

    def refused(self, acks: Iterable[Ack]) -> bool:
        """Whether each INVITE copy, or a hop below it, has had its final non-2xx (rule 8).

        An ACK with branch and Request-URI of a copy acknowledges one (RFC 3261 17.1.1.3).
        """
        closed = set(self.refusals)
        if not closed.issuperset(self.rang):
            # A caller may send such an ACK at any time.
            return False
        acknowledged = {(ack.top, ack.uri) for ack in acks if ack.cseq == self.cseq}
        for copy in self.copies if acknowledged else ():
            if any((copy.branch, uri) in acknowledged for uri in copy.uris):
                closed.add(copy.branch)
        return bool(self.copies) and all(
            copy.branch in closed or not closed.isdisjoint(copy.below) for copy in self.copies
        )


@dataclass(slots=True, eq=False)
class Bye:
    """One BYE transaction of a side: when it was sent, and its final reply."""

    cseq: int
    branch: str
    from_caller: bool
    # Whether its CSeq was lower than one seen before from its side (RFC 3261 12.2.2).
    late: bool = False
    # The ways on which it was sent (Request-URI and Route) with the HEP time of the first copy;
    # empty where only the reply was seen. A retransmission has the same way; a caller who sends
    # the same branch on another way sends another request.
    seen: tuple[tuple[str, int], ...] = ()
    # HEP time of what was carried out: see `note_way`.
    time: int = 0
    # Of the final reply, 0 before.
    status: int = 0
    reply_time: int = 0
    # In seconds of the monotonic clock.
    arrived: float = 0.0
    replied_at: float = 0.0

    def note_way(self, way: str, time: int) -> bool:
        """Take in a copy; whether it was new.

        What is carried out comes last, for a caller may send it on other ways before. So the time
        is that of the way that was tried last, and of too many the earliest is forgotten. Each hop
        sends it another way as well, but within T1: who tries again gains no more than that.
        """
        if any(known == way and at <= time for known, at in self.seen):
            return False
        others = sorted((at, known) for known, at in self.seen if known != way)[1 - MAX_WAYS :]
        self.seen = (*((known, at) for at, known in others), (way, time))
        self.time, *later = sorted(at for _, at in self.seen)
        for at in later:
            if at - self.time > SAME_SENDING:
                self.time = at
        return True


# Requests of one side, as (CSeq, HEP time): the higher, the later.
Requests = tuple[tuple[int, int], ...]


@dataclass(slots=True, eq=False)
class Dialog:
    """What is known under one To tag of a call (RFC 3261 section 12).

    Times are HEP time in microseconds, 0 for never; ``arrived`` and ``refreshed_at`` are in
    seconds of the monotonic clock.
    """

    to_tag: str
    # The INVITE that was answered, the first and the last 2xx, and an ACK to it.
    cseq: int = 0
    branch: str = ""
    answered: int = 0
    repeated: int = 0
    arrived: float = 0.0
    acked: int = 0
    # The last request or 2xx that only a dialog has, and the last one by the callee's side.
    alive: int = 0
    confirmed: int = 0
    # The session interval in seconds, the 2xx that set it, and the last refresh.
    session: int = 0
    agreed: int = 0
    refreshed: int = 0
    refreshed_at: float = 0.0
    # The lowest CSeq of the caller's re-INVITEs; the CSeqs of caller and callee behind the INVITE.
    reinvited: int = 0
    sent: tuple[Requests, Requests] = ((), ())
    acks: tuple[Ack, ...] = ()
    byes: tuple[Bye, ...] = ()

    def highest(self, from_caller: bool) -> int:
        """The highest CSeq that was seen of a side, 0 for none."""
        sent = self.sent[not from_caller]
        return max(sent[-1][0] if sent else 0, self.cseq if from_caller else 0)

    def note_cseq(self, cseq: int, time: int, from_caller: bool) -> bool:
        """Take in the CSeq of a side's request; whether it is the highest by now."""
        new = cseq > self.highest(from_caller)
        sent = self.sent[not from_caller]
        if any(other >= cseq and at <= time for other, at in sent):
            return False
        sent = tuple(x for x in sent if x[0] > cseq or x[1] < time) + ((cseq, time),)
        sent = tuple(sorted(sent)[-MAX_CSEQS:])
        self.sent = (sent, self.sent[1]) if from_caller else (self.sent[0], sent)
        return new

    @property
    def unacknowledged(self) -> bool:
        """Whether its 2xx was repeated until the callee gave up (rule 9)."""
        return not self.acked and self.repeated - self.answered >= UNACKNOWLEDGED


@dataclass(slots=True, eq=False)
class Told:
    """What a `RecordedTable` keeps of a call beside the facts that its charge needs.

    ``source``, ``source_ip``, ``destination``, ``begun_by`` and ``invited`` are what is let go once
    a begin was reported; the rest is what the replies said so far, as `Heard` has it.
    """

    source: str = ""
    source_ip: str = ""
    destination: str = ""
    begun_by: str = ""
    invited: int = 0
    cseq: int = 0
    branch: str = ""
    hops: int = 0
    phrase: str = ""
    ringing: int = 0
    status: int = 0


@dataclass(slots=True, eq=False)
class Call(Charge):
    """What is known of one call of one tenant, and what was reported of it.

    Times are HEP time in microseconds where they were reported, 0 for not yet, and else seconds of
    the monotonic clock. As a charge it is that of the attempt that was answered.
    """

    route: Route = NO_ROUTE
    call_id: str = ""
    from_tag: str = ""
    attempts: tuple[Attempt, ...] = ()
    dialogs: tuple[Dialog, ...] = ()
    # Whether the mirror has shown replies of it, and how many of its BYEs were refused.
    replied: bool = False
    byes_refused: int = 0
    state: str = ORPHAN
    # When the last fact came, and when the state began.
    heard: float = 0.0
    entered: float = 0.0
    # What was reported, when, and of which INVITE; whether it went on behind the end.
    begun: int = 0
    begun_at: float = 0.0
    cseq: int = 0
    branch: str = ""
    ended: int = 0
    ended_at: float = 0.0
    reason: str = ""
    charged: bool = False
    went_on: bool = False
    # Whether another leg is charged for it, and when a leg ended that is tied to it (rule 17).
    tied: bool = False
    tied_end: int = 0
    # By what a leg without an INVITE is tied to others: tenant and tag.
    ties: tuple[tuple[str, str], ...] = ()
    # The tenant and the capture agent of its INVITE, and the address its first packet came from.
    tenant: str = ""
    capture_id: int = 0
    sender: str = ""
    # For its record, where records are made.
    told: Told | None = None
    row: int = 0
    # When to judge it again, and where it stands in the wheel: 0 nowhere, -1 once it is forgotten.
    due: float = inf
    slot: int = 0

    @property
    def shown(self) -> Charge:
        """Whose call it is, as far as that is known."""
        newest = self.attempts[-1].identity if self.attempts else None
        return newest if newest is not None and not self.begun else self

    @property
    def acks(self) -> Iterator[Ack]:
        """The ACKs of all dialogs that are kept."""
        return (ack for dialog in self.dialogs for ack in dialog.acks)

    def is_from_caller(self, message: SipMessage) -> bool:
        """Whether a request, or the request of a reply, went from the caller to the callee."""
        return message.from_tag == self.from_tag

    def callee_tag(self, message: SipMessage) -> str:
        """The To tag of the dialog that a message is of; tags swap with the direction (12.2)."""
        return message.to_tag if message.from_tag == self.from_tag else message.from_tag

    def concerns(self, message: SipMessage) -> bool:
        """Whether a message has the caller's tag on the side where it belongs."""
        in_dialog = message.cseq_method not in ("ACK", "CANCEL") and message.to_tag != ""
        later = self.ended_at and message.time > self.ended
        if later and message.cseq_method in ("INVITE", "ACK") and not self.is_answered(message):
            # Of a later call, whose INVITE is on its way.
            return False
        if message.from_tag == self.from_tag:
            return True
        # Who called is not known yet of an orphan.
        return self.state != ORPHAN and in_dialog and message.to_tag == self.from_tag

    def is_initial(self, branch: str) -> bool:
        """Whether a branch is that of an initial INVITE, whatever its CSeq was changed to."""
        return branch == self.branch or any(x.branch == branch for x in self.attempts)

    def find_dialog(self, to_tag: str) -> Dialog | None:
        """The dialog with this To tag, if something is known of it."""
        for dialog in self.dialogs:
            if dialog.to_tag == to_tag:
                return dialog
        return None

    def dialog(self, to_tag: str) -> Dialog:
        """The dialog with this To tag, or a new one; of too many one without an answer goes."""
        for dialog in self.dialogs:
            if dialog.to_tag == to_tag:
                return dialog
        if len(self.dialogs) >= MAX_DIALOGS:
            spare = min(self.dialogs, key=lambda x: (bool(x.answered), bool(x.acks)))
            self.dialogs = tuple(x for x in self.dialogs if x is not spare)
        self.dialogs += (Dialog(to_tag),)
        return self.dialogs[-1]

    def is_answered(self, invite: SipMessage | Attempt) -> bool:
        """Whether CSeq and lowest branch are those of the INVITE that was answered."""
        return invite.cseq == self.cseq and invite.branch == self.branch

    def has_invite(self, cseq: int, branch: str) -> bool:
        """Whether an initial INVITE with this CSeq and lowest branch was seen."""
        known = [(x.cseq, x.branch) for x in self.attempts if x.copies]
        return (cseq, branch) in (*known, (self.cseq, self.branch))

    def attempt_of(self, message: SipMessage | Dialog | Ack) -> Attempt | None:
        """The attempt that a reply, an ACK, a CANCEL or a dialog belongs to.

        The branch of the lowest Via says which (RFC 3261 17.1.3). Where it is hidden by a proxy on
        the way, the CSeq does, and of several the latest that was not refused.
        """
        same = [attempt for attempt in self.attempts if attempt.cseq == message.cseq]
        if len(same) < 2:
            return same[0] if same else None
        for attempt in same:
            if attempt.branch == message.branch:
                return attempt
        acks = list(self.acks)
        going = [attempt for attempt in same if not attempt.refusals and not attempt.refused(acks)]
        return max(going or same, key=attrgetter("time"))


# What a message adds

# What `note` returns: a copy, from which nothing is learnt; a fact from which nothing follows by
# itself; a BYE whose answer is still to come, for LINGER; and evidence, which is judged at once.
COPY, FACT, UNANSWERED, EVIDENCE = range(4)


def note(call: Call, message: SipMessage, now: float) -> int:
    """Add what a message says to what is known of its call: COPY, FACT, UNANSWERED or EVIDENCE.

    Initial INVITEs are for `note_invite`, which also needs to know whose call it is.
    """
    method = message.cseq_method
    if not message.status:
        if method == "ACK":
            return _note_ack(call, message, now)
        if method == "BYE":
            return _note_bye(call, message, now)
        if method == "CANCEL":
            return _note_attempt(call, message)
        return _note_request(call, message, now)
    first = COPY if call.replied else FACT
    call.replied = True
    if message.status < 200:
        # A 100 is the next hop's own word (RFC 3261 8.2.6.1): nothing rings by it.
        rings = method == "INVITE" and message.status > 100
        return (_note_attempt(call, message) if rings else COPY) or first
    if method == "BYE":
        return _note_bye_reply(call, message, now) or first
    return _note_reply(call, message, now) or first


def note_invite(
    call: Call, sighting: Sighting, route: Route, settings: Settings, targets: bool
) -> bool:
    """Add an initial INVITE or a copy of it, and say whether it was new: rules 1 and 3.

    ``targets`` says that a route wants `carrier_ip`. While a copy nearer to the caller may still
    come, the text of a copy is kept: the nearer one may have another route, and may lack an account
    that this one has.
    """
    message, packet = sighting.message, sighting.packet
    sender = (packet.source, packet.source_port)
    receiver = (packet.destination, packet.destination_port)
    attempt, hops = _find_attempt(call, message, sender, receiver)
    if targets and packet.destination:
        attempt.note_target(message.top_branch, hops, packet.destination_ip)
    new = attempt.note_copy(message)
    # After 32 s it is no retransmission, but the branch used again.
    if not 0 < attempt.time <= message.time <= attempt.time + LINGER * 1_000_000:
        attempt.time, new = message.time, True
    identity = attempt.identity
    if identity is not None and sender[0] == attempt.sender[0]:
        caller = party_text("from", message)
        if caller != identity.caller and all(x.caller != caller for x in attempt.named):
            named = identify(sighting, route, hops, settings)
            attempt.named = (*attempt.named[1 - MAX_NAMED :], named)
            return True
    if identity is None or hops < identity.hops:
        attempt.named = ()
        identity = attempt.identity = identify(sighting, route, hops, settings)
        attempt.sender, attempt.receiver = sender, receiver
        for further in attempt.further:
            identity.add(further, len(further.vias), settings)
        new = True
    elif new and hops > identity.hops:
        identity.add(message, hops, settings)
    if hops <= 1:
        attempt.further = ()
    elif new and identity.hops > 1 and len(attempt.further) < MAX_FURTHER:
        attempt.further += (message,)
    return new


def _find_attempt(
    call: Call, message: SipMessage, sender: Side, receiver: Side
) -> tuple[Attempt, int]:
    """The attempt of an INVITE copy, maybe a new one, and the hops that the copy has behind it."""
    branch, hops = message.branch, len(message.vias)
    found = None
    for attempt in call.attempts:
        if attempt.cseq != message.cseq:
            continue
        if attempt.branch == branch:
            return attempt, hops
        # A proxy that hides the Vias below it sends the copy from where it received it.
        if attempt.identity is not None:
            if sender == attempt.receiver and sender[1]:
                found, hops = attempt, max(hops, attempt.identity.hops + 1)
            elif receiver == attempt.sender and receiver[1]:
                found, hops, attempt.branch = attempt, attempt.identity.hops - 1, branch
    if found is None:
        found = Attempt(message.cseq, branch)
        call.attempts += (found,)
    return found, hops


def _note_attempt(call: Call, message: SipMessage) -> int:
    """A 1xx, a refusal or a CANCEL of an INVITE; a 1xx renews the ringing time-out (rule 10)."""
    attempt, branch = call.attempt_of(message), message.top_branch
    if attempt is None:
        if call.begun:
            return COPY
        # Its INVITE is on its way.
        attempt = Attempt(message.cseq, message.branch)
        if len(call.attempts) < MAX_ATTEMPTS:
            call.attempts += (attempt,)
    if not message.status:
        if 0 < attempt.cancelled <= message.time:
            return COPY
        attempt.cancelled = message.time
        return EVIDENCE
    told = attempt.rang if message.status < 200 else attempt.refusals
    if branch in told or len(told) >= MAX_INVITE_COPIES:
        return COPY
    if message.status >= 300:
        attempt.refusals += (branch,)
        return EVIDENCE
    attempt.rang += (branch,)
    # An ACK that came before may be waiting for it.
    return EVIDENCE if call.dialogs else FACT


def _note_reply(call: Call, reply: SipMessage, now: float) -> int:
    """A final reply to an INVITE, a re-INVITE or an UPDATE."""
    from_caller = call.is_from_caller(reply)
    if reply.status >= 300:
        of_invite = reply.cseq_method == "INVITE" and from_caller
        return _note_attempt(call, reply) if of_invite else COPY
    dialog = call.dialog(call.callee_tag(reply))
    if reply.cseq_method == "INVITE" and from_caller:
        # Anybody may send a re-INVITE with the CSeq of the INVITE, also before its answer.
        known = call.attempts or call.begun
        reinvite = 0 < dialog.reinvited <= reply.cseq and not call.is_initial(reply.branch)
        if not (reinvite and known) and (not dialog.answered or reply.cseq <= dialog.cseq):
            return _note_answer(call, dialog, reply, now)
    new = _note_alive(dialog, reply, now, from_caller)
    return EVIDENCE if _note_session(dialog, reply) or new else COPY


def _note_answer(call: Call, dialog: Dialog, answer: SipMessage, now: float) -> int:
    """A 2xx to an INVITE."""
    for attempt in call.attempts:
        attempt.note_answer(answer.top_branch)
    if any(attempt.named for attempt in call.attempts):
        chosen = call.attempt_of(answer)
        if chosen is not None:
            chosen.choose(party_text("from", answer))
    new = not dialog.answered or answer.cseq != dialog.cseq
    was = dialog.unacknowledged
    if new:
        dialog.cseq, dialog.branch, dialog.arrived = answer.cseq, answer.branch, now
        dialog.answered = dialog.repeated = answer.time
        if dialog.acks:
            dialog.acked = min(ack.time for ack in dialog.acks)
    if not dialog.refreshed:
        dialog.refreshed, dialog.refreshed_at = answer.time, now
    if answer.time < dialog.answered:
        dialog.answered, new = answer.time, True
    dialog.repeated = max(dialog.repeated, answer.time)
    # A repetition is a fact once it says that nobody acknowledges (rule 9).
    new |= _note_session(dialog, answer) or dialog.unacknowledged != was
    return EVIDENCE if new else COPY


def _note_session(dialog: Dialog, reply: SipMessage) -> bool:
    """A 2xx starts, renews or stops the session timer (rule 16, RFC 4028 sections 7.2 and 10)."""
    if reply.time < dialog.agreed:
        return False
    interval = reply.session_interval
    new = interval != dialog.session
    dialog.session, dialog.agreed = interval, reply.time
    return new


def _note_alive(dialog: Dialog, message: SipMessage, now: float, from_caller: bool) -> bool:
    """A request or a 2xx that only a dialog has; INFO and the like refresh no session."""
    # A 2xx to the caller's request is the callee's word.
    new = message.time > dialog.alive
    if from_caller == bool(message.status) and message.time > dialog.confirmed:
        dialog.confirmed, new = message.time, True
    if message.cseq_method in ("INVITE", "UPDATE"):
        dialog.refreshed = max(dialog.refreshed, message.time)
        dialog.refreshed_at = max(dialog.refreshed_at, now)
    dialog.alive = max(dialog.alive, message.time)
    return new


def _note_request(call: Call, request: SipMessage, now: float) -> int:
    """A re-INVITE or UPDATE, or another request of a dialog, whose CSeq counts (12.2.2)."""
    from_caller, dialog = call.is_from_caller(request), call.dialog(call.callee_tag(request))
    new = dialog.note_cseq(request.cseq, request.time, from_caller)
    for bye in dialog.byes:
        if bye.from_caller == from_caller and bye.seen and bye.cseq < request.cseq:
            bye.late = bye.late or request.time < bye.time
    if request.method == "INVITE" and from_caller:
        dialog.reinvited = min(dialog.reinvited or request.cseq, request.cseq)
        known = call.attempts or call.begun
        if known and dialog.cseq >= dialog.reinvited and not call.is_initial(dialog.branch):
            # What was taken for the answer was the 2xx to this.
            dialog.answered = dialog.repeated = dialog.cseq = 0
    if request.method in ("INVITE", "UPDATE", "INFO"):
        new |= _note_alive(dialog, request, now, from_caller)
    return EVIDENCE if new else COPY


def _note_ack(call: Call, ack: SipMessage, now: float) -> int:
    dialog = call.dialog(ack.to_tag)
    if dialog.answered:
        if not dialog.acked:
            # Of one dialog it only says that the 2xx was no stray one.
            plain = len(call.dialogs) == 1 and not dialog.unacknowledged and call.begun
            # Behind the begin its time says nothing, and is not kept.
            dialog.acked = dialog.answered if call.begun else ack.time
            return FACT if plain else EVIDENCE
        earlier = ack.time < dialog.acked
        dialog.acked = min(dialog.acked, ack.time)
        if call.replied:
            return FACT if earlier else COPY
    vias, uri = ack.vias, comparable(ack.request_uri)
    fact = Ack(ack.cseq, *vias[-1], vias[0].branch, uri, ack.time, now)
    for known in dialog.acks:
        if known == fact:
            earlier = ack.time < known.time
            known.time = min(known.time, ack.time)
            return FACT if earlier else COPY
    if len(dialog.acks) >= MAX_REQUESTS:
        return COPY
    dialog.acks += (fact,)
    return EVIDENCE


def _note_bye(call: Call, bye: SipMessage, now: float) -> int:
    if bye.goes_no_further:
        return COPY
    from_caller, dialog = call.is_from_caller(bye), call.dialog(call.callee_tag(bye))
    fact = _find_bye(dialog, bye, from_caller)
    if not fact.seen:
        fact.arrived, fact.cseq = now, bye.cseq
        sent = dialog.sent[not from_caller]
        fact.late = any(cseq > bye.cseq and time <= bye.time for cseq, time in sent)
    if not fact.note_way(bye.way, bye.time):
        return COPY
    if not from_caller:
        dialog.confirmed = max(dialog.confirmed, bye.time)
    return UNANSWERED if call.begun and call.replied and not fact.status else EVIDENCE


def _note_bye_reply(call: Call, reply: SipMessage, now: float) -> int:
    from_caller, dialog = call.is_from_caller(reply), call.dialog(call.callee_tag(reply))
    bye = _find_bye(dialog, reply, from_caller)
    if bye.status in _CARRIED_OUT or bye.status == reply.status:
        return COPY
    if reply.status not in _CARRIED_OUT and reply.status not in _CHALLENGES:
        call.byes_refused += 1
    bye.status, bye.reply_time, bye.replied_at = reply.status, reply.time, now
    if from_caller and reply.status < 300:
        dialog.confirmed = max(dialog.confirmed, reply.time)
    return EVIDENCE


def _find_bye(dialog: Dialog, message: SipMessage, from_caller: bool) -> Bye:
    """The BYE that a copy or a reply belongs to, by CSeq and the branch of the lowest Via.

    A proxy that challenges for the caller counts the CSeq on by itself: the branch alone, then.
    """
    branch = message.branch
    ours = [x for x in dialog.byes if x.from_caller == from_caller]
    alike = [x for x in ours if x.branch == branch]
    exact = [x for x in alike if x.cseq == message.cseq]
    if exact:
        return exact[0]
    unpaired = [x for x in alike if bool(x.seen) == bool(message.status)]
    if unpaired:
        return min(unpaired, key=lambda bye: bye.status not in _CARRIED_OUT)
    if len(ours) >= MAX_REQUESTS:
        spare = next((x for x in ours if x.status not in _CARRIED_OUT), ours[0])
        dialog.byes = tuple(x for x in dialog.byes if x is not spare)
    bye = Bye(message.cseq, branch, from_caller)
    dialog.byes += (bye,)
    return bye


# What follows from it


class Begin(NamedTuple):
    """A call has begun: HEP time, "answer" or "ack", the attempt and the dialog that say so."""

    time: int
    reason: str
    attempt: Attempt
    dialog: Dialog


class End(NamedTuple):
    """A call, or one of its dialogs, has ended: HEP time, and what says so."""

    time: int
    reason: str


class Verdict(NamedTuple):
    """What follows from the facts of a call: its state, what is to be reported, what comes next.

    ``due`` is when to judge again if nothing comes, in seconds of the monotonic clock; ``over``
    says that nothing is waited for any more: the call is to be forgotten.
    """

    state: str
    begin: Begin | None
    end: End | None
    due: float
    over: bool = False


def judge(call: Call, now: float, settings: Settings, closing: bool = False) -> Verdict:
    """What follows from the facts of a call, and from what was reported, at this moment.

    ``closing`` says that nothing more will come: what waits for a message is decided.
    """
    if call.ended_at:
        if not call.charged:
            due = call.heard + LINGER
        else:
            known = settings.max_call_duration if call.went_on else 0.0
            due = call.ended_at + max(known, REMEMBERED)
        return Verdict(ENDED, None, None, due, now >= due)
    if call.begun_at:
        end, due = _judge_end(call, now, settings, closing)
        return Verdict(ENDED if end else ANSWERED, None, end, due)
    attempts = [attempt for attempt in call.attempts if attempt.copies]
    if not attempts:
        return _judge_orphan(call, now, settings, closing)
    begin, due = _judge_begin(call, attempts, now, settings, closing)
    if begin is not None:
        # Without a BYE it does not end sooner.
        return Verdict(ANSWERED, begin, None, now + min(LINGER, settings.max_call_duration))
    acks = list(call.acks)
    refused = all(attempt.refused(acks) for attempt in attempts)
    # A caller may acknowledge a refusal that there never was, and let it ring.
    certain = refused and all(attempt.refusals for attempt in attempts)
    gone = call.heard + (LINGER if certain else settings.invite_timeout)
    return Verdict(FAILED if refused else TRYING, None, None, min(due, gone), now >= gone)


def _judge_orphan(call: Call, now: float, settings: Settings, closing: bool) -> Verdict:
    """What to make of messages without an INVITE: a BYE may end a call that it is tied to."""
    settled = gone = call.heard + settings.reorder_window
    end, due = None, inf
    for dialog in call.dialogs if call.ties else ():
        over, later = _judge_byes(call, dialog, now, settings, closing)
        end, due = min(filter(None, (end, over)), default=None), min(due, later)
    if due < inf:
        gone = max(gone, due)
    # Only then is it clear whether the mirror shows answers.
    end = end if now >= settled or closing else None
    return Verdict(ORPHAN, None, end, min(due, gone), now >= gone)


def _judge_begin(
    call: Call, attempts: list[Attempt], now: float, settings: Settings, closing: bool
) -> tuple[Begin | None, float]:
    """The earliest certain evidence that the call was answered, and when there may be more."""
    earliest: Begin | None = None
    due = inf
    for dialog in call.dialogs:
        if dialog.answered:
            begin, certain = _begin_of_answer(call, dialog, attempts, settings)
        else:
            begin, certain = _begin_of_acks(call, dialog, attempts, settings)
        if begin is None:
            continue
        if certain > now and not closing:
            due = min(due, certain)
        elif earliest is None or begin.time < earliest.time:
            earliest = begin
    return earliest, due


def _begin_of_answer(
    call: Call, dialog: Dialog, attempts: list[Attempt], settings: Settings
) -> tuple[Begin | None, float]:
    """Rules 6, 9 and 14: a 2xx, and from when on that is certain."""
    if dialog.unacknowledged or (dialog.byes and _is_void(call, dialog, dialog.answered)):
        return None, inf
    time, reason = dialog.answered, "answer"
    if settings.begin_on == "ack":
        time, reason = dialog.acked, "ack"
    if not time:
        return None, inf
    attempt = call.attempt_of(dialog)
    if attempt is not None and attempt.copies:
        # Of an attempt that was refused, an answer of another branch may be to one on its way.
        certain = not attempt.refusals or attempt.branch == dialog.branch
        at = -inf if certain else dialog.arrived + settings.reorder_window
        return Begin(time, reason, attempt, dialog), at
    older = [attempt for attempt in attempts if attempt.cseq <= dialog.cseq]
    if not older:
        return None, inf
    latest = max(older, key=attrgetter("cseq", "time"))
    return Begin(time, reason, latest, dialog), dialog.arrived + settings.reorder_window


def _begin_of_acks(
    call: Call, dialog: Dialog, attempts: list[Attempt], settings: Settings
) -> tuple[Begin | None, float]:
    """Rule 7: an ACK of a dialog whose 2xx was not seen."""
    for ack in sorted(dialog.acks, key=attrgetter("time")):
        attempt, says = _read_ack(call, ack, attempts)
        if attempt is None or says == "refusal" or _is_void(call, dialog, ack.time):
            continue
        begin = Begin(ack.time, "ack", attempt, dialog)
        if call.replied or says == "doubtful":
            # What never rang, where replies are mirrored, the proxy refused itself.
            carried = bool(attempt.rang) or not call.replied
            if carried and not attempt.refusals and _is_followed(call, dialog, ack):
                return begin, -inf
        elif says == "answer" and ack.time >= attempt.time:
            return begin, -inf
        else:
            return begin, ack.arrived + settings.reorder_window
    return None, inf


def _read_ack(call: Call, ack: Ack, attempts: list[Attempt]) -> tuple[Attempt | None, str]:
    """Which attempt an ACK belongs to, and whether it looks like one to a 2xx.

    An ACK to a non-2xx has branch and Request-URI of its INVITE (RFC 3261 17.1.1.3); one to a 2xx
    is a new transaction of the caller to the callee's Contact (13.2.2.4). Some user agents use the
    branch of the INVITE again for a 2xx, so that only the URI tells. One of another hop may be a
    proxy's own ACK to a refusal, whose INVITE copy is still on its way: "answer later".
    """
    same = [attempt for attempt in attempts if attempt.cseq == ack.cseq]
    if not same:
        return None, ""
    for attempt in same:
        copy = attempt.copy(ack.top)
        if copy is not None:
            if ack.uri in copy.uris:
                return attempt, "refusal"
            return attempt, "doubtful" if 0 < attempt.cancelled < ack.time else "answer"
    attempt = call.attempt_of(ack) or same[-1]
    if not attempt.copies:
        # Of an INVITE that was lost, or is on its way.
        return None, ""
    # The copy that a proxy sent to the callee's Contact has the URI of an ACK to a 2xx.
    own = [copy for copy in attempt.copies if not copy.below] or attempt.copies
    if 0 < attempt.cancelled < ack.time or any(ack.uri in copy.uris for copy in own):
        return attempt, "doubtful"
    known = any(ack.branch == copy.branch or ack.branch in copy.below for copy in attempt.copies)
    return attempt, "answer" if not known and ack.sent_by == attempt.caller else "answer later"


def _is_followed(call: Call, dialog: Dialog, ack: Ack) -> bool:
    """Whether something came that only an answered call has (rule 7).

    A retry of the INVITE shows that a caller's ACK was to a refusal; then, and where replies are
    mirrored, only the callee's own word counts.
    """
    if dialog.confirmed >= ack.time:
        return True
    retried = any(x.cseq > ack.cseq and x.time > ack.time for x in call.attempts)
    if call.replied or retried:
        return False
    byes = any(time >= ack.time for bye in dialog.byes for _, time in bye.seen)
    return byes or dialog.alive >= ack.time


def _is_void(call: Call, dialog: Dialog, answered: int) -> bool:
    """Rule 14: whether a BYE had ended the early dialog before its answer."""
    early = [bye for bye in dialog.byes if bye.seen and bye.time < answered]
    if call.replied:
        return any(200 <= bye.status < 300 for bye in early)
    later = any(bye.seen and bye.time >= answered for bye in dialog.byes)
    return bool(early) and not later and dialog.alive < answered


def _judge_end(
    call: Call, now: float, settings: Settings, closing: bool
) -> tuple[End | None, float]:
    """Rules 11 to 17: when a call that was begun has ended, and when there may be more."""
    window = 0.0 if closing else settings.reorder_window
    # A caller who holds back an ACK for some seconds may still talk on in that dialog.
    patience = 0.0 if closing else LINGER + window
    settled, deadline = call.begun_at + window, call.begun_at + settings.max_call_duration
    end: End | None = None
    due, going = deadline, False
    for dialog in _counting(call, now - patience):
        over, certain = _judge_dialog(call, dialog, now, settings, closing)
        due = min(due, certain)
        if over is None:
            going = True
            if not dialog.acked and now < dialog.arrived + patience:
                # From then on it does not count where another one was acknowledged.
                due = min(due, dialog.arrived + patience)
        elif end is None or over > end:
            end = over
    if going:
        end = None
    if call.tied_end and (end is None or call.tied_end < end.time):
        end = End(call.tied_end, "bye_tied")
    if end is None and now >= deadline:
        end = End(call.begun + round(settings.max_call_duration * 1_000_000), "deadline")
        settled = now
    if end is None or now < settled:
        return None, due if end is None else min(due, settled)
    time = end.time
    if end.reason in ("deadline", "session") and settings.expired_call_end == "last-seen":
        time = max(dialog.alive for dialog in call.dialogs)
    # Rule 18: clocks differ.
    return End(max(time, call.begun), end.reason), due


def _counting(call: Call, long_ago: float) -> Sequence[Dialog]:
    """Rule 11: the answered dialogs; once one of them was acknowledged, those that were.

    One that was answered just now counts as well, for its ACK may be on its way.
    """
    if len(call.dialogs) == 1:
        return call.dialogs
    answered = []
    attempts = [attempt for attempt in call.attempts if attempt.copies]
    for dialog in call.dialogs:
        if dialog.answered and not _is_void(call, dialog, dialog.answered):
            answered.append(dialog)
        elif dialog.acks and not call.replied:
            said = [_read_ack(call, ack, attempts)[1] for ack in dialog.acks]
            if "answer" in said or "answer later" in said:
                answered.append(dialog)
    if any(dialog.acked for dialog in answered):
        return [x for x in answered if x.acked or x.acks or x.arrived > long_ago]
    return answered or [x for x in call.dialogs if x.answered]


def _judge_dialog(
    call: Call, dialog: Dialog, now: float, settings: Settings, closing: bool
) -> tuple[End | None, float]:
    """When one answered dialog has ended, and when there may be more."""
    if dialog.unacknowledged:
        certain = dialog.arrived + LINGER + settings.reorder_window
        over = now >= certain or closing
        return (End(call.begun, "unacknowledged"), inf) if over else (None, certain)
    end, due = None, inf
    if dialog.byes:
        end, due = _judge_byes(call, dialog, now, settings, closing)
    if end is None and dialog.session:
        # Rule 16.
        deadline = dialog.refreshed_at + dialog.session + SESSION_GRACE
        if now >= deadline:
            return End(dialog.refreshed + dialog.session * 1_000_000, "session"), inf
        due = min(due, deadline)
    return end, due


def _judge_byes(
    call: Call, dialog: Dialog, now: float, settings: Settings, closing: bool
) -> tuple[End | None, float]:
    """Rules 12 and 13: the first BYE of a dialog that was carried out, if that is certain."""
    first: End | None = None
    earlier, due = inf, inf
    for bye in dialog.byes:
        end, certain = _judge_bye(call, dialog, bye, settings)
        if end is None:
            continue
        if certain > now and not closing:
            due = min(due, certain)
            if end.reason != "bye_unanswered":
                earlier = min(earlier, end.time)
        elif first is None or end.time < first.time:
            first = end
    # What was carried out before is certain soon.
    return (first if first is not None and first.time <= earlier else None), due


def _judge_bye(
    call: Call, dialog: Dialog, bye: Bye, settings: Settings
) -> tuple[End | None, float]:
    """What one BYE says, and from when on that is certain; None where it was not carried out."""
    confirmed = 200 <= bye.status < 300
    # Of a dialog that nobody saw begin, only a callee that knows it can confirm the end.
    carried_out = bye.status in _CARRIED_OUT if call.begun_at else confirmed
    if not bye.seen:
        if carried_out:
            return End(bye.reply_time, "bye_reply"), bye.replied_at + settings.reorder_window
        return None, inf
    out_of_order = bye.late or (bye.from_caller and bye.cseq < dialog.cseq)
    # Before the answer it ended an early dialog, or nothing (rule 14).
    overdue = settings.reorder_window if call.replied and not bye.status else 0.0
    early = bye.time < dialog.answered and bye.arrived < call.begun_at + overdue
    if early and not confirmed:
        return None, inf
    if confirmed or (carried_out and not out_of_order):
        # Where a CSeq was left out, the BYE that was challenged before may be on its way.
        gap = dialog.highest(bye.from_caller) < bye.cseq - 1
        certain = bye.arrived + settings.reorder_window if gap else -inf
        return End(_first_try(dialog, bye), "bye"), certain
    if bye.status:
        return None, inf
    if not call.replied:
        return (None, inf) if out_of_order else (End(bye.time, "bye"), -inf)
    if settings.unanswered_bye == "ignore" or dialog.alive > bye.time:
        return None, inf
    return End(bye.time, "bye_unanswered"), bye.arrived + LINGER


def _first_try(dialog: Dialog, bye: Bye) -> int:
    """HEP time of a BYE, or of the one before that was challenged and that it repeats."""
    time = bye.time
    for other in dialog.byes:
        challenged = other.seen and other.status in _CHALLENGES
        if challenged and other.from_caller == bye.from_caller:
            time = min(time, other.time) if bye.time - CHALLENGE_RETRY <= other.time else time
    return time


# Room: call table

# Calls that one tick may judge: 7,000 a second, and the event loop is never held for over 10 ms.
MAX_EXPIRED_PER_TICK = 700
# Seconds. A deadline further ahead is looked at once in so long, so that a call that leaves earlier
# leaves nothing behind in the wheel for longer.
MAX_LOOK_AHEAD = 64.0
# Slots of the wheel a second: an event is late by less than that.
SLOTS = 10
# Notices (orphans, evictions) kept between two looks of the agent, which comes ten times a second.
MAX_NOTICES = 1_000
# Newest calls that are looked at to make room: among 32 there is one of a flood that brings a tenth
# of all calls but for once in thirty, and of one that brings half, always.
EVICTION_LOOK = 32
# Calls of one Call-ID: two phones may have the same one, a caller may send any number.
MAX_CALLS_PER_ID = 64
# Characters. RFC 3261 19.3 wants 32 bits of chance in a tag; shorter ones tie no two Call-IDs.
MIN_TAG = 6


@dataclass(slots=True)
class Notice:
    """Something that an operator should read; ``kind`` ends the name of the log line's event."""

    kind: str
    call_id: str
    fields: dict[str, Any]


# What may be seen of a call before its INVITE; other requests only tell of a call that is known.
_CALL_METHODS = frozenset(("INVITE", "ACK", "BYE", "CANCEL", "UPDATE"))


# What the journal keeps of a call

# Seconds of the monotonic clock, which starts anew with the machine.
_CLOCKS = ("arrived", "refreshed_at", "replied_at", "heard", "entered", "begun_at", "ended_at")
# What the table knows better when it takes a call back; the last fields of a call.
_TABLES_OWN = ("row", "due", "slot")
_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (Ack, Attempt, Bye, Call, Dialog, Identity, InviteCopy, Told)
}
_VALUES: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    record: attrgetter(*(x.name for x in fields(record) if x.name not in _TABLES_OWN))
    for record in _RECORDS.values()
}


def _to_json(value: Any) -> dict[str, Any]:
    """What JSON has no word for as an object of one member: its type, and what it is made of."""
    kind = type(value)
    values = _VALUES.get(kind)
    if values is not None:
        return {kind.__name__: values(value)}
    if kind is Route:
        return {"Route": value.packed}
    if kind is SipMessage:
        return {"SipMessage": (value.head, value.time)}
    return {"set": list(value)} if kind is set else {"bytes": value.hex()}


_pack_facts = json.JSONEncoder(separators=(",", ":"), default=_to_json).encode


def pack_call(call: Call, offset: float) -> str:
    """The facts of a call as a JSON text for `unpack_call`.

    ``offset`` in seconds is UNIX time less the monotonic clock, which starts anew with the machine.
    """
    return _pack_facts((offset, call))


def unpack_call(row: int, text: str, offset: float, routes: dict[str, Route]) -> Call:
    """What `pack_call` made a text of; ``routes`` keeps those seen, so that calls share them."""
    made: list[Any] = []

    def from_json(value: dict[str, Any]) -> Any:
        ((kind, values),) = value.items()
        if kind == "Route":
            return routes.get(values) or routes.setdefault(values, unpack_route(values))
        if kind == "SipMessage":
            return parse_sip(f"{values[0]}\n\r\n".encode("latin-1"), values[1])
        if kind in ("set", "bytes"):
            return set(values) if kind == "set" else bytes.fromhex(values)
        made.append(_RECORDS[kind](*map(_as_tuple, values)))
        return made[-1]

    then, call = json.loads(text, object_hook=from_json)
    for record in made:
        for clock in _CLOCKS:
            if getattr(record, clock, 0.0):
                setattr(record, clock, getattr(record, clock) + (then - offset))
    call.row = row
    return call  # type: ignore[no-any-return]


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _add_turned(dialog: Dialog, seen: Dialog) -> None:
    """Add what was seen of the callee before the INVITE, when it was taken for a caller."""
    byes = deepcopy(seen.byes)
    for bye in byes:
        bye.from_caller = False
        dialog.confirmed = max([dialog.confirmed, *(time for _, time in bye.seen)])
    dialog.byes += byes
    for cseq, at in seen.sent[0]:
        dialog.note_cseq(cseq, at, from_caller=False)
    if seen.sent[0]:
        dialog.confirmed = max(dialog.confirmed, seen.alive)
    dialog.alive = max(dialog.alive, seen.alive)
    if seen.refreshed > dialog.refreshed:
        dialog.refreshed, dialog.refreshed_at = seen.refreshed, seen.refreshed_at
    if seen.agreed > dialog.agreed:
        dialog.session, dialog.agreed = seen.session, seen.agreed


# Calls on one page, calls looked at in one go for it (about 1 ms), and seconds to look for them.
MAX_CALLS_PAGE = 1_000
CALLS_SLICE = 2_000
CALLS_SECONDS = 5.0


# Pairs of tenant and route that are counted by themselves, 1 kB each; further ones are "other". A
# route that is no more keeps its place until the agent ends. And characters of each name.
MAX_TENANT_ROUTES = 200
MAX_LABEL = 64
# A dot would be a part of its own, and statsd has a meaning for most other signs.
_ODD_IN_LABEL = re.compile(r"[^A-Za-z0-9_-]")
OTHER_LABELS = "other.other"


class Traffic:
    """Counts of the calls of one tenant and route, taken to the metrics now and then.

    ``running`` is how many there are; all others are what came about since they were last taken.
    """

    __slots__ = ("answered", "attempts", "charged", "ended", "ringing_ms", "running", "talk_ms")

    def __init__(self) -> None:
        self.attempts = self.answered = self.charged = self.ended = self.running = 0
        self.ringing_ms = self.talk_ms = 0

    def take(self) -> Iterator[tuple[str, int]]:
        """What came about since the last time, by name."""
        for name in self.__slots__:
            number = getattr(self, name)
            if number and name != "running":
                yield name, number
                setattr(self, name, 0)


class CallTable:
    """All calls that are being followed, by Call-ID, and one wheel of when to judge them again.

    ``handle`` and ``expire`` take ``now``, seconds of a monotonic clock, and return the events to
    report, in order. Should one raise, what it had brought about so far comes with the next call,
    so that nothing is lost by it. ``counts`` maps metric names to numbers since they were last
    taken. ``changed`` maps rows to what a journal has to write since it last looked, None for what
    is gone; it is None itself where there is no journal.
    """

    def __init__(self, settings: Settings, rules: Sequence[Rule]) -> None:
        self.settings = settings
        self.rules = rules
        self.counts: dict[str, int] = {}
        self.notices: list[Notice] = []
        self.changed: dict[int, Call | None] | None = None
        # By the labels of tenant and route, and by tenant and route themselves.
        self.traffic: dict[str, Traffic] = {}
        self._traffic: dict[tuple[str, str], Traffic] = {}
        self._serial = 0
        self._now = 0.0
        self._events: list[RatingEvent] = []
        self._calls: dict[str, tuple[Call, ...]] = {}
        self._sizes = dict.fromkeys(STATES, 0)
        # Calls of each sender: those of which no answer was seen, and the others.
        self._unanswered: dict[str, int] = {}
        self._answered: dict[str, int] = {}
        # The wheel: calls by the slot in which to look at them. An entry counts while its call
        # still has that slot.
        self._slots: dict[int, tuple[int, list[Call]]] = {}
        self._order: list[int] = []
        self._due: deque[Call] = deque()
        # What makes room first: calls that are over, in each state the longest first, and of the
        # others the newest.
        self._finished = {state: OrderedDict[Call, None]() for state in (ENDED, FAILED, ORPHAN)}
        self._newest: deque[Call] = deque(maxlen=EVICTION_LOOK)
        # Charged calls by tenant and transaction tag, where that is not the Call-ID; legs without
        # INVITE by what ties them.
        self._tags: dict[tuple[str, str], Call] = {}
        self._legs: dict[tuple[str, str], list[Call]] = {}
        # Running calls by From tag, or how many have it: see `_tie_tags`.
        self._from_tags: dict[str, Call | int] = {}

    @property
    def rules(self) -> Sequence[Rule]:
        """The routes; they may be replaced at any time: an attempt keeps the one that it has."""
        return self._rules

    @rules.setter
    def rules(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._targets = any(rule.route.carrier_ip for rule in rules)

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def sizes(self) -> dict[str, int]:
        """The number of calls in each state."""
        return dict(self._sizes)

    def slices(self) -> Iterator[list[Call]]:
        """All calls, newest first, in lists of some CALLS_SLICE; calls may change between two."""
        call_ids = list(self._calls)
        for end in range(len(call_ids), 0, -CALLS_SLICE):
            part = call_ids[max(end - CALLS_SLICE, 0) : end]
            groups = (self._calls.get(call_id, ()) for call_id in reversed(part))
            yield [call for group in groups for call in reversed(group)]

    def knows(self, call_id: str) -> bool:
        """Whether the INVITE of a call with this Call-ID was seen."""
        return any(call.state != ORPHAN for call in self._calls.get(call_id, ()))

    def handle(self, sighting: Sighting, now: float) -> list[RatingEvent]:
        """Take in one message; return the events that it brings about."""
        self._now = now
        message = sighting.message
        if message.method == "INVITE" and not message.to_tag:
            self._handle_invite(sighting)
        else:
            for call in self._owners(sighting):
                # One may have made room for another.
                if call.slot >= 0:
                    self._note(call, message)
        events, self._events = self._events, []
        return events

    def expire(self, now: float, closing: bool = False) -> list[RatingEvent]:
        """Judge again what has waited long enough, MAX_EXPIRED_PER_TICK calls at most.

        ``closing`` decides all that waits for a message: there will be no other time.
        """
        self._now = now
        for calls in list(self._calls.values()) if closing else ():
            for call in calls:
                self._review(call, closing)
        slot = int(now * SLOTS)
        while self._order and self._order[0] <= slot:
            passed = heapq.heappop(self._order)
            self._due += [call for call in self._slots.pop(passed)[1] if call.slot == passed]
        # A call whose deadline is still ahead costs a tenth of one that is judged.
        budget = 10 * MAX_EXPIRED_PER_TICK
        while self._due and budget > 0:
            call = self._due.popleft()
            if not 0 < call.slot <= slot:
                continue
            call.slot = 0
            budget -= 1
            if call.due > now:
                self._queue(call, call.due)
            else:
                budget -= 9
                self._review(call)
        events, self._events = self._events, []
        return events

    def take_notices(self) -> list[Notice]:
        """What there was to tell since the last time."""
        notices, self.notices = self.notices, []
        return notices

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        self.counts[name] = self.counts.get(name, 0) + number

    def _traffic_of(self, route: Route) -> Traffic:
        key = route.tenant, route.name
        found = self._traffic.get(key)
        if found is None:
            labels = OTHER_LABELS
            if len(self._traffic) < MAX_TENANT_ROUTES:
                labels = ".".join(_ODD_IN_LABEL.sub("_", text[:MAX_LABEL]) or "_" for text in key)
            found = self.traffic.setdefault(labels, Traffic())
            if labels != OTHER_LABELS:
                self._traffic[key] = found
        return found

    def next_serial(self) -> int:
        """A number greater than all before, for a row or an event."""
        self._serial += 1
        return self._serial

    def restore(
        self, kept: Iterable[tuple[int, str]], serial: int, now: float, offset: float
    ) -> None:
        """Take back what a journal kept: (row, text of `pack_call`); ``serial`` is the last given.

        Running calls go on with what is left of their time. A session and a call that rings get a
        whole new interval, for what renews it may have passed unseen meanwhile; a session's end is
        still stamped by the refresh that was seen.
        """
        self._now, self._serial, self.changed = now, serial, {}
        routes: dict[str, Route] = {}
        senders: dict[str, str] = {}
        for row, text in kept:
            call = unpack_call(row, text, offset, routes)
            call.sender = senders.setdefault(call.sender, call.sender)
            # The clock may have been set back.
            for clock in ("heard", "entered", "begun_at", "ended_at"):
                setattr(call, clock, min(getattr(call, clock), now))
            if call.state == TRYING:
                call.heard = now
            for dialog in call.dialogs:
                dialog.refreshed_at = now if dialog.session else dialog.refreshed_at
            self._add(call)
            if call.begun_at and not call.ended_at:
                self._index(call)
                self._traffic_of(call.route).running += 1
            if call.charged:
                self._take_tag(call, call.transaction_tag)
            for tie in call.ties:
                self._legs.setdefault(tie, []).append(call)
            verdict = judge(call, now, self.settings)
            now_due = verdict.begin or verdict.end or verdict.over
            self._queue(call, now if now_due else verdict.due)

    # Which calls a message is of

    def _owners(self, sighting: Sighting) -> Sequence[Call]:
        """The calls that a message which is no initial INVITE belongs to; a new orphan for none."""
        message = sighting.message
        group = self._calls.get(message.call_id, ())
        owners: Sequence[Call] = group
        if len(group) != 1 or group[0].from_tag != message.from_tag or group[0].ended_at:
            owners = [call for call in group if call.concerns(message)]
        if not owners:
            if message.cseq_method not in _CALL_METHODS:
                return ()
            owners = [self._create(sighting)]
        if message.method == "BYE" and owners[0].state == ORPHAN and not owners[0].ties:
            self._tie_orphan(owners[0], sighting)
        return owners if len(owners) == 1 else self._pick(owners, message)

    @staticmethod
    def _pick(owners: Sequence[Call], message: SipMessage) -> Sequence[Call]:
        """Whose a message is of calls of one From tag, one after another or at one time."""
        dialogs = {call: call.find_dialog(call.callee_tag(message)) for call in owners}
        known = [call for call, dialog in dialogs.items() if dialog]
        # Before its answer a To tag is only what somebody wrote; the INVITE says more.
        sure = any(x.answered or not message.status for x in dialogs.values() if x)
        if message.cseq_method in ("INVITE", "ACK", "CANCEL") and not sure:
            # The CSeq alone is of several calls where their INVITEs differ in the branch only.
            invited = [x for x in owners if x.has_invite(message.cseq, message.branch)]
            same = [x for x in owners if x.attempt_of(message) or x.cseq == message.cseq]
            known = invited or known or same
        if known:
            return known
        running = [call for call in owners if not call.ended_at] or owners
        # Of a caller with more attempts than one call keeps, it is the latest call.
        return list({call.tenant: call for call in running}.values())

    def _tie_orphan(self, call: Call, sighting: Sighting) -> None:
        """What a BYE without an INVITE is tied by, as the routes have it (rule 17)."""
        ties: dict[tuple[str, str], None] = {}
        for route in [rule.route for rule in self.rules if rule.route.ties]:
            tag = transaction_tag(route, sighting)
            # Of one Call-ID are other calls, not legs: a BYE with other tags is none of theirs.
            if route.transaction_tag != "call-id" or tag != printable_id(call.call_id):
                ties[route.tenant, tag] = None
        self._tie_by(call, tuple(ties))

    def _tie_tags(self, call: Call) -> None:
        """Tie an orphan by the From tag of the one running call that has both its tags.

        A proxy that hides topology changes the Call-ID and leaves the tags as they are (rule 17).
        """
        for dialog in call.dialogs if not call.ties else ():
            for ours, theirs in ((call.from_tag, dialog.to_tag), (dialog.to_tag, call.from_tag)):
                running = self._tied_call(("", ours))
                long = min(len(ours), len(theirs)) >= MIN_TAG
                if long and dialog.byes and running is not None and running.find_dialog(theirs):
                    self._tie_by(call, (("", ours),))
                    return

    def _tie_by(self, call: Call, ties: tuple[tuple[str, str], ...]) -> None:
        call.ties = ties
        for tie in ties:
            self._legs.setdefault(tie, []).append(call)
            running = self._tied_call(tie)
            call.replied |= running is not None and running.replied

    def _tied_call(self, tie: tuple[str, str]) -> Call | None:
        """The charged call of a tenant and tag, or, without a tenant, the running one of a tag."""
        tenant, tag = tie
        for call in self._calls.get(tag, ()):
            if call.charged and (call.route.tenant, call.transaction_tag) == tie:
                return call
        found = self._tags.get(tie) if tenant else self._from_tags.get(tag)
        return found if isinstance(found, Call) else None

    def _split(self, call: Call, message: SipMessage) -> Call:
        """Where another attempt of a call that was begun is answered, that is another call.

        Or a caller could let an expensive call go on under the charge of a cheap one.
        """
        if message.status:
            answers = message.cseq_method == "INVITE" and 200 <= message.status < 300
        else:
            again = message.method == "ACK" and message.cseq == call.cseq
            answers = message.method in ("INVITE", "ACK") and not again
        if not answers or not call.is_from_caller(message):
            return call
        dialog, attempt = call.find_dialog(message.to_tag), call.attempt_of(message)
        if dialog is not None and (dialog.answered or dialog.acked):
            return call
        if attempt is None or call.is_answered(attempt) or call.is_answered(message):
            return call
        self._make_room(message)
        return self._part(call, (attempt,), (dialog,) if dialog else ())

    def _part(self, call: Call, attempts: Sequence[Attempt], dialogs: Sequence[Dialog]) -> Call:
        """A call of its own from attempts and dialogs of another one with the same tags."""
        other = Call(call.route, call_id=call.call_id, from_tag=call.from_tag)
        other.heard = other.entered = self._now
        other.capture_id, other.sender, other.tenant = call.capture_id, call.sender, call.tenant
        other.attempts, other.dialogs, other.replied = (*attempts,), (*dialogs,), call.replied
        call.attempts = tuple(x for x in call.attempts if x not in attempts)
        call.dialogs = tuple(x for x in call.dialogs if x not in dialogs)
        other.row = self.next_serial()
        self._traffic_of(call.route).attempts += 1
        self._add(other)
        if call.slot >= 0:
            self._touch(call)
        self._touch(other)
        return other

    def _handle_invite(self, sighting: Sighting) -> None:
        route = choose_route(self._rules, sighting)
        call = self._find_invited(sighting, route)
        if call is None:
            call = self._create(sighting, TRYING)
        elif call.ended_at:
            return
        if not call.tenant:
            call.route, call.tenant = route, route.tenant
            self._traffic_of(route).attempts += 1
            call.capture_id = sighting.packet.capture_id
            self._inherit(call)
        call.heard = self._now
        if note_invite(call, sighting, route, self.settings, self._targets):
            self._touch(call)
            if call.dialogs or call.state != TRYING:
                self._review(call)
            elif not call.slot:
                self._queue(call, self._now + self.settings.invite_timeout)

    def _find_invited(self, sighting: Sighting, route: Route) -> Call | None:
        """The call that an initial INVITE belongs to (rules 1, 2 and 18), None for a new one."""
        message = sighting.message
        capture_id, branch = sighting.packet.capture_id, message.branch
        invited = None
        for call in self._calls.get(message.call_id, ()):
            # A copy from the same capture agent is the same call even where its addresses match
            # another rule; from another agent it may be another tenant's charge for the call.
            ours = call.capture_id == capture_id or call.tenant == route.tenant or not call.tenant
            if call.from_tag != message.from_tag or not ours:
                continue
            if call.ended_at and message.time > call.ended:
                continue
            answered = call.is_answered(message)
            if answered and call.begun and message.time > call.begun + LINGER * 1_000_000:
                continue
            known = any(x.cseq == message.cseq and x.branch == branch for x in call.attempts)
            if known or call.ended_at or answered:
                return call
            if len(call.attempts) >= MAX_ATTEMPTS:
                acks = list(call.acks)
                spare = next((x for x in call.attempts if x.refused(acks)), None)
                call.attempts = tuple(x for x in call.attempts if x is not spare)
            if len(call.attempts) < MAX_ATTEMPTS:
                invited = call
        return invited

    def _inherit(self, call: Call) -> None:
        """Take over what was seen before its INVITE: from the callee, or in another tenant."""
        for other in self._calls[call.call_id]:
            if not other.tenant:
                for dialog in other.dialogs:
                    if dialog.to_tag == call.from_tag:
                        _add_turned(call.dialog(other.from_tag), dialog)
                        call.replied |= other.replied
            elif other.tenant != call.tenant and other.from_tag == call.from_tag:
                call.dialogs, call.replied = deepcopy(other.dialogs), other.replied
                call.attempts = deepcopy(other.attempts)
                for attempt in call.attempts:
                    attempt.copies, attempt.identity, attempt.further = (), None, ()
                    attempt.sent_to = attempt.answers = ()
                return

    def _create(self, sighting: Sighting, state: str = ORPHAN) -> Call:
        message = sighting.message
        self._make_room(message)
        call = Call(call_id=message.call_id, from_tag=message.from_tag, state=state)
        call.heard = call.entered = self._now
        call.row, call.sender = self.next_serial(), sighting.sender
        group = self._calls.get(message.call_id, ())
        call.replied = any(x.replied and x.from_tag == call.from_tag for x in group)
        self._add(call)
        return call

    def _add(self, call: Call) -> None:
        self._calls[call.call_id] = (*self._calls.get(call.call_id, ()), call)
        self._newest.append(call)
        self._tally(call, 1)

    def _index(self, call: Call) -> None:
        known = self._from_tags.get(call.from_tag)
        count = known + 1 if isinstance(known, int) else 2
        self._from_tags[call.from_tag] = call if known is None else count

    # What follows

    def _note(self, call: Call, message: SipMessage) -> None:
        if call.ended_at:
            self._note_ended(call, message)
            return
        if call.attempts and call.begun_at:
            call = self._split(call, message)
        refused = call.byes_refused
        if not call.begun_at:
            call.heard = self._now
        new = note(call, message, self._now)
        if new and self.changed is not None:
            self.changed[call.row] = call
        if call.byes_refused != refused and call.begun_at:
            self.count("calls.bye_refused")
            self._notice("bye_refused", call, {"status": message.status})
        # An orphan's time runs from its last message, and nothing else has queued it yet.
        if new == EVIDENCE or not call.slot:
            self._review(call)
        elif new == UNANSWERED:
            self._queue(call, min(call.due, self._now + LINGER))

    def _note_ended(self, call: Call, message: SipMessage) -> None:
        """What trails behind an end is a copy, unless nobody had answered that BYE (rule 12)."""
        call.heard = self._now
        if call.reason != "bye_unanswered" or not note(call, message, self._now):
            return
        self._touch(call)
        for dialog in call.dialogs:
            ends = [x.time for x in dialog.byes if x.seen and x.status in _CARRIED_OUT]
            if not call.went_on and max([dialog.alive, *ends]) > call.ended:
                call.went_on = True
                self.count("calls.went_on")
                self._notice("went_on", call, {"timestamp_reported": rfc3339(call.ended)})
            if ends and max(ends) > call.ended:
                self._notice("went_on", call, {"timestamp_end": rfc3339(max(ends))})
                call.dialogs = ()

    def _review(self, call: Call, closing: bool = False) -> None:
        """Compare what follows from the facts with what was reported; report the difference."""
        if call.slot < 0:
            return
        verdict = judge(call, self._now, self.settings, closing)
        if verdict.over and verdict.state == ORPHAN and not call.ties:
            self._tie_tags(call)
            verdict = judge(call, self._now, self.settings, closing)
        if verdict.begin is not None:
            self._begin(call, verdict.begin)
            if call.tied_end or any(dialog.byes for dialog in call.dialogs):
                verdict = judge(call, self._now, self.settings, closing)
        if verdict.end is not None:
            if verdict.state == ORPHAN:
                call.ended = verdict.end.time
                self._end_tied(call.ties, call.ended)
            else:
                self._end(call, verdict.end)
                verdict = judge(call, self._now, self.settings)
        if verdict.state != call.state:
            self._tally(call, -1)
            call.state, call.entered = verdict.state, self._now
            self._tally(call, 1)
        elif call.begun_at and not call.ended_at and call.attempts:
            self._settle(call)
        if verdict.over:
            self._leave(call)
        else:
            self._queue(call, verdict.due)

    def _queue(self, call: Call, due: float) -> None:
        call.due = due
        slot = int(min(due, self._now + MAX_LOOK_AHEAD) * SLOTS) + 1
        if 0 < call.slot <= slot:
            return
        if slot not in self._slots:
            self._slots[slot] = (slot, [])
            heapq.heappush(self._order, slot)
        # All calls of a slot share its number.
        call.slot, calls = self._slots[slot]
        calls.append(call)

    def _touch(self, call: Call) -> None:
        if self.changed is not None:
            self.changed[call.row] = call

    def _tally(self, call: Call, step: int) -> None:
        """Count a call in, with its state and its sender, or out before these change."""
        self._sizes[call.state] += step
        counts = self._answered if call.begun_at else self._unanswered
        counts[call.sender] = counts.get(call.sender, 0) + step
        if not counts[call.sender]:
            del counts[call.sender]
        finished = self._finished.get(call.state)
        if finished is not None:
            if step > 0:
                finished[call] = None
            else:
                finished.pop(call, None)

    def _settle(self, call: Call) -> None:
        """Forget what nothing depends on any more, once no ACK of a fork is waited for."""
        if self._now < call.begun_at + self.settings.reorder_window and not call.replied:
            return
        for dialog in _counting(call, self._now):
            if not dialog.answered and dialog.acks:
                dialog.answered = dialog.acked = min(ack.time for ack in dialog.acks)
            dialog.acks = ()
        rung = self._now - call.begun_at - self.settings.invite_timeout
        rung_out = call.begun + rung * 1_000_000
        others = [x for x in call.attempts if x.time > rung_out and not call.is_answered(x)]
        acks = list(call.acks) if others else []
        call.attempts = tuple([x for x in others if not x.refused(acks)])

    def _leave(self, call: Call) -> None:
        """The call is forgotten."""
        if call.state == TRYING:
            self.count("calls.expired.trying")
        elif call.state == FAILED:
            self.count("calls.failed")
        elif call.state == ORPHAN and not call.tenant and not call.ended:
            # Rule 19: the reorder window is over and no INVITE came.
            byes = [bye.time for dialog in call.dialogs for bye in dialog.byes if bye.seen]
            self.count("calls.orphaned" if byes else "messages.orphaned")
            if byes:
                self._notice("orphan", call, {"timestamp_end": rfc3339(min(byes))})
        self._tally(call, -1)
        call.slot = -1
        calls = tuple(other for other in self._calls[call.call_id] if other is not call)
        if calls:
            self._calls[call.call_id] = calls
        else:
            del self._calls[call.call_id]
        if call.charged:
            self._tags.pop((call.route.tenant, call.transaction_tag), None)
        for tie in call.ties:
            self._legs[tie].remove(call)
            if not self._legs[tie]:
                del self._legs[tie]
        if self.changed is not None:
            self.changed[call.row] = None

    def _notice(self, kind: str, call: Call, values: dict[str, Any]) -> None:
        if len(self.notices) < MAX_NOTICES:
            self.notices.append(Notice(kind, printable_id(call.call_id), values))

    # What is reported

    def _begin(self, call: Call, begin: Begin) -> None:
        identity, dialog = begin.attempt.identity, begin.dialog
        assert identity is not None
        self._touch(call)
        self._tally(call, -1)
        call.state, call.entered = ANSWERED, self._now
        call.begun, call.begun_at = begin.time, self._now
        self._tally(call, 1)
        call.route, call.transaction_tag = identity.route, identity.transaction_tag
        call.account_tag = identity.account_tag
        call.destination_account_tag = identity.destination_account_tag
        call.cseq, call.branch = begin.attempt.cseq, begin.attempt.branch
        self._index(call)
        if dialog.branch == call.branch:
            # One text for both: an open call is to be small.
            dialog.branch = call.branch
        if not dialog.answered:
            dialog.answered = dialog.repeated = dialog.acked = begin.time
            dialog.cseq, dialog.arrived = call.cseq, self._now
            dialog.refreshed, dialog.refreshed_at = begin.time, self._now
        traffic = self._traffic_of(call.route)
        traffic.running += 1
        traffic.answered += 1
        traffic.ringing_ms += max(begin.time - begin.attempt.time, 0) // 1_000
        self._settle(call)
        if not call.rated:
            ignored = call.route.action == "ignore"
            self.count("calls.unrated.ignored" if ignored else "calls.unrated.no_account")
            return
        self._claim_tag(call)
        if call.tied:
            self.count("calls.unrated.tied")
            return
        call.charged = True
        self.count("calls.begun")
        traffic.charged += 1
        body = {
            "source": identity.source,
            "source_ip": identity.source_ip,
            "destination": identity.destination,
            "carrier_ip": begin.attempt.carrier_ip if call.route.carrier_ip else "",
            "product_tag": call.route.product_tag,
            "tags": list(call.route.tags),
            "timestamp_begin": rfc3339(begin.time),
        }
        self._report(call, "begin", begin.time, begin.reason, body)
        tie = call.route.tenant, call.transaction_tag
        for leg in self._legs.get(tie, ()):
            if leg.ended:
                self._end_tied([tie], leg.ended)

    def _claim_tag(self, call: Call) -> None:
        """Rules 2 and 17: tied legs are charged once; others have transaction tags that differ."""
        tenant, tag = call.route.tenant, call.transaction_tag
        other = self._tied_call((tenant, tag))
        if other is not None:
            routes = (call.route, other.route)
            by_call_id = any(route.transaction_tag == "call-id" for route in routes)
            tying = all(route.ties for route in routes)
            # A part of the Call-ID ties legs with different Call-IDs.
            tying = tying and not (by_call_id and call.call_id == other.call_id)
            if tying and (not other.ended_at or call.begun <= other.ended):
                call.tied = True
                return
            # No Call-ID holds a #, and a row is numbered once.
            tag = f"{tag}#{printable_id(call.from_tag)[:MAX_TEXT]}"
            if self._tied_call((tenant, tag)) is not None:
                tag = f"{tag}#{call.row}"
        self._take_tag(call, tag)

    def _take_tag(self, call: Call, tag: str) -> None:
        call.transaction_tag = tag
        if tag != call.call_id:
            self._tags[call.route.tenant, tag] = call

    def _end(self, call: Call, end: End) -> None:
        call.ended, call.ended_at, call.reason = end.time, self._now, end.reason
        traffic = self._traffic_of(call.route)
        traffic.running -= 1
        traffic.ended += 1
        traffic.talk_ms += max(end.time - call.begun, 0) // 1_000
        self._touch(call)
        known = self._from_tags.pop(call.from_tag)
        if isinstance(known, int) and known > 1:
            self._from_tags[call.from_tag] = known - 1
        acks = list(call.acks)
        others = [x for x in call.attempts if x.copies and not call.is_answered(x)]
        ringing = [x for x in others if (x.rang or not call.replied) and not x.refused(acks)]
        if ringing and len(self) < self.settings.max_calls:
            self._review(self._part(call, ringing, ()))
        call.attempts = ()
        if end.reason != "bye_unanswered":
            call.dialogs = ()
        stamp = {"timestamp_end": rfc3339(end.time)}
        if end.reason == "evicted":
            self._notice("evicted", call, {**stamp, "reason": end.reason})
        elif end.reason in ("deadline", "session"):
            self.count("calls.expired.answered")
            self._notice("expired", call, {**stamp, "reason": end.reason})
        if call.charged:
            self.count("calls.ended")
            self.count(f"calls.end.{end.reason}")
            self._report(call, "end", end.time, end.reason, stamp)
        elif call.tied:
            self._end_tied([(call.route.tenant, call.transaction_tag)], end.time)
        call.account_tag = call.destination_account_tag = ""

    def _end_tied(self, ties: Iterable[tuple[str, str]], time: int) -> None:
        """The running calls that a leg which ended is tied to end with it (rule 17)."""
        for tie in ties:
            call = self._tied_call(tie)
            if call is not None and call.begun_at and not call.ended_at:
                call.tied_end = min(call.tied_end or time, time)
                self._touch(call)
                self._review(call)

    def _report(self, call: Call, kind: str, time: int, reason: str, body: dict[str, Any]) -> None:
        route = call.route
        content = {
            "tenant": route.tenant,
            "transaction_tag": call.transaction_tag,
            "account_tag": call.account_tag,
            "destination_account_tag": call.destination_account_tag,
            **body,
        }
        # An empty tag is left out: some of the API's answers to "" are ok with nothing stored.
        content = {name: value for name, value in content.items() if value}
        event = RatingEvent(
            kind=kind,
            call_id=printable_id(call.call_id),
            tenant=route.tenant,
            transaction_tag=call.transaction_tag,
            account_tag=call.account_tag,
            destination_account_tag=call.destination_account_tag,
            time=time,
            reason=reason,
            api_url=route.rating_api_url,
            body=_compact_json(content).encode(),
            row=call.row,
            serial=self.next_serial(),
        )
        self._events.append(event)

    # What makes room

    def _make_room(self, message: SipMessage) -> None:
        """For one more call of this Call-ID; an attempt that outlives its call came without."""
        for _ in range(min(len(self) - self.settings.max_calls + 1, 2)):
            self._evict(self._least(), message.time)
        group = self._calls.get(message.call_id, ())
        if len(group) >= MAX_CALLS_PER_ID:
            self._evict(min(group, key=self._worth), message.time)

    def _least(self) -> Call:
        """Who makes room for one call: what is over goes first, an answered call last.

        A sender with more calls that nobody answered than others, as a flood of INVITEs leaves
        them, gives up its own before those of others; and an answered call of a sender with more
        than half of all goes before what others let ring.
        """

        def excess(call: Call) -> int:
            return max(unanswered.get(call.sender, 0) - answered.get(call.sender, 0), 0)

        def is_large(call: Call) -> bool:
            share = unanswered.get(call.sender, 0) + answered.get(call.sender, 0)
            return share > self.settings.max_calls / 2

        unanswered, answered = self._unanswered, self._answered
        longest = [
            next((x for x in calls if x.slot > 0), None) for calls in self._finished.values()
        ]
        # Those that are due next were looked at least recently, or so.
        oldest = (call for slot in sorted(self._order)[:4] for call in self._slots[slot][1])
        sample = [*islice(oldest, EVICTION_LOOK), *reversed(self._newest)]
        sample = [call for call in sample if call.slot > 0]
        others = [call for call in sample if call.state != ANSWERED]
        first = max((*filter(None, longest), *others), key=excess, default=None)
        if first is not None and (first.state != TRYING or is_large(first)):
            return first
        talking = [call for call in sample if call.state == ANSWERED]
        large = (call for call in reversed(talking) if is_large(call))
        return next(large, first) or talking[0]

    @staticmethod
    def _worth(call: Call) -> int:
        """Who stays of the calls of one Call-ID: a caller may send INVITEs that nobody carries."""
        if call.begun_at:
            return 1 if call.ended_at else 3
        return 2 if call.replied and call.state == TRYING else 0

    def _evict(self, call: Call, time: int) -> None:
        self.count(f"calls.evicted.{call.state}")
        if call.state == ANSWERED:
            last = max((dialog.alive for dialog in call.dialogs), default=0)
            self._end(call, End(max(time, last, call.begun), "evicted"))
        self._leave(call)


# Room: call records
#
# What became of each call, charged or not: one record when it is over. The call table itself knows
# no more than it needs to charge; who wants records takes a `RecordedTable` in its place.

CHARGED, REFUSED, CANCELLED, NOT_ANSWERED = "charged", "refused", "cancelled", "not answered"
NO_ACCOUNT, IGNORED, TIED, MISSING = "no account", "ignored by route", "tied", "evidence missing"
# Why a call is charged or not. TIED is a leg of a call that another leg is charged for, MISSING one
# of which too little was seen to tell.
OUTCOMES = (CHARGED, REFUSED, CANCELLED, NOT_ANSWERED, NO_ACCOUNT, IGNORED, TIED, MISSING)
# Attempts of one Call-ID of which the replies are kept, 0.4 kB each: those of a call and of some
# calls after it.
MAX_HEARD = 64
# Characters of a reason phrase that are kept; RFC 3261 21 has none longer than 40.
MAX_PHRASE = 100

_PHRASE = re.compile(r"SIP/2\.0[ \t]+\d+[ \t]+([^\r\n]*)", re.I)


class CallRecord(NamedTuple):
    """One call that is over, or that was followed until a recording ended.

    Times are UNIX time in microseconds, 0 for never: ``invited`` of its first INVITE, ``ringing``
    of its first 18x, ``begun`` and ``ended`` as they are reported. ``begun_by`` and ``ended_by``
    are the reasons of the two events ("answer", "ack", "bye", "deadline", ...), "" where there was
    none. ``hung_up`` is CALLER or CALLEE where a BYE ended it. ``status`` and ``phrase`` are of the
    last final reply to its INVITE, 0 and "" where none was mirrored. ``outcome`` is one of
    OUTCOMES. ``row`` numbers the calls of one table, and is that of the events.
    """

    call_id: str
    from_tag: str
    to_tag: str
    tenant: str
    route: str
    transaction_tag: str
    account_tag: str
    destination_account_tag: str
    source: str
    source_ip: str
    destination: str
    sender: str
    capture_id: int
    invited: int
    ringing: int
    begun: int
    ended: int
    begun_by: str
    ended_by: str
    hung_up: str
    status: int
    phrase: str
    outcome: str
    row: int

    @property
    def charged(self) -> bool:
        """Whether the rating API is told of it."""
        return self.outcome == CHARGED

    @property
    def seconds(self) -> float:
        """What is charged, between the time stamps as the API gets them; 0 while it runs."""
        return max(self.ended // 1000 - self.begun // 1000, 0) / 1000 if self.ended else 0.0


def record_fields(record: CallRecord) -> dict[str, Any]:
    """A record as `call_records` has it (docs/call-records.md), without what delivery adds."""

    def stamp(time: int) -> str | None:
        return rfc3339(time) if time else None

    return {
        "call_id": record.call_id,
        "from_tag": record.from_tag,
        "to_tag": record.to_tag,
        "tenant": record.tenant,
        "route": record.route,
        "transaction_tag": record.transaction_tag,
        "account_tag": record.account_tag,
        "destination_account_tag": record.destination_account_tag,
        "source": record.source,
        "source_ip": record.source_ip,
        "destination": record.destination,
        "sender": record.sender,
        "capture_id": record.capture_id,
        "invited": stamp(record.invited),
        "ringing": stamp(record.ringing),
        "answered": stamp(record.begun),
        "ended": stamp(record.ended),
        "seconds": record.seconds,
        "status": record.status or None,
        "reason": record.phrase,
        "begun_by": record.begun_by,
        "ended_by": record.ended_by,
        "hung_up": record.hung_up,
        "charged": record.charged,
        "outcome": record.outcome,
    }


class Heard:
    """What the replies to one INVITE transaction said: HEP time of the first 18x, the final reply.

    Of several final replies, as a fork has them, the one nearest to the caller counts, and of these
    the last: it has the fewest ``hops``.
    """

    __slots__ = ("branch", "cseq", "hops", "phrase", "ringing", "status")

    def __init__(self, cseq: int = 0, branch: str = "") -> None:
        self.cseq, self.branch = cseq, branch
        self.ringing = self.status = 0
        self.hops = MAX_VIAS + 1
        self.phrase = ""

    def note(self, reply: SipMessage) -> None:
        """Take in a reply to an INVITE."""
        if reply.status < 200:
            self.ringing = min(self.ringing or reply.time, reply.time)
            return
        # Near enough where a quoted comma stands in a Via.
        hops = len(",".join(reply.headers.get("via", ())).split(","))
        if hops <= self.hops:
            self.hops, self.status = hops, reply.status
            phrase = _PHRASE.match(reply.head)
            self.phrase = phrase[1].strip()[:MAX_PHRASE] if phrase else ""


_HEARD = attrgetter(*Heard.__slots__)


def outcome(call: Call, settings: Settings, status: int = 0) -> str:
    """Why a call is charged or not, from its facts: one of OUTCOMES.

    ``status`` is that of the final reply which the caller got, 0 where none was seen: the facts say
    only that there was one.
    """
    if call.begun_at:
        if call.charged:
            return CHARGED
        if call.tied:
            return TIED
        return IGNORED if call.route.action == "ignore" else NO_ACCOUNT
    attempts = [attempt for attempt in call.attempts if attempt.copies]
    if not attempts:
        return MISSING
    answered = [dialog for dialog in call.dialogs if dialog.answered]
    void = [x for x in answered if not x.unacknowledged and _is_void(call, x, x.answered)]
    if void or status == 487 or (not answered and any(x.cancelled for x in call.attempts)):
        return CANCELLED
    if answered:
        # A 2xx that nobody acknowledged, or with `begin_on: ack` one whose ACK was not seen.
        unheard = all(dialog.unacknowledged for dialog in answered)
        return NOT_ANSWERED if unheard else MISSING
    if status == 408:
        return NOT_ANSWERED
    acks = list(call.acks)
    if status >= 300 or all(attempt.refused(acks) for attempt in attempts):
        return REFUSED
    talked = any(dialog.byes or dialog.acks for dialog in call.dialogs)
    return MISSING if talked else NOT_ANSWERED


def _who_hung_up(call: Call, end: End) -> tuple[str, str]:
    """The side whose BYE ended a call, and the To tag of that dialog; "" where none did."""
    for dialog in call.dialogs:
        for bye in dialog.byes:
            times = [at for _, at in bye.seen] or [bye.reply_time]
            if end.time in times:
                return CALLER if bye.from_caller else CALLEE, dialog.to_tag
    return "", next((x.to_tag for x in call.dialogs if x.answered), "")


class RecordedTable(CallTable):
    """A call table that also says what became of each call: ``records``, for who takes them.

    A call that was begun gets its record when it ends, any other when it is forgotten; what is no
    call, such as a stray reply, gets none. `unfinished` gives those of the calls that are left.
    """

    def __init__(self, settings: Settings, rules: Sequence[Rule]) -> None:
        super().__init__(settings, rules)
        self.records: list[CallRecord] = []
        # By Call-ID: replies by From tag, CSeq and branch.
        self._heard: dict[str, dict[tuple[str, int, str], Heard]] = {}

    def handle(self, sighting: Sighting, now: float) -> list[RatingEvent]:
        """Take in one message; return the events that it brings about."""
        message = sighting.message
        # A 100 says nothing of the call (RFC 3261 8.2.6.1).
        replied = message.status > 100 and message.cseq_method == "INVITE"
        if replied:
            self._hear(message)
        events = super().handle(sighting, now)
        if message.call_id not in self._calls:
            self._heard.pop(message.call_id, None)
        elif replied and self.changed is not None:
            self._keep_heard(message)
        return events

    def restore(
        self, kept: Iterable[tuple[int, str]], serial: int, now: float, offset: float
    ) -> None:
        """Take back what a journal kept, as `CallTable.restore` says."""
        super().restore(kept, serial, now, offset)
        for call in chain.from_iterable(self._calls.values()):
            if call.told is not None and call.told.hops:
                heard = Heard()
                for name in Heard.__slots__:
                    setattr(heard, name, getattr(call.told, name))
                key = (call.from_tag, heard.cseq, heard.branch)
                self._heard.setdefault(call.call_id, {})[key] = heard

    def take_records(self) -> list[CallRecord]:
        """The calls that are over since the last time."""
        records, self.records = self.records, []
        return records

    def unfinished(self) -> Iterator[CallRecord]:
        """The calls that are still followed and have no record yet, in order of their first."""
        calls = [call for part in self.slices() for call in part if not call.ended_at]
        for call in sorted(calls, key=attrgetter("row")):
            if call.begun_at:
                yield self._record(call, End(0, ""))
            elif self._is_call(call):
                yield self._record(call)

    def due(self) -> float:
        """When to call `expire` next, in seconds of the monotonic clock; inf for never."""
        if self._due:
            return self._now
        return self._order[0] / SLOTS if self._order else inf

    def _hear(self, reply: SipMessage) -> None:
        replies = self._heard.setdefault(reply.call_id, {})
        key = (reply.from_tag, reply.cseq, reply.branch)
        if key not in replies:
            if len(replies) >= MAX_HEARD:
                del replies[next(iter(replies))]
            replies[key] = Heard(reply.cseq, reply.branch)
        replies[key].note(reply)

    def _keep_heard(self, reply: SipMessage) -> None:
        """Put what the replies said where a restart finds it."""
        for call in self._calls[reply.call_id]:
            if call.from_tag == reply.from_tag and not call.ended_at:
                heard = self._heard_of(call)
                call.told = call.told or Told()
                if _HEARD(heard) != _HEARD(call.told):
                    for name in Heard.__slots__:
                        setattr(call.told, name, getattr(heard, name))
                    self._touch(call)

    def _heard_of(self, call: Call) -> Heard:
        """What the replies to the answered attempt said, or to the last one of all."""
        replies = self._heard.get(call.call_id, {})
        if call.begun_at:
            usual = replies.get((call.from_tag, call.cseq, call.branch))
            if usual is not None and usual.status:
                return usual
        tried = [(x.cseq, x.branch) for x in call.attempts if x.copies]
        tried = [(call.cseq, call.branch)] if call.begun_at else tried[::-1]
        ours = {key[1:]: heard for key, heard in replies.items() if key[0] == call.from_tag}
        found = [ours[key] for key in tried if key in ours]
        if not found:
            # A proxy on the way hides the lowest branch.
            numbers = {cseq for cseq, _ in tried}
            found = [heard for (cseq, _), heard in ours.items() if cseq in numbers][::-1]
        return next((x for x in found if x.status), found[0] if found else Heard())

    def _begin(self, call: Call, begin: Begin) -> None:
        identity = begin.attempt.identity
        assert identity is not None
        told = call.told or Told()
        told.source, told.source_ip = identity.source, identity.source_ip
        told.destination, told.begun_by = identity.destination, begin.reason
        told.invited = min(x.time for x in (*call.attempts, begin.attempt) if x.copies)
        # Legs that are tied may end it at once.
        call.told = told
        super()._begin(call, begin)

    def _end(self, call: Call, end: End) -> None:
        # Afterwards the call is no more than what trails behind it needs.
        self.records.append(self._record(call, end))
        call.told = None
        super()._end(call, end)

    def _leave(self, call: Call) -> None:
        if not call.begun_at and self._is_call(call):
            self.records.append(self._record(call))
        super()._leave(call)
        if call.call_id not in self._calls:
            self._heard.pop(call.call_id, None)

    @staticmethod
    def _is_call(call: Call) -> bool:
        """Whether something was rung, or hung up that nobody had seen begin."""
        if any(attempt.copies for attempt in call.attempts):
            return True
        if call.ended:
            # A leg that has ended the call which it is tied to.
            return False
        return any(x.answered or any(bye.seen for bye in x.byes) for x in call.dialogs)

    def _record(self, call: Call, end: End | None = None) -> CallRecord:
        charge, heard = call.shown, self._heard_of(call)
        told = call.told or Told()
        if not call.begun_at:
            invited = min((x.time for x in call.attempts if x.copies), default=0)
            told = Told(invited=invited)
            if isinstance(charge, Identity):
                parties = (charge.source, charge.source_ip, charge.destination)
                told = Told(*parties, "", invited)
        hung_up, to_tag = _who_hung_up(call, end) if end is not None else ("", "")
        return CallRecord(
            call_id=printable_id(call.call_id),
            from_tag=call.from_tag,
            to_tag=to_tag,
            tenant=call.tenant,
            route=charge.route.name,
            transaction_tag=charge.transaction_tag,
            account_tag=charge.account_tag,
            destination_account_tag=charge.destination_account_tag,
            source=told.source,
            source_ip=told.source_ip,
            destination=told.destination,
            sender=call.sender,
            capture_id=call.capture_id,
            invited=told.invited,
            ringing=heard.ringing,
            begun=call.begun,
            ended=end.time if end is not None else 0,
            begun_by=told.begun_by,
            ended_by=end.reason if end is not None else "",
            hung_up=hung_up,
            status=heard.status,
            phrase=heard.phrase,
            outcome=outcome(call, self.settings, heard.status),
            row=call.row,
        )


# Room: outbox

# Where an event is at any moment, what holds it there, and what moves it on:
#
#   produced ──> being written ──────> ready ─────────> out ─────> settled ───> gone
#   CallTable    Shard, until its      Outbox, takes    a worker,  Outbox holds its call
#   .handle      store has committed   the oldest       HTTP       until the store has committed
#                      │                 ^    ^             │
#                      │ the outbox      │    │ its time    │ no answer that counts,
#                      │ is full         │    │ has come    │ or ok: false
#                      v                 │    │             v
#                  on disk only ─────────┘    └────────── delayed, in the Outbox
#                  Store; a _Backlog counts it;
#                  loaded when the outbox is half empty
#
#   An event is rejected when the API refuses it for good, or has refused its begin. The store keeps
#   it, the log has it whole, and `outbox retry` makes it an event that is being written.
#
# At most one event of a call is ready, delayed, out or settled; the later ones wait after it in the
# call's queue in the Outbox. Without a store an event is ready as soon as it is produced, and gone
# as soon as it is settled. While the store fails, events do not wait for it: they are delivered
# from memory, after those that are on disk only. Over a limit the events that waited longest are
# lost; the log has each of them whole.

DELIVERED, REFUSED_BY_API, REJECTED = "delivered", "refused", "rejected"
# The kind of DeliveryError of an event that its store did not let go.
NOT_OURS = "not_ours"
# The answer by which the API refuses, as `outbox` shows it.
NOT_OK = "ok: false"


# Calls whose begin was given up: their end is given up as well when it comes.
MAX_GIVEN_UP = 100_000
# An event that may have been carried out already is refused so often before that is believed, if
# the API said ok to another event between each refusal and the one before: its storage service
# lives. An end had been done, then; a begin with both parties had not, for one party is unknown.
MAX_CONFIRMED_REFUSALS = 2
# Seconds. A begin with both parties must be refused twice so far apart before one party is tried
# alone, and the latest refusal must be no older: a storage service that restarts takes longer.
REFUSED_APART = 1.0
# Parties that are left out for one API, 0.2 kB each. Over that the oldest is tried again sooner.
MAX_UNKNOWN_PARTIES = 10_000
# Running calls of one API that were begun with one party alone, 0.2 kB each: five times the default
# of max_calls. Over that no call is begun with one party alone: its end might name another.
MAX_ONE_SIDED = 1_000_000


def retry_delay(failures: int) -> float:
    """Seconds to wait after so many failures in a row, one or more; a caller adds its jitter."""
    return min(RETRY_FIRST * 2.0 ** min(failures - 1, 16), RETRY_LAST)


class Outbox:
    """The events that wait for one API: which may be sent when, in order for each call.

    It sends nothing itself. `take` gives out an event, and `settle` or `fail` say what became of
    it; ``now`` is seconds of a monotonic clock. At most one event of a call is out at a time. When
    several events may go, the one that came about first goes first. ``jitter`` gives the factor for
    each delay.

    With ``drop`` a begin that is refused with both parties is sent with the caller alone, then with
    the callee alone. What the API keeps of a running call for one party has the same values either
    way and is stored once, so both may be sent again at any time, also after a restart. An ok to
    one party alone is believed only if no attempt of unknown outcome can have begun both: they were
    refused again while the API's storage service is known to live.
    """

    def __init__(
        self,
        limit: int = MAX_WAITING_EVENTS,
        jitter: Callable[[], float] = lambda: 1.0,
        drop: bool = True,
    ) -> None:
        self.limit = limit
        self._jitter = jitter
        self._drop = drop
        self._calls: dict[CallKey, deque[RatingEvent]] = {}
        # An entry is stale, and is skipped, once its queue is no longer the call's.
        self._ready: list[tuple[int, int, CallKey, deque[RatingEvent]]] = []
        self._delayed: list[tuple[float, int, CallKey, deque[RatingEvent]]] = []
        # Calls of which an event is out, or was settled and not `release`d yet. These and the next
        # two have the store of the call, for `forget`.
        self._out: dict[CallKey, Any] = {}
        # Calls whose begin was given up, so that their end must not be sent.
        self._given_up: OrderedDict[CallKey, Any] = OrderedDict()
        # Running calls that were begun with one party alone: their ends must name no other.
        self._one_sided: dict[CallKey, tuple[str, Any]] = {}
        # Tenants and tags that the API does not know, and until when they are left out.
        self._unknown: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._size = 0
        self._sequence = 0
        self._failures = 0
        self._down_until = 0.0
        self._last_ok = 0.0
        self._probe: RatingEvent | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def down(self) -> bool:
        """Whether the API failed so often in a row that it gets one probe at a time."""
        return self._failures >= DOWN_AFTER

    @property
    def busy(self) -> bool:
        """Whether an event is out, or may go at once."""
        return bool(self._out) or (bool(self._ready) and not self.down)

    def put(self, event: RatingEvent) -> tuple[bool, list[RatingEvent]]:
        """Add an event; returns whether it will be sent, and the events that are lost for it."""
        if event.kind == "end" and event.key in self._given_up:
            del self._given_up[event.key]
            return False, []
        self._given_up.pop(event.key, None)
        self.restrict(event)
        queue = self._calls.get(event.key)
        if queue is None:
            queue = self._calls[event.key] = deque()
        queue.append(event)
        if len(queue) == 1 and event.key not in self._out:
            self._make_ready(event.key, queue)
        self._size += 1
        return True, self._make_room()

    def give_up(self, key: CallKey, store: Any = None) -> None:
        """A begin will not be sent, so its end will not be accepted."""
        self._given_up[key] = store
        if len(self._given_up) > MAX_GIVEN_UP:
            self._given_up.popitem(last=False)

    def begun(self, key: CallKey, party: str, store: Any = None) -> None:
        """A begin was taken with one party alone; its end will name no other."""
        self._one_sided[key] = (party, store)

    def restrict(self, event: RatingEvent) -> None:
        """Take out of an end the party that its begin was taken without."""
        party, _ = self._one_sided.pop(event.key, ("", None))
        if party and event.kind == "end":
            event.keep_only(party)

    def leave_out(self, event: RatingEvent, now: float) -> bool:
        """Leave who was left out of this begin out of others for a while; True if it is news."""
        unknown, key = self._unknown, (event.tenant, event.left_out)
        while unknown and next(iter(unknown.values())) <= now:
            unknown.popitem(last=False)
        if key in unknown:
            return False
        unknown[key] = now + UNKNOWN_PAUSE
        if len(unknown) > MAX_UNKNOWN_PARTIES:
            unknown.popitem(last=False)
        return True

    def take(self, now: float) -> RatingEvent | None:
        """The next event to send, or None while there is none that may go."""
        if self.down and (self._probe is not None or now < self._down_until):
            return None
        # While it is down each probe is another event: one of them may be the reason.
        while not self.down and self._delayed and self._delayed[0][0] <= now:
            self._undelay()
        queue = self._next_ready()
        while queue is None and self.down and self._delayed:
            self._undelay()
            queue = self._next_ready()
        if queue is None:
            return None
        event = queue[0]
        self._out[event.key] = event.store
        event.party = self._party(event, now)
        event.attempts += 1
        if self.down:
            self._probe = event
        return event

    def settle(
        self, event: RatingEvent, outcome: str, now: float, committed: bool = True
    ) -> tuple[str, list[RatingEvent]]:
        """The API answered; returns what that means and the events that are rejected for good.

        The meaning is DELIVERED, REJECTED, or REFUSED_BY_API for an event that is tried again.
        Without ``committed`` the call's next event waits for `release`.
        """
        self._come_back(event)
        self._come_up()
        if outcome == REFUSED_BY_API:
            outcome = self._refused(event, now)
        elif outcome == DELIVERED:
            outcome = self._accepted(event, now)
        if outcome == REFUSED_BY_API:
            return REFUSED_BY_API, []
        settled = self._remove(event, outcome)
        self._out[event.key] = event.store
        if committed:
            self.release(event.key)
        return outcome, settled if outcome == REJECTED else []

    def release(self, key: CallKey) -> None:
        """What was settled is on disk: the call's next event may go."""
        self._out.pop(key, None)
        queue = self._calls.get(key)
        if queue:
            self._make_ready(key, queue)

    def fail(self, event: RatingEvent, error: DeliveryError, now: float) -> None:
        """The API gave no answer that counts: the event is sent again, the same octets, later."""
        # Requests that were under way together fail together: that is one failure, not many.
        if not self.down or self._probe is event:
            self._failures += 1
            if self.down:
                pause = self._backoff(self._failures - DOWN_AFTER + 1)
                self._down_until = max(self._down_until, now + pause)
        if error.wait:
            self._failures = max(self._failures, DOWN_AFTER)
            self._down_until = max(self._down_until, now + error.wait)
        self._come_back(event)
        if error.unknown:
            # The refusals before say nothing about this attempt.
            event.unknown, event.confirmed, event.refused_at = True, 0, now
        event.party = ""
        event.answer = str(error)
        event.failures += 1
        self._delay(event, now, event.failures)

    def hold_back(self, event: RatingEvent, now: float) -> None:
        """The event was not sent, for a reason that is not the API's: it goes later."""
        self._come_back(event)
        event.attempts -= 1
        self._delay(event, now, 1)

    def holds(self, event: RatingEvent) -> bool:
        """Whether an event that was given out is still of this outbox."""
        queue = self._calls.get(event.key)
        return bool(queue) and queue[0] is event and event.key in self._out  # type: ignore[index]

    def withdraw(self, store: Any) -> bool:
        """Let go of the events of a store but for those that are out; whether there are any."""
        for key, queue in list(self._calls.items()):
            if queue[0].store is store and key not in self._out:
                self._size -= len(self._calls.pop(key))
        return any(other is store for other in self._out.values())

    def forget(self, store: Any) -> None:
        """Let go of all that is of a store; what comes of events that are out is not asked for."""
        if self._probe is not None and self._probe.store is store:
            self._probe = None
        for key in [key for key, other in self._out.items() if other is store]:
            del self._out[key]
        self.withdraw(store)
        for key in [key for key, other in self._given_up.items() if other is store]:
            del self._given_up[key]
        for key in [key for key, (_, other) in self._one_sided.items() if other is store]:
            del self._one_sided[key]

    def waiting(self, store: Any) -> list[RatingEvent]:
        """All events of a store, also those that are out."""
        return [x for queue in self._calls.values() for x in queue if x.store is store]

    def undelivered(self) -> list[RatingEvent]:
        """All that still waits, the calls in order of their oldest event."""
        for key in self._out:
            # Nobody waits for its answer any more.
            if key in self._calls:
                self._calls[key][0].unknown = True
        return [event for queue in self._calls.values() for event in queue]

    def _party(self, event: RatingEvent, now: float) -> str:
        """Whom alone the next request names, "" for all that the event has."""
        if not self._may_drop(event):
            return ""
        if event.refusals:
            return event.party if now - event.refused_at < REFUSED_APART else ""
        if event.attempts or event.unknown:
            return ""
        tags = (event.account_tag, event.destination_account_tag)
        caller, callee = (self._unknown.get((event.tenant, tag), 0.0) > now for tag in tags)
        return "" if caller == callee else CALLEE if caller else CALLER

    def _may_drop(self, event: RatingEvent) -> bool:
        both = event.account_tag and event.destination_account_tag
        room = len(self._one_sided) < MAX_ONE_SIDED
        return bool(self._drop and event.kind == "begin" and both and room)

    def _accepted(self, event: RatingEvent, now: float) -> str:
        """What ``ok: true`` means: DELIVERED, or REFUSED_BY_API to send it again."""
        self._last_ok = now
        if event.kind == "begin" and event.party:
            if event.unknown and event.confirmed < MAX_CONFIRMED_REFUSALS:
                # The storage service may have begun both before it went away for a moment.
                self._delay(event, now, max(event.refusals, 1))
                return REFUSED_BY_API
            event.keep_only(event.party)
        return DELIVERED

    def _refused(self, event: RatingEvent, now: float) -> str:
        """What ``ok: false`` means: DELIVERED, REJECTED, or REFUSED_BY_API to send it again."""
        event.answer = NOT_OK
        party = ""
        if event.kind == "end" or not event.party:
            again = event.refusals > 0 and now - event.refused_at >= REFUSED_APART
            event.refusals += 1
            event.confirmed += event.refusals > 1 and self._last_ok > event.refused_at
            event.refused_at = now
            party = CALLER if again and self._may_drop(event) else ""
        elif event.refusals and event.party == CALLER:
            party = CALLEE
        if party:
            event.party = party
            self._make_ready(event.key, self._calls[event.key])
            return REFUSED_BY_API
        # A dead storage service answers ok: false as well, so that is believed only after some
        # minutes. Then an end that may have arrived before had arrived.
        done_before = event.kind == "end" and event.unknown
        done_surely = done_before and event.confirmed >= MAX_CONFIRMED_REFUSALS
        if event.refusals < MAX_REFUSALS and not done_surely:
            self._delay(event, now, max(event.refusals, 1))
            return REFUSED_BY_API
        return DELIVERED if done_before else REJECTED

    def _come_back(self, event: RatingEvent) -> None:
        self._out.pop(event.key, None)
        if self._probe is event:
            self._probe = None

    def _come_up(self) -> None:
        """The API answers. What failed while it was down goes first, being the oldest."""
        if self.down:
            failed = [entry for entry in self._delayed if entry[3][0].answer != NOT_OK]
            # What it refused has its own time.
            self._delayed = [entry for entry in self._delayed if entry[3][0].answer == NOT_OK]
            heapq.heapify(self._delayed)
            for _, _, key, queue in failed:
                if self._calls.get(key) is queue:
                    self._make_ready(key, queue)
        self._failures = 0

    def _remove(self, event: RatingEvent, outcome: str) -> list[RatingEvent]:
        """Take out an event that was DELIVERED or REJECTED; returns all that goes with it."""
        queue = self._calls[event.key]
        removed = [queue.popleft()]
        if event.kind == "begin" and event.left_out:
            self.begun(event.key, event.party, event.store)
            if queue:
                self.restrict(queue[0])
        if outcome == REJECTED and event.kind == "begin":
            # Its end goes with it, but not the begin of another call with the same tag.
            while queue and queue[0].kind == "end":
                removed.append(queue.popleft())
            if not queue and removed[-1].kind == "begin":
                self.give_up(event.key, event.store)
        self._size -= len(removed)
        if not queue:
            del self._calls[event.key]
        return removed

    def _backoff(self, failures: int) -> float:
        return retry_delay(failures) * self._jitter()

    def _delay(self, event: RatingEvent, now: float, failures: int) -> None:
        self._sequence += 1
        entry = (now + self._backoff(failures), self._sequence, event.key, self._calls[event.key])
        heapq.heappush(self._delayed, entry)

    def _undelay(self) -> None:
        _, _, key, queue = heapq.heappop(self._delayed)
        if self._calls.get(key) is queue:
            self._make_ready(key, queue)

    def _make_ready(self, key: CallKey, queue: deque[RatingEvent]) -> None:
        self._sequence += 1
        heapq.heappush(self._ready, (queue[0].serial, self._sequence, key, queue))

    def _next_ready(self) -> deque[RatingEvent] | None:
        while self._ready:
            _, _, key, queue = heapq.heappop(self._ready)
            if self._calls.get(key) is queue:
                return queue
        return None

    def _make_room(self) -> list[RatingEvent]:
        """Take out the events of the calls that wait longest, down to the limit."""
        gone: list[RatingEvent] = []
        while self._size > self.limit:
            key = next((key for key in self._calls if key not in self._out), None)
            if key is None:
                break
            events = self._calls.pop(key)
            self._size -= len(events)
            if events[-1].kind == "begin":
                self.give_up(key, events[-1].store)
            gone += events
        heaps: tuple[list[Any], list[Any]] = (self._ready, self._delayed)
        for heap in heaps:
            if len(heap) > 2 * len(self._calls) + 64:
                heap[:] = [entry for entry in heap if self._calls.get(entry[2]) is entry[3]]
                heapq.heapify(heap)
        return gone


# Room: configuration

_PREFIX = "RATING_AGENT_HEP_"
# Options of the former agent. All but the first are of its Redis, which `_former_redis` takes over.
_FORMER = ("message_bus_uri", "state_manager", "redis_address", "redis_password", "redis_db")
# The former agent's first versions had one listener.
_FORMER_NAMES = {"listen": "listen_udp"}


class _ConfigFile(configargparse.ConfigFileParser):
    """YAML whose values become text for the converters; unknown keys name their line."""

    former: dict[str, str]

    def parse(self, stream: Any) -> dict[str, str]:
        options = {option.name: option for option in OPTIONS}

        def option_name(text: str) -> str:
            name = text.replace("-", "_")
            name = _FORMER_NAMES.get(name, name)
            if name not in options and name not in _FORMER:
                near = ", ".join(difflib.get_close_matches(name, options, 3))
                raise ConfigError(f"{text!r}; allowed: {near or 'the options that --help lists'}")
            return name

        node = yaml_node(stream.read(), stream.name)
        entries = yaml_entries(stream.name, node, "", option_name) if node is not None else {}
        self.former |= {
            name: str(value.value) for name, value in entries.items() if name in _FORMER
        }
        return {
            name: self._text(stream.name, options[name], value)
            for name, value in entries.items()
            if name in options
        }

    @staticmethod
    def _text(name: str, option: Option, node: yaml.Node) -> str:
        many = isinstance(node, yaml.SequenceNode) and isinstance(option.default, tuple)
        items = node.value if many else [node]
        for item in items:
            if not isinstance(item, yaml.ScalarNode) or not item.tag.startswith("tag:yaml.org"):
                allowed = "a list of plain values" if many else "a plain value"
                raise yaml_error(name, item, f"{option.name}: not plain; allowed: {allowed}")
        # The text as written: 0123 or 1e3 in an account is no number.
        texts = ["" if item.tag.endswith(":null") else str(item.value) for item in items]
        return json.dumps(texts) if many else texts[0]


class _Parser(configargparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{' '.join(message.split())}; allowed: as --help says")


def _open_text(path: str) -> io.StringIO:
    """A whole file as text. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            stream = io.StringIO(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; allowed: a file that can be read") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; allowed: text in UTF-8") from None
    stream.name = path
    return stream


# The names by which sockets are passed; each takes the place of listen_udp and so on.
_PASSED = ("hep-udp", "hep-tcp", "hep-tls", "status")
# The variables of sd_listen_fds(3) that say so, and the first descriptor: SD_LISTEN_FDS_START.
PASSING = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_FIRST_PASSED = 3


def passed_sockets(environ: Mapping[str, str]) -> dict[str, socket.socket]:
    """The sockets that systemd or the like has opened for this process, by option.

    Source: sd_listen_fds_with_names(3). Raises ConfigError.
    """
    pid, count, names = (environ.get(name, "") for name in PASSING)
    if pid != str(os.getpid()) or count in ("", "0"):
        return {}
    listed = names.split(":") if names else []
    if count != str(len(listed)):
        raise ConfigError(
            f"LISTEN_FDS, LISTEN_FDNAMES: {count!r}, {names!r}; allowed: a name for each socket"
        )
    sockets: dict[str, socket.socket] = {}
    for descriptor, name in enumerate(listed, _FIRST_PASSED):
        option = f"listen_{name.removeprefix('hep-')}"
        if name not in _PASSED or option in sockets:
            allowed = ", ".join(_PASSED)
            raise ConfigError(f"LISTEN_FDNAMES: {names!r}; allowed: {allowed}, each once")
        try:
            sockets[option] = _adopt(descriptor, option == "listen_udp")
        except (OSError, ConfigError) as error:
            reason = getattr(error, "strerror", None) or error
            kind = "a bound UDP" if option == "listen_udp" else "a listening TCP"
            text = f"descriptor {descriptor}, in the place of {option}: {reason}"
            raise ConfigError(f"{name}: {text}; allowed: {kind} socket of IPv4 or IPv6") from None
    return sockets


def _adopt(descriptor: int, udp: bool) -> socket.socket:
    """The socket of a descriptor that was passed. Raises OSError, ConfigError.

    Its options stay as they are: its buffer may be larger than this process may ask for.
    """
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise ConfigError(f"its family is {sock.family}")
    if sock.type != (socket.SOCK_DGRAM if udp else socket.SOCK_STREAM):
        raise ConfigError(f"its type is {sock.type}")
    if not udp and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError("it does not listen")
    if not sock.getsockname()[1]:
        raise ConfigError("it is not bound")
    sock.setblocking(False)
    return sock


def bound_to(sock: socket.socket) -> str:
    """HOST:PORT or [IPv6]:PORT of a socket."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Configuration(NamedTuple):
    """What the command line, environment and files say together.

    ``sockets`` are those that were passed, by option; such an option is its socket's address.
    ``reread`` reads the options once more; it raises ConfigError.
    """

    command: str
    arguments: list[str]
    settings: Settings
    rules: tuple[Rule, ...]
    warnings: list[str]
    tls: ssl.SSLContext | None
    sockets: dict[str, socket.socket]
    reread: Callable[[], Settings]


def load_configuration(argv: Sequence[str], environ: dict[str, str]) -> Configuration:
    """Read and check everything before a socket opens. Raises ConfigError with one line."""
    former: dict[str, str] = {}
    settings, command, arguments = _read_options(argv, environ, former)
    sockets = passed_sockets(environ)
    bound: dict[str, Any] = {option: bound_to(sock) for option, sock in sockets.items()}
    settings = replace(settings, **bound)
    if not any((settings.listen_udp, settings.listen_tcp, settings.listen_tls)):
        raise ConfigError(
            "listen_udp, listen_tcp, listen_tls: all empty; allowed: at least one address"
        )
    if settings.call_records and settings.cluster_url:
        raise ConfigError(
            "call_records: a cluster keeps no call records; allowed: without cluster_url, or empty"
        )
    if settings.call_records and not settings.state_dir:
        raise ConfigError("call_records: without a state_dir; allowed: with one, or empty")
    for name in ("rating_api_ca_file", "hep_forward_ca_file"):
        if ca_file := getattr(settings, name):
            client_tls(name, ca_file)
    names = ", ".join(sorted(former))
    warnings = [f"options of the former agent that have no effect: {names}"] if former else []
    if settings.cluster_url and settings.state_dir:
        warnings.append("with cluster_url there is no journal: state_dir has no effect")
    rules, tls = load_rules(settings), load_tls(settings)

    def reread() -> Settings:
        return _read_options(argv, environ, {})[0]

    return Configuration(command, arguments, settings, rules, warnings, tls, sockets, reread)


# The options that SIGHUP reads again: who may send, and what the rating API asks for.
RELOADED = (
    "hep_allow",
    "hep_auth_key",
    "hep_auth_key_file",
    "rating_api_token",
    "rating_api_token_file",
    "rating_api_username",
    "rating_api_password",
    "rating_api_password_file",
)


def read_again(configuration: Configuration, running: Settings) -> tuple[Settings, list[str]]:
    """The running settings with the options of RELOADED as they are set now.

    With it come the names of all options whose value has changed. Raises ConfigError.
    """
    fresh = configuration.reread()
    changed = [
        option.name
        for option in OPTIONS
        if getattr(fresh, option.name) != getattr(running, option.name)
        # The place of these was taken by sockets.
        and option.name not in configuration.sockets
    ]
    return replace(running, **{name: getattr(fresh, name) for name in RELOADED}), changed


def _read_options(
    argv: Sequence[str], environ: dict[str, str], former: dict[str, str]
) -> tuple[Settings, str, list[str]]:
    """The options, the command and its arguments; ``former`` is as for `_option_parser`."""
    if _PREFIX + "LISTEN" in environ:
        environ = {_PREFIX + "LISTEN_UDP": environ[_PREFIX + "LISTEN"], **environ}
    known, unknown = _option_parser(former).parse_known_args(list(argv), env_vars=environ)
    texts = vars(known)
    for name in _FORMER:
        if _PREFIX + name.upper() in environ:
            former[name] = environ[_PREFIX + name.upper()]
    texts |= _former_redis(former, texts)
    settings = Settings(**{option.name: _convert_option(option, texts) for option in OPTIONS})
    return settings, *_command(texts["words"], unknown)


def _former_redis(former: dict[str, str], texts: Mapping[str, str | None]) -> dict[str, str]:
    """The Redis of the former agent as options of ours; takes out of ``former`` what it uses."""
    if former.get("state_manager") != "redis" or texts["cluster_url"]:
        return {}
    _, address, password, database = (former.pop(name, "") for name in _FORMER[1:])
    meant = {"cluster_url": f"redis://{address or 'localhost:6379'}/{database or 0}"}
    if password:
        meant["cluster_password"] = password
    return meant


def _option_parser(former: dict[str, str]) -> _Parser:
    """A parser that takes the text of an option from flags, else the environment, else the file.

    What the file sets of the former agent's options it adds to ``former``.
    """
    parser = _Parser(
        prog="rating_agent_hep.py",
        description="Rate telephone calls from a HEP mirror of their signalling.",
        epilog="A list is a YAML list, or words separated by commas or spaces.",
        config_file_open_func=_open_text,
        config_file_parser_class=type("_Reader", (_ConfigFile,), {"former": former}),
        add_env_var_help=False,
        add_config_file_help=False,
        allow_abbrev=False,
        default_config_files=[],
    )
    commands = (
        "run (the default; also agent), check, decode FILE..., explain FILE..., "
        "rate [--format table|csv|json] [--deliver --journal FOLDER] FILE..., "
        "outbox [list | retry [CALL...] | drop CALL...]"
    )
    parser.add_argument("words", nargs="*", metavar="COMMAND", help=commands)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-c", "--config", is_config_file=True, env_var=_PREFIX + "CONFIG", help="YAML file"
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        dashed, plain = f"--{option.name.replace('_', '-')}", f"--{option.name}"
        groups[option.group].add_argument(
            *dict.fromkeys((dashed, plain)),
            dest=option.name,
            env_var=_PREFIX + option.name.upper(),
            metavar="VALUE",
            help=f"{option.help} (default: {default_text(option)})",
            **({"nargs": "?", "const": "true"} if option.convert is flag else {}),
        )
    return parser


def _command(words: list[str], unknown: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments, from what is no option. Raises ConfigError."""
    for word in unknown:
        # What stands behind = may be a secret; `rate` reads its own.
        if word.startswith("-") and words[:1] != ["rate"]:
            name = ascii(word.partition("=")[0])[1:-1]
            raise ConfigError(f"{name}: unknown; allowed: the options that --help lists")
    # argparse does not know positional arguments that stand behind an option.
    command, *arguments = [*words, *unknown] or ["run"]
    # The former agent's command line.
    command = "run" if command == "agent" else command
    if command not in ("run", "check", "decode", "rate", "explain", "outbox"):
        raise ConfigError(
            "command: unknown; allowed: run, agent, check, decode FILE..., rate FILE..., "
            "explain FILE..., outbox"
        )
    if arguments and command in ("run", "check"):
        raise ConfigError(f"files: unexpected; allowed: {command} alone, decode FILE...")
    return command, arguments


def _convert_option(option: Option, texts: Mapping[str, str | None]) -> Any:
    """The value of an option; the text of a secret one may be in a file. Raises ConfigError."""
    name, text = option.name, texts[option.name]
    path = texts[f"{name}_file"] if option.secret else None
    if path:
        if text not in (None, "", "[]"):
            raise ConfigError(f"{name}, {name}_file: both set; allowed: one of them")
        name = f"{name}_file"
    try:
        text = _read_secret(option, path) if path else text
        return option.default if text is None else option.convert(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _read_secret(option: Option, path: str) -> str:
    """The text of an option from its file: one line, or a list's lines. Raises ConfigError."""
    lines = [line for line in re.split(r"[\r\n]+", _open_text(path).read()) if line]
    if isinstance(option.default, tuple) and lines:
        return json.dumps(lines)
    if len(lines) != 1:
        what = "several lines" if lines else "empty"
        raise ConfigError(f"{path}: {what}; allowed: one line")
    return lines[0]


def default_text(option: Option) -> str:
    """An option's default as the documentation and --help show it."""
    value = option.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g} s"
    return str(value) if value not in ("", ()) else "none"


def load_rules(settings: Settings) -> tuple[Rule, ...]:
    """The rules of the routes file and the main options. Raises ConfigError."""
    if not settings.routes:
        return parse_routes("", "", settings)
    try:
        stream = _open_text(settings.routes)
    except ConfigError as error:
        raise ConfigError(f"routes: {error}") from None
    return parse_routes(stream.read(), settings.routes, settings)


def _load_pem(option: str, path: str, load: Callable[[], Any], allowed: str) -> None:
    """Load a file of certificates or keys. Raises ConfigError."""
    try:
        with open(path, "rb"):  # OpenSSL does not say which file it could not open.
            load()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: {path}: {reason}; allowed: {allowed}") from None


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """The context of the TLS listener, TLS 1.2 or later; None if it is off. Raises ConfigError."""
    if not settings.listen_tls:
        return None
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if not cert:
        raise ConfigError("tls_cert: empty; allowed: with listen_tls, a certificate's file, PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A sender that never reads would find tickets in its buffer when it closes, and TCP then resets
    # the connection and throws away what was sent last.
    context.num_tickets = 0

    def load_pair() -> None:
        # Without a password OpenSSL would ask for it at the terminal.
        context.load_cert_chain(cert, key or None, password="")

    other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load_pem("tls_cert", cert, lambda: other.load_verify_locations(cert), "certificates, PEM")
    _load_pem("tls_key", key or cert, load_pair, "the certificate's key, PEM, without passphrase")
    if client_ca:
        _load_pem(
            "tls_client_ca",
            client_ca,
            lambda: context.load_verify_locations(client_ca),
            "certificates of CAs, PEM",
        )
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@cache
def client_tls(option: str, ca_file: str) -> ssl.SSLContext:
    """The CAs that a server's certificate may come from: those of a file, else the system's.

    ``option`` names the file. It is loaded once, for that is slow. Raises ConfigError.
    """
    if not ca_file:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    allowed = "certificates of CAs, PEM"
    _load_pem(option, ca_file, lambda: context.load_verify_locations(ca_file), allowed)
    return context


def effective(configuration: Configuration) -> Iterator[str]:
    """The options in force, a line each in the file's own form, without secrets."""
    for option in OPTIONS:
        value = getattr(configuration.settings, option.name)
        if option.secret and value:
            # If a file gave it, the line must not set it a second time.
            from_file = getattr(configuration.settings, f"{option.name}_file")
            value = type(value)() if from_file else "***"
        shown = list(value) if isinstance(value, tuple) else value
        # JSON escapes a character beyond 16 bits as two halves, which YAML does not join.
        yield f"{option.name}: {json.dumps(shown, ensure_ascii=not str(shown).isprintable())}"
    for rule in configuration.rules:
        route = rule.route
        what = "ignored" if route.action == "ignore" else f"tenant {route.tenant}"
        conditions = len(rule.conditions)
        yield f"# route {route.name}: {conditions} conditions, {what}, {route.rating_api_url}"


# Room: logs and metrics

log = logging.getLogger("rating_agent_hep")

# Kinds of warnings and errors of which the last is shown, and characters of each.
MAX_LAST_ERRORS = 50
MAX_ERROR_TEXT = 300


class WarningLimiter(logging.Filter):
    """Let only a few warnings of one ``event`` through each second, and keep the last of each.

    A line that passes says how many of its kind were held back before it. The last ones are kept by
    event, so that a storm of one kind does not push out what explains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._second = 0
        self._passed: dict[str, int] = {}
        self._held: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "event", None)
        if record.levelno >= logging.WARNING and event != "held_back":
            self._keep(event or "", record)
        if record.levelno != logging.WARNING or event is None:
            return True
        if self._exhausted(event, record.created):
            return False
        self._passed[event] = self._passed.get(event, 0) + 1
        if event in self._held:
            record.held_back = self._held.pop(event)
        return True

    def holds(self, event: str, now: float) -> bool:
        """Whether a warning would be held back at this UNIX time; if so, it is counted.

        To make a line costs far more than to drop the packet that it is about.
        """
        if not self._exhausted(event, now):
            return False
        self._last[event]["count"] += 1
        self._last[event]["time"] = now
        return True

    def take_held(self) -> dict[str, int]:
        """How many lines of each event were held back that no line has told of yet."""
        held, self._held = self._held, {}
        return held

    def last_errors(self) -> list[dict[str, Any]]:
        """The last warning or error of each event, held back or not; the newest is first.

        Each has ``event``, ``level``, ``time`` (UNIX time, seconds), ``count`` and ``text``.
        """
        return list(reversed(self._last.values()))

    def _exhausted(self, event: str, now: float) -> bool:
        if int(now) != self._second:
            self._second = int(now)
            self._passed.clear()
        if self._passed.get(event, 0) < MAX_WARNINGS_PER_SECOND:
            return False
        self._held[event] = self._held.get(event, 0) + 1
        return True

    def _keep(self, event: str, record: logging.LogRecord) -> None:
        before = self._last.pop(event, None)
        facts = {name: getattr(record, name, None) for name in ("api", "sender", "call_id")}
        text = " ".join([record.getMessage(), *(f"{k}={v}" for k, v in facts.items() if v)])
        if record.exc_info and record.exc_info[0]:
            text += f": {record.exc_info[0].__name__}"
        self._last[event] = {
            "event": event,
            "level": record.levelname.lower(),
            "time": record.created,
            "count": (before["count"] if before else 0) + 1,
            "text": text[:MAX_ERROR_TEXT],
        }
        if len(self._last) > MAX_LAST_ERRORS:
            self._last.popitem(last=False)


def set_up_logging(settings: Settings, stream: Any) -> WarningLimiter:
    """Send log lines to ``stream``: JSON objects, or text for a person."""
    # Where a line was logged, by which thread and process, is on no line of ours; to find it out
    # takes a seventh of the time of a line (Python's logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(stream)
    if settings.log_format == "json":
        names = {"levelname": "level"}
        handler.setFormatter(
            JsonFormatter("%(levelname)s %(message)s", rename_fields=names, timestamp="time")
        )
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    limiter = WarningLimiter()
    handler.addFilter(limiter)
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if settings.debug else settings.log_level.upper())
    return limiter


def printable(text: str) -> str:
    """Text that can neither begin a line nor move the cursor of a terminal, whoever sent it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _TextFormatter(logging.Formatter):
    """The message with the fields behind it, for a terminal."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "event"}

    def format(self, record: logging.LogRecord) -> str:
        more = {name: value for name, value in vars(record).items() if name not in self._STANDARD}
        text = " ".join(
            f"{name}={value}" for name, value in more.items() if value not in ("", None)
        )
        return printable(f"{super().format(record)} {text}".rstrip())


# Metrics whose last parts are labels at Prometheus; conf/statsd/mapping.yaml says the same.
LABELS: dict[str, tuple[str, ...]] = {
    "calls.end": ("calls_end", "reason"),
    "calls.evicted": ("calls_evicted", "state"),
    "calls.expired": ("calls_expired", "state"),
    "calls.state": ("calls", "state"),
    "calls.unrated": ("calls_unrated", "reason"),
    "api.answers": ("api_answers", "answer"),
    "api.errors": ("api_errors", "error"),
    "forward.connected": ("forward_connected", "target"),
    "forward.dropped": ("forward_dropped", "target"),
    "forward.errors": ("forward_errors", "target"),
    "forward.sent": ("forward_sent", "target"),
    "packets.dropped": ("packets_dropped", "reason"),
    "packets.malformed": ("packets_malformed", "reason"),
    "packets.received": ("packets_received", "transport"),
    **{
        f"tenants.{name}": (f"tenants_{name}", "tenant", "route")
        for name in "attempts answered charged running ringing_ms ended talk_ms".split()
    },
}


def prometheus_name(name: str) -> tuple[str, str]:
    """The family of a metric at Prometheus, without prefix, and its labels in braces or ""."""
    for count in (1, 2):
        head, *values = name.rsplit(".", count)
        family, *labels = LABELS.get(head, ("",))
        if len(labels) == count:
            break
    else:
        return re.sub(r"\W", "_", name, flags=re.A), ""
    texts = [
        value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values
    ]
    pairs = ",".join(f'{label}="{text}"' for label, text in zip(labels, texts, strict=True))
    return family, f"{{{pairs}}}"


def prometheus_text(
    counters: dict[str, int],
    gauges: dict[str, float],
    timers: dict[str, tuple[int, float]],
    prefix: str = "rating_agent_hep",
) -> str:
    """Metrics in the text format 0.0.4 of Prometheus; timers are (count, sum of seconds).

    A family's lines stand together, as the format asks for.
    """
    families: dict[tuple[str, str], list[str]] = {}
    for kind, values in (("counter", counters), ("gauge", gauges)):
        for name, value in values.items():
            family, labels = prometheus_name(name)
            family = f"{prefix}_{family}" + ("_total" if kind == "counter" else "")
            families.setdefault((family, kind), []).append(f"{family}{labels} {value}")
    for name, (count, total) in timers.items():
        family = f"{prefix}_{prometheus_name(name)[0]}_seconds"
        lines = [f"{family}_count {count}", f"{family}_sum {total:.6f}"]
        families[family, "summary"] = lines
    return "".join(
        f"# TYPE {family} {kind}\n" + "".join(f"{line}\n" for line in sorted(lines))
        for (family, kind), lines in sorted(families.items())
    )


# Samples of one timer kept for one flush; a statsd server computes percentiles from them.
MAX_TIMER_SAMPLES = 100
# Seconds between two flushes to statsd, and after which its host name is resolved anew.
STATSD_FLUSH = 1.0
STATSD_RESOLVE = 60.0


class Metrics:
    """Counters and timers, added up here and sent to statsd by `flush` only.

    ``totals`` maps names to counts since the start, ``timer_totals`` to (count, seconds). A statsd
    server that is gone, or whose name does not resolve, disturbs nothing: sending is tried anew at
    each flush.
    """

    def __init__(self, settings: Settings) -> None:
        self.totals: dict[str, int] = {}
        self.timer_totals: dict[str, tuple[int, float]] = {}
        self._settings = settings
        self._sent: dict[str, int] = {}
        self._timers: dict[str, list[float]] = {}
        self._client: Any = None
        self._resolved = 0.0

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        self.totals[name] = self.totals.get(name, 0) + number

    def time(self, name: str, seconds: float) -> None:
        """Add a sample to a timer; of many in one flush only the first are kept."""
        count, total = self.timer_totals.get(name, (0, 0.0))
        self.timer_totals[name] = (count + 1, total + seconds)
        samples = self._timers.setdefault(name, [])
        if len(samples) < MAX_TIMER_SAMPLES:
            samples.append(seconds)

    def flush(self, gauges: dict[str, int], now: float) -> None:
        """Send what has changed since the last flush; ``now`` on a monotonic clock."""
        timers, self._timers = self._timers, {}
        settings = self._settings
        if not settings.statsd_host:
            return
        try:
            if self._client is None or now - self._resolved >= STATSD_RESOLVE:
                # The client resolves the name when it is made and never again.
                self._client = statsd.StatsClient(
                    settings.statsd_host,
                    settings.statsd_port,
                    settings.statsd_prefix,
                    ipv6=":" in settings.statsd_host,
                )
                self._resolved = now
            with self._client.pipeline() as pipeline:
                for name, total in self.totals.items():
                    if total != self._sent.get(name, 0):
                        pipeline.incr(name, total - self._sent.get(name, 0))
                        self._sent[name] = total
                for name, samples in timers.items():
                    for sample in samples:
                        pipeline.timing(name, sample * 1000)
                for name, value in gauges.items():
                    pipeline.gauge(name, value)
        except (OSError, UnicodeError) as error:
            self._client = None
            log.warning("statsd unreachable: %s", error, extra={"event": "statsd"})


# Room: store

# A store is where the calls and the waiting events of a shard outlive the process. `Journal` keeps
# them in SQLite, for one agent alone. Another kind of store has the same methods and attributes:
#
#   at a start     load_calls, last_serial, count_events, load_given_up, load_one_sided
#   notes          put_call, drop_call, put_event, put_attempt, drop_event, reject_event,
#                  retry_event
#   call records   put_record, load_records, drop_records, holds, trim_records, records_lost
#   to disk        commit writes all notes; due is set while there are some, unwritten counts them,
#                  failure says why they can't be written, "" while they can
#   while it runs  load_events, load_retries, count_rejected; these raise StoreError
#   for delivery   answered: events that wait no more, as the notes say; `Shard.commit` takes them
#   at the end     close
#
# A note never waits and never fails. All notes on one row are written together, so that a call and
# its events always fit. put_event and load_events set ``event.store``.

# The octets "HEPJ" as application_id of our files: another program's file is never touched.
_JOURNAL_ID = 0x4845504A
JOURNAL_FILE = "journal.sqlite"
# The version of what a file holds. A row of ``calls`` stays until its call has left the table and
# both events were answered. ``call`` is the text of `pack_call`, empty once the call has left. A
# serial is greater than 0 while its event waits. ``attempts`` and ``answer`` are of the event that
# goes next. ``party`` is the one party that the begin was taken with, where it was one alone.
JOURNAL_VERSION = 4
_SCHEMA = """
    CREATE TABLE calls (
        id INTEGER PRIMARY KEY, api TEXT, call TEXT, begin_event TEXT, begin_serial INTEGER,
        end_event TEXT, end_serial INTEGER, attempts INTEGER, answer TEXT, given_up INTEGER,
        party TEXT
    );
    CREATE INDEX begins ON calls (api, begin_serial) WHERE begin_serial > 0;
    CREATE INDEX ends ON calls (api, end_serial) WHERE end_serial > 0;
    CREATE TABLE rejected (
        serial INTEGER PRIMARY KEY, id INTEGER, api TEXT, event TEXT, attempts INTEGER,
        answer TEXT, retry INTEGER NOT NULL DEFAULT 0
    );
"""
# Call records, where they are made. A row stays until its line is in the file: ``begun`` and
# ``ended`` have [attempts, result] of the two events, and the last of the three comes ``ended``.
_RECORDS_SCHEMA = """
    CREATE TABLE IF NOT EXISTS call_records (
        id INTEGER PRIMARY KEY, record TEXT, begun TEXT, ended TEXT
    );
    CREATE INDEX IF NOT EXISTS due_records ON call_records (id) WHERE record != '' AND ended != '';
"""
_COLUMNS = "api call begin_event begin_serial end_event end_serial".split()
_COLUMNS += "attempts answer given_up party".split()
_PLACES = {name: place for place, name in enumerate(_COLUMNS)}
# In a row to be written: a column that keeps its value, a call that left the table, and the serial
# of an event that waits no more.
_UNCHANGED, _NO_CALL, _NO_EVENT = None, "", 0
_CLEAN_CALLS = """
    DELETE FROM calls WHERE id IN (SELECT value FROM json_each(?)) AND coalesce(call, '') = ''
    AND coalesce(begin_serial, 0) = 0 AND coalesce(end_serial, 0) = 0
"""
_WRITE_REJECTED = """
    INSERT OR REPLACE INTO rejected (serial, id, api, event, attempts, answer)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]')
    FROM json_each(?)
"""
_CLEAN_REJECTED = """
    DELETE FROM rejected WHERE serial IN (SELECT value FROM json_each(?)) OR serial <=
    (SELECT serial FROM rejected ORDER BY serial DESC LIMIT 1 OFFSET ?)
"""
# What became of an end whose record is not kept is of no use.
_WRITE_RECORDS = """
    INSERT INTO call_records (id, record, begun, ended)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]') FROM json_each(?)
    WHERE coalesce(json_extract(value, '$[1]'), json_extract(value, '$[2]')) IS NOT NULL
    OR json_extract(value, '$[0]') IN (SELECT id FROM call_records)
    ON CONFLICT (id) DO UPDATE SET record = coalesce(excluded.record, record),
    begun = coalesce(excluded.begun, begun), ended = coalesce(excluded.ended, ended)
"""
_CLEAN_RECORDS = "DELETE FROM call_records WHERE id IN (SELECT value FROM json_each(?))"
# Of calls that ended while no records were made.
_CLEAN_NO_RECORDS = """
    DELETE FROM call_records WHERE record IS NULL AND id NOT IN (SELECT id FROM calls)
"""
_DUE_RECORDS = """
    SELECT json_group_array(json_array(id, json(record), json(begun), json(ended))) FROM (
        SELECT * FROM call_records WHERE record != '' AND ended != '' ORDER BY id LIMIT ?
    )
"""
_TRIM_RECORDS = """
    DELETE FROM call_records WHERE record != '' AND ended != '' AND id <= (
        SELECT id FROM call_records WHERE record != '' AND ended != ''
        ORDER BY id DESC LIMIT 1 OFFSET ?
    )
"""
# The events that wait after a serial, in order. They come as one JSON text, because each row that
# is fetched gives the interpreter's lock away, as in `_write_calls`.
_WAITING = """
    SELECT json_group_array(json_array(serial, id, api, json(event), attempts, answer, party))
    FROM (
        SELECT begin_serial AS serial, id, api, begin_event AS event,
            coalesce(attempts, 0) AS attempts, coalesce(answer, '') AS answer, '' AS party
        FROM calls WHERE api = ?1 AND begin_serial > 0 AND begin_serial > ?2
        UNION ALL
        SELECT end_serial, id, api, end_event,
            iif(begin_serial > 0, 0, coalesce(attempts, 0)),
            iif(begin_serial > 0, '', coalesce(answer, '')), coalesce(party, '')
        FROM calls WHERE api = ?1 AND end_serial > 0 AND end_serial > ?2
        ORDER BY serial LIMIT ?3
    )
"""
_WAITING_COUNTS = """
    SELECT api, count(*) FROM (
        SELECT api FROM calls WHERE begin_serial > 0
        UNION ALL SELECT api FROM calls WHERE end_serial > 0
    ) GROUP BY api
"""
_REJECTED = """
    SELECT json_group_array(json_array(serial, id, api, json(event), attempts, answer, '')) FROM (
        SELECT * FROM rejected WHERE retry = ?1 AND serial > ?2 ORDER BY serial LIMIT ?3
    )
"""
# Rejected events of some Call-IDs or transaction tags, or all of them.
_OF_CALLS = """
    WHERE ?1 = '[]' OR json_extract(event, '$[1]') IN (SELECT value FROM json_each(?1))
    OR json_extract(event, '$[3]') IN (SELECT value FROM json_each(?1))
"""


@cache
def _write_calls(number: int) -> str:
    """The statement that writes so many rows, those without an id left out.

    One for all rows: each call into sqlite3 gives the interpreter's lock away, and gets it back
    from a busy event loop only after a switch interval. The number is a power of two, so that a few
    prepared statements do. Values are bound: a JSON text of them costs three times as much.
    """
    rows = ", ".join([f"({', '.join('?' * (1 + len(_COLUMNS)))})"] * number)
    return f"""
        INSERT INTO calls (id, {", ".join(_COLUMNS)})
        SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL
        ON CONFLICT (id) DO UPDATE SET
        {", ".join(f"{name} = coalesce(excluded.{name}, {name})" for name in _COLUMNS)}
    """


def _newer(old: list[str | None] | None, new: list[str | None] | None) -> list[str | None] | None:
    """What is noted of a call record, where more was noted since."""
    if old is None or new is None:
        return new
    return [then if now is None else now for then, now in zip(old, new, strict=True)]


def _unpack_waiting(text: str) -> list[RatingEvent]:
    events = []
    for serial, row, api_url, values, attempts, answer, party in json.loads(text):
        event = unpack_event(values, api_url, row, serial)
        event.attempts, event.answer = attempts, answer
        if party:
            event.keep_only(party)
        events.append(event)
    return sorted(events, key=attrgetter("serial"))


def inspect_journal(folder: str) -> str:
    """The path of the journal in a state_dir, "" where there is none yet; changes nothing.

    Raises ConfigError for a folder that can't be used, and for a file that is damaged, another
    program's or a newer version's.
    """
    if not os.path.isdir(folder):
        parent = os.path.dirname(os.path.abspath(folder))
        if os.path.exists(folder):
            raise _unfit(folder, "not a folder", "a folder, or a path at which to make one")
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
            raise _unfit(folder, "cannot be made", "a folder in one that is there and writable")
        return ""
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise _unfit(folder, "not writable", "a folder that this user may read and write")
    path = os.path.join(folder, JOURNAL_FILE)
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _unfit(path, str(error.strerror), "a file that this user may read") from None
    _check_head(path, head)
    _check_content(path)
    return path


def _unfit(path: str, text: str, allowed: str) -> ConfigError:
    return ConfigError(printable(f"state_dir: {path}: {text}; allowed: {allowed}"))


def _check_head(path: str, head: bytes) -> None:
    # Read here and not through SQLite, which writes to what it opens. SQLite's file format, 1.3.
    if head[:16] != b"SQLite format 3\0" or head[68:72] != _JOURNAL_ID.to_bytes(4, "big"):
        raise _unfit(path, "a file of another program, left untouched", "a folder of its own")
    version = int.from_bytes(head[60:64], "big")
    if version != JOURNAL_VERSION:
        written = "an earlier tree" if version < JOURNAL_VERSION else "a newer agent"
        raise _unfit(
            path,
            f"version {version}, written by {written}, left untouched",
            f"version {JOURNAL_VERSION}, or an empty folder",
        )


def _check_content(path: str) -> None:
    try:
        # A reader never checkpoints, so the file itself stays as it is.
        with closing(_connect(path, "ro")) as db:
            fault = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
            db.execute("SELECT count(*) FROM rejected").fetchone()
    except sqlite3.OperationalError as error:
        raise _unfit(path, str(error), "a file that can be read") from None
    except sqlite3.DatabaseError as error:
        fault = str(error)
    if fault != "ok":
        fault = " ".join(fault.replace("*", "").split())
        raise _unfit(path, f"damaged, left untouched: {fault}", "a whole file, or none")


# Seconds to wait for a lock, which `outbox retry` and `outbox drop` hold for milliseconds.
JOURNAL_BUSY = 5.0


def _connect(path: str, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(path)}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=JOURNAL_BUSY,
    )


def sync_folder(path: str) -> None:
    """Make the names in a folder outlive a power cut, as fsync does its files. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _wal_frames(path: str) -> tuple[int, int]:
    """How many frames a write-ahead log has, and how many octets after the last whole one.

    SQLite drops what comes after the last whole commit, and does not say so. Frames of an earlier
    round of the log have other salts (SQLite's file format, section 4.1).
    """
    try:
        with open(path, "rb") as file:
            header = file.read(32)
            size = os.fstat(file.fileno()).st_size
            if len(header) < 32 or header[:3] != b"\x37\x7f\x06":
                return 0, size
            frame = 24 + int.from_bytes(header[8:12], "big")
            frames = 0
            while 32 + (frames + 1) * frame <= size:
                salts = os.pread(file.fileno(), 24, 32 + frames * frame)[8:16]
                if salts not in (header[16:24], bytes(8)):
                    return frames, 0
                frames += 1
            return frames, size - 32 - frames * frame
    except OSError:
        return 0, 0


# What became of an event, in a call record; the other two are DELIVERED and REJECTED.
LOST = "lost"
# Call records that wait in the journal for a file that can't be written, some 1 kB each, and in
# memory for a journal that can't. Over that the oldest are lost.
MAX_RECORDS = 1_000_000
MAX_RECORDS_IN_MEMORY = 100_000
# Events that are read from the journal at once; the event loop waits while they are unpacked.
MAX_LOADED = 500
# Rows of one transaction; the event loop waits while they are put together.
JOURNAL_GROUP = 2_000
# Seconds between attempts to return to a journal that failed.
JOURNAL_RETRY = 5.0
# Octets to which the write-ahead log is cut when a long commit made it larger.
JOURNAL_WAL = 64 * 1024 * 1024


class Journal:
    """The store of an agent alone: one SQLite file in ``state_dir``.

    `commit` writes in a thread of gevent's pool, so that the event loop never waits for the disk.
    When it fails, what was noted stays in memory, and a later commit tries again. ``torn`` says
    what a power cut left of the last commits, "" for nothing. Raises ConfigError, as
    `inspect_journal` does, and where another agent works in the same folder.
    """

    def __init__(self, folder: str, records: bool = False) -> None:
        path = inspect_journal(folder)
        # Whether call records are made, and how many of them were lost.
        self._recording = records
        self.records_lost = 0
        self.due = gevent.event.Event()
        self.failure = ""
        self.torn = ""
        self.answered: list[RatingEvent] = []
        self._lock = self._lock_folder(folder)
        try:
            self._db = self._open(folder, path)
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            self._lock.close()
            raise ConfigError(
                f"state_dir: {folder}: {reason}; allowed: a folder with room for a file"
            ) from None
        self._pool = gevent.threadpool.ThreadPool(1)
        self._job: Any = None
        self._pending: dict[int, list[Any]] = {}
        self._writing: dict[int, list[Any]] = {}
        self._rejected: dict[int, list[Any] | None] = {}
        self._rejecting: dict[int, list[Any] | None] = {}
        # By row: record, begun and ended as on disk, None for what is unchanged; or None to delete.
        self._records: dict[int, list[str | None] | None] = {}
        self._writing_records: dict[int, list[str | None] | None] = {}
        self._retry_at = self._started = 0.0
        (self.last_serial,) = self._db.execute(
            "SELECT max((SELECT coalesce(max(max(id, coalesce(begin_serial, 0),"
            " coalesce(end_serial, 0))), 0) FROM calls),"
            " (SELECT coalesce(max(max(id, serial)), 0) FROM rejected),"
            " (SELECT coalesce(max(id), 0) FROM call_records))"
        ).fetchone()
        # Rows up to this one may be on disk. A later one that is done before a commit is never
        # written.
        self._highest = self.last_serial

    @staticmethod
    def _lock_folder(folder: str) -> io.FileIO:
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            lock = io.FileIO(
                os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600), "r+"
            )
        except OSError as error:
            raise ConfigError(
                f"state_dir: {folder}: {error.strerror}; allowed: a folder that can be written"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = lock.read(20).decode("latin-1").strip()
            lock.close()
            raise ConfigError(
                f"state_dir: {folder}: in use by another agent, process {pid}; "
                "allowed: one agent for each folder"
            ) from None
        with suppress(OSError):
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
        return lock

    def _open(self, folder: str, path: str) -> sqlite3.Connection:
        if not path:
            path = os.path.join(folder, JOURNAL_FILE)
            # It has another name until it is whole, so that no half-made file is taken for one.
            with suppress(FileNotFoundError):
                os.unlink(path + ".new")
            with closing(_connect(path + ".new", "rwc")) as db:
                self._create(db)
            os.chmod(path + ".new", 0o600)
            os.rename(path + ".new", path)
            sync_folder(folder)
        frames, rest = _wal_frames(path + "-wal")
        db = _connect(path, "rw")
        db.execute("PRAGMA journal_mode = WAL")
        # A commit is on disk when it returns, whatever happens to the power.
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_RECORDS_SCHEMA)
        if self._recording:
            db.execute(_CLEAN_NO_RECORDS)
        db.execute(f"PRAGMA journal_size_limit = {JOURNAL_WAL}")
        whole = max(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1], 0)
        if frames > whole or rest:
            torn = max(frames - whole, 0)
            self.torn = f"{torn} pages and {rest} octets behind the last whole commit"
        return db

    @staticmethod
    def _create(db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA application_id = {_JOURNAL_ID}")
        db.execute(f"PRAGMA user_version = {JOURNAL_VERSION}")
        db.executescript(_SCHEMA)

    # What a start takes back

    def load_calls(self) -> Iterator[tuple[int, str]]:
        """The calls as `CallTable.restore` needs them: row and text of `pack_call`."""
        return self._db.execute("SELECT id, call FROM calls WHERE call != ''")

    def count_events(self) -> dict[str, int]:
        """How many events wait for each API, by its URL."""
        return dict(self._db.execute(_WAITING_COUNTS).fetchall())

    def load_given_up(self) -> list[CallKey]:
        """The running calls whose begin was rejected."""
        keys = []
        for api_url, begin in self._db.execute(
            "SELECT api, begin_event FROM calls WHERE given_up = 1 AND call != ''"
        ):
            keys.append(unpack_event(json.loads(begin), api_url, 0, 0).key)
        return keys

    def load_one_sided(self) -> dict[CallKey, str]:
        """The running calls that were begun with one party alone, and which."""
        return {
            unpack_event(json.loads(begin), api_url, 0, 0).key: party
            for api_url, begin, party in self._db.execute(
                "SELECT api, begin_event, party FROM calls WHERE party != '' AND end_event IS NULL"
            )
        }

    # What is written

    def put_call(self, row: int, text: str) -> None:
        """Note a call that is new or has changed, as `pack_call` writes it."""
        self._change(row, call=text)

    def drop_call(self, row: int) -> None:
        """Note that a call has left the table; its events stay while they wait."""
        self._change(row, call=_NO_CALL)

    def put_event(self, event: RatingEvent) -> None:
        """Note an event that waits from now on."""
        event.store = self
        values = {
            f"{event.kind}_event": _compact_json(event.pack()),
            f"{event.kind}_serial": event.serial,
        }
        self._change(event.row, api=event.api_url, **values)

    def put_attempt(self, event: RatingEvent) -> None:
        """Note that an event was tried and still waits: its attempts and the last answer."""
        self._change(event.row, attempts=event.attempts, answer=event.answer)

    def drop_event(self, event: RatingEvent, result: str = DELIVERED) -> None:
        """Note that an event waits no more: DELIVERED, REJECTED or LOST."""
        values = {f"{event.kind}_event": "", f"{event.kind}_serial": _NO_EVENT}
        if event.kind == "begin" and event.left_out:
            values |= {"begin_event": _compact_json(event.pack()), "party": event.party}
        self._change(event.row, attempts=0, answer="", **values)
        if self._recording:
            result = _compact_json([event.attempts, result])
            self._note_record(event.row, **{f"{event.kind}_result": result})

    def reject_event(self, event: RatingEvent) -> None:
        """Note that an event waits no more, and keep it for an operator."""
        self.drop_event(event, REJECTED)
        if event.kind == "begin":
            self._change(event.row, begin_event=_compact_json(event.pack()), given_up=1)
        packed = [event.row, event.api_url, event.pack(), event.attempts, event.answer]
        self._rejected[event.serial] = packed
        if len(self._rejected) > MAX_REJECTED:
            del self._rejected[next(iter(self._rejected))]

    def retry_event(self, event: RatingEvent, serial: int) -> None:
        """Note that a rejected event waits again, with a new serial."""
        self._rejected[event.serial] = None
        event.serial = serial
        self.put_event(event)
        if event.kind == "begin":
            self._change(event.row, given_up=0)

    def put_record(self, row: int, text: str, charged: bool) -> None:
        """Note the record of a call that is over; of a charged one once its end waits no more."""
        self._note_record(row, record=text, end_result=None if charged else "[null,null]")

    def drop_records(self, rows: Iterable[int]) -> None:
        """Note that the lines of these records are in their file."""
        self._records.update(dict.fromkeys(rows))
        self.due.set()

    def holds(self, rows: Iterable[int]) -> bool:
        """Whether something is noted of these records that is not on disk yet."""
        return any(row in self._records or row in self._writing_records for row in rows)

    def _note_record(
        self,
        row: int,
        record: str | None = None,
        begin_result: str | None = None,
        end_result: str | None = None,
    ) -> None:
        new = [record, begin_result, end_result]
        self._records[row] = _newer(self._records.get(row), new)
        if len(self._records) > MAX_RECORDS_IN_MEMORY:
            del self._records[next(iter(self._records))]
            self.records_lost += 1
        self.due.set()

    def _change(self, row: int, **values: Any) -> None:
        columns = self._pending.get(row)
        if columns is None:
            columns = self._pending[row] = [_UNCHANGED] * len(_COLUMNS)
        for name, value in values.items():
            columns[_PLACES[name]] = value
        if row > self._highest and self._is_done(columns):
            del self._pending[row]
        self.due.set()

    @staticmethod
    def _is_done(columns: Sequence[Any]) -> bool:
        serials = (columns[_PLACES["begin_serial"]], columns[_PLACES["end_serial"]])
        return columns[_PLACES["call"]] == _NO_CALL and set(serials) <= {_UNCHANGED, _NO_EVENT}

    @property
    def unwritten(self) -> int:
        """How many rows are not on disk yet."""
        return len(self._pending) + len(self._writing)

    def commit(self, patience: float | None = None) -> bool:
        """Write what was noted so far, in the calling greenlet. Returns whether it is on disk.

        ``patience`` is how many seconds the disk may take. The default is JOURNAL_STALL. While the
        journal fails, the default is not to wait, and to try again each JOURNAL_RETRY.
        """
        while self._job is not None or self._pending or self._rejected or self._records:
            if self._job is None:
                if patience is None and self.failure and time.monotonic() < self._retry_at:
                    return False
                self._start_writing()
            least = 0.001 if self.failure else JOURNAL_STALL
            self._job.wait(timeout=least if patience is None else patience)
            if not self._job.ready():
                late = patience is not None or time.monotonic() - self._started >= JOURNAL_STALL
                return self._fail("the disk does not answer") if late else False
            error, self._job = self._job.get(), None
            if error:
                self._note_again()
                return self._fail(error)
            self._writing, self._rejecting, self._writing_records = {}, {}, {}
        return self._succeed()

    def _start_writing(self) -> None:
        rows = list(islice(self._pending, JOURNAL_GROUP))
        self._writing = {row: self._pending.pop(row) for row in rows}
        self._rejecting, self._rejected = self._rejected, {}
        self._highest = max([self._highest, *rows])
        size = 1 << max(len(rows) - 1, 0).bit_length()
        values = [value for row, columns in self._writing.items() for value in (row, *columns)]
        values += [None] * ((size - len(rows)) * (1 + len(_COLUMNS)))
        done = [
            row
            for row, columns in self._writing.items()
            if _NO_CALL in columns or _NO_EVENT in columns
        ]
        rejected = [[serial, *packed] for serial, packed in self._rejecting.items() if packed]
        retried = [serial for serial, packed in self._rejecting.items() if packed is None]
        self._writing_records, self._records = self._records, {}
        records = [[row, *noted] for row, noted in self._writing_records.items() if noted]
        filed = [row for row, noted in self._writing_records.items() if noted is None]
        self._started = time.monotonic()
        lists = (done, rejected, retried, records, filed)
        self._job = self._pool.spawn(self._write, values, *map(_compact_json, lists))

    def _write(
        self, calls: list[Any], done: str, rejected: str, retried: str, records: str, filed: str
    ) -> str:
        """In the pool's thread: one transaction; returns what went wrong, "" for nothing."""
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            db.execute(_write_calls(len(calls) // (1 + len(_COLUMNS))), calls)
            db.execute(_CLEAN_CALLS, (done,))
            if rejected != "[]" or retried != "[]":
                db.execute(_WRITE_REJECTED, (rejected,))
                db.execute(_CLEAN_REJECTED, (retried, MAX_REJECTED))
            if records != "[]" or filed != "[]":
                db.execute(_WRITE_RECORDS, (records,))
                db.execute(_CLEAN_RECORDS, (filed,))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return str(error)
        return ""

    def _note_again(self) -> None:
        for row, columns in self._pending.items():
            older = self._writing.get(row, columns)
            self._writing[row] = [
                old if new is _UNCHANGED else new for old, new in zip(older, columns, strict=True)
            ]
        self._pending, self._writing = self._writing, {}
        self._rejected, self._rejecting = {**self._rejecting, **self._rejected}, {}
        for row, noted in self._records.items():
            self._writing_records[row] = _newer(self._writing_records.get(row), noted)
        self._records, self._writing_records = self._writing_records, {}

    def _fail(self, error: str) -> bool:
        now = time.monotonic()
        if not self.failure or now >= self._retry_at:
            extra = {"event": "journal_failed", "rows": len(self._pending)}
            log.error("the journal cannot be written, going on from memory: %s", error, extra=extra)
            self._retry_at = now + JOURNAL_RETRY
        self.failure = error
        return False

    def _succeed(self) -> bool:
        if self.failure:
            self.failure = ""
            log.warning("the journal is written again", extra={"event": "journal_back"})
        return True

    # What is read while the agent runs

    def _read(self, query: str, *values: Any) -> Any:
        """The first row of a query, read in the pool's thread. Raises StoreError."""
        return self._in_thread(lambda: self._db.execute(query, values).fetchone())

    def _execute(self, query: str, *values: Any) -> int:
        """How many rows a statement has changed, in the pool's thread. Raises StoreError."""
        return int(self._in_thread(lambda: self._db.execute(query, values).rowcount))

    def _in_thread(self, ask: Callable[[], Any]) -> Any:
        def safely() -> Any:
            try:
                return ask()
            except sqlite3.Error as error:
                return StoreError(str(error))

        result = self._pool.spawn(safely).get()
        if isinstance(result, StoreError):
            raise result
        return result

    def load_events(self, api_url: str, after: int, limit: int) -> list[RatingEvent]:
        """Up to ``limit`` events that wait for an API, after a serial, in order.

        Raises StoreError.
        """
        events = _unpack_waiting(self._read(_WAITING, api_url, after, limit)[0])
        for event in events:
            event.store = self
        return events

    def count_rejected(self) -> int:
        """How many rejected events are kept. Raises StoreError."""
        return int(self._read("SELECT count(*) FROM rejected")[0])

    def load_retries(self) -> list[RatingEvent]:
        """Rejected events that an operator wants to be sent again. Raises StoreError."""
        return _unpack_waiting(self._read(_REJECTED, 1, 0, MAX_LOADED)[0])

    def load_records(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Up to ``limit`` call records that are whole: row, and fields with those of delivery.

        Raises StoreError.
        """
        whole = []
        for row, record, begun, ended in json.loads(self._read(_DUE_RECORDS, limit)[0]):
            begin_attempts, result = begun or (None, None)
            end_attempts, end_result = ended
            record["begin_attempts"], record["end_attempts"] = begin_attempts, end_attempts
            record["delivery"] = end_result if result in (None, DELIVERED) else result
            whole.append((row, record))
        return whole

    def trim_records(self) -> None:
        """Forget the oldest whole call records over MAX_RECORDS. Raises StoreError."""
        self.records_lost += self._execute(_TRIM_RECORDS, MAX_RECORDS)

    @staticmethod
    def may_send(_: float) -> bool:
        """Whether a request that takes so many seconds may be sent: nobody else has this file."""
        return True

    def close(self, patience: float) -> None:
        """Close the file and unlock the folder; ``patience`` is how many seconds that may take."""
        self._pool.spawn(self._db.close).wait(timeout=patience)
        self._lock.close()


# Call records that are read from the journal and written to their file at once.
MAX_RECORDS_AT_ONCE = 500
# Octets that are read at once from the end of that file, to find the last lines.
TAIL_READ = 1 << 20
_RECORD_KEY = "call_record"
_RECORD_START = f'{{"{_RECORD_KEY}":"'.encode()
_RECORD_ID = re.compile(rb"^" + re.escape(_RECORD_START) + rb'(\w+)"', re.M)


class RecordFile:
    """Where the lines of call records go: a file, or the standard output for ``-``.

    The ids of the lines that it wrote last, also those that it finds when it is opened, are not
    written again. All is done in a thread of gevent's pool, but for the first opening, which raises
    ConfigError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.failure = ""
        self._pool = gevent.threadpool.ThreadPool(1)
        self._written: set[str] = set()
        self._file = -1
        self._stale = False
        try:
            self._open()
        except OSError as error:
            raise ConfigError(
                printable(
                    f"call_records: {path}: {error.strerror}; allowed: a file of call records that "
                    "can be written, a path at which to make one, or -"
                )
            ) from None

    def reopen(self) -> None:
        """Open the path anew before the next line: the file there may have been moved away."""
        self._stale = True

    def write(self, lines: Sequence[tuple[str, bytes]]) -> str:
        """Write lines by their ids, in the calling greenlet; returns what went wrong, or ""."""
        self.failure = str(self._pool.spawn(self._write, lines).get())
        return self.failure

    def _write(self, lines: Sequence[tuple[str, bytes]]) -> str:
        try:
            if self._stale or self._file < 0:
                self._close()
                self._open()
            fresh = [(name, line) for name, line in lines if name not in self._written]
            if self.path == "-":
                # One by one, so that what others write comes between whole lines.
                for name, line in fresh:
                    _write_all(self._file, line)
                    self._written.add(name)
            else:
                _write_all(self._file, b"".join(line for _, line in fresh))
                os.fsync(self._file)
            self._written = {name for name, _ in lines}
        except OSError as error:
            # Opening it again finds out how much of that is there.
            self._stale = True
            return error.strerror or type(error).__name__
        return ""

    def _close(self) -> None:
        if self._file > 2:
            os.close(self._file)
        self._file = -1

    def _open(self) -> None:
        self._stale = False
        if self.path == "-":
            self._file = 1
            return
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self.path, flags, 0o640)
        try:
            if not S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a file")
            self._written |= _look_back(file)
            sync_folder(os.path.dirname(os.path.abspath(self.path)))
        except BaseException:
            os.close(file)
            raise
        self._file = file


def _look_back(file: int) -> set[str]:
    """The ids of the last lines; a line that was cut short is taken away. Raises OSError."""
    end, tail = os.fstat(file).st_size, b""
    if os.pread(file, len(_RECORD_START), 0) != _RECORD_START[:end]:
        raise OSError(errno.EINVAL, "a file of something else, left untouched")
    while len(tail) < end and tail.count(b"\n") <= MAX_RECORDS_AT_ONCE:
        start = max(end - len(tail) - TAIL_READ, 0)
        tail = os.pread(file, end - len(tail) - start, start) + tail
    rest = len(tail) - tail.rfind(b"\n") - 1
    if rest:
        os.ftruncate(file, end - rest)
    return {found.decode() for found in _RECORD_ID.findall(tail[: len(tail) - rest])}


def _write_all(file: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(file, view) :]


# Room: Redis

# Several agents, one set of calls. Any agent takes in any packet and appends it to the stream of
# its shard in Redis; each shard has one owner, the agent that holds its lease. The owner reads the
# stream, feeds a call table and commits what changed, what waits for delivery and how far it has
# read in one atomic step, which Redis refuses to anybody else. So a new owner goes on exactly where
# the last commit was, and what it reads again was never counted.
#
#   NAME:config      hash    version, number of shards, whether routes tie legs, salt of the hash
#   NAME:agents      zset    agents by the time of their last beat; NAME:agent has their status
#   NAME:appended    hash    of each agent: the last group of frames that it appended
#   NAME:lease:K     string  the token of the owner of shard K; expires
#   NAME:stream:K    stream  frames that were taken in; f: the frame, s: a stray of another shard
#   NAME:meta:K      hash    position in the stream, clock, lag, last row given, number of owners so
#                            far, last commit; gap where Redis has lost one that it had confirmed
#   NAME:calls:K     hash    ROW:c the facts of a call, ROW:b and ROW:e its events
#   NAME:rejected:K  zset    rejected events by serial; NAME:retry:K those to be sent again
#   NAME:tags        hash    From tags of running calls: the shard, or #N where N calls have it
#
# Redis may come back without the last that it had confirmed: a failover to a replica, a power cut
# with `appendfsync everysec`, a disk that is lost. Agents notice: a commit that does not follow the
# one before, a lease that nobody has. Then the owner writes all that it knows of the shard again,
# and each agent appends once more what Redis has lost of its frames; a copy adds no fact.
#
# The clock of a shard is the time of its stream, so it never runs ahead of what is unread. Leases
# go by CLOCK_BOOTTIME here, which goes on while the machine sleeps: who woke up owns nothing.

# Seconds for one answer of Redis.
REDIS_TIMEOUT = 2.0
# Fields of a hash read at once.
SCAN_GROUP = 500
# What the keys hold.
CLUSTER_VERSION = "1"
# Bits of a row's number that count calls; those above say which shard.
_ROW_BITS = 40

BEAT_SCRIPT = """
local p, t = ARGV[1], redis.call('TIME')
local ms = t[1] * 1000 + math.floor(t[2] / 1000)
-- A write that needs no memory first: then Redis refuses none of the others for want of it.
redis.call('ZREM', p .. 'agents', '')
redis.call('ZADD', p .. 'agents', ms, ARGV[2])
redis.call('HSET', p .. 'agent', ARGV[2], ARGV[3])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', p .. 'agents', '-inf', ms - ARGV[4])) do
  redis.call('ZREM', p .. 'agents', id)
  redis.call('HDEL', p .. 'agent', id)
  redis.call('HDEL', p .. 'appended', id)
end
local lost, retry, free, rejected, entries = {}, {}, {}, 0, 0
for i = 7, #ARGV, 3 do
  local lease, meta = p .. 'lease:' .. ARGV[i], p .. 'meta:' .. ARGV[i]
  local owner = redis.call('GET', lease)
  if not owner and tonumber(redis.call('HGET', meta, 'owners') or 0) <= tonumber(ARGV[i + 2]) then
    -- Nobody has had it since, so Redis has lost the lease.
    redis.call('HSET', meta, 'owners', ARGV[i + 2])
    owner = ARGV[i + 1]
  end
  if owner == ARGV[i + 1] then
    redis.call('SET', lease, owner, 'PX', ARGV[5])
    if redis.call('EXISTS', p .. 'retry:' .. ARGV[i]) == 1 then retry[#retry + 1] = ARGV[i] end
  else
    lost[#lost + 1] = ARGV[i]
  end
end
for k = 0, ARGV[6] - 1 do
  if redis.call('EXISTS', p .. 'lease:' .. k) == 0 then free[#free + 1] = k end
  rejected = rejected + redis.call('ZCARD', p .. 'rejected:' .. k)
  entries = entries + redis.call('XLEN', p .. 'stream:' .. k)
end
local salt = redis.call('HGET', p .. 'config', 'salt') or ''
return {ms, redis.call('HVALS', p .. 'agent'), lost, free, retry, rejected, entries, salt}
"""

# Of each shard: values, then lists, each after its length. Answers 0 where another agent is the
# owner and 3 where nobody is. It answers 1 where it has committed, and 2 if a commit before that
# has gone, until all was written again (`before` is *). A commit whose answer was lost is sent
# again, and is done once.
COMMIT_SCRIPT = """
local p, at, done = ARGV[1], 3, {}
local function list(width)
  local first = at + 1
  at = first + ARGV[at] * width
  return first, at - 1
end
local function each(first, last, command, key)
  for i = first, last, 1000 do
    redis.call(command, key, unpack(ARGV, i, math.min(i + 999, last)))
  end
end
while ARGV[at] do
  local k, token, commit, before, position, trim, clock, lag, serial = unpack(ARGV, at, at + 8)
  at = at + 9
  local sets, sets_end = list(2)
  local dels, dels_end = list(1)
  local rejects, rejects_end = list(1)
  local retried, retried_end = list(1)
  local tags, tags_end = list(1)
  local untags, untags_end = list(1)
  local strays, strays_end = list(3)
  local owner = redis.call('GET', p .. 'lease:' .. k)
  local ours = owner == token
  local known, gap = unpack(redis.call('HMGET', p .. 'meta:' .. k, 'commit', 'gap'))
  local whole, done_before = before == '*', known == commit
  gap = not whole and (gap or not done_before and (known or '') ~= before)
  done[#done + 1] = ours and (gap and 2 or 1) or owner and 0 or 3
  if ours and not done_before then
    -- A write that needs no memory first: then Redis refuses none of the others for want of it.
    redis.call('SREM', p .. 'retry:' .. k, '')
    redis.call('HSET', p .. 'meta:' .. k,
      'position', position, 'clock', clock, 'lag', lag, 'serial', serial, 'commit', commit)
    if gap then redis.call('HSET', p .. 'meta:' .. k, 'gap', 1) end
    if whole then redis.call('HDEL', p .. 'meta:' .. k, 'gap') end
    each(sets, sets_end, 'HSET', p .. 'calls:' .. k)
    each(dels, dels_end, 'HDEL', p .. 'calls:' .. k)
    each(rejects, rejects_end, 'ZADD', p .. 'rejected:' .. k)
    if rejects_end > rejects then
      redis.call('ZREMRANGEBYRANK', p .. 'rejected:' .. k, 0, -1 - ARGV[2])
    end
    for i = retried, retried_end do
      redis.call('ZREMRANGEBYSCORE', p .. 'rejected:' .. k, ARGV[i], ARGV[i])
      redis.call('SREM', p .. 'retry:' .. k, ARGV[i])
    end
    for i = tags, tags_end do
      local tag = redis.call('HGET', p .. 'tags', ARGV[i])
      local count = tag and (tonumber(tag:match('^#(%d+)$')) or 1)
      -- Of all that is written again, most tags were not lost.
      if not (whole and count) then
        tag = count and '#' .. string.format('%d', count + 1) or k
        redis.call('HSET', p .. 'tags', ARGV[i], tag)
      end
    end
    for i = untags, untags_end do
      local tag = redis.call('HGET', p .. 'tags', ARGV[i]) or ''
      local count = tonumber(tag:match('^#(%d+)$')) or 1
      if count > 1 then
        redis.call('HSET', p .. 'tags', ARGV[i], '#' .. string.format('%d', count - 1))
      else
        redis.call('HDEL', p .. 'tags', ARGV[i])
      end
    end
    for i = strays, strays_end, 3 do
      local to = redis.call('HMGET', p .. 'tags', ARGV[i], ARGV[i + 1])
      for _, shard in ipairs({to[1] or '', to[2] or ''}) do
        if shard:match('^%d+$') and shard ~= k then
          redis.call('XADD', p .. 'stream:' .. shard, '*', 's', ARGV[i + 2])
        end
      end
    end
    if trim ~= '' then redis.call('XTRIM', p .. 'stream:' .. k, 'MINID', '=', trim) end
  end
end
return done
"""

TAKE_SCRIPT = """
redis.call('SREM', ARGV[1] .. 'retry:' .. ARGV[2], '')
if not redis.call('SET', ARGV[1] .. 'lease:' .. ARGV[2], ARGV[3], 'NX', 'PX', ARGV[4]) then
  return false
end
local meta = ARGV[1] .. 'meta:' .. ARGV[2]
redis.call('HINCRBY', meta, 'owners', 1)
return redis.call('HMGET', meta, 'position', 'clock', 'lag', 'serial', 'commit', 'owners')
"""

RELEASE_SCRIPT = """
local done = 0
for i = 2, #ARGV, 2 do
  if redis.call('GET', ARGV[1] .. 'lease:' .. ARGV[i]) == ARGV[i + 1] then
    done = done + redis.call('DEL', ARGV[1] .. 'lease:' .. ARGV[i])
    -- Else a beat that is under way would take it for lost.
    redis.call('HINCRBY', ARGV[1] .. 'meta:' .. ARGV[i], 'owners', 1)
  end
end
return done
"""


def boottime() -> float:
    """Seconds of a clock that also goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def pack_frame(data: bytes, arrival: int, sender: str) -> bytes:
    """A HEP packet with its arrival in microseconds and its sender's address."""
    address = sender.encode("latin-1", "replace")[:255]
    return struct.pack("!QB", arrival, len(address)) + address + data


def unpack_frame(frame: bytes) -> tuple[bytes, int, str]:
    """What `pack_frame` was given. Raises struct.error."""
    arrival, length = struct.unpack_from("!QB", frame)
    return frame[9 + length :], arrival, frame[9 : 9 + length].decode("latin-1")


class RedisError(AgentError):
    """Redis gave no answer, or one that is a fault; ``kind`` is the client's name for it."""


class RedisPool:
    """Where Redis is: ``redis://``, ``rediss://``, ``unix://`` or ``sentinel://HOST,HOST/MASTER/DB``.

    The client is imported here, so that only who uses a cluster needs it. Raises ConfigError.
    """

    def __init__(self, url: str, password: str = "") -> None:
        try:
            import redis
            import redis.sentinel
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError(
                "cluster_url: the client of Redis is not installed; "
                "allowed: pip install 'rating-agent-hep[cluster]'"
            ) from None
        self.errors = (redis.RedisError, OSError)
        self.refusal = redis.ResponseError
        more: dict[str, Any] = {
            "socket_timeout": REDIS_TIMEOUT,
            "socket_connect_timeout": REDIS_TIMEOUT,
            "socket_keepalive": True,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "client_name": "rating-agent-hep",
        }
        if password:
            more["password"] = password
        try:
            if url.startswith("sentinel://"):
                self._pool = self._of_sentinels(redis.sentinel, urlsplit(url), more)
            else:
                if url.startswith("unix:"):
                    del more["socket_keepalive"]
                self._pool = redis.ConnectionPool.from_url(url, **more)
        except ValueError as error:
            raise ConfigError(f"cluster_url: {error}; allowed: a URL of Redis") from None

    @staticmethod
    def _of_sentinels(sentinel: Any, parts: Any, more: dict[str, Any]) -> Any:
        hosts = [split_address(host) for host in parts.netloc.rpartition("@")[2].split(",")]
        master, _, database = parts.path.strip("/").partition("/")
        if not master:
            raise ConfigError("cluster_url: no master; allowed: sentinel://HOST:PORT,.../MASTER/DB")
        if parts.username:
            more = {**more, "username": parts.username}
        watchers = sentinel.Sentinel(hosts, sentinel_kwargs={"socket_timeout": REDIS_TIMEOUT})
        return sentinel.SentinelConnectionPool(
            master, watchers, db=int(database or 0), check_connection=False, **more
        )

    def connect(self) -> Any:
        """A new connection, not yet connected."""
        return self._pool.make_connection()


class RedisLink:
    """One connection, for one greenlet at a time: commands in a pipeline, answers in order."""

    def __init__(self, pool: RedisPool) -> None:
        self._pool = pool
        self._connection: Any = None

    def ask(self, *commands: Sequence[Any]) -> list[Any]:
        """The answers to some commands; one that Redis refused is a RedisError in its place.

        Raises RedisError where no answer came; whether the commands were carried out is unknown,
        then.
        """
        pool = self._pool
        limit = gevent.Timeout(REDIS_TIMEOUT)
        try:
            with limit:
                if self._connection is None:
                    self._connection = pool.connect()
                    self._connection.connect()
                connection = self._connection
                connection.send_packed_command(connection.pack_commands(commands), False)
                answers = [self._answer(connection) for _ in commands]
        except gevent.Timeout as timeout:
            self.close()
            if timeout is not limit:
                raise
            raise RedisError("timeout", "no answer in time") from None
        except pool.errors as error:
            self.close()
            kind = type(error).__name__
            raise RedisError(kind, " ".join(str(error).split()) or kind) from None
        except BaseException:
            # A greenlet that is killed here leaves answers unread.
            self.close()
            raise
        if any(isinstance(x, RedisError) and x.kind == "ReadOnlyError" for x in answers):
            # The master is another one by now.
            self.close()
        return answers

    def _answer(self, connection: Any) -> Any:
        try:
            return connection.read_response(disconnect_on_error=False)
        except self._pool.refusal as error:
            return RedisError(type(error).__name__, str(error))

    def one(self, *command: Any) -> Any:
        """The answer to one command. Raises RedisError, also for a refusal."""
        (answer,) = self.ask(command)
        if isinstance(answer, RedisError):
            raise answer
        return answer

    def run(self, script: str, *arguments: Any) -> Any:
        """What a Lua script answers; it is loaded where it is unknown. Raises RedisError."""
        digest = hashlib.sha1(script.encode()).hexdigest()
        (answer,) = self.ask(("EVALSHA", digest, 0, *arguments))
        if isinstance(answer, RedisError) and answer.kind == "NoScriptError":
            return self.one("EVAL", script, 0, *arguments)
        if isinstance(answer, RedisError):
            raise answer
        return answer

    def scan(self, key: str) -> Iterator[tuple[bytes, bytes]]:
        """All fields and values of a hash, some of them twice if it changes. Raises RedisError."""
        cursor: Any = 0
        while True:
            cursor, values = self.one("HSCAN", key, cursor, "COUNT", SCAN_GROUP)
            yield from zip(values[::2], values[1::2], strict=True)
            if int(cursor) == 0:
                return

    def close(self) -> None:
        """Give the connection up; the next command opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.disconnect()


def check_redis(link: RedisLink) -> None:
    """Refuse a server that would lose calls or can't do what is asked of it.

    Raises ConfigError, RedisError.
    """
    text = link.one("INFO", "everything").decode("utf-8", "replace")
    info = dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)
    version = info.get("redis_version", "0")
    if int(version.split(".")[0]) < 7:
        raise ConfigError(f"cluster_url: Redis {version}; allowed: Redis 7 or later, or Valkey")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") != "0" and policy != "noeviction":
        raise ConfigError(
            f"cluster_url: maxmemory-policy {policy} would lose calls; allowed: noeviction"
        )
    if info.get("role", "master") != "master":
        raise ConfigError("cluster_url: a replica; allowed: the master, or sentinel://...")
    if info.get("cluster_enabled") == "1":
        raise ConfigError("cluster_url: Redis Cluster; allowed: one Redis, with replicas or not")


# Which part of a row a field holds; the letter stands at the end of its name.
_FACTS, _BEGIN, _END = "c", "b", "e"
_LETTERS = {"begin": _BEGIN, "end": _END}
# What a record says of its event: it waits, or its begin is kept for the end to come.
_WAITS, _ONE_SIDED, _GIVEN_UP = "waits", "one-sided", "given up"


def unpack_record(row: int, record: bytes) -> tuple[RatingEvent, str, str]:
    """An event from its field: the event, its state, and whom alone a begin named that is kept."""
    api_url, serial, attempts, answer, state, party, packed = json.loads(record)
    event = unpack_event(packed, api_url, row, serial)
    event.attempts, event.answer = attempts, answer
    return event, state, party


def unpack_rejected(text: bytes) -> RatingEvent:
    """A rejected event as it is kept for an operator."""
    serial, row, api_url, packed, attempts, answer = json.loads(text)
    event = unpack_event(packed, api_url, row, serial)
    event.attempts, event.answer = attempts, answer
    return event


class RedisStore:
    """One shard in Redis, from the lease that makes an agent its owner until that is lost.

    What is noted is written by `Cluster`, for all shards of an agent at once. ``position`` is the
    last entry of the stream that was handled, ``clock`` the time of the calls in seconds, which is
    that of the stream less ``lag``, for it stands still while Redis is away. ``lost`` says that
    another agent may be the owner by now.
    """

    def __init__(
        self, pool: RedisPool, prefix: str, number: int, token: str, due: gevent.event.Event
    ) -> None:
        self.number = number
        self.token = token
        self.position = b"0-0"
        self.clock = self.lag = 0.0
        self.lost = self.leaving = False
        self.failure = ""
        self.due = due
        self.last_serial = number << _ROW_BITS
        self.answered: list[RatingEvent] = []
        # Seconds of `boottime` at which the lease ends at the earliest.
        self.until = 0.0
        # How many owners the shard has had with this one, and the last commit.
        self.owners = 0
        self.committed = ""
        # What is being written: it is sent again until it is answered.
        self.writing: list[Any] = []
        self._pool = pool
        self._prefix = prefix
        self._commits = self._serial = 0
        self._moved = False
        # The letters of the fields that Redis has, or will have, of a row.
        self._rows: dict[int, str] = {}
        # Waiting events of each API: row by serial.
        self._waiting: defaultdict[str, dict[int, tuple[int, str]]] = defaultdict(dict)
        # Begins that are kept for the end to come, by row: whom alone they named, and the field.
        self._kept: dict[int, tuple[CallKey, str, str]] = {}
        # From tags of running calls.
        self._tags: dict[int, str] = {}
        self._taken_up: set[int] = set()
        self._calls: list[tuple[int, str]] = []
        self._clear()

    def _clear(self) -> None:
        self._changes: dict[str, str | None] = {}
        self._rejected: dict[int, str] = {}
        self._retried: list[int] = []
        self._new_tags: list[str] = []
        self._old_tags: list[str] = []
        self._strays: list[tuple[str, str, bytes]] = []

    # At the start

    def load(self, link: RedisLink, serial: int) -> None:
        """Read what was committed; ``serial`` is the last that was given. Raises RedisError."""
        self.last_serial = max(self.last_serial, serial)
        fields = dict(link.scan(f"{self._prefix}calls:{self.number}"))
        for name, value in sorted(fields.items()):
            row, letter = int(name[:-1]), chr(name[-1])
            self._rows[row] = self._rows.get(row, "") + letter
            if letter == _FACTS:
                self._calls.append((row, value.decode()))
                continue
            event, state, party = unpack_record(row, value)
            self._serial = max(self._serial, event.serial)
            if state == _WAITS:
                self._waiting[event.api_url][event.serial] = (row, letter)
            else:
                self._kept[row] = (event.key, party, value.decode())

    def load_calls(self) -> list[tuple[int, str]]:
        """The calls as `CallTable.restore` needs them: row and text of `pack_call`."""
        calls, self._calls = self._calls, []
        return calls

    def count_events(self) -> dict[str, int]:
        """How many events wait for each API, by its URL."""
        return {url: len(waiting) for url, waiting in self._waiting.items()}

    def load_given_up(self) -> list[CallKey]:
        """The running calls whose begin was rejected."""
        return [key for key, party, _ in self._kept.values() if not party]

    def load_one_sided(self) -> dict[CallKey, str]:
        """The running calls that were begun with one party alone, and which."""
        return {key: party for key, party, _ in self._kept.values() if party}

    # Notes

    def put_call(self, row: int, text: str) -> None:
        """Note a call that is new or has changed, as `pack_call` writes it."""
        self._put(row, _FACTS, text)

    def drop_call(self, row: int) -> None:
        """Note that a call has left the table; its events stay while they wait."""
        self._drop(row, _FACTS)

    def put_tag(self, row: int, from_tag: str) -> None:
        """Note the From tag of a running call, "" for none or one that runs no more."""
        known = self._tags.get(row, "")
        if known == from_tag:
            return
        if known:
            del self._tags[row]
            self._old_tags.append(known)
        if from_tag:
            self._tags[row] = from_tag
            self._new_tags.append(from_tag)

    def know_tag(self, row: int, from_tag: str) -> None:
        """A From tag that was noted by an owner before."""
        self._tags[row] = from_tag

    def put_stray(self, from_tag: str, to_tag: str, frame: bytes) -> None:
        """Note a frame of no call here, for the shard of a running call with one of these tags."""
        self._strays.append((from_tag, to_tag, frame))

    def put_event(self, event: RatingEvent) -> None:
        """Note an event that waits from now on; its serial is one of all shards' time."""
        event.store = self
        event.serial = self._serial = max(self._serial + 1, time.time_ns() // 1000)
        self._kept.pop(event.row, None)
        self._waiting[event.api_url][event.serial] = (event.row, _LETTERS[event.kind])
        self._put_record(event, _WAITS)

    def put_attempt(self, event: RatingEvent) -> None:
        """Note that an event was tried and still waits: its attempts and the last answer."""
        if event.serial in self._waiting[event.api_url]:
            self._put_record(event, _WAITS)

    def drop_event(self, event: RatingEvent) -> None:
        """Note that an event waits no more: it was answered, or lost."""
        self._waiting[event.api_url].pop(event.serial, None)
        if event.kind == "begin" and event.left_out:
            self._keep(event, event.party)
        else:
            self._drop(event.row, _LETTERS[event.kind])

    def reject_event(self, event: RatingEvent) -> None:
        """Note that an event waits no more, and keep it for an operator."""
        self.drop_event(event)
        if event.kind == "begin":
            self._keep(event, "")
        record = [
            event.serial,
            event.row,
            event.api_url,
            event.pack(),
            event.attempts,
            event.answer,
        ]
        self._rejected[event.serial] = _compact_json(record)
        self.due.set()

    def retry_event(self, event: RatingEvent, _: int) -> None:
        """Note that a rejected event waits again."""
        self._retried.append(event.serial)
        self.due.set()

    def _keep(self, event: RatingEvent, party: str) -> None:
        # Its call, or its end, is still there: else nothing asks for it.
        if self._rows.get(event.row, _BEGIN) == _BEGIN:
            self._drop(event.row, _BEGIN)
            return
        text = self._put_record(event, _ONE_SIDED if party else _GIVEN_UP, party)
        self._kept[event.row] = (event.key, party, text)

    def _put_record(self, event: RatingEvent, state: str, party: str = "") -> str:
        record = [event.api_url, event.serial, event.attempts, event.answer, state, party]
        text = _compact_json([*record, event.pack()])
        self._put(event.row, _LETTERS[event.kind], text)
        return text

    def _put(self, row: int, letter: str, value: str) -> None:
        letters = self._rows.get(row, "")
        if letter not in letters:
            self._rows[row] = letters + letter
        self._changes[f"{row}{letter}"] = value
        self.due.set()

    def _drop(self, row: int, letter: str) -> None:
        letters = self._rows.get(row, "")
        if letter in letters:
            self._rows[row] = letters.replace(letter, "")
            self._changes[f"{row}{letter}"] = None
            self.due.set()
        if not self._rows.get(row):
            self._rows.pop(row, None)
        if row in self._kept and (letter == _END or self._rows.get(row) == _BEGIN):
            # The begin was kept for an end that was answered, or can't come any more.
            del self._kept[row]
            self._drop(row, _BEGIN)

    # To Redis

    def advance(self, position: bytes) -> None:
        """All entries of the stream up to here were handled; to be committed in any case."""
        self.position, self._moved = position, True
        self.due.set()

    def rewrite(self, names: Iterable[bytes], waiting: Iterable[RatingEvent]) -> None:
        """Note all again but for the calls, for Redis has lost some of it.

        ``names`` are the fields that Redis has, ``waiting`` the events in memory. Those in Redis
        alone are lost where they are.
        """
        self.committed = "*"
        ours = {f"{row}{letter}" for row, letters in self._rows.items() for letter in letters}
        for name in {name.decode() for name in names} - ours:
            self._changes.setdefault(name, None)
        for event in waiting:
            self.put_attempt(event)
        for row, (_, _, text) in self._kept.items():
            self._put(row, _BEGIN, text)
        self._new_tags = list(self._tags.values())
        self.due.set()

    @property
    def unwritten(self) -> int:
        """How many fields are not committed yet, those of a commit under way not counted."""
        return len(self._changes)

    @property
    def clean(self) -> bool:
        """Whether all that was noted is committed."""
        noted = self._changes or self._rejected or self._retried or self._old_tags or self._strays
        return not (noted or self._moved or self.writing)

    def collect(self, serial: int) -> None:
        """Put all that was noted into ``writing``, in the order of the script that writes it."""
        self._commits += 1
        milliseconds, _, count = self.position.partition(b"-")
        after = b"%s-%d" % (milliseconds, int(count) + 1)
        before, self.committed = self.committed, f"{self.token}:{self._commits}"
        values: list[Any] = [self.number, self.token, self.committed, before]
        values += [self.position, after, repr(self.clock), repr(self.lag), serial]
        sets = [(name, value) for name, value in self._changes.items() if value is not None]
        values += [len(sets), *chain.from_iterable(sets)]
        for names in (
            [name for name, value in self._changes.items() if value is None],
            list(chain.from_iterable(self._rejected.items())),
            self._retried,
            self._new_tags,
            self._old_tags,
        ):
            values += [len(names), *names]
        values += [len(self._strays), *chain.from_iterable(self._strays)]
        self._moved = False
        self._clear()
        self.writing = values

    def may_send(self, seconds: float) -> bool:
        """Whether a request that ends in so many seconds ends before the lease may."""
        return not self.lost and boottime() + seconds < self.until

    # While it runs

    @contextmanager
    def _reading(self) -> Iterator[RedisLink]:
        """A connection of its own, so that no other greenlet waits. Raises StoreError."""
        link = RedisLink(self._pool)
        try:
            yield link
        except RedisError as error:
            raise StoreError(str(error)) from None
        finally:
            link.close()

    def load_events(self, api_url: str, after: int, limit: int) -> list[RatingEvent]:
        """Up to ``limit`` events that wait for an API, after a serial, in order.

        Raises StoreError.
        """
        known = self._waiting.get(api_url, {})
        key = f"{self._prefix}calls:{self.number}"
        events: list[RatingEvent] = []
        with self._reading() as link:
            while not events:
                chosen = heapq.nsmallest(limit, (serial for serial in known if serial > after))
                names = [known[serial] for serial in chosen]
                if not names:
                    break
                values = link.one("HMGET", key, *[f"{row}{letter}" for row, letter in names])
                for serial, (row, _), value in zip(chosen, names, values, strict=True):
                    if value is None:
                        # Redis has lost it, or it was dropped meanwhile.
                        known.pop(serial, None)
                    else:
                        events.append(unpack_record(row, value)[0])
        for event in events:
            event.store = self
        return events

    def load_retries(self) -> list[RatingEvent]:
        """Rejected events that an operator wants to be sent again. Raises StoreError."""
        events = []
        with self._reading() as link:
            wanted = link.one("SMEMBERS", f"{self._prefix}retry:{self.number}")
            for serial in sorted(map(int, wanted))[:MAX_LOADED]:
                key = f"{self._prefix}rejected:{self.number}"
                found = link.one("ZRANGEBYSCORE", key, serial, serial)
                if serial in self._taken_up:
                    continue
                self._taken_up.add(serial)
                for event in map(unpack_rejected, found):
                    event.attempts, event.answer = 0, ""
                    events.append(event)
                if not found:
                    # Dropped meanwhile.
                    self._retried.append(serial)
        return events


# Room: rating API

# The request is written here, and the usual answer is read here. Connections and TLS are left to
# urllib3, any other answer to http.client. This takes less than a quarter of the CPU that it takes
# http.client to do all, and a sixth of urllib3's. With every answer read by http.client a call
# would cost a quarter more.

# gevent's goes through the event loop, which takes longer than the rest of a request; a look at one
# socket never waits.
_plain_poll = monkey.get_original("select", "poll")
_HTTP_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(?=\r\n|\Z)")
# What asks for more than to take the octets as they are: http.client knows how.
_UNUSUAL_HEADER = re.compile(
    rb"(?i)\r\n(?:transfer-encoding|content-encoding|[ \t]"
    rb"|connection:(?![ \t]*keep-alive[ \t]*(?:\r\n|\Z)))"
)


class RatingApi:
    """A client of one rating API: one synchronous POST for each event, never retried in here."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self._timeout = settings.rating_api_timeout
        parts = urllib3.util.parse_url(url)
        self._prefix = parts.path or ""
        self._netloc = parts.netloc
        self.authorize(settings)
        self._address: dict[str, Any] = {"host": str(parts.host), "port": parts.port}
        self._class: Any = urllib3.connection.HTTPConnection
        if parts.scheme == "https":
            self._class = urllib3.connection.HTTPSConnection
            ca_file = settings.rating_api_ca_file
            self._address["ssl_context"] = client_tls("rating_api_ca_file", ca_file)
        # Connections that are open and have nothing to do; a worker uses one at a time.
        self._idle: list[Any] = []

    def authorize(self, settings: Settings) -> None:
        """Send the token, or the user and password, of these settings from now on."""
        headers = {
            "Host": self._netloc,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"rating-agent-hep/{__version__}",
        }
        if settings.rating_api_token:
            headers["Authorization"] = f"Bearer {settings.rating_api_token}"
        elif settings.rating_api_username:
            pair = f"{settings.rating_api_username}:{settings.rating_api_password}"
            headers["Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._head = f"HTTP/1.1\r\n{head}Content-Length: "

    def send(self, event: RatingEvent) -> str:
        """Tell the API one event: DELIVERED, REFUSED_BY_API (``ok: false``) or REJECTED (4xx).

        Raises DeliveryError where the API gave no answer that counts, of the kind NOT_OURS where
        the event's store does not let it go.
        """
        path = f"/v1/{event.kind}_transaction"
        status, retry_after, answer = self._post(path, event.request(), event.store)
        if 200 <= status < 300:
            try:
                return DELIVERED if json.loads(answer)["ok"] is True else REFUSED_BY_API
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DeliveryError("answer", "an answer that is no rating API's", True) from None
        self._check_status(status, retry_after)
        event.answer = f"status {status}"
        return REJECTED

    @staticmethod
    def _check_status(status: int, retry_after: str) -> None:
        """Raises DeliveryError for a status that passes, after which the same may be asked."""
        try:
            wait = urllib3.Retry().parse_retry_after(retry_after) if retry_after else 0.0
        except urllib3.exceptions.InvalidHeader:
            wait = 0.0
        wait = min(max(wait, 0.0), MAX_RETRY_AFTER)
        if status in (408, 429) or not 400 <= status < 500:
            # A gateway's time-out says nothing of the request; the API's own 500 comes undone.
            unknown = status in (408, 502, 504)
            raise DeliveryError(f"status_{status}", f"status {status}", unknown, wait)

    def _post(self, path: str, body: bytes, store: Any) -> tuple[int, str, bytes]:
        """One request: status, Retry-After and body of the answer. Raises DeliveryError.

        The last thing before it is sent is to ask the event's store whether it still may be.
        """
        connection, sent, whole = None, False, False
        # One limit for all of it: a server that trickles would hold a worker.
        limit = gevent.Timeout(self._timeout)
        try:
            with limit:
                connection = self._connect()
                if store is not None and not store.may_send(self._timeout):
                    whole = True
                    raise DeliveryError(NOT_OURS, "another agent may have its shard", False)
                sent = True
                request = f"POST {self._prefix}{path} {self._head}{len(body)}\r\n\r\n"
                connection.sock.sendall(request.encode("latin-1") + body)
                status, retry_after, answer, whole = _read_answer(connection)
                return status, retry_after, answer
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            raise DeliveryError("timeout", "no whole answer in time", sent) from None
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise DeliveryError("connection", str(error) or type(error).__name__, sent) from None
        finally:
            if whole:
                self._idle.append(connection)
            elif connection is not None:
                _close(connection)

    def _connect(self) -> Any:
        """A connection that is open: one that is idle, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            # What is readable now is the end of it, or an answer to nothing.
            poll = _plain_poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            _close(connection)
        connection = self._class(**self._address, timeout=self._timeout)
        try:
            connection.connect()
            connection.sock.settimeout(None)
            connection.answers = connection.sock.makefile("rb")
        except BaseException:
            connection.close()
            raise
        return connection


def _close(connection: Any) -> None:
    # The socket is open for as long as a file of it is.
    connection.answers.close()
    connection.close()


# Octets. An answer of the rating API is about 150; more than this is not read.
MAX_API_ANSWER = 65_536


def _read_answer(connection: Any) -> tuple[int, str, bytes, bool]:
    """Status, Retry-After and body of an answer, and whether the connection is of further use.

    Raises OSError, http.client.HTTPException.
    """
    data = connection.answers.peek()
    head, _, answer = data.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 200 ") and _UNUSUAL_HEADER.search(head) is None:
        lengths = _HTTP_LENGTH.findall(head)
        if len(lengths) == 1 and int(lengths[0]) == len(answer):
            connection.answers.read(len(data))
            return 200, "", answer, True
    # http.client wants to make the file itself, and closes it.
    source: Any = SimpleNamespace(makefile=lambda _: connection.answers)
    response = http.client.HTTPResponse(source, method="POST")
    try:
        response.begin()
        answer = response.read(MAX_API_ANSWER)
        if response.length and len(answer) < MAX_API_ANSWER:
            raise http.client.IncompleteRead(answer, response.length)
        whole = not response.read(1) and response.isclosed() and not response.will_close
        return response.status, response.headers.get("Retry-After", ""), answer, whole
    finally:
        response.close()
        connection.answers = connection.sock.makefile("rb")


# Room: delivery

Store = Journal | RedisStore


class _Backlog:
    """The events for one API that wait in one store and not in the outbox.

    ``last_serial`` is that of the last event that the outbox got from the store; these came about
    after it. ``unwritten`` are those among them that the store could not write yet.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last_serial = 0
        self.unwritten: deque[RatingEvent] = deque()


class _Lane:
    """One API with its outbox, its client and the workers that have nothing to do."""

    def __init__(self, api: RatingApi, outbox: Outbox) -> None:
        self.api = api
        self.outbox = outbox
        self.backlogs: defaultdict[Store | None, _Backlog] = defaultdict(_Backlog)
        self.loader: gevent.Greenlet | None = None
        self.idle: list[gevent.event.Event] = []
        self.was_down = False
        # Seconds of a monotonic clock: when it went down or came up, and when it last failed.
        self.since = time.monotonic()
        self.failed = 0.0
        self.fault = ""

    @property
    def stored(self) -> int:
        """How many events wait for this API in a store alone."""
        return sum(backlog.count for backlog in self.backlogs.values())

    @property
    def waiting(self) -> int:
        """How many events wait for this API, in memory or not."""
        return len(self.outbox) + self.stored


# The share by which a delay is shorter or longer: what failed together is not sent together again.
JITTER = 0.25


class Delivery:
    """Workers that tell the rating APIs what happened: ``rating_api_concurrency`` for each API.

    An event that has a store comes here once it is written there. MAX_EVENTS_IN_MEMORY of them are
    in the outbox, the later ones in the store alone. The next event of a call waits until it is
    written that the one before was answered: a call that is begun again after its end is charged
    twice.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._lanes: dict[str, _Lane] = {}
        self._workers: list[gevent.Greenlet] = []

    def restore(self, store: Store) -> None:
        """Learn what waits in a store, and how its running calls were begun."""
        for url, count in store.count_events().items():
            self._lane(url).backlogs[store].count = count
        for key in store.load_given_up():
            self._lane(key[0]).outbox.give_up(key, store)
        for key, party in store.load_one_sided().items():
            self._lane(key[0]).outbox.begun(key, party, store)

    def put(self, event: RatingEvent, written: bool = False) -> None:
        """Take an event for delivery; ``written`` says that its store has it. Never waits."""
        lane = self._lane(event.api_url)
        backlog = lane.backlogs[event.store]
        if event.store and event.serial <= backlog.last_serial:
            # The loader has found it in the store since that was written.
            return
        if backlog.count or (written and len(lane.outbox) >= MAX_EVENTS_IN_MEMORY):
            backlog.count += 1
            if not written:
                backlog.unwritten.append(event)
                if len(backlog.unwritten) > MAX_WAITING_EVENTS:
                    self._lose_unwritten(lane, backlog)
            return
        self._enqueue(lane, event)
        self._wake(lane)

    def tick(self) -> None:
        """Send what has waited long enough; called a few times a second."""
        for lane in self._lanes.values():
            if lane.stored and not lane.loader and len(lane.outbox) <= MAX_EVENTS_IN_MEMORY // 2:
                lane.loader = gevent.spawn(self._load, lane)
            self._wake(lane)

    def __len__(self) -> int:
        return sum(lane.waiting for lane in self._lanes.values())

    @property
    def busy(self) -> bool:
        """Whether a request is under way or can be sent at once."""
        return any(
            lane.outbox.busy or (lane.stored and not lane.outbox.down)
            for lane in self._lanes.values()
        )

    def apis(self) -> list[dict[str, Any]]:
        """Each API: URL, state ("up" or "down"), what waits, the last error (all times monotonic).

        ``since`` is when it went down or came up, ``failed`` when the last error was, 0 for never.
        """
        return [
            {
                "url": url,
                "state": "down" if lane.was_down else "up",
                "since": lane.since,
                "waiting": lane.waiting,
                "failed": lane.failed,
                "last_error": lane.fault[:MAX_ERROR_TEXT],
            }
            for url, lane in self._lanes.items()
        ]

    def release(self, event: RatingEvent) -> None:
        """It is on disk what became of this event: the next one of its call may go."""
        lane = self._lane(event.api_url)
        lane.outbox.release(event.key)
        self._wake(lane)

    def forget_unwritten(self, store: Store) -> None:
        """The store has written all, so that it can be loaded."""
        for lane in self._lanes.values():
            lane.backlogs[store].unwritten.clear()

    def withdraw(self, store: Store) -> bool:
        """Send no more of a store; whether requests of it are under way or not yet written."""
        busy = False
        for lane in self._lanes.values():
            lane.backlogs.pop(store, None)
            busy |= lane.outbox.withdraw(store)
        return busy

    def waiting(self, store: Store) -> list[RatingEvent]:
        """The events of a store that are in memory."""
        return [event for lane in self._lanes.values() for event in lane.outbox.waiting(store)]

    def forget(self, store: Store) -> None:
        """Let go of all events of a store, also those that are out: they are another agent's."""
        for lane in self._lanes.values():
            lane.backlogs.pop(store, None)
            lane.outbox.forget(store)

    def authorize(self, settings: Settings) -> None:
        """Send the token, or the user and password, of these settings with each later request."""
        self._settings = settings
        for lane in self._lanes.values():
            lane.api.authorize(settings)

    def kill(self) -> None:
        """End the workers, wherever they are."""
        gevent.killall(self._workers)
        gevent.killall([lane.loader for lane in self._lanes.values() if lane.loader])

    def stop(self) -> None:
        """End the workers and log each event that was not delivered, so that it can be replayed."""
        self.kill()
        for lane in self._lanes.values():
            unwritten = [x for backlog in lane.backlogs.values() for x in backlog.unwritten]
            for event in unwritten:
                lane.outbox.restrict(event)
            for event in (*lane.outbox.undelivered(), *unwritten):
                self._log_whole(event, "event_undelivered", "an event was not delivered")

    def _lane(self, url: str) -> _Lane:
        return self._lanes.get(url) or self._open(url)

    def _open(self, url: str) -> _Lane:
        outbox = Outbox(
            jitter=lambda: random.uniform(1 - JITTER, 1 + JITTER),
            drop=self._settings.unknown_party == "drop",
        )
        lane = self._lanes[url] = _Lane(RatingApi(url, self._settings), outbox)
        count = self._settings.rating_api_concurrency
        self._workers += [gevent.spawn(self._work, lane) for _ in range(count)]
        return lane

    @staticmethod
    def _wake(lane: _Lane) -> None:
        # The worker that has waited shortest goes first: its connection is most likely open.
        if lane.idle:
            lane.idle.pop().set()

    def _enqueue(self, lane: _Lane, event: RatingEvent) -> None:
        backlog = lane.backlogs[event.store]
        backlog.last_serial = max(backlog.last_serial, event.serial)
        accepted, lost = lane.outbox.put(event)
        if not accepted:
            self._reject(event, "its begin was rejected")
        for each in lost:
            self._lose(lane, each)

    def _lose_unwritten(self, lane: _Lane, backlog: _Backlog) -> None:
        backlog.count -= 1
        lost = backlog.unwritten.popleft()
        if lost.kind == "begin":
            lane.outbox.give_up(lost.key, lost.store)
        self._lose(lane, lost)

    def _lose(self, lane: _Lane, event: RatingEvent) -> None:
        self._metrics.count("events.lost")
        lane.outbox.restrict(event)
        self._log_whole(event, "event_lost", "an event left memory undelivered: too many wait")
        if event.store:
            event.store.drop_event(event, LOST)

    def _load(self, lane: _Lane) -> None:
        """Fill the outbox from the stores, in a greenlet of its own, for they take time."""
        try:
            for store, backlog in list(lane.backlogs.items()):
                while backlog.count and len(lane.outbox) < MAX_EVENTS_IN_MEMORY:
                    if store not in lane.backlogs:
                        break
                    self._load_some(lane, store, backlog)
        except StoreError as error:
            self._metrics.count("journal.errors")
            log.error("the store cannot be read: %s", error, extra={"event": "journal_failed"})
            gevent.sleep(JOURNAL_RETRY)
        finally:
            lane.loader = None

    def _load_some(self, lane: _Lane, store: Store | None, backlog: _Backlog) -> None:
        assert store is not None
        count = backlog.count
        events = store.load_events(lane.api.url, backlog.last_serial, MAX_LOADED)
        if store not in lane.backlogs:
            return
        if not events:
            # All that is on disk was loaded. What came while the store was read still counts.
            events = [x for x in backlog.unwritten if x.serial > backlog.last_serial]
            backlog.unwritten.clear()
            backlog.count -= count - len(events)
        for event in events:
            # Not those that are written, and not `put` yet.
            backlog.count = max(backlog.count - 1, 0)
            self._enqueue(lane, event)
        self._wake(lane)

    def _work(self, lane: _Lane) -> None:
        wake = gevent.event.Event()
        while True:
            event = lane.outbox.take(time.monotonic())
            if event is None:
                wake.clear()
                lane.idle.append(wake)
                wake.wait()
                continue
            # There may be more than this worker can do.
            self._wake(lane)
            self._deliver(lane, event)

    def _deliver(self, lane: _Lane, event: RatingEvent) -> None:
        started = time.monotonic()
        outcome: str | DeliveryError
        try:
            outcome = lane.api.send(event)
        except DeliveryError as error:
            outcome = error
        except Exception as error:
            # A fault of ours must not end the worker: the event is tried again like any other.
            # Only where it came from is logged: the error's text may hold a header with a token.
            where = "".join(traceback.format_tb(error.__traceback__))
            extra = {"event": "internal_error", "where": where, **event.fields()}
            log.warning("delivery failed: %s", type(error).__name__, extra=extra)
            outcome = DeliveryError("internal", type(error).__name__, True)
        if not lane.outbox.holds(event):
            # It was sent while it was ours, and is another agent's by now.
            self._metrics.count("cluster.late_answers")
            return
        if isinstance(outcome, DeliveryError) and outcome.kind == NOT_OURS:
            lane.outbox.hold_back(event, time.monotonic())
            self._metrics.count("cluster.held_back")
            return
        if isinstance(outcome, DeliveryError):
            self._failed(lane, event, outcome)
        else:
            self._settle(lane, event, outcome)
        self._metrics.time("api.time", time.monotonic() - started)
        if lane.outbox.down != lane.was_down:
            lane.was_down, lane.since = lane.outbox.down, time.monotonic()
            extra = {"event": "api_down" if lane.was_down else "api_up", "api": lane.api.url}
            extra["waiting"] = lane.waiting
            log.warning("rating API is %s", "down" if lane.was_down else "up again", extra=extra)

    def _failed(self, lane: _Lane, event: RatingEvent, error: DeliveryError) -> None:
        lane.failed, lane.fault = time.monotonic(), str(error)
        lane.outbox.fail(event, error, lane.failed)
        self._metrics.count(f"api.errors.{error.kind}")
        if error.kind != "internal":
            self._metrics.count("api.retries")
            extra = {"event": "api_error", "api": lane.api.url, **event.fields()}
            log.warning("rating API: %s", error, extra=extra)
        if event.store:
            event.store.put_attempt(event)

    def _settle(self, lane: _Lane, event: RatingEvent, outcome: str) -> None:
        store = event.store
        meaning, rejected = lane.outbox.settle(event, outcome, time.monotonic(), store is None)
        self._metrics.count(f"api.answers.{outcome}")
        if meaning == DELIVERED:
            self._delivered(lane, event, "done before" if outcome == REFUSED_BY_API else "ok")
        elif meaning == REFUSED_BY_API:
            self._refused(lane, event, outcome)
        for each in rejected:
            reason = "refused by the API" if each is event else "its begin was rejected"
            self._reject(each, reason)
        if store and meaning != REFUSED_BY_API:
            store.answered.append(event)

    def _delivered(self, lane: _Lane, event: RatingEvent, outcome: str) -> None:
        extra = {"event": f"call_{event.kind}", "outcome": outcome, **event.fields()}
        log.info("call %s", "begun" if event.kind == "begin" else "ended", extra=extra)
        if event.kind == "begin" and event.left_out:
            self._left_out(lane, event)
        if event.store:
            event.store.drop_event(event)

    def _refused(self, lane: _Lane, event: RatingEvent, outcome: str) -> None:
        self._metrics.count("api.retries")
        # An ok that the outbox does not believe is no refusal for the log.
        if outcome == REFUSED_BY_API:
            extra = {"event": "api_refused", "api": lane.api.url, **event.fields()}
            log.warning("rating API refused, to be tried again", extra=extra)
        if event.store:
            event.store.put_attempt(event)

    def _left_out(self, lane: _Lane, event: RatingEvent) -> None:
        self._metrics.count("events.unknown_party")
        if lane.outbox.leave_out(event, time.monotonic()):
            extra = {"event": "unknown_party", "api": lane.api.url, **event.fields()}
            account = printable(event.left_out)
            log.warning("the rating API does not know account %s: left out", account, extra=extra)

    def _reject(self, event: RatingEvent, reason: str) -> None:
        event.answer = event.answer or reason
        self._metrics.count("events.rejected")
        self._log_whole(event, "event_rejected", f"an event was rejected: {reason}")
        if event.store:
            event.store.reject_event(event)

    @staticmethod
    def _log_whole(event: RatingEvent, name: str, text: str) -> None:
        extra = {"event": name, "outcome": "failed", **event.fields(), "replay": event.replayable()}
        log.error(text, extra=extra)


# Calls that are packed for the store in one go; the event loop waits meanwhile.
STORE_STEP = 100
# Seconds between two looks for what an operator wants done with rejected events.
JOURNAL_POLL = 1.0
# Seconds between two looks for call records that are whole, and after a file that failed.
RECORDS_POLL = 0.5
RECORDS_RETRY = 5.0


class Shard:
    """A call table with its store, and the events between them: one agent alone has one.

    Without a store, events are delivered as they come about. With one, `commit` writes them along
    with their calls first; one greenlet does that. ``rejected`` is how many events the store keeps
    for an operator.
    """

    def __init__(
        self,
        table: CallTable,
        delivery: Delivery,
        metrics: Metrics,
        store: Store | None = None,
        records: RecordFile | None = None,
    ) -> None:
        self.table = table
        self.records = records
        # The rows whose lines were written last.
        self._filed: list[int] = []
        self.store = store
        self.rejected = 0
        self.delivery = delivery
        self._metrics = metrics
        # Events that the store has to write before they are delivered.
        self._fresh: list[RatingEvent] = []
        self._polled = 0.0
        if store:
            calls, serial = store.load_calls(), store.last_serial
            table.restore(calls, serial, self._now(), self._offset())
            delivery.restore(store)
            self._put_calls(store)

    def _now(self) -> float:
        """The clock of the calls."""
        return time.monotonic()

    def _offset(self) -> float:
        """Seconds of UNIX time less those of that clock."""
        return clock_offset()

    @property
    def fresh(self) -> int:
        """How many events wait for the store."""
        return len(self._fresh)

    def handle(self, sighting: Sighting, now: float) -> None:
        """Take in one message; ``now`` is seconds of a monotonic clock."""
        self._report(self.table.handle(sighting, now))

    def expire(self, now: float, closing: bool = False) -> None:
        """Judge what has waited long enough; ``closing`` decides all that waits for a message."""
        self._report(self.table.expire(now, closing))

    @property
    def behind(self) -> bool:
        """Whether messages come faster than the store can take them."""
        store, changed = self.store, self.table.changed
        if store is None or store.failure or changed is None:
            return False
        return len(changed) + store.unwritten > MAX_UNWRITTEN

    def commit_forever(self) -> None:
        """Commit what has changed, at most each JOURNAL_INTERVAL, in a greenlet of its own."""
        assert isinstance(self.store, Journal)
        while True:
            self.store.due.wait(timeout=JOURNAL_POLL)
            gevent.sleep(JOURNAL_INTERVAL)
            try:
                self.commit()
                if time.monotonic() - self._polled >= JOURNAL_POLL:
                    self._polled = time.monotonic()
                    self._poll(self.store)
            except Exception:
                self._metrics.count("packets.internal_error")
                log.error("a commit failed", exc_info=True, extra={"event": "internal_error"})

    def commit(self, patience: float | None = None) -> bool:
        """Write the changes since the last time, then hand the events among them to delivery.

        Only the greenlet that calls it waits, as `Journal.commit` says; where the store can't be
        written, delivery goes on from memory. Returns whether all is written.
        """
        store = self.store
        assert isinstance(store, Journal)
        store.due.clear()
        events, answered = self.note(store)
        started = time.monotonic()
        written = False
        try:
            written = store.commit(patience)
        finally:
            self.hand_over(events, answered, written)
        self._metrics.count("journal.commits" if written else "journal.errors")
        self._metrics.time("journal.time", time.monotonic() - started)
        return written

    def note(self, store: Store) -> tuple[list[RatingEvent], list[RatingEvent]]:
        """Put down all that has changed; returns the events that came about, and those answered."""
        self._put_calls(store)
        events, self._fresh = self._fresh, []
        for event in events:
            store.put_event(event)
        if isinstance(self.table, RecordedTable) and isinstance(store, Journal):
            for record in self.table.take_records():
                fields = {_RECORD_KEY: os.urandom(8).hex(), **record_fields(record)}
                store.put_record(record.row, _compact_json(fields), record.charged)
        answered, store.answered = store.answered, []
        return events, answered

    def hand_over(
        self, events: Iterable[RatingEvent], answered: Iterable[RatingEvent], written: bool
    ) -> None:
        """Deliver what `note` returned; ``written`` says that the store has it."""
        for event in answered:
            self.delivery.release(event)
        if written and self.store:
            self.delivery.forget_unwritten(self.store)
        for event in events:
            self.delivery.put(event, written)

    def write_records_forever(self) -> None:
        """Write the call records that are whole, in a greenlet of its own."""
        assert self.records is not None
        while True:
            gevent.sleep(RECORDS_RETRY if self.records.failure else RECORDS_POLL)
            try:
                while self.write_records():
                    gevent.sleep(JOURNAL_INTERVAL)
            except Exception:
                self._metrics.count("packets.internal_error")
                log.error("records not written", exc_info=True, extra={"event": "internal_error"})

    def write_records(self) -> bool:
        """Write some call records that are whole; whether there may be more of them.

        The next ones are read only when it is on disk that these were written, so a start that
        finds these in the journal finds them among the last lines of the file, too.
        """
        store, file = self.store, self.records
        assert isinstance(store, Journal) and file is not None
        lost, store.records_lost = store.records_lost, 0
        if lost:
            self._metrics.count("records.lost", lost)
            extra = {"event": "records_lost", "records": lost}
            log.error("call records were lost: too many wait", extra=extra)
        if store.failure:
            return False
        if store.holds(self._filed):
            return True
        failed = file.failure
        try:
            records = store.load_records(MAX_RECORDS_AT_ONCE)
            lines = [
                (fields[_RECORD_KEY], f"{_compact_json(fields)}\n".encode())
                for _, fields in records
            ]
            # One that failed is tried without records as well, or it would seem to fail for ever.
            if (records or failed) and file.write(lines):
                self._metrics.count("records.errors")
                extra = {"event": "records_failed", "file": file.path}
                log.warning("call records cannot be written: %s", file.failure, extra=extra)
                store.trim_records()
                return False
        except StoreError as error:
            log.error("the journal cannot be read: %s", error, extra={"event": "journal_failed"})
            return False
        if failed:
            log.warning("call records are written again", extra={"event": "records_back"})
        if records:
            self._metrics.count("records.written", len(records))
            self._filed = [row for row, _ in records]
            store.drop_records(self._filed)
        return len(records) == MAX_RECORDS_AT_ONCE

    def _report(self, events: list[RatingEvent]) -> None:
        if self.store is None:
            for event in events:
                self.delivery.put(event)
            return
        self._fresh += events
        if self.table.changed:
            # A call that is over has changed, so its record is seen to as well.
            self.store.due.set()

    def _put_calls(self, store: Store) -> None:
        """Note the changed calls as they are now, in steps of STORE_STEP.

        Between two steps other greenlets have their turn; what they change is noted (again) by a
        later step. The last step takes all that is left, so that no call is newer than its events.
        """
        offset, changed = self._offset(), self.table.changed
        while changed:
            for _ in range(min(len(changed), STORE_STEP)):
                row, call = changed.popitem()
                self._put_call(store, row, call, offset)
            if changed:
                gevent.sleep(0)

    def _put_call(self, store: Any, row: int, call: Call | None, offset: float) -> None:
        if call is None:
            store.drop_call(row)
        else:
            store.put_call(row, pack_call(call, offset))

    def _poll(self, store: Journal) -> None:
        """Send the rejected events again that an operator wants to be sent again."""
        if store.failure:
            return
        try:
            self.rejected = store.count_rejected()
            retried = self.take_up(store)
        except StoreError as error:
            log.error("the journal cannot be read: %s", error, extra={"event": "journal_failed"})
            return
        if retried:
            # Before the next look, or they would be found again.
            self.commit()

    def take_up(self, store: Store) -> bool:
        """Take up the rejected events that an operator wants to be sent again; whether any.

        Raises StoreError.
        """
        events = store.load_retries()
        for event in events:
            store.retry_event(event, self.table.next_serial())
            log.info("taken up again", extra={"event": "event_retried", **event.fields()})
        self._report(events)
        return bool(events)


def clock_offset() -> float:
    """Seconds of UNIX time less those of the monotonic clock, which starts anew with a machine."""
    return time.time() - time.monotonic()


# Room: cluster

# Octets of frames that wait for Redis, over which those of UDP are dropped, and over which no more
# is read from TCP: its senders wait.
MAX_UNAPPENDED = 64 * 1024 * 1024
TCP_UNAPPENDED = 1024 * 1024
# Seconds for which frames are gathered, and frames of one pipeline.
APPEND_INTERVAL = 0.005
APPEND_GROUP = 256
# Seconds for which frames are kept that Redis has, and their octets: it may come back without its
# last, with `appendfsync everysec` without those of a second or two.
APPENDED_KEPT = 2.0
MAX_APPENDED_KEPT = 16 * 1024 * 1024
# Entries of one stream read at once, some 10 ms of work, and seconds between two looks at all
# streams, which cost the more the more shards there are.
READ_GROUP = 128
READ_INTERVAL = 0.05
# Seconds for which an entry waits for others that belong before it: agents append what they take in
# a little sooner or later, and an ACK that goes before its 200 begins the call at its own time.
HOLD = 0.5
# Seconds for which entries may wait before an agent calls itself unhealthy; a taken shard has those
# of one lease.
LAG_UNHEALTHY = 30.0
# Seconds between two commits of what an agent owns: what is sooner goes in one.
CLUSTER_COMMIT = 0.05
# Seconds that a lease is longer than rating_api_timeout: so long may Redis be silent before nothing
# is sent any more.
LEASE_MARGIN = 5.0
# Seconds between two beats, which renew the leases, and without one after which an agent is gone.
BEAT = 1.0
AGENT_GONE = 5.0
# Seconds between two attempts while Redis gives no answer, and between two lines that say so.
REDIS_RETRY = 0.1
REDIS_SAID = 10.0
# Seconds after Redis was away in which all agents see that it is back and append what they kept,
# before anything is read: then an ACK does not go before its 200 that another agent kept.
SETTLE = REDIS_TIMEOUT + 2 * REDIS_RETRY


def ties_legs(rules: Iterable[Rule]) -> bool:
    """Whether calls of several Call-IDs may be one charge by these routes (rule 17)."""
    return any(rule.route.ties for rule in rules)


class _Entry(NamedTuple):
    """An entry of a stream; ``frame`` is empty for a stray, which goes no further.

    ``after`` is the number of the entry before it.
    ``time`` is the stream's, in seconds of UNIX time, ``read_at`` ours, of a monotonic clock,
    ``hep_time`` that of the packet, in microseconds; ``packet`` is None for what is no frame.
    """

    after: bytes
    time: float
    read_at: float
    hep_time: int
    packet: HepPacket | None
    sender: str
    frame: bytes


class StreamShard(Shard):
    """A shard whose messages come from a stream, by whose clock its calls live."""

    store: RedisStore

    def _now(self) -> float:
        return self.store.clock

    def _offset(self) -> float:
        return 0.0

    def __init__(
        self, table: CallTable, delivery: Delivery, metrics: Metrics, store: RedisStore
    ) -> None:
        super().__init__(table, delivery, metrics, store)
        # What was read and not yet handled, and its last number.
        self.held: list[_Entry] = []
        self.read = store.position
        for call in chain.from_iterable(table.slices()):
            store.know_tag(call.row, self._tag(call))

    @staticmethod
    def _tag(call: Call | None) -> str:
        """The From tag by which a leg of another Call-ID may end a call (rule 17)."""
        running = call is not None and call.begun_at and not call.ended_at
        return call.from_tag if running and len(call.from_tag) >= MIN_TAG else ""  # type: ignore[union-attr]

    def _put_call(self, store: RedisStore, row: int, call: Call | None, offset: float) -> None:
        super()._put_call(store, row, call, offset)
        store.put_tag(row, self._tag(call))

    @property
    def unwritten(self) -> int:
        """How many calls, events and fields are not committed yet."""
        return len(self.table.changed or ()) + len(self._fresh) + self.store.unwritten

    @property
    def clean(self) -> bool:
        """Whether all is committed."""
        return not self.unwritten and not self.store.answered and self.store.clean

    def rewrite(self, link: RedisLink, key: str) -> None:
        """Write all again, for Redis has lost some of it. Raises RedisError."""
        names = link.one("HKEYS", key)
        for call in chain.from_iterable(self.table.slices()):
            self.table.changed.setdefault(call.row, call)  # type: ignore[union-attr]
        self.store.rewrite(names, self.delivery.waiting(self.store))

    @property
    def owned(self) -> bool:
        """Whether its stream is to be followed."""
        return not (self.store.lost or self.store.leaving)


# What a commit under way is of: the shard, the events that came about, and those answered.
_Written = tuple[StreamShard, list[RatingEvent], list[RatingEvent]]


class Cluster:
    """The shards of an agent, and the frames that it hands to others, all in one Redis.

    ``failure`` says why Redis does not answer, "" while it does; ``fatal`` why it never will as
    things are. ``agents`` is what the last beat said of each agent, ``lost`` how many shards were
    lost. Its greenlets, which `start` starts, never raise. Raises ConfigError.
    """

    def __init__(
        self, settings: Settings, rules: Sequence[Rule], metrics: Metrics, delivery: Delivery
    ) -> None:
        self.settings = settings
        self.rules = rules
        self.owned: dict[int, StreamShard] = {}
        self.agents: list[dict[str, Any]] = []
        self.rejected = self.entries = self.lost = 0
        self.fatal = ""
        # Why a greenlet gets nothing done, by what it does.
        self._faults = {"beat": "not connected yet"}
        self.name = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self._metrics = metrics
        self._delivery = delivery
        self._prefix = f"{settings.cluster_name}:"
        self._pool = RedisPool(settings.cluster_url, settings.cluster_password)
        self._lease = settings.rating_api_timeout + LEASE_MARGIN
        # The calls are shared out among the shards.
        self._ties = ties_legs(rules)
        used = 1 if self._ties else settings.cluster_shards
        self._shard_settings = replace(settings, max_calls=-(-settings.max_calls // used))
        self._salt = b""
        self._joined = False
        self._tokens = 0
        # Shards whose lease we have, but not all of the rest yet.
        self._taking: list[RedisStore] = []
        self._taker: gevent.Greenlet | None = None
        # Redis' time of its last answer, and from when to when it was away last.
        self._answered = 0.0
        self._away = (0.0, 0.0)
        self._settled = 0.0
        self._said = -inf
        self._pending: deque[tuple[str, bytes]] = deque()
        self._octets = 0
        # What was appended last: when, by `boottime`, in which group, and what.
        self._groups = 0
        self._appended: deque[tuple[float, int, str, bytes]] = deque()
        self._appended_octets = 0
        self._append_again = False
        self._again_from = 0.0
        self._append_due = gevent.event.Event()
        self._commit_due = gevent.event.Event()
        self._beat_due = gevent.event.Event()
        self._writing: list[_Written] = []
        self._greenlets: list[gevent.Greenlet] = []
        self._stopping = False

    # The start

    def join(self) -> None:
        """Check Redis, and what all agents must have in common. Raises ConfigError, RedisError."""
        link = RedisLink(self._pool)
        try:
            check_redis(link)
            self._agree(link)
        except RedisError as error:
            if "uthentica" in error.kind or "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                raise ConfigError(
                    f"cluster_url, cluster_password: {error}; allowed: what Redis accepts"
                ) from None
            if "WRONGTYPE" in str(error) or error.kind == "NoPermissionError":
                raise ConfigError(
                    f"cluster_name: {self.settings.cluster_name}: {error}; "
                    "allowed: a name whose keys are ours"
                ) from None
            raise
        finally:
            link.close()

    def _agree(self, link: RedisLink) -> None:
        key, settings = f"{self._prefix}config", self.settings
        wanted = {
            "version": CLUSTER_VERSION,
            "shards": str(settings.cluster_shards),
            "ties": "yes" if self._ties else "no",
        }
        ours = {**wanted, "salt": (self._salt or os.urandom(8)).hex()}
        for name, value in ours.items():
            link.one("HSETNX", key, name, value)
        values = link.one("HMGET", key, *ours)
        found = dict(zip(ours, (value.decode("latin-1") for value in values), strict=True))
        options = {
            "version": "cluster_name",
            "shards": "cluster_shards",
            "ties": "routes: transaction_tag of another call than its own",
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise ConfigError(
                    f"{options[name]}: {value}, but {settings.cluster_name} has {found[name]}; "
                    "allowed: the same for all agents, or another cluster_name"
                )
        salt = bytes.fromhex(found["salt"])
        if self._salt not in (b"", salt):
            for shard in list(self.owned.values()):
                self._lose(shard, "Redis was emptied, and another agent has begun anew")
        self._salt, self._joined = salt, True

    def change_rules(self, rules: Sequence[Rule]) -> None:
        """Other routes, for attempts from now on. Raises ConfigError where calls would be torn."""
        if ties_legs(rules) != self._ties:
            raise ConfigError(
                "routes: a transaction_tag that ties calls where none did, or none where one did; "
                "allowed: a start with another cluster_name"
            )
        self.rules = rules
        for shard in self.owned.values():
            shard.table.rules = rules

    @property
    def failure(self) -> str:
        """Why Redis does not answer as it should, "" while it does."""
        return next(iter(self._faults.values()), "")

    def start(self) -> None:
        """Take part: the greenlets that append, own, read and commit."""
        steps = {
            "append": self._append,
            "read": self._read,
            "commit": self._commit,
            "beat": self._beat,
        }
        self._greenlets = [gevent.spawn(self._repeat, *item) for item in steps.items()]

    def _repeat(self, name: str, step: Callable[[RedisLink], None]) -> None:
        link = RedisLink(self._pool)
        while True:
            try:
                step(link)
            except (RedisError, StoreError) as error:
                link.close()
                self._fail(name, error)
                gevent.sleep(REDIS_RETRY)
            except Exception:
                link.close()
                self._metrics.count("packets.internal_error")
                extra = {"event": "internal_error"}
                log.error("the cluster: %s failed", name, exc_info=True, extra=extra)
                gevent.sleep(REDIS_RETRY)
            else:
                self._work(name)

    def _fail(self, name: str, error: AgentError) -> None:
        self._metrics.count("cluster.errors")
        if not self._faults:
            self._again_from = boottime() - REDIS_TIMEOUT - APPENDED_KEPT
        if name == "beat" and name not in self._faults:
            self._away = (self._answered, inf)
        self._faults[name] = str(error)
        # To be looked at before the next group is appended.
        self._append_again = True
        self._beat_due.set()
        now = time.monotonic()
        if now - self._said >= REDIS_SAID:
            self._said = now
            extra = {"event": "redis_failed", "unappended": self._octets}
            log.error("Redis does not answer as it should: %s", error, extra=extra)

    def _work(self, name: str) -> None:
        """A step was done: its fault is over, if it had one."""
        if not self._faults.pop(name, "") or self._said == -inf:
            return
        # The others may see it later, and have more to tell.
        self._settled = time.monotonic() + SETTLE
        if not self._faults:
            self._said = -inf
            self._write_again()
            log.warning("Redis answers again", extra={"event": "redis_back"})

    def _write_again(self) -> None:
        """Redis was away, and may have lost its last: see what it has, also by a commit."""
        self._append_again = True
        self._append_due.set()
        for shard in self.owned.values():
            shard.store.advance(shard.store.position)

    def _come_back(self) -> None:
        """Redis is back: the clocks go on where they stood, once all agents have told all."""
        if self._away[1] == inf:
            self._away = (self._away[0], self._answered + SETTLE)
            for shard in self.owned.values():
                self._skip(shard.store)

    def _skip(self, store: RedisStore) -> None:
        """Let a clock stand still over the time in which Redis was away last."""
        start, end = self._away
        if store.clock and end > start:
            store.lag += max(end - max(start, store.clock + store.lag), 0.0)

    # Taking in

    def shard_of(self, call_id: str) -> int:
        """The shard of a call. Where routes tie legs all calls have one, so that legs meet."""
        if self._ties:
            return 0
        octets = call_id.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(octets, digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest, "big") % self.settings.cluster_shards

    @property
    def unappended(self) -> int:
        """Octets of frames that wait for Redis."""
        return self._octets

    @property
    def behind(self) -> bool:
        """Whether senders over TCP have to wait."""
        return bool(self._faults) or self._octets > TCP_UNAPPENDED

    def append(self, call_ids: Iterable[str], frame: bytes) -> bool:
        """Hand a frame to the shards of its calls; False where too much waits: it was dropped."""
        if self._octets + len(frame) > MAX_UNAPPENDED:
            return False
        for call_id in call_ids:
            self._pending.append((call_id, frame))
            self._octets += len(frame)
        self._append_due.set()
        return True

    def _append(self, link: RedisLink) -> None:
        """One pipeline. What was not answered is sent again; a copy adds no fact."""
        self._append_due.wait()
        if self._append_again:
            known = int(link.one("HGET", f"{self._prefix}appended", self.name) or 0)
            self._append_again = False
            # Behind what Redis has never had, which must not be late.
            for when, number, call_id, frame in self._appended:
                # What is older may be of calls that were forgotten.
                if number > known and when >= self._again_from:
                    self._pending.append((call_id, frame))
                    self._octets += len(frame)
            self._appended.clear()
            self._appended_octets = 0
        if not self._pending or not self._salt:
            self._append_due.clear()
            return
        if len(self._pending) < APPEND_GROUP:
            gevent.sleep(APPEND_INTERVAL)
        group = list(islice(self._pending, APPEND_GROUP))
        self._groups += 1
        prefix = f"{self._prefix}stream:"
        commands = [
            ("XADD", f"{prefix}{self.shard_of(call_id)}", "*", "f", frame)
            for call_id, frame in group
        ]
        # Redis has all up to this group as long as it has this.
        mark = ("HSET", f"{self._prefix}appended", self.name, self._groups)
        *appended, marked = link.ask(*commands, mark)
        for answer in appended:
            if isinstance(answer, RedisError):
                raise answer
            self._note_appended(*self._pending.popleft())
            self._metrics.count("cluster.appended")
        if isinstance(marked, RedisError):
            raise marked

    def _note_appended(self, call_id: str, frame: bytes) -> None:
        """A frame is in Redis; keep it for a while."""
        kept, now = self._appended, boottime()
        self._octets -= len(frame)
        kept.append((now, self._groups, call_id, frame))
        self._appended_octets += len(frame)
        while kept[0][0] < now - APPENDED_KEPT or self._appended_octets > MAX_APPENDED_KEPT:
            self._appended_octets -= len(kept.popleft()[3])

    # Owning

    def tick(self) -> None:
        """Drop what may be another agent's by now; called a few times a second."""
        now = boottime()
        for shard in list(self.owned.values()):
            if now >= shard.store.until:
                self._lose(shard, "its lease could not be renewed in time")

    def _beat(self, link: RedisLink) -> None:
        """Renew the leases, see who is there, take or give back shards."""
        if not self._joined:
            try:
                self.join()
            except ConfigError as error:
                self.fatal = str(error)
                raise RedisError("config", str(error)) from None
            self._append_due.set()
        started = boottime()
        beaten = [*(shard.store for shard in self.owned.values()), *self._taking]
        status = {"name": self.name, "shards": len(self.owned), "version": __version__}
        answer = link.run(
            BEAT_SCRIPT,
            self._prefix,
            self.name,
            _compact_json(status),
            round(AGENT_GONE * 1000),
            round(self._lease * 1000),
            self.settings.cluster_shards,
            *chain.from_iterable((store.number, store.token, store.owners) for store in beaten),
        )
        now, agents, lost, free, retries, self.rejected, self.entries, salt = answer
        self.agents = sorted((json.loads(text) for text in agents), key=lambda x: str(x["name"]))
        self._answered = max(self._answered, now / 1000)
        self.tick()
        taken = set(map(int, lost))
        for store in beaten:
            if store.number not in taken:
                store.until = started + self._lease
            elif store in self._taking:
                store.lost = True
            elif not store.lost:
                self._lose(self.owned[store.number], "another agent has it")
        if "beat" in self._faults:
            self._come_back()
            self._work("beat")
        for number in map(int, retries):
            shard = self.owned.get(number)
            if shard is not None and shard.owned and shard.take_up(shard.store):
                self._commit_due.set()
        if salt != self._salt.hex().encode():
            # Redis was emptied.
            self._joined = False
            self._again_from = boottime() - BEAT - APPENDED_KEPT
            self._write_again()
        elif time.monotonic() >= self._settled:
            self._take_share([int(number) for number in free])
        self._beat_due.wait(timeout=max(BEAT - (boottime() - started), 0.05))
        self._beat_due.clear()

    def try_to_join(self) -> None:
        """`join`; where Redis does not answer that is said, and tried again later."""
        try:
            self.join()
        except RedisError as error:
            self._fail("beat", error)

    def _take_share(self, free: Sequence[int]) -> None:
        """Take free shards up to the share of one agent, or give some back."""
        if self._stopping or (self._taker is not None and not self._taker.ready()):
            return
        share = -(-self.settings.cluster_shards // max(len(self.agents), 1))
        staying = [shard for shard in self.owned.values() if shard.owned]
        if len(staying) > share:
            gevent.spawn(self._give_back, staying[share:])
        elif len(staying) < share and free:
            free = [number for number in free if number not in self.owned]
            chosen = random.sample(free, min(len(free), share - len(staying)))
            self._taker = gevent.spawn(self._take_all, chosen)

    def _take_all(self, numbers: Iterable[int]) -> None:
        link = RedisLink(self._pool)
        before = set(self.owned)
        try:
            for number in numbers:
                if not self._stopping:
                    self._take(link, number)
        except RedisError:
            # The beat says so. What was not taken whole is free again when its lease ends.
            self._metrics.count("cluster.errors")
        except Exception:
            self._metrics.count("packets.internal_error")
            log.error("a shard was not taken", exc_info=True, extra={"event": "internal_error"})
        finally:
            self._taking.clear()
            link.close()
            taken = [shard for number, shard in self.owned.items() if number not in before]
            extra: dict[str, Any] = {"event": "shards_taken", "shards": len(taken)}
            extra["calls"] = sum(len(shard.table) for shard in taken)
            if taken:
                log.info("shards were taken", extra=extra)

    def _take(self, link: RedisLink, number: int) -> None:
        self._tokens += 1
        token = f"{self.name}:{self._tokens}"
        store = RedisStore(self._pool, self._prefix, number, token, self._commit_due)
        started = boottime()
        lease = round(self._lease * 1000)
        meta = link.run(TAKE_SCRIPT, self._prefix, number, store.token, lease)
        if meta is None:
            return
        position, clock, lag, serial, commit, owners = meta
        store.until = started + self._lease
        store.position = position or b"0-0"
        store.clock, store.lag = float(clock or 0), float(lag or 0)
        store.committed, store.owners = (commit or b"").decode(), int(owners)
        self._skip(store)
        self._taking.append(store)
        store.load(link, int(serial or 0))
        table = CallTable(self._shard_settings, self.rules)
        calls = iter(store.load_calls())
        while some := list(islice(calls, STORE_STEP)):
            table.restore(some, store.last_serial, store.clock, 0.0)
            gevent.idle(gevent.get_hub().loop.MAXPRI)
        self._taking.remove(store)
        if store.lost:
            return
        shard = self.owned[number] = StreamShard(table, self._delivery, self._metrics, store)
        self._metrics.count("cluster.shards.taken")
        if shard.unwritten:
            self._commit_due.set()

    def _lose(self, shard: StreamShard, reason: str) -> None:
        if shard.store.lost:
            return
        self.lost += 1
        self._metrics.count("cluster.shards.lost")
        extra = {"event": "shard_lost", "shard": shard.store.number, "calls": len(shard.table)}
        log.warning("a shard was lost: %s", reason, extra=extra)
        self._forget(shard)

    def _forget(self, shard: StreamShard) -> None:
        """Drop a shard at once: table, waiting events, further attempts."""
        shard.store.lost = True
        if self.owned.get(shard.store.number) is shard:
            del self.owned[shard.store.number]
        self._delivery.forget(shard.store)

    def _give_back(self, shards: Sequence[StreamShard]) -> None:
        """Release shards once nothing of them is under way and all is committed."""
        for shard in shards:
            shard.store.leaving = True
        while shards := [shard for shard in shards if not shard.store.lost]:
            # All, without a stop at the first that has some.
            busy = sum([self._delivery.withdraw(shard.store) for shard in shards])
            if not busy and all(shard.clean for shard in shards):
                break
            self._commit_due.set()
            gevent.sleep(CLUSTER_COMMIT)
        for shard in shards:
            self._forget(shard)
        link = RedisLink(self._pool)
        try:
            names = ((shard.store.number, shard.store.token) for shard in shards)
            link.run(RELEASE_SCRIPT, self._prefix, *chain.from_iterable(names))
        except RedisError:
            # The leases end by themselves.
            self._metrics.count("cluster.errors")
        finally:
            link.close()
        self._metrics.count("cluster.shards.given_back", len(shards))
        extra = {"event": "shards_given_back", "shards": len(shards)}
        log.info("shards were given back", extra=extra)

    # Following

    def _read(self, link: RedisLink) -> None:
        """One look at the streams of all shards, and at what is due in them."""
        shards = [shard for shard in self.owned.values() if shard.owned]
        crowded = sum(shard.unwritten for shard in shards) > MAX_UNWRITTEN
        if not shards or "beat" in self._faults or crowded or time.monotonic() < self._settled:
            gevent.sleep(CLUSTER_COMMIT)
            return
        streams = [f"{self._prefix}stream:{shard.store.number}" for shard in shards]
        after = [shard.read for shard in shards]
        started = time.monotonic()
        command = ("XREAD", "COUNT", READ_GROUP, "STREAMS", *streams, *after)
        # The time first: what is appended later is not older.
        (seconds, micros), found = link.ask(("TIME",), command)
        if isinstance(found, RedisError):
            raise found
        now = int(seconds) + int(micros) / 1_000_000
        entries = {name.decode(): batch for name, batch in found or ()}
        for shard, stream in zip(shards, streams, strict=True):
            batch = entries.get(stream, ())
            if not shard.owned:
                continue
            for entry, values in batch:
                self._hold(shard, entry, values)
            self._feed(shard, now - HOLD)
            if len(batch) < READ_GROUP:
                shard.store.clock = max(shard.store.clock, now - HOLD - shard.store.lag)
            try:
                shard.expire(shard.store.clock)
            except Exception:
                # It must not keep the other shards from their work.
                self._metrics.count("packets.internal_error")
                log.warning("a tick failed", exc_info=True, extra={"event": "internal_error"})
            if not shard.clean:
                self._commit_due.set()
            if batch:
                # Others first that have something to do.
                gevent.idle(gevent.get_hub().loop.MAXPRI)
        self._answered = max(self._answered, now)
        if all(len(batch) < READ_GROUP for batch in entries.values()):
            gevent.sleep(max(READ_INTERVAL - (time.monotonic() - started), 0.001))

    def _hold(self, shard: StreamShard, entry: bytes, values: Sequence[bytes]) -> None:
        """Decode an entry of a stream, and keep it until its turn comes."""
        after, shard.read = shard.read, entry
        kind, frame = values if len(values) == 2 else (b"", b"")
        appended = int(entry.partition(b"-")[0]) / 1000
        packet, sender = None, ""
        try:
            data, arrival, sender = unpack_frame(frame)
            packet = decode_hep(data, arrival)
        except (HepError, struct.error):
            # It was whole when it was appended: another program writes here.
            self._metrics.count("packets.dropped.cluster_foreign")
        shard.held.append(
            _Entry(
                after=after,
                time=appended,
                read_at=time.monotonic(),
                hep_time=packet.time if packet else 0,
                packet=packet,
                sender=sender,
                frame=frame if kind == b"f" else b"",
            )
        )

    def _feed(self, shard: StreamShard, until: float) -> None:
        """Handle the entries up to a time of the stream in the order of their HEP time, in one go.

        Later ones go with them whose HEP time is before that of one of these.
        """
        held, store = shard.held, shard.store
        # Or read so long ago: a clock that was set back must not hold all.
        read = time.monotonic() - HOLD
        number = sum(1 for _ in takewhile(lambda x: x.time <= until or x.read_at <= read, held))
        if not number:
            return
        latest = max(entry.hep_time for entry in held[:number])
        later = held[number:]
        batch = held[:number] + [entry for entry in later if entry.hep_time < latest]
        batch.sort(key=attrgetter("hep_time"))
        shard.held = later = [entry for entry in later if entry.hep_time >= latest]
        ahead = later[0].time if later else inf
        clocks = list(accumulate((entry.time for entry in reversed(batch)), min, initial=ahead))
        for entry in batch:
            # Never ahead of what is still to come.
            store.clock = max(store.clock, clocks.pop() - store.lag)
            try:
                self._handle(shard, entry)
            except Exception:
                self._metrics.count("packets.internal_error")
                extra = {"event": "internal_error", "sender": entry.sender}
                log.warning("a packet could not be handled", exc_info=True, extra=extra)
        store.advance(later[0].after if later else shard.read)
        self._metrics.count("cluster.read", len(batch))

    def _handle(self, shard: StreamShard, entry: _Entry) -> None:
        packet = entry.packet
        if packet is None:
            return
        for payload in split_messages(packet):
            try:
                message = parse_sip(payload, packet.time)
            except SipError:
                # Counted where it was taken in.
                continue
            if message is None:
                continue
            if entry.frame and self.shard_of(message.call_id) != shard.store.number:
                continue
            shard.handle(Sighting(packet, message, entry.sender), shard.store.clock)
            tags = message.from_tag, message.to_tag
            leg = message.cseq_method == "BYE" and min(map(len, tags)) >= MIN_TAG
            if leg and entry.frame and not shard.table.knows(message.call_id):
                # A leg without INVITE ends the call whose tags it has, in another shard (rule 17).
                shard.store.put_stray(*tags, entry.frame)

    def _commit(self, link: RedisLink) -> None:
        """Write what was noted in all shards; what was not answered is written again as it was."""
        if not self._writing:
            self._commit_due.wait(timeout=BEAT)
            gevent.sleep(CLUSTER_COMMIT)
            self._commit_due.clear()
            for shard in list(self.owned.values()):
                if not shard.clean:
                    events, answered = shard.note(shard.store)
                    shard.store.collect(shard.table.next_serial())
                    self._writing.append((shard, events, answered))
        writing = [entry for entry in self._writing if not entry[0].store.lost]
        self._writing = writing
        if not writing:
            return
        started = time.monotonic()
        limit = max(MAX_REJECTED // self.settings.cluster_shards, 1)
        values = chain.from_iterable(shard.store.writing for shard, _, _ in writing)
        written = link.run(COMMIT_SCRIPT, self._prefix, limit, *values)
        self._metrics.count("cluster.commits")
        self._metrics.time("cluster.commit.time", time.monotonic() - started)
        self._committed(link, list(zip(writing, written, strict=True)))

    def _committed(self, link: RedisLink, answers: Sequence[tuple[_Written, int]]) -> None:
        """Go on by what the script answered for each shard."""
        self._writing = [entry for entry, answer in answers if answer == 3]
        for (shard, events, answered), answer in answers:
            if answer == 3:
                continue
            shard.store.writing = []
            if not answer:
                self._lose(shard, "its commit was refused")
            elif not shard.store.lost:
                shard.hand_over(events if shard.owned else (), answered, True)
        for (shard, _, _), answer in answers:
            # What fails here is done after the next commit, which says so again.
            if answer == 2 and not shard.store.lost:
                self._metrics.count("cluster.shards.rewritten")
                extra = {"event": "redis_went_back", "shard": shard.store.number}
                log.warning("Redis has lost a commit: the shard is written again", extra=extra)
                shard.rewrite(link, f"{self._prefix}calls:{shard.store.number}")
        if self._writing:
            # The next beat gives the lease back, or says that the shard is lost.
            self._beat_due.set()
            gevent.sleep(REDIS_RETRY)

    # How things are, and the end

    def faults(self) -> list[str]:
        """Why this agent's part of the work is not done, each a line for a person."""
        faults = []
        if self.failure:
            faults.append(f"Redis does not answer as it should: {self.failure}")
        if self.lag() > LAG_UNHEALTHY:
            faults.append(f"what was taken in waits for {self.lag():.0f} s in Redis")
        return faults

    def status(self) -> dict[str, Any]:
        """What ``/status`` shows: the agents by name, and how far this one is."""
        return {
            "name": self.name,
            "redis": self.failure or "ok",
            "shards": len(self.owned),
            "of": self.settings.cluster_shards,
            "lag": round(self.lag(), 3),
            "entries": self.entries,
            "unappended": self._octets,
            "shards_lost": self.lost,
            "agents": self.agents,
        }

    def lag(self) -> float:
        """Seconds for which what is still unread waits at most."""
        clocks = (shard.store.clock + shard.store.lag for shard in self.owned.values())
        return max(self._answered - min(clocks, default=self._answered), 0.0)

    def stop(self, deadline: float) -> None:
        """Append what waits and give all back, until a time of the monotonic clock.

        What could not be given back is free when its lease ends.
        """
        self._stopping = True
        # Also while Redis is away: it may come back in time.
        while self._pending and not self.fatal and time.monotonic() < deadline:
            gevent.sleep(APPEND_INTERVAL)
        if self._taker is not None:
            # Else nobody would give back what it takes.
            self._taker.join(timeout=max(deadline - time.monotonic(), 0.1))
        leaving = gevent.spawn(self._give_back, list(self.owned.values()))
        leaving.join(timeout=max(deadline - time.monotonic(), 0.1))
        gevent.killall([leaving, *filter(None, [self._taker]), *self._greenlets])
        if self._pending:
            extra = {"event": "unappended", "packets": len(self._pending)}
            log.error("packets are lost that Redis did not take", extra=extra)
        # The others share what is free from their next beat on.
        with suppress(RedisError):
            RedisLink(self._pool).ask(
                ("ZREM", f"{self._prefix}agents", self.name),
                ("HDEL", f"{self._prefix}agent", self.name),
                ("HDEL", f"{self._prefix}appended", self.name),
            )


class ClusterOutbox:
    """What waits and what was rejected in a cluster, for an operator on any machine.

    Raises ConfigError where no agent has run, RedisError where Redis does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._prefix = f"{settings.cluster_name}:"
        self._link = RedisLink(RedisPool(settings.cluster_url, settings.cluster_password))
        shards = self._link.one("HGET", f"{self._prefix}config", "shards")
        if shards is None:
            raise ConfigError(
                f"cluster_name: {settings.cluster_name}: no such cluster; "
                "allowed: one in which an agent has run"
            )
        self._shards = range(int(shards))

    def events(self) -> Iterator[tuple[str, RatingEvent]]:
        """Each event with its state: "waiting", "rejected" or "retry"; shard by shard, in order."""
        for number in self._shards:
            found = []
            for name, value in self._link.scan(f"{self._prefix}calls:{number}"):
                if chr(name[-1]) != _FACTS:
                    event, state, _ = unpack_record(int(name[:-1]), value)
                    if state == _WAITS:
                        found.append(event)
            yield from (("waiting", event) for event in sorted(found, key=attrgetter("serial")))
        for number in self._shards:
            again = self._retries(number)
            for _, event in self._rejected(number):
                yield "retry" if event.serial in again else "rejected", event

    def retry(self, calls: Collection[str]) -> int:
        """Have rejected events of some calls, or of all, sent again; how many they are."""
        return self._mark(calls, lambda event, _, key: ("SADD", f"{key}retry:{{}}", event.serial))

    def drop(self, calls: Collection[str]) -> int:
        """Drop the rejected events of some calls; how many they were."""
        return self._mark(calls, lambda _, text, key: ("ZREM", f"{key}rejected:{{}}", text))

    def _mark(self, calls: Collection[str], command: Callable[..., tuple[Any, ...]]) -> int:
        changed = 0
        for number in self._shards:
            for text, event in self._rejected(number):
                if not calls or {event.call_id, event.transaction_tag} & set(calls):
                    name, key, value = command(event, text, self._prefix)
                    self._link.one(name, key.format(number), value)
                    changed += 1
        return changed

    def _retries(self, number: int) -> set[int]:
        return {
            int(serial) for serial in self._link.one("SMEMBERS", f"{self._prefix}retry:{number}")
        }

    def _rejected(self, number: int) -> Iterator[tuple[bytes, RatingEvent]]:
        after: Any = "-inf"
        while found := self._link.one(
            "ZRANGEBYSCORE",
            f"{self._prefix}rejected:{number}",
            after,
            "+inf",
            "LIMIT",
            0,
            MAX_LOADED,
        ):
            for text in found:
                event = unpack_rejected(text)
                after = f"({event.serial}"
                yield text, event


# Room: forwarding

# Octets of packets that wait for one target, with what each takes in memory besides its own: the
# head of a bytes object, the allocator's rounding and a place in the queue. 30 s of 500 packets a
# second, 1 kB each: the time in which Homer restarts.
FORWARD_QUEUE = 16 * 1024 * 1024
_PACKET_OVERHEAD = 64
# Packets that go to one target in one go, some 1 ms of work, and seconds until the next: to wake a
# greenlet takes as long as to send a packet, so it is woken for many. 128,000 a second may go.
FORWARD_PACKETS = 256
FORWARD_PAUSE = 0.002
# Seconds for a connection to one address, and for its TLS handshake.
FORWARD_CONNECT = 10.0
# Seconds for which a target over TCP may take no octets, or its host be gone without a word: the
# kernel itself would wait for some 15 minutes.
FORWARD_STALLED = 30.0
# Seconds after which the name of a UDP target is resolved anew; others are at each connection.
FORWARD_RESOLVE = 60.0
# Seconds between two warnings of one kind about one target.
FORWARD_WARN = 60.0
# Seconds at most for what waits when the agent stops.
FORWARD_LAST = 1.0


class Forwarder:
    """Sends the packets that were let in on to one target of hep_forward, octet by octet.

    `put` only queues; a greenlet of its own resolves, connects and sends. What finds the queue full
    is dropped and counted, and so is what a broken connection may have lost: to send it again would
    keep the target at a packet that it refuses. A stream has no frames but HEP3's, so HEP1 and HEP2
    go on over UDP only. ``listeners`` is what this agent listens on, as the status has it.
    """

    def __init__(
        self,
        target: str,
        settings: Settings,
        metrics: Metrics,
        listeners: Sequence[Mapping[str, str]],
    ) -> None:
        self.target = target
        self._scheme, _, address = target.partition("://")
        self._host, self._port = split_address(address)
        ca_file = settings.hep_forward_ca_file
        self._tls = client_tls("hep_forward_ca_file", ca_file) if self._scheme == "tls" else None
        self._stream = self._scheme != "udp"
        # Dots would divide a metric's name.
        self._name = re.sub("[^A-Za-z0-9-]+", "_", target)
        self._metrics = metrics
        self._listeners = listeners
        self.last_error, self._failed_at = "", 0.0
        self._warned: dict[str, float] = {}
        self._queue: deque[bytes] = deque()
        self._octets = 0
        self._due, self._stopping = gevent.event.Event(), gevent.event.Event()
        self.greenlet = gevent.Greenlet(self._run)

    def __len__(self) -> int:
        """How many packets wait."""
        return len(self._queue)

    def put(self, data: bytes) -> None:
        """Queue a packet, or drop it; never waits."""
        size = len(data) + _PACKET_OVERHEAD
        if self._octets + size > FORWARD_QUEUE:
            self._drop(1, "its queue is full")
        elif self._stream and data[:4] not in _MAGIC:
            self._drop(1, "HEP1 and HEP2 go over UDP only")
        else:
            self._queue.append(data)
            self._octets += size
            if not self._due.is_set():
                self._due.set()

    def counts(self) -> dict[str, int]:
        """The totals of the metrics ``forward.*`` for this target."""
        totals = self._metrics.totals
        kinds = ("sent", "dropped", "connected", "errors")
        return {kind: totals.get(f"forward.{kind}.{self._name}", 0) for kind in kinds}

    def status(self, offset: float) -> dict[str, Any]:
        """What the status shows; ``offset`` makes UNIX time of the monotonic clock's."""
        return {
            "target": self.target,
            "waiting": len(self),
            **self.counts(),
            "last_error": self.last_error,
            "last_error_at": round(self._failed_at + offset, 3) if self._failed_at else None,
        }

    def finish(self) -> None:
        """Let the greenlet end once it has sent what waits, or can't."""
        self._stopping.set()
        self._due.set()

    def close(self) -> None:
        """End the greenlet; what waits still is dropped."""
        self.greenlet.kill()
        if self._queue:
            self._drop(len(self._queue), "the agent stops")
            self._queue.clear()
            self._octets = 0

    def _run(self) -> None:
        failures = 0
        while self._wait():
            started = time.monotonic()
            try:
                with closing(self._open()) as sock:
                    (self._send_stream if self._stream else self._send_datagrams)(sock)
            except Exception as error:
                self._note(error)
                if self._stopping.is_set():
                    return
                # A target that takes connections only to close them is no better than one that
                # refuses them.
                failures = 1 if time.monotonic() - started > RETRY_LAST else failures + 1
                self._stopping.wait(retry_delay(failures) * random.uniform(1 - JITTER, 1 + JITTER))

    def _wait(self, reader: gevent.Greenlet | None = None) -> bool:
        """Wait for a packet; False at the end of the agent, or of a connection with its reader."""
        while not self._queue:
            if self._stopping.is_set() or (reader is not None and reader.ready()):
                return False
            self._due.clear()
            self._due.wait()
        return reader is None or not reader.ready()

    def _take(self) -> list[bytes]:
        """The next packets to go, FORWARD_PACKETS at most."""
        queue = self._queue
        batch = [queue.popleft() for _ in range(min(len(queue), FORWARD_PACKETS))]
        self._octets -= sum(map(len, batch)) + len(batch) * _PACKET_OVERHEAD
        return batch

    def _send_datagrams(self, sock: Any) -> None:
        """Send what waits and what comes until the agent stops."""
        until = time.monotonic() + FORWARD_RESOLVE
        try:
            while self._wait():
                if time.monotonic() >= until:
                    until = time.monotonic() + FORWARD_RESOLVE
                    sock = self._renewed(sock)
                sent = 0
                for data in self._take():
                    try:
                        sock.send(data)
                        sent += 1
                    except OSError as error:
                        # Such as an ICMP error that an earlier packet brought about.
                        self._note(error)
                        self._drop(1, str(error))
                self._metrics.count(f"forward.sent.{self._name}", sent)
                gevent.sleep(FORWARD_PAUSE)
        finally:
            sock.close()

    def _renewed(self, sock: Any) -> Any:
        """A socket to the address that the name has now; the old one if it can't be told."""
        try:
            fresh = self._open()
        except OSError as error:
            self._note(error)
            return sock
        sock.close()
        return fresh

    def _send_stream(self, sock: Any) -> None:
        """Send what waits and what comes until the agent stops. Raises OSError at a broken end."""
        self._metrics.count(f"forward.connected.{self._name}")
        self._warned.clear()
        extra = {"event": "forward_connected", "target": self.target}
        log.info("connected to a target of hep_forward", extra=extra)
        reader = gevent.spawn(self._read, sock)
        reader.link(lambda _: self._due.set())
        try:
            while self._wait(reader):
                batch = self._take()
                try:
                    sock.sendall(b"".join(batch))
                except BaseException as error:
                    self._drop(len(batch), str(error))
                    raise
                self._metrics.count(f"forward.sent.{self._name}", len(batch))
                gevent.sleep(FORWARD_PAUSE)
            if reader.ready():
                raise ConnectionError("the target closed the connection")
            # The end of its side says that it has read all. Not SSLSocket's own, which would end
            # the reading, too.
            socket.socket.shutdown(sock, socket.SHUT_WR)
            reader.join()
        finally:
            reader.kill()

    @staticmethod
    def _read(sock: Any) -> None:
        # Targets say nothing; an end is to be seen before a packet is written to it in vain.
        with suppress(OSError):
            while sock.recv(4096):
                pass

    def _open(self) -> Any:
        """A connected socket. Raises OSError."""
        failure = OSError("the name has no address")
        kind = socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM
        for family, _, _, _, address in socket.getaddrinfo(self._host, self._port, 0, kind):
            sock: Any = socket.socket(family, kind)
            try:
                sock.settimeout(FORWARD_CONNECT)
                sock.connect(address)
                if self._is_self(sock):
                    raise OSError("the target is this agent itself")
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_hostname=self._host)
                if self._stream:
                    limit = int(FORWARD_STALLED * 1000)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
                sock.settimeout(None)
                return sock
            except OSError as error:
                failure = error
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise failure

    def _is_self(self, sock: Any) -> bool:
        """Whether a listener of this agent is at the other end: packets would go round for ever."""
        host, port = sock.getpeername()[:2]
        if sock.getsockname()[0] != host:
            return False
        own = [x["address"] for x in self._listeners if x["transport"] == self._scheme]
        return any(split_address(x) in [(y, port) for y in (host, "0.0.0.0", "::")] for x in own)

    def _note(self, error: Exception) -> None:
        self.last_error, self._failed_at = str(error)[:MAX_ERROR_TEXT], time.monotonic()
        self._metrics.count(f"forward.errors.{self._name}")
        self._warn(f"a target of hep_forward fails: {self.last_error}", "forward_failed")

    def _drop(self, number: int, reason: str) -> None:
        self._metrics.count(f"forward.dropped.{self._name}", number)
        self._warn(f"packets are not forwarded: {reason}", "forward_dropped")

    def _warn(self, text: str, event: str) -> None:
        now = time.monotonic()
        if now >= self._warned.get(event, 0.0):
            self._warned[event] = now + FORWARD_WARN
            log.warning(text, extra={"event": event, "target": self.target})


def finish_forwarding(forwarders: Sequence[Forwarder], seconds: float) -> None:
    """Give what waits so much time to go, then end."""
    for forwarder in forwarders:
        forwarder.finish()
    gevent.joinall([forwarder.greenlet for forwarder in forwarders], timeout=seconds)
    for forwarder in forwarders:
        forwarder.close()


# Room: agent

# Share of a new packet in the smoothed clock skew of a sender.
SKEW_WEIGHT = 1 / 16


@dataclass(slots=True, eq=False)
class Sender:
    """What is known of one IP address that sends HEP; ``allowed`` is what hep_allow says of it.

    ``seen_at`` is when its last packet came, UNIX time in microseconds. ``dropped`` counts by kind,
    as the metrics ``packets.dropped.*`` and ``packets.malformed.*`` do, and refused connections as
    ``connection_*``; kinds are words of this module, so they are few. ``skew`` is arrival less HEP
    time stamp in milliseconds, smoothed, None before the first stamp: the sender's clock, its queue
    and ours. ``fault`` is the text of its last malformed packet.
    """

    address: str
    allowed: bool
    packets: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seen_at: int = 0
    connections: int = 0
    skew: float | None = None
    fault: str = ""
    _tokens: float = 0.0
    _filled: float = -inf

    def drop(self, kind: str) -> None:
        """Count a packet that was not taken in."""
        self.dropped[kind] = self.dropped.get(kind, 0) + 1

    def within(self, rate: int, now: float) -> bool:
        """Whether one more packet keeps to ``rate`` a second, with a burst of one second."""
        self._tokens = min(self._tokens + (now - self._filled) * rate, rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def note_skew(self, milliseconds: float) -> None:
        """Take in the skew of one packet."""
        if self.skew is None:
            self.skew = milliseconds
        else:
            self.skew += (milliseconds - self.skew) * SKEW_WEIGHT


class Senders:
    """The senders by address, at most MAX_SENDERS.

    Over that those go first that were refused last, then those unseen for longest; one with open
    connections stays.
    """

    def __init__(self, networks: Sequence[str] = ()) -> None:
        self._known: OrderedDict[str, Sender] = OrderedDict()
        self.allow(networks)

    def allow(self, networks: Sequence[str]) -> None:
        """From now on those in these networks may send; all, if there is none."""
        self._networks = [_network(text) for text in networks]
        for sender in self:
            sender.allowed = self._may_send(sender.address)

    def __iter__(self) -> Iterator[Sender]:
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def of(self, host: str) -> Sender:
        """The sender with an address as a socket gives it; it counts as seen just now."""
        # IPv4 on a socket of IPv6.
        if host.startswith("::ffff:"):
            host = host[7:]
        sender = self._known.get(host)
        if sender is None:
            sender = self._meet(host)
        else:
            self._known.move_to_end(host)
        return sender

    def demote(self, sender: Sender) -> None:
        """A packet of it was refused: it goes before those that may send."""
        if sender.address in self._known:
            self._known.move_to_end(sender.address, last=False)

    def _meet(self, address: str) -> Sender:
        while len(self._known) >= MAX_SENDERS:
            oldest, sender = self._known.popitem(last=False)
            if sender.connections:
                self._known[oldest] = sender
        sender = self._known[address] = Sender(address, self._may_send(address))
        return sender

    def _may_send(self, address: str) -> bool:
        return not self._networks or _in_networks(address, self._networks)


# What some senders send to keep a path through a firewall open.
_BLANK = b"\r\n\0 "
# Characters of the text of a sender's last fault.
MAX_FAULT = 200


class Agent:
    """The glue: a packet in, events out to delivery. Its methods never raise."""

    def __init__(
        self,
        settings: Settings,
        rules: Sequence[Rule],
        limiter: WarningLimiter,
        store: Journal | None = None,
        tls: ssl.SSLContext | None = None,
        records: RecordFile | None = None,
    ) -> None:
        self.settings = settings
        self.tls = tls
        self.metrics = Metrics(settings)
        self.delivery = Delivery(settings, self.metrics)
        self.cluster: Cluster | None = None
        self._shards: list[Shard] = []
        if settings.cluster_url:
            self.cluster = Cluster(settings, rules, self.metrics, self.delivery)
        else:
            table = (RecordedTable if records else CallTable)(settings, rules)
            self._shards = [Shard(table, self.delivery, self.metrics, store, records)]
        self.senders = Senders(settings.hep_allow)
        self.connections = 0
        # What listens, as the log says it, for the status.
        self.listeners: list[dict[str, Any]] = []
        self.forwarders = tuple(
            Forwarder(target, settings, self.metrics, self.listeners)
            for target in settings.hep_forward
        )
        self.started = self._heard = time.monotonic()
        self._taken_in = 0
        self._limiter = limiter
        self._keys = [key.encode() for key in settings.hep_auth_key]

    @property
    def shards(self) -> list[Shard]:
        """What this agent owns: all calls, or its part of them in a cluster."""
        return list(self.cluster.owned.values()) if self.cluster else self._shards

    @property
    def waiting(self) -> int:
        """How many events wait for a store or for delivery."""
        return sum(shard.fresh for shard in self.shards) + len(self.delivery)

    @property
    def rejected(self) -> int:
        """How many rejected events are kept for an operator."""
        return self.cluster.rejected if self.cluster else sum(x.rejected for x in self.shards)

    @property
    def store_failure(self) -> str | None:
        """Why a store can't be written, "" where each can, None where there is none."""
        if self.cluster:
            return self.cluster.failure
        stores = [shard.store for shard in self.shards if shard.store]
        return next((x.failure for x in stores if x.failure), "") if stores else None

    @property
    def behind(self) -> bool:
        """Whether messages come faster than a store can take them."""
        if self.cluster:
            return self.cluster.behind
        return any(shard.behind for shard in self.shards)

    @property
    def busy(self) -> bool:
        """Whether something can be written or sent at once."""
        return any(shard.fresh for shard in self.shards) or self.delivery.busy

    def sizes(self) -> dict[str, int]:
        """The number of calls in each state."""
        sizes = [shard.table.sizes() for shard in self.shards]
        return {state: sum(each[state] for each in sizes) for state in STATES}

    def commit(self, patience: float | None = None) -> bool:
        """Write all that has changed, as `Shard.commit` does; whether all of it is written."""
        written = [
            shard.commit(patience) for shard in self.shards if isinstance(shard.store, Journal)
        ]
        return all(written)

    def admit(self, sender: Sender) -> bool:
        """Whether a sender may open one more connection; counted and logged where not."""
        if not sender.allowed:
            kind, text = "not_allowed", "a connection from outside hep_allow"
            self.senders.demote(sender)
        elif sender.connections >= MAX_CONNECTIONS_PER_SENDER:
            kind, text = "too_many", "too many connections of one sender"
        else:
            return True
        sender.drop(f"connection_{kind}")
        self.metrics.count(f"connections.refused.{kind}")
        self._warn(f"{text}, closed", f"connection_{kind}", sender)
        return False

    def receive(self, data: bytes, transport: str, sender: Sender) -> None:
        """Take in one HEP packet; ``transport`` is "udp", "tcp" or "tls"."""
        self.metrics.count(f"packets.received.{transport}")
        arrival = time.time_ns() // 1000
        now = time.monotonic()
        sender.packets += 1
        sender.seen_at = arrival
        if not sender.allowed:
            self._shut_out("not_allowed", "a packet from outside hep_allow", sender)
            return
        try:
            packet = decode_hep(data, arrival)
            if self._may_enter(packet, sender, now):
                for forwarder in self.forwarders:
                    forwarder.put(data)
                # Without a time stamp the packet has the arrival's.
                if packet.time != arrival:
                    sender.note_skew((arrival - packet.time) / 1000)
                self._follow(packet, sender, now, data)
        except (HepError, SipError) as error:
            layer = "hep" if isinstance(error, HepError) else "sip"
            self.malformed(f"{layer}_{error.kind}", str(error), sender)
        except Exception:
            self.metrics.count("packets.internal_error")
            extra = {"event": "internal_error", "sender": sender.address}
            log.warning("a packet could not be handled", exc_info=True, extra=extra)

    def _may_enter(self, packet: HepPacket, sender: Sender, now: float) -> bool:
        if self._keys and not self._has_key(packet):
            kind = "wrong_key" if packet.auth_key else "no_key"
            self._shut_out(kind, "a packet without a key of hep_auth_key", sender)
            return False
        # After the key, or packets with a forged address would use up the sender's share.
        rate = self.settings.hep_rate_limit
        if rate and not sender.within(rate, now):
            self._drop("rate_limit", sender)
            self._warn("more packets than hep_rate_limit", "dropped_rate_limit", sender)
            return False
        return True

    def _follow(self, packet: HepPacket, sender: Sender, now: float, data: bytes) -> None:
        """Give the SIP messages of a packet to their calls. Raises SipError for a bad one."""
        if packet.protocol_type != SIP_PROTOCOL_TYPE:
            self._drop("not_sip", sender)
            return
        if packet.payload[:1] in _BLANK and not packet.payload.strip(_BLANK):
            self._drop("empty", sender)
            return
        fault: SipError | None = None
        call_ids = []
        for payload in split_messages(packet):
            try:
                message = parse_sip(payload, packet.time)
            except SipError as error:
                # What comes after it in the stream counts all the same.
                fault = fault or error
                continue
            if message is None:
                self.metrics.count("packets.ignored")
            elif self.cluster:
                call_ids.append(message.call_id)
            else:
                self._shards[0].handle(Sighting(packet, message, sender.address), now)
        if call_ids:
            self._append(data, call_ids, sender)
        if fault is not None:
            raise fault

    def _append(self, data: bytes, call_ids: list[str], sender: Sender) -> None:
        assert self.cluster is not None
        frame = pack_frame(data, sender.seen_at, sender.address)
        if not self.cluster.append(dict.fromkeys(call_ids), frame):
            self._drop("cluster_full", sender)
            if not self._limiter.holds("dropped_cluster_full", time.time()):
                extra = {"event": "dropped_cluster_full", "sender": sender.address}
                log.error("Redis takes too little, packets are lost: calls go wrong", extra=extra)

    def _has_key(self, packet: HepPacket) -> bool:
        # Some senders end a string chunk with a NUL. All keys are compared, in constant time each.
        key = packet.auth_key.rstrip(b"\0")
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0

    def _shut_out(self, kind: str, text: str, sender: Sender) -> None:
        self._drop(kind, sender)
        self.senders.demote(sender)
        self._warn(text, f"dropped_{kind}", sender)

    def _warn(self, text: str, event: str, sender: Sender | None) -> None:
        if not self._limiter.holds(event, time.time()):
            log.warning(text, extra={"event": event, "sender": sender.address if sender else ""})

    def _drop(self, kind: str, sender: Sender) -> None:
        self.metrics.count(f"packets.dropped.{kind}")
        sender.drop(kind)

    def malformed(self, kind: str, text: str, sender: Sender | None) -> None:
        """Count a fault of a peer, None where unknown, by its kind; log it at a limited rate."""
        kind = kind.replace("-", "_")
        self.metrics.count(f"packets.malformed.{kind}")
        if sender:
            sender.drop(kind)
            sender.fault = text[:MAX_FAULT]
        self._warn(f"malformed packet: {text}", f"malformed_{kind}", sender)

    def tick(self, closing: bool = False) -> None:
        """Look at deadlines and send what has waited; ``closing``: decide all that waits."""
        now = time.monotonic()
        try:
            if self.cluster:
                self.cluster.tick()
            else:
                for shard in self.shards:
                    shard.expire(now, closing)
            self.delivery.tick()
            for notice in chain.from_iterable(x.table.take_notices() for x in self.shards):
                text = {
                    "orphan": "a BYE without a call: its answer was not seen, nothing is charged",
                    "evicted": "too many calls: a running call was ended",
                    "expired": "a call without BYE was ended",
                    "bye_refused": "a BYE was refused, the call goes on",
                    "went_on": "a call went on behind a BYE that nobody answered",
                }[notice.kind]
                extra = {"event": f"call_{notice.kind}", "call_id": notice.call_id, **notice.fields}
                log.warning(text, extra=extra)
        except Exception:
            self.metrics.count("packets.internal_error")
            log.warning("a tick failed", exc_info=True, extra={"event": "internal_error"})

    def flush(self, now: float) -> None:
        """Send metrics, and say how many warnings were held back."""
        for shard in self.shards:
            counts, shard.table.counts = shard.table.counts, {}
            for name, number in counts.items():
                self.metrics.count(name, number)
            for labels, traffic in shard.table.traffic.items():
                for name, number in traffic.take():
                    self.metrics.count(f"tenants.{name}.{labels}", number)
        taken_in = self._count_taken_in()
        if taken_in > self._taken_in:
            self._heard = now
        self._taken_in = taken_in
        gauges = self.gauges()
        for event, held in self._limiter.take_held().items():
            extra = {"event": "held_back", "kind": event, "held_back": held}
            log.warning("more warnings of one kind were held back", extra=extra)
        try:
            self.metrics.flush(gauges, now)
        except Exception:
            log.warning("metrics not sent", exc_info=True, extra={"event": "internal_error"})

    def gauges(self) -> dict[str, int]:
        """How things stand now, by metric name."""
        gauges = {f"calls.state.{state}": size for state, size in self.sizes().items()}
        gauges["events.waiting"] = self.waiting
        if (failure := self.store_failure) is not None:
            gauges["events.rejected_kept"] = self.rejected
            if not self.cluster:
                gauges["journal.failing"] = int(bool(failure))
        if self.cluster:
            gauges["cluster.agents"] = len(self.cluster.agents)
            gauges["cluster.shards"] = len(self.cluster.owned)
            gauges["cluster.lag_ms"] = round(self.cluster.lag() * 1000)
            gauges["cluster.entries"] = self.cluster.entries
            gauges["cluster.unappended"] = self.cluster.unappended
            gauges["cluster.failing"] = int(bool(self.cluster.failure))
        gauges["connections"] = self.connections
        for shard in self.shards:
            for labels, traffic in shard.table.traffic.items():
                others = gauges.get(f"tenants.running.{labels}", 0)
                gauges[f"tenants.running.{labels}"] = others + traffic.running
        return gauges

    def tenants(self, number: int) -> list[dict[str, Any]]:
        """So many tenants and routes at most, those with the most calls first, since the start.

        ``answered_%`` is the answer-seizure ratio, ``average_s`` the average duration of the calls
        that have ended, ``ringing_s`` how long those rang that were answered; None for no call.
        """
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for name, value in (*self.metrics.totals.items(), *self.gauges().items()):
            if name.startswith("tenants."):
                _, kind, tenant, route = name.split(".")
                rows.setdefault((tenant, route), {})[kind] = value

        def share(row: dict[str, int], part: str, of: str, scale: float) -> float | None:
            whole = row.get(of, 0)
            return round(row.get(part, 0) / whole * scale, 1) if whole else None

        def size(item: tuple[tuple[str, str], dict[str, int]]) -> tuple[int, int]:
            return item[1].get("attempts", 0), item[1].get("running", 0)

        return [
            {
                "tenant": tenant,
                "route": route,
                "running": row.get("running", 0),
                "attempts": row.get("attempts", 0),
                "answered": row.get("answered", 0),
                "charged": row.get("charged", 0),
                "answered_%": share(row, "answered", "attempts", 100),
                "average_s": share(row, "talk_ms", "ended", 1 / 1000),
                "ringing_s": share(row, "ringing_ms", "answered", 1 / 1000),
            }
            for (tenant, route), row in heapq.nlargest(number, rows.items(), key=size)
        ]

    def _count_taken_in(self) -> int:
        """Packets so far that were SIP over HEP of somebody who may send: a port scan is none."""
        received = bad = 0
        for name, total in self.metrics.totals.items():
            if name.startswith("packets.received."):
                received += total
            elif name.startswith(("packets.dropped.", "packets.malformed.")):
                bad += total
        return received - bad

    def faults(self, now: float) -> list[str]:
        """Why the agent is not healthy, each a line for a person; empty where it is."""
        faults = [
            f"rating API {api['url']} is down for {now - api['since']:.0f} s: {api['last_error']}"
            for api in self.delivery.apis()
            if api["state"] == "down" and now - api["since"] >= API_DOWN_UNHEALTHY
        ]
        if self.cluster:
            faults += self.cluster.faults()
        elif self.store_failure:
            faults.append(f"the journal cannot be written: {self.store_failure}")
        longest = self.settings.status_max_silence
        if longest and now - self._heard >= longest:
            faults.append(f"no SIP over HEP came for {now - self._heard:.0f} s")
        return faults

    def status(self, now: float, senders: int, errors: int) -> dict[str, Any]:
        """What ``/status`` shows, with so many senders, tenants and last errors at most.

        Times are UNIX time in seconds; ``now`` is on the monotonic clock.
        """
        offset = clock_offset()

        def api_status(api: dict[str, Any]) -> dict[str, Any]:
            failed = api.pop("failed")
            api["last_error_at"] = round(failed + offset, 3) if failed else None
            return {**api, "since": round(api["since"] + offset, 3)}

        def sender_status(sender: Sender) -> dict[str, Any]:
            return {
                "address": sender.address,
                "connections": sender.connections,
                "packets": sender.packets,
                "dropped": sender.dropped,
                "last_seen": sender.seen_at / 1_000_000,
                "clock_skew_ms": None if sender.skew is None else round(sender.skew, 1),
                "last_fault": sender.fault,
            }

        faults = self.faults(now)
        in_memory = self.cluster is not None or self.store_failure is None
        return {
            "version": __version__,
            "healthy": not faults,
            "faults": faults,
            "time": round(now + offset, 3),
            "uptime": round(now - self.started, 1),
            "heard": round(self._heard + offset, 3),
            "listeners": self.listeners,
            "calls": self.sizes(),
            "waiting": self.waiting,
            "rejected_kept": self.rejected,
            "journal": None if in_memory else self.store_failure or "ok",
            "cluster": self.cluster.status() if self.cluster else None,
            "apis": [api_status(api) for api in self.delivery.apis()],
            "tenants": self.tenants(senders),
            "forward": [forwarder.status(offset) for forwarder in self.forwarders],
            "known_senders": len(self.senders),
            "senders": [
                sender_status(sender)
                for sender in heapq.nlargest(senders, self.senders, key=attrgetter("packets"))
            ],
            "last_errors": self._limiter.last_errors()[:errors],
            "counters": dict(sorted(self.metrics.totals.items())),
        }

    def log_status(self) -> None:
        """One line with what ``/status`` shows, cut to a few senders and errors."""
        status = self.status(time.monotonic(), senders=10, errors=5)
        log.info("status", extra={"event": "status", "status": status})

    def flush_forever(self) -> None:
        """Flush once a second, in a greenlet of its own: a name server may take its time."""
        while True:
            gevent.sleep(STATSD_FLUSH)
            self.flush(time.monotonic())

    def reload(self, configuration: Configuration) -> None:
        """Read routes, certificates and the options of RELOADED again, all or nothing.

        Calls keep the route they have, connections the certificate that they began with. A sender
        that may not send any more keeps its connections, but its packets are dropped. The file of
        call records is opened anew in any case.
        """
        for shard in self.shards:
            if shard.records:
                shard.records.reopen()
        try:
            settings, changed = read_again(configuration, self.settings)
            rules, tls = load_rules(settings), load_tls(settings)
            if self.cluster:
                self.cluster.change_rules(rules)
        except ConfigError as error:
            log.error("not reloaded: %s", error, extra={"event": "reload_failed"})
            return
        self.settings, self.tls = settings, tls
        for shard in self.shards:
            shard.table.rules = rules
        self.senders.allow(settings.hep_allow)
        self._keys = [key.encode() for key in settings.hep_auth_key]
        self.delivery.authorize(settings)
        extra = {
            "event": "reloaded",
            "rules": len(rules) - 1,
            "changed": [name for name in changed if name in RELOADED],
            "needs_restart": [name for name in changed if name not in RELOADED],
        }
        log.info("routes, certificates, hep_allow, keys and secrets reloaded", extra=extra)


# Room: servers

_SO_RCVBUFFORCE = 33  # Linux: include/uapi/asm-generic/socket.h


def bind(text: str, kind: socket.SocketKind) -> socket.socket:
    """A bound socket for HOST:PORT; an empty host means all addresses of IPv4 and IPv6.

    Raises OSError, UnicodeError for what is no host name.
    """
    host, port = split_address(text)
    try:
        return _bind(host or "::", port, kind)
    except OSError as error:
        # The kernel may have been started without IPv6.
        if host or error.errno == errno.EADDRINUSE:
            raise
        return _bind("0.0.0.0", port, kind)


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    host.encode("idna")  # Else gevent's resolver prints a traceback of its own.
    family, _, _, _, address = socket.getaddrinfo(host, port, 0, kind)[0]
    sock = socket.socket(family, kind)
    try:
        if host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            # With CAP_NET_ADMIN also beyond net.core.rmem_max, else this is refused.
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
        else:
            # For TCP this allows a restart at once; for UDP it would let two agents share a port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


# Datagrams handled in one go before other greenlets get the loop: few enough that none of them
# waits for long.
UDP_BUDGET = 256


class UdpServer(gevent.server.DatagramServer):
    """HEP over UDP: each wake-up drains the socket, up to a budget, with no greenlet for a packet.

    gevent's own do_read takes 8192 octets and would silently cut longer datagrams.
    """

    kind = socket.SOCK_DGRAM
    transport = "udp"

    def __init__(self, sock: socket.socket, agent: Agent) -> None:
        super().__init__(sock, handle=lambda *_: None)
        self._agent = agent

    def do_read(self) -> None:
        # Returning None ends this wake-up; the watcher fires again while there is more to read.
        for _ in range(UDP_BUDGET):
            try:
                data, address = self._socket.recvfrom(MAX_HEP_FRAME + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                # For example the ICMP error that answers an earlier packet.
                self._agent.malformed("udp_receive", str(error), None)
                return
            self._agent.receive(data, "udp", self._agent.senders.of(address[0]))


@dataclass(slots=True, eq=False)
class Connection:
    """An open connection that waits for the rest of a frame where ``inside``, else for a next one.

    ``since`` is when the waiting began, seconds of a monotonic clock.
    """

    sender: Sender
    sock: socket.socket
    since: float
    inside: bool = False
    greenlet: gevent.Greenlet = field(default_factory=gevent.getcurrent)


# Frames of TCP handled in one go, likewise; all connections that have more frames share it.
TCP_BUDGET = 256
# Share of the files that the process may open which one listener's connections may take: senders
# must not keep the agent from opening a connection to the rating API.
FILES_PER_LISTENER = 1 / 4
# Seconds. While no place is free for a new connection, one that is silent for so long is closed.
CROWDED_IDLE = 60.0
# Seconds between two checks of the connections after which their waiting is not counted: the
# process was stopped, and what they sent meanwhile is still unread.
STALLED = 5.0


class TcpServer(gevent.server.StreamServer):
    """HEP over TCP, with a greenlet for each connection; one that loses framing is closed."""

    kind = socket.SOCK_STREAM
    transport = "tcp"

    def __init__(self, sock: socket.socket, agent: Agent) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        places = min(MAX_CONNECTIONS, int(files * FILES_PER_LISTENER))
        super().__init__(sock, handle=self._converse, spawn=places)
        self._agent = agent
        self._open: set[Connection] = set()
        self._yielding = 0
        self._checked = time.monotonic()

    def do_handle(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        # This is not done in the greenlet, so that what is refused takes no place.
        sender = self._agent.senders.of(address[0])
        if not self._agent.admit(sender):
            sock.close()
            return
        sender.connections += 1
        super().do_handle(sock, sender)

    def close_overdue(self, now: float) -> None:
        """Close the connections that take too long for a frame, or are silent for too long."""
        counted = now - self._checked < STALLED and not self._agent.behind
        self._checked = now
        crowded = CROWDED_IDLE if self.pool.full() else inf
        idle = min(self._agent.settings.hep_idle_timeout or inf, crowded)
        for connection in list(self._open):
            if not counted:
                connection.since = now
            elif now - connection.since < (FRAME_TIMEOUT if connection.inside else idle):
                continue
            elif connection.inside:
                text = f"connection closed: a frame was not complete after {FRAME_TIMEOUT:g} s"
                self._agent.malformed("hep_slow", text, connection.sender)
                self._close(connection)
            else:
                self._agent.metrics.count("connections.idle")
                extra = {"event": "connection_idle", "sender": connection.sender.address}
                log.info("connection closed: it was silent", extra=extra)
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.greenlet.kill(block=False)

    def hang_up(self) -> bool:
        """Tell the senders that this side is closing; what they send until they close is read.

        Returns whether there are connections left.
        """
        for connection in self._open:
            # SSLSocket's own shutdown would also end the reading.
            with suppress(OSError):
                socket.socket.shutdown(connection.sock, socket.SHUT_WR)
        return bool(self.pool)

    def _secure(self, sock: socket.socket) -> socket.socket:
        return sock

    def _converse(self, sock: socket.socket, sender: Sender) -> None:
        agent, connection = self._agent, Connection(sender, sock, time.monotonic())
        agent.connections += 1
        agent.metrics.count("connections.opened")
        try:
            # Without it a sender that vanishes would keep its place for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.sock = self._secure(sock)
            self._open.add(connection)
            self._read(connection)
            extra = {"event": "connection_closed", "sender": sender.address}
            log.debug("connection closed", extra=extra)
        except HepError as error:
            agent.malformed(f"hep_{error.kind}", f"connection closed: {error}", sender)
        except OSError as error:
            failed = "failed" if connection in self._open else "handshake_failed"
            agent.metrics.count(f"connections.{failed}")
            extra = {"event": f"connection_{failed}", "sender": sender.address}
            log.warning("connection failed: %s", error, extra=extra)
        finally:
            connection.sock.close()
            self._open.discard(connection)
            # This marks it as seen now, so that it is not the first to be forgotten.
            agent.senders.of(sender.address)
            agent.connections -= 1
            sender.connections -= 1

    def _read(self, connection: Connection) -> None:
        """Hand on frames until the sender closes. Raises HepError, OSError."""
        agent, splitter, handled = self._agent, HepSplitter(), 0
        while data := connection.sock.recv(splitter.room):
            whole = False
            for frame in splitter.feed(data):
                agent.receive(frame, self.transport, connection.sender)
                whole = True
                handled += 1
                if handled * (1 + self._yielding) >= TCP_BUDGET:
                    handled = 0
                    connection.since = time.monotonic()
                    self._yield()
            if whole or not connection.inside:
                connection.since = time.monotonic()
            connection.inside = splitter.room < MAX_HEP_FRAME
            if not whole:
                self._yield()
            while agent.behind:
                gevent.sleep(JOURNAL_INTERVAL)

    def _yield(self) -> None:
        """Let everything else run first that has something to do.

        `gevent.sleep(0)` lets the loop poll its sockets only each 50th time, so a few connections
        that always have more would keep UDP waiting. An idle watcher of the highest priority runs
        once in each round of the loop.
        """
        self._yielding += 1
        try:
            gevent.idle(gevent.get_hub().loop.MAXPRI)
        finally:
            self._yielding -= 1


# Seconds. A TLS handshake is three packets.
HANDSHAKE_TIMEOUT = 10.0


class TlsServer(TcpServer):
    """HEP over TLS 1.2 or later; a handshake that fails costs its connection only."""

    transport = "tls"

    def _secure(self, sock: socket.socket) -> socket.socket:
        assert self._agent.tls is not None
        secured = self._agent.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        try:
            with gevent.Timeout(HANDSHAKE_TIMEOUT, TimeoutError("no handshake in time")):
                secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        return secured


# What comes from the network goes into the page as text only; its policy allows no other script.
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>rating agent</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; --good: #2a8c4f; --bad: #d5453c; --warn: #b07400 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 8px; max-width: 1100px; font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere }
header, section { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  margin-bottom: 12px }
header { border-left: 6px solid }
h1 { margin: 0; font-size: 28px; line-height: 1.2 } h2 { margin: 0 0 6px; font-size: 15px }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
ul { margin: 6px 0 0; padding: 0; list-style: none; font-size: 17px; color: CanvasText }
.dim, h2 span, th { color: GrayText; font-weight: 400; font-size: 13px }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  text-align: left }
td:empty::after { content: "–"; color: GrayText }
#now td { font-size: 22px }
input { font: inherit; width: 100%; padding: 6px 8px; margin-bottom: 6px }
@media (max-width: 640px) { thead { display: none } #now td { font-size: inherit }
  tr { display: block; padding: 6px 0; border-bottom: 1px solid var(--line) }
  td { display: flex; gap: 8px; padding: 1px 0; border: 0 }
  td::before { content: attr(data-name); flex: 0 0 92px; color: GrayText } }
</style></head><body>
<header id="health"><h1 id="word">…</h1><ul id="faults"></ul><div class="dim" id="facts"></div>
</header>
<section><table id="now"></table></section>
<section><h2>Rating APIs</h2><table id="apis"></table></section>
<section id="cluster" hidden><h2>Cluster <span id="part"></span></h2>
<table id="agents"></table></section>
<section id="forwarding" hidden><h2>Forwarding</h2><table id="targets"></table></section>
<section><h2>Last warnings and errors <span>the last of each kind</span></h2>
<table id="errors"></table></section>
<section><h2>Tenants and routes <span>calls since the start</span></h2>
<table id="tenants"></table></section>
<section><h2>Senders <span id="known"></span></h2><table id="senders"></table></section>
<section><h2>Dropped and failed <span>since the start</span></h2>
<table id="drops"></table></section>
<section><h2>Live calls <span>the newest 50</span></h2>
<input id="find" placeholder="part of a Call-ID" aria-label="part of a Call-ID">
<table id="calls"></table></section>
<script>
"use strict";
const $ = id => document.getElementById(id);
const CLASSES = { up: "good", down: "bad", error: "bad", warning: "warn" };
const WARN = { clock_skew_ms: 2000, dropped: 0, events_waiting: 100, events_rejected: 0,
  events_lost: 0 };
let shown = null, before = null, answered = 0, run = 0;

function add(parent, tag, text, kind) {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = kind ?? "";
  parent.append(node);
  return node;
}

function span(seconds) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (seconds >= 2 * size) return Math.floor(seconds / size) + " " + unit;
  return Math.max(Math.round(seconds), 0) + " s";
}
const ago = time => time ? span(shown.time - time) + " ago" : "";
const count = number => number.toLocaleString("en");

// The text of a value of the agent's JSON; its name tells what is a time.
function cell(name, value) {
  if (/^(time|since|last_seen|last_error_at)$/.test(name)) return ago(value);
  if (typeof value === "number") return count(value);
  if (value && typeof value === "object")
    return Object.entries(value).map(([kind, number]) => count(number) + " " + kind).join(", ");
  return value ?? "";
}

// Objects of the agent's JSON as rows; the columns are names of their values, or all of the first.
function draw(id, rows, columns) {
  const table = document.createElement("table");
  const names = columns ? columns.split(" ") : Object.keys(rows[0] ?? { "": 0 });
  table.id = id;
  const head = add(add(table, "thead", ""), "tr", ""), body = add(table, "tbody", "");
  names.forEach(name => add(head, "th", name.replaceAll("_", " ")));
  for (const row of rows) {
    const line = add(body, "tr", "");
    for (const name of names) {
      const kind = Math.abs(row[name]) > WARN[name] ? "warn"
        : CLASSES[name === "event" ? row.level : row[name]];
      add(line, "td", cell(name, row[name]), kind).dataset.name = name.replaceAll("_", " ");
    }
  }
  if (!rows.length) add(add(body, "tr", ""), "td", "none").colSpan = names.length;
  $(id).replaceWith(table);
}

function list(faults) {
  document.title = (faults.length ? "✖ " : "") + "rating agent";
  $("faults").replaceChildren();
  faults.forEach(fault => add($("faults"), "li", fault));
}

function perSecond(pattern) {
  if (!before || shown.uptime <= before.uptime) return null;
  let sum = 0;
  for (const [name, total] of Object.entries(shown.counters))
    if (pattern.test(name)) sum += total - (before.counters[name] ?? 0);
  return Math.round(sum / (shown.uptime - before.uptime));
}

function show() {
  // An API that has just gone down does not make the agent unhealthy yet.
  const down = shown.apis.filter(api => api.state === "down");
  const [word, kind] = !shown.healthy ? ["Unhealthy", "bad"]
    : down.length ? ["Degraded", "warn"] : ["Healthy", "good"];
  $("word").textContent = word;
  $("health").className = kind;
  list(shown.healthy ? down.map(api => "rating API " + api.url + " is down") : shown.faults);
  const total = name => shown.counters[name] ?? 0;
  const heard = Object.keys(shown.counters).some(name => name.startsWith("packets.received."));
  $("facts").textContent = ["up " + span(shown.uptime), "journal: " + (shown.journal ?? "none"),
    "last packet: " + (heard ? ago(shown.heard) : "never"),
    ...shown.listeners.map(x => x.transport + " " + x.address), "version " + shown.version,
  ].join(" · ");
  draw("now", [{ running_calls: shown.calls.answered, ringing: shown.calls.trying,
    "begun_/_s": perSecond(/^calls.begun$/), "packets_/_s": perSecond(/^packets.received/),
    "dropped_/_s": perSecond(/^packets.(dropped|malformed)/), events_waiting: shown.waiting,
    events_rejected: total("events.rejected"), events_lost: total("events.lost") }]);
  draw("apis", shown.apis, "url state since waiting last_error last_error_at");
  $("cluster").hidden = !shown.cluster;
  if (shown.cluster) {
    const { shards, of, lag, entries, redis } = shown.cluster;
    $("part").textContent = [`${shards} of ${of} shards`, `lag ${lag} s`,
      `${count(entries)} packets in Redis`, "Redis: " + redis].join(" · ");
    draw("agents", shown.cluster.agents, "name shards version");
  }
  $("forwarding").hidden = !shown.forward.length;
  draw("targets", shown.forward, "target sent waiting dropped last_error last_error_at");
  draw("errors", shown.last_errors.slice(0, 12), "time event count text");
  draw("tenants", shown.tenants.slice(0, 50), "tenant route running attempts answered charged "
    + "answered_% average_s ringing_s");
  $("known").textContent = count(shown.known_senders) + " known";
  draw("senders", shown.senders.slice(0, 50),
    "address last_seen packets dropped clock_skew_ms last_fault");
  draw("drops", Object.entries(shown.counters).map(([name, times]) => ({ name, times })).filter(
    x => !x.name.startsWith("tenants.")
      && /dropped|malformed|evicted|orphan|lost|rejected|errors|failed$/.test(x.name)));
}

async function load(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(8000) });
  if (!answer.ok) throw new Error("status " + answer.status);
  return answer.json();
}

async function refresh() {
  const mine = ++run;
  try {
    const find = $("find").value.trim();
    const query = "calls?limit=50" + (find ? "&call_id=" + encodeURIComponent(find)
      : "&state=trying,answered");
    const [next, page] = [await load("status"), await load(query)];
    if (mine !== run) return;
    [before, shown, answered] = [shown, next, Date.now()];
    show();
    for (const call of page.calls) call.rated = call.rated === false ? "no" : call.rated && "yes";
    draw("calls", page.calls,
      "call_id state since rated tenant account_tag destination_account_tag");
  } catch (error) {
    if (mine !== run) return;
    $("health").className = "bad";
    $("word").textContent = "No answer";
    const fault = "The agent does not answer this page: " + error.message + ".";
    const age = " What is below is " + span((Date.now() - answered) / 1000) + " old.";
    list([fault + (answered ? age : "")]);
  }
  setTimeout(() => mine === run && refresh(), 2000);
}
$("find").addEventListener("input", refresh);
refresh();
</script></body></html>
"""


class HttpError(Exception):
    """A request for the status gets this HTTP status; the text says what is allowed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


# Requests for the status at one time: some browsers, a monitor and a health check.
MAX_STATUS_CONNECTIONS = 32
# Octets of one such request, start line and headers; a browser's has about 1,000.
MAX_STATUS_REQUEST = 8_192
# Seconds for one such request, from its first octet to the last of the answer.
STATUS_TIMEOUT = 10.0
# Senders that the status shows, those with most packets first.
MAX_STATUS_SENDERS = 500
_REQUEST = re.compile(rb"([A-Z]+) (/[^\s?]*)(?:\?(\S*))? HTTP/1\.[01]\r?\n")
_HOST = re.compile(rb"\nhost[ \t]*:[ \t]*([^\r\n]*)", re.I)
_PLAIN = "text/plain; charset=utf-8"

_CALL_TESTS: dict[str, Callable[[Call, Any], bool]] = {
    "state": lambda call, states: call.state in states,
    "tenant": lambda call, tenant: call.tenant == tenant,
    "account": lambda call, account: (
        account in (call.shown.account_tag, call.shown.destination_account_tag)
    ),
    "call_id": lambda call, part: part in printable_id(call.call_id),
}


class StatusServer(gevent.server.StreamServer):
    """The status over HTTP/1.1: GET and HEAD, one request a connection, all within STATUS_TIMEOUT.

    gevent.pywsgi bounds neither the time nor the octets of a request, and prints a traceback for
    one with too many headers; to mend that takes as many lines as these few parts of HTTP.
    """

    kind = socket.SOCK_STREAM
    transport = "status"

    def __init__(self, sock: socket.socket, agent: Agent) -> None:
        super().__init__(sock, handle=self._converse, spawn=MAX_STATUS_CONNECTIONS)
        self._agent = agent
        # One reader at a time looks through the calls; the others wait.
        self._reading_calls = gevent.lock.BoundedSemaphore(1)
        style, script = (
            b64encode(hashlib.sha256(re.findall(tag, PAGE, re.S)[0].encode()).digest()).decode()
            for tag in ("<style>(.*)</style>", "<script>(.*)</script>")
        )
        self._headers = (
            "Allow: GET, HEAD\r\nContent-Security-Policy: default-src 'none'; "
            f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
            "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )

    def _converse(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        with suppress(OSError), gevent.Timeout(STATUS_TIMEOUT, False):
            request = b""
            while not (ended := re.search(rb"\r?\n\r?\n", request)):
                data = sock.recv(4096) if len(request) < MAX_STATUS_REQUEST else b""
                if not data:
                    break
                request += data
            if request:
                sock.sendall(self._answer(request if ended else b""))
            # If it were closed with something unread, the answer might get lost on its way.
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65_536):
                gevent.sleep(0)

    def _answer(self, request: bytes) -> bytes:
        """The whole answer to a request, b"" for one that is none; never raises."""
        line = _REQUEST.match(request)
        try:
            if line is None:
                raise HttpError(400, f"no HTTP request of less than {MAX_STATUS_REQUEST} octets")
            method, path, query = (part.decode("latin-1") for part in line.groups(b""))
            for host in _HOST.findall(request):
                self._check_host(host.decode("latin-1"))
            if method not in ("GET", "HEAD"):
                raise HttpError(405, "allowed: GET, HEAD")
            if path not in self._PATHS:
                raise HttpError(404, f"allowed: {' '.join(self._PATHS)}")
            handler, kind = self._PATHS[path]
            status, body = handler(self, query)
        except HttpError as error:
            status, body, kind = error.status, f"{error}\n", _PLAIN
        except Exception:
            extra = {"event": "internal_error"}
            log.warning("a status request failed", exc_info=True, extra=extra)
            status, body, kind = 500, "the log says why\n", _PLAIN
        content = body.encode()
        head = (
            f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n{self._headers}"
        )
        head_only = line is not None and line[1] == b"HEAD"
        return head.encode("latin-1") + (b"" if head_only else content)

    def _check_host(self, value: str) -> None:
        """Refuse a request by a name that is not this machine's.

        A web page may let its own name point to this machine (DNS rebinding), and its script would
        then read what the browser can reach. To an address the browser would not let it.
        """
        name = re.sub(r":\d*$", "", value.strip()).strip("[]").rstrip(".").lower()
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return
        own = socket.gethostname().lower()
        given = split_address(self._agent.settings.listen_status)[0].lower()
        # The full name comes last, for it may take a look-up.
        names = {"localhost", own, given} - {""}
        if name not in names and name != socket.getfqdn(own).lower():
            raise HttpError(421, "allowed as Host: an address, or a name of this machine")

    def _health(self, query: str) -> tuple[int, str]:
        faults = self._agent.faults(time.monotonic())
        answer = {"healthy": not faults, "faults": faults}
        return 503 if faults else 200, json.dumps(answer) + "\n"

    def _status(self, query: str) -> tuple[int, str]:
        status = self._agent.status(time.monotonic(), MAX_STATUS_SENDERS, MAX_LAST_ERRORS)
        return 200, json.dumps(status) + "\n"

    def _metrics(self, query: str) -> tuple[int, str]:
        agent, metrics = self._agent, self._agent.metrics
        gauges: dict[str, float] = {
            **agent.gauges(),
            "healthy": int(not agent.faults(time.monotonic())),
            "start_time_seconds": round(time.time() - time.monotonic() + agent.started, 3),
        }
        return 200, prometheus_text(metrics.totals, gauges, metrics.timer_totals)

    def _page(self, query: str) -> tuple[int, str]:
        return 200, PAGE

    def _calls(self, query: str) -> tuple[int, str]:
        """Calls that match, newest first; ``next`` is the ``after`` of the page that follows."""
        wanted = self._wanted(query)
        limit, after = wanted.pop("limit"), wanted.pop("after")
        tests = [(_CALL_TESTS[name], value) for name, value in wanted.items()]
        deadline = time.monotonic() + CALLS_SECONDS
        offset = time.time() - time.monotonic()
        rows: list[dict[str, Any]] = []
        row = after
        with self._reading_calls:
            for calls in chain.from_iterable(x.table.slices() for x in self._agent.shards):
                for call in calls:
                    if (after and call.row >= after) or not all(test(call, x) for test, x in tests):
                        continue
                    if len(rows) == limit:
                        return 200, json.dumps({"calls": rows, "next": row}) + "\n"
                    row = call.row
                    rows.append(self._call_facts(call, offset))
                if time.monotonic() >= deadline:
                    return 200, json.dumps({"calls": rows, "next": calls[-1].row}) + "\n"
                gevent.sleep(0)
        return 200, json.dumps({"calls": rows, "next": None}) + "\n"

    @staticmethod
    def _wanted(query: str) -> dict[str, Any]:
        """What ``/calls`` is to show. Raises HttpError."""
        wanted: dict[str, Any] = {"limit": 100, "after": 0}
        for name, text in parse_qsl(query, keep_blank_values=True, max_num_fields=20):
            if name in wanted and re.fullmatch("[0-9]{1,18}", text, re.A):
                wanted[name] = int(text)
            elif name == "state" and set(text.split(",")) <= set(STATES):
                wanted[name] = text.split(",")
            elif name in ("tenant", "account", "call_id"):
                wanted[name] = text
            else:
                raise HttpError(
                    400,
                    f"{ascii(name)[:40]}; allowed: state={','.join(STATES)} tenant=TEXT "
                    f"account=TEXT call_id=PART limit=1..{MAX_CALLS_PAGE} after=ROW",
                )
        wanted["limit"] = min(max(wanted["limit"], 1), MAX_CALLS_PAGE)
        return wanted

    @staticmethod
    def _call_facts(call: Call, offset: float) -> dict[str, Any]:
        known = call.shown
        return {
            "row": call.row,
            "call_id": printable_id(call.call_id),
            "state": call.state,
            "since": round(call.entered + offset, 3),
            "tenant": call.tenant,
            "route": known.route.name,
            "account_tag": known.account_tag,
            "destination_account_tag": known.destination_account_tag,
            "transaction_tag": known.transaction_tag,
            # What is over has forgotten whom it was charged to.
            "rated": known.rated and not call.tied if call.tenant and not call.ended_at else None,
            "answered": call.begun / 1_000_000 if call.state == ANSWERED else None,
            "capture_id": call.capture_id,
        }

    _PATHS: ClassVar[dict[str, tuple[Callable[..., tuple[int, str]], str]]] = {
        "/": (_page, "text/html; charset=utf-8"),
        "/healthz": (_health, "application/json"),
        "/status": (_status, "application/json"),
        "/calls": (_calls, "application/json"),
        "/metrics": (_metrics, "text/plain; version=0.0.4; charset=utf-8"),
    }


Server = UdpServer | TcpServer | StatusServer


# Room: recordings
#
# What tcpdump, Wireshark, Homer or a recorder of HEP wrote goes through the same pure code as what
# comes from a socket. Files become packets (`Recordings`), packets go through a call table whose
# clock is that of the recording (`Playback`). pktcap reads pcap and pcapng and is imported only
# here: containers, link layers, IP fragments and TCP streams, with a bound for all that files say.

# Octets. The longest SIP message that is put together from a TCP stream.
MAX_STREAM_MESSAGE = 65_535
# Octets of a line that may be the start of a message and has no end yet.
MAX_START_LINE = 8_192
# Octets that one frame of a file may have; the most that tcpdump and dumpcap record.
MAX_FRAME = 262_144
# IP datagrams of which fragments are waited for at one time, 64 kB each at most, and seconds.
MAX_DATAGRAMS = 256
FRAGMENT_PATIENCE = 30.0
# TCP connections at one time, and octets of them all that wait behind lost segments. What two
# directions of one hold of unfinished messages comes to 128 kB at most.
MAX_STREAMS = 1_024
MAX_HELD = 16 * 1024 * 1024
# Seconds without a segment after which a connection is another one.
STREAM_IDLE = 7_200.0
# Seconds for which a segment is waited for that others have overtaken; a retransmission after that
# finds its place given up. As long as the default of reorder_window.
HOLE_PATIENCE = 2.0
# Segments behind a hole of which the time is known, 0.2 kB each; the library holds 1,024 of them.
MAX_SEGMENTS = 1_024
# Directions that wait for a segment at one time; over that the one that waits longest goes on.
MAX_HOLES = 64
# Packets that are held back while a segment is waited for: 2 s of 5,000 a second, 1 kB each.
MAX_LATE = 10_000
# Octets of one line of a `.hepl` file: a read of 64 kB in base64 and what stands around it.
MAX_LINE = 262_144
# Files that are read at one time, in order of time.
MAX_RECORDINGS = 500
# Seconds. A time stamp further ahead than this is believed once another one says so as well, or one
# broken packet would end all calls.
LEAP = 3_600.0
# Seconds of UNIX time, in 2106: what a pcap can say at most.
MAX_STAMP = 2**32

_PCAP_MAGIC = {
    bytes.fromhex(text) for text in ("a1b2c3d4 d4c3b2a1 a1b23c4d 4d3cb2a1 0a0d0d0a").split()
}
_RESYNC = re.compile(
    rf"(?:\A|\n)({_TOKEN}[ \t]+\S+[ \t]+SIP/2\.0[ \t]*\r?\n|SIP/2\.0[ \t]+\d)".encode(), re.I
)
_FIND_MAGIC = re.compile(b"|".join(_MAGIC))


class Unit(NamedTuple):
    """One thing of a file, in order: a HEP packet, or a frame of a network.

    ``time`` is when it was recorded, UNIX time in microseconds, 0 where the file does not say;
    ``where`` the number of the frame, packet or line; ``content`` a HepPacket, a HepError, or a
    frame of pktcap.
    """

    time: int
    name: str
    where: int
    content: Any


class Recorded(NamedTuple):
    """A packet that a recording holds; ``packet`` is the HepError of one that is broken.

    A SIP message that was no HEP packet, but went over the network itself, has version 0.
    ``sender`` is the address from which a HEP packet came, "" where the recording does not say.
    """

    time: int
    name: str
    where: int
    sender: str
    packet: HepPacket | HepError


def read_units(name: str, file: Any) -> Iterator[Unit]:
    """What is in one file: pcap, pcapng, HEP packets one behind another, or a `.hepl` capture.

    ``file`` is a binary stream with ``peek``. Raises ConfigError where pktcap is missing, and
    OSError, EOFError, ValueError or HepError where the file ends or is broken, after what came
    before that point.
    """
    head = file.peek(4)[:4]
    if head in _PCAP_MAGIC:
        return _read_frames(name, file)
    if head[:1] == b"{":
        return _read_hepl(name, file)
    return _read_hep(name, file)


def pktcap_library() -> Any:
    """The module that reads pcap and pcapng. Raises ConfigError where it is not installed."""
    try:
        import pktcap
    except ImportError:
        raise ConfigError(
            "pcap and pcapng need a library: pip install 'rating-agent-hep[rate]'"
        ) from None
    return pktcap


def _read_frames(name: str, file: Any) -> Iterator[Unit]:
    for where, frame in enumerate(pktcap_library().read_frames(file, max_frame_size=MAX_FRAME), 1):
        seconds = frame.time
        stamp = round(seconds * 1_000_000) if MIN_STAMP <= seconds < MAX_STAMP else 0
        yield Unit(stamp, name, where, frame)


def _decoded(data: bytes, arrival: int) -> HepPacket | HepError:
    try:
        return decode_hep(data, arrival)
    except HepError as error:
        return error


def _read_hep(name: str, file: Any) -> Iterator[Unit]:
    """HEP3 frames one behind another, or one packet of HEP1 or HEP2, which have no framing."""
    splitter, clock = HepSplitter(), 0
    if file.peek(1)[:1] in (b"\x01", b"\x02"):
        pieces: Iterable[bytes] = [file.read(MAX_HEP_FRAME)]
    else:
        pieces = (
            frame
            for data in iter(lambda: file.read(splitter.room), b"")
            for frame in splitter.feed(data)
        )
    for where, data in enumerate(pieces, 1):
        packet = _decoded(data, clock)
        # Such a file has no times of arrival: the packets' own are the next best.
        clock = max(clock, packet.time if isinstance(packet, HepPacket) else 0)
        yield Unit(clock, name, where, packet)
    if splitter.room < MAX_HEP_FRAME:
        raise ValueError("the last frame is cut")


def _read_hepl(name: str, file: Any) -> Iterator[Unit]:
    """Lines of JSON, as recorders of HEP at a socket write them: see docs/recordings.md."""
    splitters: dict[Any, HepSplitter] = {}
    began = 0
    for where, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
        try:
            event = json.loads(line)
            kind, connection = event["ev"], event.get("conn")
            octets = b64decode(event["data"]) if kind == "data" else b""
            datagram = kind == "data" and event["transport"] == "udp"
            since = round(float(event.get("t", 0)) * 1_000_000)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"line {where} is no event of a capture") from None
        if kind == "stop":
            # A recording of several runs uses the numbers of its connections again.
            splitters.clear()
        elif kind in ("open", "close"):
            splitters.pop(connection, None)
        frames: Iterable[bytes] = ()
        if datagram:
            frames = (octets,)
        elif kind == "data":
            if len(splitters) >= MAX_STREAMS:
                splitters.pop(next(iter(splitters)))
            frames = splitters.setdefault(connection, HepSplitter()).feed(octets)
        for data in frames:
            packet = _decoded(data, began and began + since)
            if not began and isinstance(packet, HepPacket) and packet.time:
                began = packet.time - since
            yield Unit(began and began + since, name, where, packet)


class SipSplitter:
    """Cut a TCP stream into SIP messages, by Content-Length (RFC 3261 18.3).

    Behind a hole, and in a stream that is met half-way, it looks for the next start of a message.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._synced = False
        self._looked = 0

    def feed(self, data: bytes, missing: int = 0) -> Iterator[bytes]:
        """Yield the messages that ``data`` completes; ``missing`` octets were lost before it."""
        if missing:
            yield from self.rest()
        self._buffer += data
        while self._buffer and (self._synced or self._find()):
            self._buffer = self._buffer.lstrip(b"\r\n")
            if _NEXT.match(self._buffer) is None:
                if b"\n" not in self._buffer and len(self._buffer) <= MAX_START_LINE:
                    return
                self._synced = False
                continue
            size = self._message_size()
            if not size and len(self._buffer) > MAX_STREAM_MESSAGE:
                # Headers without an end.
                self._buffer = self._buffer[self._buffer.find(b"\n") + 1 :]
                self._synced = False
                continue
            if not size:
                return
            message, self._buffer = self._buffer[:size], self._buffer[size:]
            self._looked = 0
            yield message

    def rest(self) -> Iterator[bytes]:
        """The message of which the end is lost, if its headers are whole."""
        if self._synced and _EMPTY_LINE.search(self._buffer) is not None:
            yield self._buffer
        self._buffer, self._synced, self._looked = b"", False, 0

    def _find(self) -> bool:
        found = _RESYNC.search(self._buffer) if b"SIP/2.0" in self._buffer else None
        self._synced, self._looked = found is not None, 0
        # The line that is not whole yet may be a start line.
        start = found.start(1) if found is not None else self._buffer.rfind(b"\n") + 1
        self._buffer = self._buffer[start:]
        if found is None and len(self._buffer) > MAX_START_LINE:
            self._buffer = b""
        return self._synced

    def _message_size(self) -> int:
        """The octets of the message in front, 0 while it is not whole; of a long one the head's."""
        empty = _EMPTY_LINE.search(self._buffer, self._looked)
        if empty is None:
            self._looked = max(len(self._buffer) - 3, 0)
            return 0
        length = _CONTENT_LENGTH.search(self._buffer, 0, empty.end())
        body = min(int(length[1][:8]), MAX_STREAM_MESSAGE) if length is not None else 0
        size = empty.end() + body
        if size > MAX_STREAM_MESSAGE:
            return empty.end()
        return size if size <= len(self._buffer) else 0


class _Stream:
    """One direction of a TCP connection of a recording: SIP, HEP3 or neither.

    ``base`` is the sequence number of its first octet, None while that is not known.
    """

    def __init__(self) -> None:
        self._sip = SipSplitter()
        self._hep: HepSplitter | None = None
        self._begin: bytes | None = b""
        self._lost = False
        self.base: int | None = None

    def feed(self, data: bytes, missing: int) -> Iterator[tuple[bool, bytes]]:
        """Yield what ``data`` completes: whether it is HEP, and a frame or a SIP message.

        Raises HepError once, where the framing of HEP is lost; then it goes on at the next frame.
        """
        if self._begin is not None:
            data = self._begin + data
            if len(data) < 4 and data:
                self._begin = data
                return
            self._begin = None
            self._hep = HepSplitter() if data[:4] in _MAGIC else None
        if self._hep is None:
            yield from ((False, message) for message in self._sip.feed(data, missing))
            return
        if missing:
            self._hep, self._lost = HepSplitter(), True
        while data:
            if self._lost:
                magic = _FIND_MAGIC.search(data)
                if magic is None:
                    return
                data, self._lost = data[magic.start() :], False
            piece, data = data[: self._hep.room], data[self._hep.room :]
            try:
                yield from ((True, frame) for frame in self._hep.feed(piece))
            except HepError:
                self._hep, self._lost = HepSplitter(), True
                raise

    def rest(self) -> Iterator[bytes]:
        """The SIP message of which only the body's end is lost."""
        return self._sip.rest()


# A packed address and a port; the library has the address as text.
Endpoint = tuple[bytes, int]


@lru_cache(maxsize=4_096)
def _packed_end(end: tuple[str, int]) -> Endpoint:
    return ipaddress.ip_address(end[0]).packed, end[1]


# Where the IP header begins behind the usual link layers: Ethernet, raw IP, Linux cooked 1 and 2;
# and what says that it is IPv4, by its place.
_USUAL_LINKS = {1: (14, 12), 101: (0, None), 113: (16, 14), 276: (20, 0)}
_IPV4_UDP = struct.Struct(">BxH2xHxB2x4s4sHHH2x")


def usual_datagram(frame: Any) -> tuple[Endpoint, Endpoint, bytes, bool] | None:
    """Both ends and the payload of a UDP datagram in one IPv4 packet without options, else None.

    Also whether its end is missing. It says what the library would say, in an eighth of the time:
    nearly all frames are of this kind.
    """
    data = frame.data
    start, place = _USUAL_LINKS.get(frame.linktype, (-1, None))
    if start < 0 or len(data) < start + 28:
        return None
    if place is not None and data[place : place + 2] != b"\x08\x00":
        return None
    found = _IPV4_UDP.unpack_from(data, start)
    version, total, fragment, protocol, source, destination, sender, receiver, length = found
    if version != 0x45 or protocol != 17 or fragment & 0x3FFF or total < 28 or length < 8:
        return None
    payload = data[start + 28 : start + min(total, 20 + length)]
    return (source, sender), (destination, receiver), payload, length > 8 + len(payload)


class _Hole:
    """What waits behind the lost segments of one direction of a TCP connection.

    ``since`` is when the first of it came, in seconds, ``frame`` one of these segments.
    """

    def __init__(self, now: float, frame: Any) -> None:
        self.since = now
        self.frame = frame
        # By sequence number: when the segment came, and its octets.
        self._waiting: dict[int, tuple[float, int]] = {}

    def note(self, now: float, frame: Any) -> None:
        """Take in a segment behind the hole."""
        if len(self._waiting) < MAX_SEGMENTS:
            sequence = int(frame.layers[-1].sequence)
            self._waiting.setdefault(sequence, (now, len(frame.payload)))

    def end(self, before: float) -> int:
        """The sequence number behind what has waited since before then."""
        ends = [seq + size for seq, (time, size) in self._waiting.items() if time <= before]
        return max(ends, key=lambda end: _behind(end, ends[0])) & 0xFFFFFFFF

    def first(self) -> int:
        """The sequence number of the earliest segment that waits."""
        (some, *_) = self._waiting
        return min(self._waiting, key=lambda sequence: _behind(sequence, some))

    def parts(self, items: Sequence[Any], base: int) -> Iterator[Any]:
        """Items of the library taken apart again, each part with its own time.

        ``base`` is the sequence number of the stream's first octet. What comes of it waits no more.
        """
        times = sorted(
            (item_offset, time)
            for sequence, (time, _) in self._waiting.items()
            if (item_offset := _offset(sequence, base, items[0])) >= items[0].offset
        )
        at, latest = 0, 0.0
        for item in items:
            start, end = item.offset, item.offset + len(item.data)
            while start < end:
                while at < len(times) and times[at][0] <= start:
                    latest = max(latest, times[at][1])
                    at += 1
                cut = min(times[at][0], end) if at < len(times) else end
                yield item._replace(
                    time=latest or self.since,
                    data=item.data[start - item.offset : cut - item.offset],
                    missing=item.missing if start == item.offset else 0,
                    end=item.end and cut == end,
                )
                start = cut
            if not item.data:
                yield item._replace(time=latest or self.since)

    def drop(self, item: Any, base: int) -> bool:
        """What the library gave up to the end of an item waits no more; whether anything does."""
        end = item.offset + len(item.data)
        return self._keep(lambda sequence, _: _offset(sequence, base, item) >= end)

    def forget(self, before: float) -> bool:
        """What came before then was nothing new; whether anything else waits."""
        return self._keep(lambda _, time: time > before)

    def _keep(self, wanted: Callable[[int, float], bool]) -> bool:
        self._waiting = {
            sequence: (time, size)
            for sequence, (time, size) in self._waiting.items()
            if wanted(sequence, time)
        }
        self.since = min((time for time, _ in self._waiting.values()), default=inf)
        return bool(self._waiting)


def _behind(sequence: int, other: int) -> int:
    """How far one sequence number is behind another, as they wrap (RFC 9293 section 3.4)."""
    return ((sequence - other + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def _offset(sequence: int, base: int, item: Any) -> int:
    """The offset in its stream of a sequence number not far from an item of the library."""
    return int(item.offset) + _behind(sequence, base + item.offset)


class Network:
    """Takes the frames of networks and gives what there was of SIP and HEP in them.

    ``counts`` gets what was not SIP or HEP, and what was cut or lost. Nothing here raises for a
    frame, whatever is in it.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self._library = pktcap_library()
        self._counts = counts
        self._dissector = self._library.FrameDissector(
            max_reassemblies=MAX_DATAGRAMS, reassembly_timeout=FRAGMENT_PATIENCE
        )
        self._tcp = self._library.TCPReassembler(
            max_streams=MAX_STREAMS, max_buffered=MAX_HELD, idle_timeout=STREAM_IDLE
        )
        self._streams: OrderedDict[Any, _Stream] = OrderedDict()
        self._holes: dict[Any, _Hole] = {}

    def take(self, unit: Unit) -> Iterable[Recorded]:
        """What one frame completes."""
        usual = usual_datagram(unit.content)
        if usual is not None:
            found = self._sort_out(unit, *usual)
            return () if found is None else (found,)
        frame = self._dissector.dissect(unit.content)
        last = frame.layers[-1] if frame.layers else None
        if isinstance(last, self._library.UDPLayer):
            found = self._datagram(unit, frame)
            return () if found is None else (found,)
        if isinstance(last, self._library.TCPLayer):
            return self._segment(unit, frame)
        self._count("frames.other" if frame.error is None else "frames.malformed")
        return ()

    @property
    def waits_since(self) -> float:
        """The earliest time, in microseconds, of what is held behind a lost segment; else inf."""
        if not self._holes:
            return inf
        return min(hole.since for hole in self._holes.values()) * 1_000_000

    def finish(self, unit: Unit) -> Iterator[Recorded]:
        """What is left at the end; ``unit`` is the last one."""
        yield from self._give_up(unit, inf)
        for item in self._tcp.flush():
            yield from self._streamed(unit, item)
        for (_, *ends), stream in self._streams.items():
            for message in stream.rest():
                self._count("messages.cut")
                source, destination = map(_packed_end, ends)
                yield self._wire(unit, unit.time, 6, source, destination, message)
        self._streams.clear()
        stats = self._dissector.stats
        for name, number in (
            ("datagrams.incomplete", stats.dropped + stats.pending),
            ("frames.link_type", stats.unsupported),
            ("octets.missing", self._tcp.stats.missing + self._tcp.stats.dropped),
        ):
            if number:
                self._count(name, number)

    def _count(self, name: str, number: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + number

    @staticmethod
    def _wire(
        unit: Unit,
        time: int,
        protocol: int,
        source: Endpoint,
        destination: Endpoint,
        payload: bytes,
    ) -> Recorded:
        packet = HepPacket(
            0,
            time,
            protocol,
            SIP_PROTOCOL_TYPE,
            source[0],
            destination[0],
            source[1],
            destination[1],
            payload=payload,
        )
        return Recorded(time, unit.name, unit.where, "", packet)

    @staticmethod
    def _hep(unit: Unit, time: int, source: Endpoint, data: bytes) -> Recorded:
        return Recorded(time, unit.name, unit.where, _ip_text(source[0]), _decoded(data, time))

    def _datagram(self, unit: Unit, frame: Any) -> Recorded | None:
        cut = frame.layers[-1].length > 8 + len(frame.payload)
        source, destination = map(_packed_end, self._direction(frame))
        return self._sort_out(unit, source, destination, frame.payload, cut)

    def _sort_out(
        self, unit: Unit, source: Endpoint, destination: Endpoint, payload: bytes, cut: bool
    ) -> Recorded | None:
        """What a datagram is; None for what is neither SIP nor HEP."""
        if _NEXT.match(payload) is not None:
            found = self._wire(unit, unit.time, 17, source, destination, payload)
        elif payload[:4] in _MAGIC:
            found = self._hep(unit, unit.time, source, payload)
        else:
            # HEP1 and HEP2 have no magic: only what is in it tells one from anything else.
            old = payload[:1] in (b"\x01", b"\x02")
            found = self._hep(unit, unit.time, source, payload if old else b"")
            if isinstance(found.packet, HepError) or _NEXT.match(found.packet.payload) is None:
                self._count("datagrams.other")
                return None
        if cut:
            self._count("messages.cut")
        return found

    def _segment(self, unit: Unit, frame: Any) -> Iterator[Recorded]:
        now = unit.time / 1_000_000
        yield from self._give_up(unit, now - HOLE_PATIENCE)
        key = self._direction(frame)
        if key[::-1] in self._holes:
            # Not given up yet: what is out of order may have been overtaken by its acknowledgment.
            frame = self._without_ack(frame)
        items = self._tcp.add(frame)
        for item in items:
            yield from self._streamed(unit, item)
        ours = [item for item in items if (item.source, item.destination) == key]
        hole = self._holes.get(key)
        if not ours and frame.payload:
            if hole is None:
                hole = self._holes[key] = _Hole(now, frame)
            hole.note(now, frame)
        elif ours and ours[0].data and ours[0].data.startswith(frame.payload):
            base = frame.layers[-1].sequence - ours[0].offset
            self._note_base(ours[0], base)
            if hole is not None and not hole.drop(ours[-1], base):
                del self._holes[key]

    def _note_base(self, item: Any, base: int) -> None:
        """Where a stream begins, by its sequence numbers; known from its first octets on."""
        stream = self._streams.get((item.stream, item.source, item.destination))
        if stream is not None and stream.base is None:
            stream.base = base

    def _direction(self, frame: Any) -> tuple[Any, Any]:
        """Between which ends a datagram or a segment goes, as the library has them."""
        ip, last = self._headers(frame)
        return (ip.source, last.source_port), (ip.destination, last.destination_port)

    def _headers(self, frame: Any) -> tuple[Any, Any]:
        """The innermost IP header, and that of UDP or TCP behind it."""
        *outer, ip, last = frame.layers
        while not isinstance(ip, (self._library.IPv4Layer, self._library.IPv6Layer)):
            # A header of IPv6 that extends it.
            *outer, ip = outer
        return ip, last

    @staticmethod
    def _without_ack(frame: Any) -> Any:
        *outer, tcp = frame.layers
        return frame._replace(layers=(*outer, tcp._replace(flags=tcp.flags & ~0x10)))

    def _give_up(self, unit: Unit, before: float) -> Iterator[Recorded]:
        """Go on behind the segments that were waited for since before then.

        To the library an acknowledgment says that they came, and were not recorded (its rule 7).
        Not all recordings have both directions, and what it holds would be told at the end only.
        """
        while self._holes:
            key = min(self._holes, key=lambda key: self._holes[key].since)
            hole = self._holes[key]
            if hole.since > before and len(self._holes) <= MAX_HOLES:
                break
            ip, tcp = self._headers(hole.frame)
            ip = ip._replace(source=ip.destination, destination=ip.source)
            tcp = tcp._replace(
                source_port=tcp.destination_port,
                destination_port=tcp.source_port,
                sequence=tcp.acknowledgment,
                acknowledgment=hole.end(max(before, hole.since)),
                flags=0x10,
            )
            frame = hole.frame.frame._replace(time=hole.since, data=b"")
            made = hole.frame._replace(frame=frame, layers=(ip, tcp), payloads=(b"", b""))
            items = self._tcp.add(made)
            if not items:
                # Copies of what came before, or of a connection that is over.
                if not hole.forget(max(before, hole.since)):
                    del self._holes[key]
                continue
            stream = self._streams.get((items[0].stream, *key))
            base = stream.base if stream is not None else None
            if base is None:
                # Nothing came before: the first octet there is is that of the earliest segment.
                base = hole.first() - items[0].offset
            for item in hole.parts(items, base):
                yield from self._streamed(unit, item)
            self._note_base(items[0], base)
            if not hole.drop(items[-1], base):
                del self._holes[key]

    def _streamed(self, unit: Unit, item: Any) -> Iterator[Recorded]:
        """What octets of a TCP stream complete."""
        key = (item.stream, item.source, item.destination)
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= 2 * MAX_STREAMS:
                self._streams.popitem(last=False)
            stream = self._streams[key] = _Stream()
        else:
            self._streams.move_to_end(key)
        time = round(item.time * 1_000_000)
        source, destination = _packed_end(item.source), _packed_end(item.destination)
        if item.missing:
            self._count("segments.missing")
        try:
            for is_hep, data in stream.feed(item.data, item.missing):
                if is_hep:
                    yield self._hep(unit, time, source, data)
                else:
                    yield self._wire(unit, time, 6, source, destination, data)
        except HepError as error:
            yield Recorded(time, unit.name, unit.where, item.source[0], error)
        if item.end:
            del self._streams[key]


class Recordings:
    """Reads recordings, all at one time, in order of time; yields what each packet in them was.

    ``files`` are (name, binary stream with ``peek``). What can't be read is told by
    ``fault(name, text)``, and the other files go on. ``counts`` says what was seen.
    """

    def __init__(self, files: Sequence[tuple[str, Any]], fault: Callable[[str, str], None]) -> None:
        self.counts: dict[str, int] = {}
        self._files = files
        self._fault = fault
        self._late: list[tuple[int, int, Recorded]] = []
        self._number = 0

    def __iter__(self) -> Iterator[Recorded]:
        network, unit = None, None
        readers = [self._guarded(name, file) for name, file in self._files]
        units: Iterable[Unit] = readers[0] if len(readers) == 1 else ()
        for unit in units or heapq.merge(*readers, key=attrgetter("time")):
            if isinstance(unit.content, (HepPacket, HepError)):
                yield Recorded(unit.time, unit.name, unit.where, "", unit.content)
                continue
            network = network or Network(self.counts)
            found = network.take(unit)
            since = network.waits_since
            if since < inf or self._late:
                yield from self._in_order(found, since)
            else:
                yield from found
        if network is not None and unit is not None:
            yield from self._in_order(network.finish(unit), inf)

    def _in_order(self, found: Iterable[Recorded], since: float) -> Iterator[Recorded]:
        """Hold back what is later than what a stream may still bring, by HOLE_PATIENCE at most."""
        for recorded in found:
            self._number += 1
            heapq.heappush(self._late, (recorded.time, self._number, recorded))
        while self._late and (self._late[0][0] <= since or len(self._late) > MAX_LATE):
            yield heapq.heappop(self._late)[2]

    def _guarded(self, name: str, file: Any) -> Iterator[Unit]:
        try:
            yield from read_units(name, file)
        except (OSError, EOFError, ValueError, HepError, zlib.error) as error:
            self._fault(name, getattr(error, "strerror", None) or str(error))


class Playback:
    """Takes recorded packets through the agent's pure code; the clock is that of the recording.

    ``table`` keeps the records of calls. ``now`` is UNIX time in seconds, 0 before the first
    packet; ``gap`` the longest time without a packet and when it began; ``packets`` and
    ``messages`` what was taken in, ``counts`` what was not.
    """

    def __init__(
        self,
        settings: Settings,
        rules: Sequence[Rule],
        counts: dict[str, int] | None = None,
        table: RecordedTable | None = None,
    ) -> None:
        self.table = RecordedTable(settings, rules) if table is None else table
        self.counts: dict[str, int] = {} if counts is None else counts
        self.now = 0.0
        self.gap = (0.0, 0.0)
        self.packets = self.messages = 0
        self._senders = Senders(settings.hep_allow)
        self._keys = {key.encode() for key in settings.hep_auth_key}
        self._odd: Recorded | None = None

    def take(self, recorded: Recorded) -> list[RatingEvent]:
        """Take in one packet, and what has become due since the last; the events of both."""
        time = recorded.time / 1_000_000 or self.now
        if self._odd is None and abs(time - self.now) <= LEAP:
            return self._take(recorded, time)
        events: list[RatingEvent] = []
        odd, self._odd = self._odd, None
        if odd is not None:
            confirmed = recorded.time and abs(recorded.time - odd.time) <= LEAP * 1_000_000
            events += self._take(odd, odd.time / 1_000_000 if confirmed else self.now)
        if abs(time - self.now) > LEAP:
            self._odd = recorded
            return events
        return events + self._take(recorded, time)

    def finish(self) -> list[RatingEvent]:
        """The recording is over: what waits for a message is decided with what is known."""
        events: list[RatingEvent] = []
        odd, self._odd = self._odd, None
        if odd is not None:
            events += self._take(odd, self.now or odd.time / 1_000_000)
        return events + self.table.expire(self.now, closing=True)

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def _advance(self, time: float) -> list[RatingEvent]:
        """Let time pass as for the live agent, which looks at each deadline when it is due."""
        events: list[RatingEvent] = []
        step = time - self.now
        if self.now:
            if step > self.gap[0]:
                self.gap = (step, self.now)
            while (due := self.table.due()) <= time:
                self.now = max(self.now, due)
                events += self.table.expire(self.now)
        # Back only where two packets agree that the clock was wrong.
        if step > 0 or step < -LEAP:
            self.now = time
        return events

    def _take(self, recorded: Recorded, time: float) -> list[RatingEvent]:
        events = self._advance(time)
        sender = recorded.sender
        try:
            packet, payloads = self._let_in(recorded)
            fault: SipError | None = None
            for payload in payloads:
                try:
                    message = parse_sip(payload, packet.time)
                except SipError as error:
                    # What stands behind it in the stream counts all the same.
                    fault = fault or error
                    continue
                if message is None:
                    self._count("ignored.method")
                else:
                    self.messages += 1
                    events += self.table.handle(Sighting(packet, message, sender), self.now)
            if fault is not None:
                raise fault
        except (HepError, SipError) as error:
            layer = "hep" if isinstance(error, HepError) else "sip"
            self._count(f"malformed.{layer}_{error.kind}".replace("-", "_"))
        except Exception:
            self._count("internal_error")
        return events

    def _let_in(self, recorded: Recorded) -> tuple[HepPacket, Sequence[bytes]]:
        """A packet and its SIP messages, none where the agent takes none. Raises HepError."""
        packet = recorded.packet
        self.packets += 1
        if isinstance(packet, HepError):
            raise packet
        packet.time = packet.time or round(self.now * 1_000_000)
        refused = ""
        if packet.version and recorded.sender:
            key = packet.auth_key.rstrip(b"\0")
            if not self._senders.of(recorded.sender).allowed:
                refused = "refused.not_allowed"
            elif self._keys and key not in self._keys:
                refused = "refused.key"
        if packet.protocol_type != SIP_PROTOCOL_TYPE:
            refused = refused or "ignored.not_sip"
        elif packet.payload[:1] in _BLANK and not packet.payload.strip(_BLANK):
            refused = refused or "ignored.empty"
        if refused:
            self._count(refused)
            return packet, ()
        return packet, split_messages(packet)


# Room: command line

# Files that the process asks to open at one time, connections included, where it may.
MAX_FILES = 65_536
# Seconds between two checks of what is due in the call table.
TICK = 0.1
# Octets of a recording that are read from the disk at once.
READ_AHEAD = 1 << 20
# Packets of a recording between two looks at how far it came.
PROGRESS_EACH = 5_000
# Beside the journal of `rate --deliver`: which recording it is of, and how far it came.
PROGRESS_FILE = "recording.json"


def run(configuration: Configuration) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Raises ConfigError."""
    settings = configuration.settings
    limiter = set_up_logging(settings, sys.stdout)
    for warning in configuration.warnings:
        log.warning(warning, extra={"event": "former_option"})
    alone = not settings.cluster_url
    records = RecordFile(settings.call_records) if settings.call_records else None
    journal = Journal(settings.state_dir, bool(records)) if alone and settings.state_dir else None
    agent = Agent(settings, configuration.rules, limiter, journal, configuration.tls, records)
    if agent.cluster:
        agent.cluster.try_to_join()
    # The soft limit is 1,024 on most systems, for programs that use select().
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    servers = _open_servers(configuration, agent)
    notifier = Notifier(os.environ)
    stop = _watch_signals(lambda: notifier.reload(agent, configuration), agent.log_status)
    for server in servers:
        server.start()
        _tell_listening(agent, server, f"listen_{server.transport}" in configuration.sockets)
    background = [gevent.spawn(agent.flush_forever)]
    for forwarder in agent.forwarders:
        forwarder.greenlet.start()
    if journal:
        _tell_restored(agent, journal)
        background += [gevent.spawn(shard.commit_forever) for shard in agent.shards]
        background += [gevent.spawn(x.write_records_forever) for x in agent.shards if x.records]
    if agent.cluster:
        agent.cluster.start()
    notifier.say("READY=1")
    collector = Collector(time.monotonic())
    while not stop.wait(TICK):
        agent.tick()
        if agent.cluster and agent.cluster.fatal:
            # Redis answers for the first time, and is not what it must be.
            return _fail(agent.cluster.fatal)
        collector.step(sum(agent.sizes().values()), time.monotonic())
        notifier.alive(agent, time.monotonic())
        for server in servers:
            if isinstance(server, TcpServer):
                server.close_overdue(time.monotonic())
    notifier.say("STOPPING=1")
    _shut_down(agent, servers, background, configuration.sockets)
    return 0


def _open_servers(configuration: Configuration, agent: Agent) -> list[Server]:
    """A server for each listener that is on, bound but not started. Raises ConfigError."""
    servers: list[Server] = []
    for server_class in (UdpServer, TcpServer, TlsServer, StatusServer):
        option = f"listen_{server_class.transport}"
        address = getattr(configuration.settings, option)
        # Unlike HEP, the status is for this machine unless told otherwise.
        if option == "listen_status" and address.startswith(":"):
            address = f"127.0.0.1{address}"
        if address:
            try:
                sock = configuration.sockets.get(option) or bind(address, server_class.kind)
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                text = f"{option}: {address}: {reason}; allowed: a free address of this host"
                raise ConfigError(text) from None
            servers.append(server_class(sock, agent))
    return servers


def _watch_signals(
    reload: Callable[[], None], log_status: Callable[[], None]
) -> gevent.event.Event:
    """The event that SIGTERM and SIGINT set; a second one of them ends the process at once."""
    stop = gevent.event.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    gevent.signal_handler(signal.SIGTERM, on_signal)
    gevent.signal_handler(signal.SIGINT, on_signal)
    gevent.signal_handler(signal.SIGHUP, reload)
    gevent.signal_handler(signal.SIGUSR1, log_status)
    return stop


def _tell_listening(agent: Agent, server: Server, inherited: bool) -> None:
    where = {"transport": server.transport, "address": bound_to(server.socket)}
    agent.listeners.append(where)
    size = server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    extra = {"event": "listening", **where, "inherited": inherited, "receive_buffer": size}
    log.info("listening", extra=extra)


# New objects after which the garbage collector goes through them. It goes through all others only
# each GC_PAUSE seconds, while fewer than GC_FEW calls are open, or else each GC_LAST: nothing runs
# meanwhile, and that takes the longer the more calls there are.
GC_OBJECTS = 5_000
GC_FEW = 5_000
GC_PAUSE = 600.0
GC_LAST = 86_400.0


class Collector:
    """Runs the garbage collector in place of its own rule, which goes through all calls at once.

    Each collection freezes what it leaves: reference counts free nearly all of that, and the next
    full collection finds the rest.
    """

    def __init__(self, now: float) -> None:
        gc.disable()
        gc.freeze()
        self._full = now

    def step(self, calls: int, now: float) -> None:
        """Collect what is new if there is enough of it, or all in time; called at each tick."""
        if now - self._full >= (GC_PAUSE if calls < GC_FEW else GC_LAST):
            self._full = now
            gc.unfreeze()
        elif gc.get_count()[0] < GC_OBJECTS:
            return
        gc.collect()
        gc.freeze()


# Seconds between two lines for `systemctl status`; the watchdog may ask for more.
NOTIFY_INTERVAL = 10.0


class Notifier:
    """Tells systemd how the agent is (sd_notify(3)); it does nothing without NOTIFY_SOCKET.

    ``interval`` is the seconds between two calls of `alive`: half of what the watchdog allows, and
    NOTIFY_INTERVAL at most.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the NUL of an abstract address.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        self.interval, self._next = NOTIFY_INTERVAL, 0.0
        limit = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watched = ours and limit.isascii() and limit.isdigit() and int(limit) > 0
        if self._watched:
            self.interval = min(int(limit) / 2_000_000, NOTIFY_INTERVAL)

    def say(self, *lines: str) -> None:
        """Send assignments such as ``READY=1``; never raises, never waits."""
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), self._address)

    def alive(self, agent: Agent, now: float) -> None:
        """Pet the watchdog and renew the line of ``systemctl status``, when it is time."""
        if not self._address or now < self._next:
            return
        self._next = now + self.interval
        running, faults = agent.sizes()[ANSWERED], "; ".join(agent.faults(now))
        text = printable(f"{faults or 'healthy'}: {running} calls, {agent.waiting} events wait")
        self.say(*["WATCHDOG=1"] * self._watched, f"STATUS={text[:MAX_ERROR_TEXT]}")

    def reload(self, agent: Agent, configuration: Configuration) -> None:
        """Reload what the agent reads again, and say so before and after."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        agent.reload(configuration)
        self.say("READY=1")


def _tell_restored(agent: Agent, journal: Journal) -> None:
    if journal.torn:
        extra = {"event": "journal_torn"}
        log.warning(
            "the journal was cut; what was committed is there: %s", journal.torn, extra=extra
        )
    sizes = agent.sizes()
    counts = {"running": sizes[ANSWERED], "ringing": sizes[TRYING], "waiting": agent.waiting}
    log.info("journal opened", extra={"event": "journal_opened", **counts})


def _shut_down(
    agent: Agent,
    servers: Sequence[Server],
    background: list[gevent.Greenlet],
    inherited: Collection[str],
) -> None:
    log.info("stopping", extra={"event": "stopping", "waiting": len(agent.delivery)})
    timeout, in_memory = agent.settings.shutdown_timeout, agent.store_failure is None
    deadline = time.monotonic() + timeout
    # The last commit and the last metrics need some of the time.
    last_send = deadline - min(timeout / 4, STATSD_FLUSH)
    for server in servers:
        # What waits in an inherited socket is the next agent's.
        if isinstance(server, UdpServer) and "listen_udp" not in inherited:
            server.do_read()
        server.close()
    _hang_up([server for server in servers if isinstance(server, TcpServer)], deadline)
    for server in servers:
        server.stop(timeout=0)
    if agent.cluster:
        agent.cluster.stop(last_send)
    # What waits for a late message is decided with what is known now, where nobody keeps it.
    agent.tick(closing=in_memory)
    while not agent.cluster and agent.waiting and time.monotonic() < last_send:
        # What a store has can wait for the next start.
        if agent.store_failure == "" and not agent.busy:
            break
        gevent.sleep(TICK / 2)
        agent.tick()
    agent.delivery.kill()
    gevent.killall(background)
    saved = not in_memory and agent.commit(max(deadline - time.monotonic(), 0.1))
    if not saved and not agent.cluster:
        agent.delivery.stop()
    finish_forwarding(agent.forwarders, max(min(deadline - time.monotonic(), FORWARD_LAST), 0.1))
    if saved:
        with gevent.Timeout(max(deadline - time.monotonic(), 0.1), False):
            _write_last_records(agent)
    with gevent.Timeout(max(min(deadline - time.monotonic(), STATSD_FLUSH), 0.1), False):
        agent.flush(time.monotonic())
    running = agent.sizes()[ANSWERED]
    if running and not saved and not agent.cluster:
        extra = {"event": "calls_forgotten", "running": running}
        log.warning("running calls are forgotten: their end will not be reported", extra=extra)
    for shard in agent.shards:
        if isinstance(shard.store, Journal):
            shard.store.close(max(deadline - time.monotonic(), 0.1))
    log.info("stopped", extra={"event": "stopped"})


def _write_last_records(agent: Agent) -> None:
    """What is whole by now; the next start writes the rest."""
    for shard in agent.shards:
        while shard.records and shard.write_records() and agent.commit():
            pass
    agent.commit()


# Seconds in which senders over TCP may close their connections when the agent stops. Those that
# notice that the other side has closed, as SIP servers do, need far less.
HANG_UP = 0.5


def _hang_up(servers: Sequence[TcpServer], deadline: float) -> None:
    """Read what senders send until they know that nobody listens any more."""
    last = min(time.monotonic() + HANG_UP, deadline)
    # `any` would not call the servers behind the first that has some.
    while sum(server.hang_up() for server in servers) and time.monotonic() < last:
        gevent.sleep(TICK / 10)


def open_recording(name: str) -> tuple[Any, Any]:
    """A file, or "-" for the standard input, as a binary stream with ``peek``, unpacked.

    What gzip packed is unpacked; the second stream is the one below, whose position says how much
    was read. Raises OSError.
    """
    below: Any = sys.stdin.buffer
    if name != "-":
        below = io.BufferedReader(io.FileIO(name), READ_AHEAD)
    if below.peek(2)[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=below), READ_AHEAD), below
    return below, below


def _open_recordings(
    names: Sequence[str], fault: Callable[[str, str], None]
) -> list[tuple[str, Any, Any]]:
    """Open each with `open_recording`; ``fault(name, text)`` is told of those that can't be."""
    opened = []
    for name in names:
        try:
            opened.append((name, *open_recording(name)))
        except (OSError, EOFError, zlib.error) as error:
            fault(name, getattr(error, "strerror", None) or str(error))
    return opened


def _check_number(command: str, files: Sequence[str]) -> None:
    if not 0 < len(files) <= MAX_RECORDINGS:
        raise ConfigError(
            f"{command}: {len(files)} files; "
            f"allowed: {command} FILE..., 1 to {MAX_RECORDINGS} files"
        )


def decode_files(names: Sequence[str], out: Any) -> int:
    """Print what is in recordings as text, one file after another.

    Returns the exit status. Raises ConfigError without a file, and where pktcap is missing.
    """
    if not names:
        raise ConfigError("decode: no file; allowed: decode FILE...")
    faults = []

    def fault(name: str, text: str) -> None:
        faults.append(_fail(printable(f"{name}: {text}")))

    for name in names:
        try:
            file, _ = open_recording(name)
            with file:
                for found in Recordings([(name, file)], fault):
                    print(f"{name}:{found.where}: {describe(found.packet)}", file=out)
        except BrokenPipeError:
            return _reader_left(out)
        except (OSError, EOFError, zlib.error) as error:
            fault(name, getattr(error, "strerror", None) or str(error))
    return max(faults, default=0)


class RateOptions(NamedTuple):
    """What stands behind `rate` on the command line; ``format`` is "" for the usual one."""

    files: tuple[str, ...]
    format: str = ""
    deliver: bool = False
    journal: str = ""


def rate_options(arguments: Sequence[str]) -> RateOptions:
    """Read the words behind `rate`. Raises ConfigError."""
    files, values, deliver = [], {"--format": "", "--journal": ""}, False
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            files.append(word)
        elif word == "--deliver":
            deliver = True
        elif name in values:
            values[name] = value if equals else next(words, "")
        else:
            name = ascii(name)[1:-1]
            raise ConfigError(f"{name}: unknown; allowed: --format, --deliver, --journal")
    if values["--format"] not in ("", *_WRITERS):
        allowed = ", ".join(_WRITERS)
        raise ConfigError(f"--format: {values['--format']!r}; allowed: {allowed}")
    _check_number("rate", files)
    if deliver and (not values["--journal"] or "-" in files):
        raise ConfigError(
            "--deliver: cannot be resumed; allowed: with --journal FOLDER, and files instead of -"
        )
    return RateOptions(tuple(files), values["--format"], deliver, values["--journal"])


def record_row(record: CallRecord) -> dict[str, Any]:
    """A call as `rate` shows it: the columns by name."""
    reason = record.outcome
    if record.outcome in (REFUSED, CANCELLED, NOT_ANSWERED) and record.status:
        reason = f"{reason}: {record.status} {record.phrase}".rstrip()
    elif record.begun and not record.ended:
        reason = f"{reason}, running at the end of the recording"
    return {
        "call_id": record.call_id,
        "tenant": record.tenant,
        "route": record.route,
        "transaction_tag": record.transaction_tag,
        "account_tag": record.account_tag,
        "destination_account_tag": record.destination_account_tag,
        "source": record.source,
        "destination": record.destination,
        "begin": rfc3339(record.begun) if record.begun else "",
        "end": rfc3339(record.ended) if record.ended else "",
        "duration": record.seconds,
        "charged": record.charged,
        "reason": reason,
        "begin_by": record.begun_by,
        "end_by": record.ended_by,
    }


# The columns of `record_row`, and their characters in a table; what is longer moves the next ones.
_COLUMNS_SHOWN = {
    "call_id": 24,
    "tenant": 8,
    "route": 8,
    "transaction_tag": 24,
    "account_tag": 12,
    "destination_account_tag": 12,
    "source": 30,
    "destination": 30,
    "begin": 24,
    "end": 24,
    "duration": 9,
    "charged": 7,
    "reason": 24,
    "begin_by": 8,
    "end_by": 8,
}


def _write_table(row: Mapping[str, Any], out: Any) -> None:
    shown = {name: value if value != "" else "-" for name, value in row.items()}
    if not isinstance(row["charged"], str):
        shown["charged"] = "yes" if row["charged"] else "no"
        shown["duration"] = f"{row['duration']:.3f}"
    cells = (str(shown[name]).ljust(width) for name, width in _COLUMNS_SHOWN.items())
    print(printable(" ".join(cells).rstrip()), file=out)


def _write_csv(row: Mapping[str, Any], out: Any) -> None:
    cells = [str(value) for value in row.values()]
    if not "".join(cells).isprintable():
        cells = [printable(cell) for cell in cells]
    csv.writer(out, lineterminator="\n").writerow(cells)


def _write_json(row: Mapping[str, Any], out: Any) -> None:
    print(_compact_json(row), file=out)


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}


class _Ledger:
    """Shows each call that is over, and counts for the summary; see `rate`."""

    def __init__(self, form: str, out: Any) -> None:
        self._write = _WRITERS[form]
        self._out = out
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.seconds = 0.0
        self.running = 0
        if form != "json":
            self._write({name: name for name in _COLUMNS_SHOWN}, out)

    def note(self, record: CallRecord) -> None:
        """Show a call. Raises OSError."""
        self.outcomes[record.outcome] += 1
        if record.charged:
            self.seconds += record.seconds
            self.running += not record.ended
        self._write(record_row(record), self._out)

    def summary(self, playback: Playback, counts: Mapping[str, int]) -> Iterator[str]:
        """What there was in all, as lines for a person."""
        known = {name: number for name, number in self.outcomes.items() if number}
        calls = ", ".join(f"{number} {name}" for name, number in known.items())
        yield f"{sum(known.values())} calls: {calls or 'none'}"
        yield f"{self.seconds:.3f} seconds charged; {self.running} calls run on behind the end"
        gap, since = playback.gap
        stamp = f", behind {rfc3339(round(since * 1_000_000))}" if gap else ""
        yield f"largest gap in the recording: {gap:.1f} s{stamp}"
        lost = {name: counts.get(name, 0) for name in _LOST}
        told = ", ".join(f"{number} {_LOST[name]}" for name, number in lost.items() if number)
        broken = {name: n for name, n in counts.items() if name.startswith("malformed.")}
        told = ", ".join(filter(None, [told, *(f"{n} {name}" for name, n in broken.items())]))
        yield f"{playback.packets} packets, {playback.messages} messages of calls"
        yield f"cut or lost: {told or 'nothing'}"
        more = {name: n for name, n in sorted(counts.items()) if name not in (*_LOST, *broken)}
        if more:
            yield "counted: " + ", ".join(f"{name} {number}" for name, number in more.items())


# What says that messages are missing, or parts of them.
_LOST = {
    "messages.cut": "messages cut",
    "segments.missing": "holes in TCP streams",
    "octets.missing": "octets of TCP streams",
    "datagrams.incomplete": "datagrams without all fragments",
    "frames.malformed": "frames with broken headers",
    "frames.link_type": "frames of an unknown link type",
    "internal_error": "packets that could not be handled",
}


class _Progress:
    """A bar on a terminal: how much of the files was read."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files
        self._bar: Any = None
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        with suppress(ImportError):
            import tqdm

            quiet = not sys.stderr.isatty()
            self._bar = tqdm.tqdm(
                total=sum(sizes) or None, unit="B", unit_scale=True, disable=quiet, leave=False
            )

    def step(self) -> None:
        """Look how far the reading came."""
        if self._bar is not None and not self._bar.disable:
            self._bar.update(sum(map(self._position, self._files)) - self._bar.n)

    @staticmethod
    def _position(file: Any) -> int:
        with suppress(OSError):
            return os.lseek(file.fileno(), 0, os.SEEK_CUR)
        return 0

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class RecordedDelivery:
    """Sends the events of a recording, each call once it is over, and knows how far it came.

    The same files give the same calls in the same order, so that a number is enough to go on from:
    that of the calls which are in the journal, or were answered. It is written before the first of
    them may be sent. A call that still runs at the end is not sent: the API would let it run on.
    """

    def __init__(self, options: RateOptions, settings: Settings) -> None:
        quiet = settings.log_level if settings.log_level == "error" else "warning"
        set_up_logging(replace(settings, log_level=quiet), sys.stderr)
        self._journal = Journal(options.journal)
        self._path = os.path.join(options.journal, PROGRESS_FILE)
        try:
            self._print = fingerprint(options.files, settings)
            done = self._read()
        except (OSError, ConfigError) as error:
            self._journal.close(JOURNAL_STALL)
            raise ConfigError(str(error)) from None
        # What the journal took before a kill may be one commit further.
        self._done = max(done, self._journal.last_serial // 2)
        self._delivery = Delivery(settings, Metrics(settings))
        self._delivery.restore(self._journal)
        self._begins: dict[int, RatingEvent] = {}
        self._fresh: list[RatingEvent] = []
        self.calls = 0
        while events := self._journal.load_retries():
            for event in events:
                self._journal.retry_event(event, event.serial)
            self._fresh += events
            self._hand_over()

    def put(self, event: RatingEvent) -> None:
        """Take in the next event of the recording."""
        if event.kind == "begin":
            self._begins[event.row] = event
            return
        begin = self._begins.pop(event.row)
        self.calls += 1
        if self.calls <= self._done:
            return
        for one, serial in ((begin, 2 * self.calls - 1), (event, 2 * self.calls)):
            one.row, one.serial = self.calls, serial
            self._journal.put_event(one)
            self._fresh.append(one)
        if len(self._fresh) >= MAX_LOADED:
            self._hand_over()
            while len(self._delivery) > MAX_EVENTS_IN_MEMORY:
                self._turn()

    def finish(self, note: Any) -> int:
        """Wait until all was answered; returns how many events still wait, where it was stopped."""
        running = len(self._begins)
        if running:
            print(f"{running} calls run on behind the end: not sent", file=note)
        self._hand_over()
        try:
            while len(self._delivery):
                self._turn()
        except KeyboardInterrupt:
            print("stopped: the same command goes on", file=note)
        waiting, rejected = len(self._delivery), self._journal.count_rejected()
        print(f"{self.calls} calls sent, {waiting} events wait, {rejected} rejected", file=note)
        return waiting + rejected

    def close(self) -> None:
        """Write what was answered, and give the journal back."""
        self._delivery.kill()
        self._journal.commit(JOURNAL_STALL)
        self._journal.close(JOURNAL_STALL)

    def _turn(self) -> None:
        gevent.sleep(JOURNAL_INTERVAL)
        self._commit()
        self._delivery.tick()

    def _hand_over(self) -> None:
        """Put down what is fresh, then how far that is, and only then let it be sent."""
        self._commit()
        self._write()
        fresh, self._fresh = self._fresh, []
        for event in fresh:
            self._delivery.put(event, written=True)
        self._turn()

    def _commit(self) -> None:
        answered, self._journal.answered = self._journal.answered, []
        if not self._journal.commit():
            raise ConfigError(f"--journal: {self._journal.failure}; allowed: a disk with room")
        for event in answered:
            self._delivery.release(event)
        self._delivery.forget_unwritten(self._journal)

    def _read(self) -> int:
        try:
            with open(self._path, encoding="utf-8") as file:
                known = json.load(file)
            if known["recording"] != self._print:
                raise ConfigError(
                    f"--journal: {self._path}: of another recording or configuration; "
                    "allowed: the files and options that it was begun with, or a new folder"
                )
            return int(known["calls"])
        except FileNotFoundError:
            if self._journal.last_serial:
                raise ConfigError(
                    "--journal: an agent has worked in this folder; allowed: a folder of its own"
                ) from None
            return 0
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--journal: {self._path}: damaged; allowed: a whole file, or a new folder"
            ) from None

    def _write(self) -> None:
        text = _compact_json({"recording": self._print, "calls": max(self.calls, self._done)})
        with open(self._path + ".new", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self._path + ".new", self._path)
        sync_folder(os.path.dirname(self._path) or ".")


# Settings that do not change what is charged.
_FREE_SETTINGS = re.compile(
    "listen_|tls_|hep_rate|hep_idle|hep_forward|status|rating_api_(?!url)|statsd|log_|debug|state_dir|shutdown"
    "|unknown_party|call_records|cluster_"
)


def fingerprint(files: Sequence[str], settings: Settings) -> str:
    """What tells whether recordings and configuration are those of before. Raises OSError."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=16)
    for item in fields(settings):
        if not _FREE_SETTINGS.match(item.name):
            digest.update(f"{item.name}={getattr(settings, item.name)!r}\n".encode())
    for name in [settings.routes] * bool(settings.routes) + list(files):
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\n".encode() + file.read(READ_AHEAD))
    return digest.hexdigest()


def rate(
    options: RateOptions, settings: Settings, rules: Sequence[Rule], out: Any, note: Any
) -> int:
    """Charge recordings: show what became of each call on ``out``, a summary on ``note``.

    With ``--deliver`` the rating API is told. Returns the exit status: 0, or 1 where a file is cut,
    damaged or could not be read, or events wait or were rejected. Raises ConfigError.
    """
    faults: list[str] = []

    def fault(name: str, text: str) -> None:
        faults.append(name)
        print(printable(f"rating_agent_hep.py: {name}: {text}"), file=note)

    delivery = RecordedDelivery(options, settings) if options.deliver else None
    opened = _open_recordings(options.files, fault)
    recordings = Recordings([(name, file) for name, file, _ in opened], fault)
    playback = Playback(settings, rules, recordings.counts)
    ledger = _Ledger(options.format or ("table" if out.isatty() else "csv"), out)
    progress = _Progress([below for _, _, below in opened])
    waiting = 0
    try:
        for number, recorded in enumerate(recordings):
            _account(playback.take(recorded), playback.table, ledger, delivery)
            if not number % PROGRESS_EACH:
                progress.step()
        _account(playback.finish(), playback.table, ledger, delivery)
        for record in playback.table.unfinished():
            ledger.note(record)
        progress.close()
        for line in ledger.summary(playback, recordings.counts):
            print(line, file=note)
        waiting = delivery.finish(note) if delivery is not None else 0
    except BrokenPipeError:
        return _reader_left(out)
    finally:
        progress.close()
        if delivery is not None:
            delivery.close()
    return 1 if faults or waiting else 0


# INVITE copies of one call that `explain` looks at: proxies in the path.
MAX_EXPLAINED = 8


class ExplainedTable(RecordedTable):
    """A table that also says how the route of each call came about: ``lines`` by row."""

    def __init__(self, settings: Settings, rules: Sequence[Rule]) -> None:
        super().__init__(settings, rules)
        self.lines: dict[int, list[str]] = {}
        # By Call-ID and From tag, the copies of the latest INVITE, the nearest to the caller first.
        self._invites: dict[str, dict[str, list[Sighting]]] = {}

    def handle(self, sighting: Sighting, now: float) -> list[RatingEvent]:
        """Take in one message; return the events that it brings about."""
        message = sighting.message
        if message.method == "INVITE" and not message.to_tag:
            self._keep(sighting)
        events = super().handle(sighting, now)
        if message.call_id not in self._calls:
            self._invites.pop(message.call_id, None)
        return events

    def _keep(self, sighting: Sighting) -> None:
        message = sighting.message
        callers = self._invites.setdefault(message.call_id, {})
        copies = callers.get(message.from_tag, [])
        latest = copies[0].message.cseq if copies else 0
        new = (message.top_branch, sighting.packet.capture_id)
        known = any((x.message.top_branch, x.packet.capture_id) == new for x in copies)
        if message.cseq < latest or (message.cseq == latest and known):
            return
        if message.from_tag not in callers and len(callers) >= MAX_CALLS_PER_ID:
            return
        copies = [*(copies if message.cseq == latest else ()), sighting]
        copies.sort(key=lambda copy: len(copy.message.hops))
        callers[message.from_tag] = copies[:MAX_EXPLAINED]

    def _leave(self, call: Call) -> None:
        super()._leave(call)
        if call.call_id not in self._calls:
            self._invites.pop(call.call_id, None)

    def _record(self, call: Call, end: End | None = None) -> CallRecord:
        record = super()._record(call, end)
        copies = [
            copy
            for copy in self._invites.get(call.call_id, {}).get(call.from_tag, ())
            if copy.packet.capture_id == call.capture_id
            or choose_route(self.rules, copy).tenant == call.tenant
        ]
        self.lines[record.row] = ["its INVITE was not seen"]
        if copies:
            self.lines[record.row] = list(explain_route(self.rules, self.settings, copies))
        return record


def explain_files(names: Sequence[str], settings: Settings, rules: Sequence[Rule], out: Any) -> int:
    """Print of each call of recordings what became of it, its route and its accounts, and why.

    Returns the exit status: 0, or 2 where a file could not be read. Raises ConfigError.
    """
    _check_number("explain", names)
    faults = []

    def fault(name: str, text: str) -> None:
        faults.append(_fail(printable(f"{name}: {text}")))

    opened = _open_recordings(names, fault)
    recordings = Recordings([(name, file) for name, file, _ in opened], fault)
    table = ExplainedTable(settings, rules)
    playback = Playback(settings, rules, recordings.counts, table)
    try:
        for recorded in recordings:
            playback.take(recorded)
            for record in table.take_records() if table.records else ():
                _explain_call(record, table.lines.pop(record.row), out)
        playback.finish()
        for record in (*table.take_records(), *table.unfinished()):
            _explain_call(record, table.lines.pop(record.row), out)
    except BrokenPipeError:
        return _reader_left(out)
    return max(faults, default=0)


def _explain_call(record: CallRecord, lines: Sequence[str], out: Any) -> None:
    row = record_row(record)
    print(printable(f"call {record.call_id}: {row['reason']}"), file=out)
    for line in lines:
        print(printable(f"  {line}"), file=out)
    for name in ("tenant", "transaction_tag", "source", "destination", "begin", "end"):
        print(printable(f"  {name}: {row[name] or 'none'}"), file=out)


def _account(
    events: Sequence[RatingEvent],
    table: RecordedTable,
    ledger: _Ledger,
    delivery: RecordedDelivery | None,
) -> None:
    if table.records:
        for record in table.take_records():
            ledger.note(record)
    if delivery is not None:
        for event in events:
            delivery.put(event)


def outbox(settings: Settings, arguments: Sequence[str], out: Any) -> int:
    """The command that shows what waits and what was rejected; an agent may run meanwhile.

    ``arguments`` is "list", "retry" with any number of calls (none: all that were rejected), or
    "drop" with one at least; a call is named by its Call-ID or transaction tag. Returns the exit
    status; raises ConfigError.
    """
    action, *calls = arguments or ["list"]
    known = action in ("list", "retry", "drop")
    if not known or (action == "list" and calls) or (action == "drop" and not calls):
        raise ConfigError("outbox: unknown; allowed: list, retry [CALL...], drop CALL...")
    if settings.cluster_url:
        return _cluster_outbox(settings, action, calls, out)
    folder = settings.state_dir
    if not folder:
        raise ConfigError("state_dir: empty; allowed: the folder of the agent's journal")
    path = inspect_journal(folder)
    if not path:
        raise ConfigError(f"state_dir: {folder}: no journal; allowed: where an agent has run")
    try:
        with closing(_connect(path, "rw")) as db:
            if action == "list":
                return _list_outbox(_events_of(db), out)
            verb = "UPDATE rejected SET retry = 1" if action == "retry" else "DELETE FROM rejected"
            changed = db.execute(f"{verb} {_OF_CALLS}", (json.dumps(calls),)).rowcount
    except BrokenPipeError:
        return _reader_left(out)
    except sqlite3.Error as error:
        return _fail(f"outbox: {error}")
    return _tell_changed(action, changed, calls, out)


def _cluster_outbox(settings: Settings, action: str, calls: Sequence[str], out: Any) -> int:
    try:
        cluster = ClusterOutbox(settings)
        if action == "list":
            return _list_outbox(cluster.events(), out)
        changed = cluster.retry(calls) if action == "retry" else cluster.drop(calls)
    except BrokenPipeError:
        return _reader_left(out)
    except RedisError as error:
        return _fail(f"outbox: {error}")
    return _tell_changed(action, changed, calls, out)


def _tell_changed(action: str, changed: int, calls: Sequence[str], out: Any) -> int:
    if not changed and calls:
        return _fail("outbox: nothing was rejected of these calls")
    done = "to be sent again, by a running agent within seconds" if action == "retry" else "dropped"
    print(f"{changed} events {done}", file=out)
    return 0


def _list_outbox(events: Iterable[tuple[str, RatingEvent]], out: Any) -> int:
    form = "{:<8} {:<5} {:<24} {:>8} {} {} {} {}"
    print(form.format(*"STATE KIND TIME ATTEMPTS TENANT API CALL ANSWER".split()), file=out)
    for state, event in events:
        shown = [state, event.kind, rfc3339(event.time), event.attempts, event.tenant]
        shown += [event.api_url, event.call_id, event.answer]
        print(printable(form.format(*shown).rstrip()), file=out)
    return 0


def _events_of(db: sqlite3.Connection) -> Iterator[tuple[str, RatingEvent]]:
    apis = sorted(api for api, _ in db.execute(_WAITING_COUNTS).fetchall())
    sources = [("waiting", _WAITING, api) for api in apis]
    sources += [("rejected", _REJECTED, 0), ("retry", _REJECTED, 1)]
    for state, query, chosen in sources:
        after = 0
        # In pages: a long reading would keep the agent from cutting its write-ahead log.
        while events := _unpack_waiting(
            db.execute(query, (chosen, after, MAX_LOADED)).fetchone()[0]
        ):
            yield from ((state, event) for event in events)
            after = events[-1].serial


def _reader_left(out: Any) -> int:
    """End well when the reader of our output, such as head, has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return 0


def describe(packet: HepPacket | HepError) -> str:
    """A packet as text for a terminal: a line of its facts, then the payload, indented."""
    if isinstance(packet, HepError):
        return f"malformed: {packet}"
    source = f"{packet.source_ip or '?'} port {packet.source_port}"
    destination = f"{packet.destination_ip or '?'} port {packet.destination_port}"
    kind = f"HEP{packet.version}" if packet.version else "TCP" if packet.protocol == 6 else "UDP"
    facts = [f"{kind} {rfc3339(packet.time)} {source} > {destination}"]
    if packet.version:
        facts.append(f"type {packet.protocol_type}, capture id {packet.capture_id}")
    if packet.capture_name or packet.correlation_id:
        facts.append(f"name {packet.capture_name!r}, correlation id {packet.correlation_id!r}")
    if packet.auth_key:
        facts.append("with a key")
    text = packet.payload.decode("utf-8", "backslashreplace").replace("\r\n", "\n").rstrip("\n")
    return "\n    ".join([", ".join(facts), *map(printable, text.split("\n"))])


def _fail(text: str) -> int:
    print(f"rating_agent_hep.py: {text}", file=sys.stderr)
    return 2


def check(configuration: Configuration, out: Any) -> int:
    """Check the journal, then print the options in force. Raises ConfigError."""
    if configuration.settings.state_dir:
        inspect_journal(configuration.settings.state_dir)
    for warning in configuration.warnings:
        print(f"# {warning}", file=out)
    for line in effective(configuration):
        print(line, file=out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status: 0, or 2 for what the operator has to mend."""
    try:
        arguments, environ = sys.argv[1:] if argv is None else argv, dict(os.environ)
        for name in PASSING:
            os.environ.pop(name, None)
        configuration = load_configuration(arguments, environ)
        match configuration.command:
            case "decode":
                return decode_files(configuration.arguments, sys.stdout)
            case "rate":
                options = rate_options(configuration.arguments)
                settings, rules = configuration.settings, configuration.rules
                return rate(options, settings, rules, sys.stdout, sys.stderr)
            case "explain":
                settings, rules = configuration.settings, configuration.rules
                return explain_files(configuration.arguments, settings, rules, sys.stdout)
            case "outbox":
                return outbox(configuration.settings, configuration.arguments, sys.stdout)
            case "check":
                return check(configuration, sys.stdout)
        return run(configuration)
    except ConfigError as error:
        return _fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
