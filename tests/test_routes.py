"""Which route a call takes, who is charged, and what is said of a bad routes.yaml."""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pure
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
import hepbuild
import rating_agent_hep as agent
from hep_replay import frames, read_capture
from hepbuild import sip_request

PLAIN = agent.Settings()
Headers = Sequence[tuple[str, str]]


def message(
    headers: Headers = (),
    *,
    sender: str = "sip:2000@sip.canyan.io",
    receiver: str = "sip:2001@sip.canyan.io",
    request: str = "sip:2002@10.0.0.9:5060",
) -> agent.SipMessage:
    payload = sip_request(
        "INVITE",
        request,
        call_id="1@h",
        from_tag="a",
        cseq=1,
        branch="z9hG4bK1",
        from_uri=sender,
        to_uri=receiver,
        headers=headers,
    )
    parsed = agent.parse_sip(payload)
    assert parsed is not None
    return parsed


def seen(
    headers: Headers = (),
    *,
    sighted_from: str = "192.0.2.1",
    packet: agent.HepPacket | None = None,
    **parts: str,
) -> agent.Sighting:
    """An INVITE as a capture agent at `sighted_from` reported it."""
    return agent.Sighting(
        packet or agent.HepPacket(version=3, time=1), message(headers, **parts), sighted_from
    )


def rules(text: str, main: agent.Settings = PLAIN) -> tuple[agent.Rule, ...]:
    return agent.parse_routes(text, "routes.yaml", main)


def first(text: str, main: agent.Settings = PLAIN) -> agent.Route:
    """The route of the first rule."""
    return rules(text, main)[0].route


def taken(match: str, sighting: agent.Sighting) -> bool:
    """Whether a rule with this `match` (a YAML flow mapping) takes the message."""
    route = agent.choose_route(rules(f"- {{name: ours, match: {match}}}\n"), sighting)
    assert route.name in ("ours", "main")
    return route.name == "ours"


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


# Match keys


@pytest.mark.parametrize(
    ("match", "number", "hit"),
    [
        ("{capture_id: 2001}", 2001, True),
        ("{capture_id: 2001}", 2002, False),
        ("{capture_id: [1, 2001]}", 2001, True),
        ("{capture_id: [1, 2001]}", 2, False),
        ("{capture_id: 0}", 0, True),
        ("{capture_id: 4294967295}", 2**32 - 1, True),
    ],
)
def test_capture_id(match, number, hit):
    packet = agent.HepPacket(version=3, time=1, capture_id=number)
    assert taken(match, seen(packet=packet)) is hit


@pytest.mark.parametrize(
    ("match", "name", "hit"),
    [
        ("{capture_name: edge-1}", "edge-1", True),
        ("{capture_name: edge-1}", "edge-10", False),
        ("{capture_name: edge-1}", "EDGE-1", False),
        ("{capture_name: edge-1}", "", False),
        ("{capture_name: [edge-1, edge-2]}", "edge-2", True),
        ("{capture_name: [edge-1, edge-2]}", "edge-3", False),
        ("{capture_name: 12}", "12", True),
    ],
)
def test_capture_name(match, name, hit):
    packet = agent.HepPacket(version=3, time=1, capture_name=name)
    assert taken(match, seen(packet=packet)) is hit


NETWORKS = [
    ("10.20.0.0/16", "10.20.255.1", True),
    ("10.20.0.0/16", "10.21.0.1", False),
    ("10.20.0.1", "10.20.0.1", True),
    ("10.20.0.1", "10.20.0.2", False),
    ("10.20.3.4/16", "10.20.0.9", True),  # host bits do not matter
    ("[192.0.2.0/24, 10.0.0.0/8]", "10.1.2.3", True),
    ("[192.0.2.0/24, 10.0.0.0/8]", "11.1.2.3", False),
    ("'2001:db8::/32'", "2001:db8:1::5", True),
    ("'2001:db8::/32'", "2001:db9::5", False),
    ("['2001:db8::/32', 10.0.0.0/8]", "10.0.0.1", True),
    ("'::/0'", "10.0.0.1", False),
    ("0.0.0.0/0", "2001:db8::1", False),
    ("0.0.0.0/0", "10.0.0.1", True),
]
# As a socket for both families gives and logs the addresses of IPv4 (RFC 4291 section 2.5.5.2).
MAPPED = [("10.20.0.0/16", "::ffff:10.20.0.1", True), ("10.20.0.0/16", "::ffff:10.21.0.1", False)]


@pytest.mark.parametrize(("networks", "host", "hit"), NETWORKS)
def test_sender(networks, host, hit):
    # IPv4-mapped addresses of senders are unwrapped by the servers, not here.
    assert taken(f"{{sender: {networks}}}", seen(sighted_from=host)) is hit


@pytest.mark.parametrize("key", ["source", "destination"])
@pytest.mark.parametrize(("networks", "host", "hit"), NETWORKS + MAPPED)
def test_networks_of_the_sip_message(key, networks, host, hit):
    # The other end is where the first is not, so a mix-up of the two shows.
    other = {"source": "destination", "destination": "source"}[key]
    packet = replace(agent.HepPacket(version=3, time=1), **{key: address(host)})
    match = f"{{{key}_network: {networks}}}"
    assert taken(match, seen(packet=packet)) is hit
    assert taken(match, seen(packet=replace(packet, **{key: b"", other: address(host)}))) is False


def test_mapped_network_of_an_unknown_sender():
    assert taken("{sender: 0.0.0.0/0}", seen(sighted_from="")) is False


DOMAINS = [
    ("carrier.example", "sip:1@carrier.example", True),
    ("carrier.example", "sip:1@CARRIER.example:5060;x=y", True),
    ("Carrier.EXAMPLE", "sip:1@carrier.example", True),
    ("carrier.example", "sip:1@a.carrier.example", False),
    ("carrier.example", "sip:1@xcarrier.example", False),
    ("carrier.example", "sip:carrier.example@other.example", False),
    ("'*.carrier.example'", "sip:1@a.carrier.example", True),
    ("'*.carrier.example'", "sip:1@a.b.carrier.example", True),
    ("'*.carrier.example'", "sip:1@carrier.example", False),
    ("'*.carrier.example'", "sip:1@xcarrier.example", False),
    ("[carrier.example, '*.carrier.example']", "sip:1@a.carrier.example", True),
    ("[carrier.example, '*.carrier.example']", "sips:1@carrier.example", True),
    ("[carrier.example, other.example]", "sip:1@third.example", False),
    ("127.0.0.10", "sip:1@127.0.0.10:5060", True),
    ("'2001:db8::1'", "sip:1@[2001:DB8::1]:5060", True),
    ("carrier.example", "tel:+1201", False),
]


@pytest.mark.parametrize(("key", "part"), [("from", "sender"), ("to", "receiver")])
@pytest.mark.parametrize(("domains", "uri", "hit"), DOMAINS)
def test_from_and_to_domain(key, part, domains, uri, hit):
    match = f"{{{key}_domain: {domains}}}"
    assert taken(match, seen(**{part: uri})) is hit
    others = {"sender", "receiver", "request"} - {part}
    assert taken(match, seen(**dict.fromkeys(others, uri))) is False


@pytest.mark.parametrize(("domains", "uri", "hit"), DOMAINS)
def test_request_domain(domains, uri, hit):
    assert taken(f"{{request_domain: {domains}}}", seen(request=uri)) is hit


def test_domain_of_what_has_none():
    sighting = seen(request="nonsense")
    sighting.message.headers["from"] = ["Bob"]
    for key in ("request_domain", "from_domain"):
        assert taken(f"{{{key}: '*.example'}}", sighting) is False


@pytest.mark.parametrize(
    ("match", "headers", "hit"),
    [
        ("{header: {X-Trunk: ^gold$}}", [("X-Trunk", "gold")], True),
        ("{header: {x-trunk: ^gold$}}", [("X-TRUNK", "gold")], True),
        ("{header: {X-Trunk: old}}", [("X-Trunk", "golden")], True),
        ("{header: {X-Trunk: ^gold$}}", [("X-Trunk", "golden")], False),
        ("{header: {X-Trunk: ''}}", [("X-Trunk", "any")], True),
        # A header that is not there matches nothing, not even the regexp that matches all.
        ("{header: {X-Trunk: '.*'}}", [], False),
        ("{header: {X-Trunk: ''}}", [], False),
        ("{header: {X-Trunk: gold}}", [("X-Trunk", "tin"), ("X-Trunk", "gold")], True),
        ("{header: {User-Agent: 'v[0-9]+'}}", [("User-Agent", "ua/v12")], True),
        ("{header: {s: hello}}", [("Subject", "hello")], True),
        ("{header: {Subject: hello}}", [("s", "hello")], True),
        ("{header: {X-N: 12}}", [("X-N", "3124")], True),
        ("{header: {X-A: '1', X-B: '2'}}", [("X-A", "1"), ("X-B", "2")], True),
        ("{header: {X-A: '1', X-B: '2'}}", [("X-A", "1"), ("X-B", "3")], False),
        ("{header: {X-A: '1', X-B: '2'}}", [("X-B", "2")], False),
    ],
)
def test_header(match, headers, hit):
    assert taken(match, seen(headers)) is hit


@pytest.mark.parametrize(
    ("number", "domain"), [(1, "a.example"), (1, "b.example"), (2, "a.example")]
)
def test_all_conditions_must_hold(number, domain):
    sighting = seen(
        packet=agent.HepPacket(version=3, time=1, capture_id=number), receiver=f"sip:1@{domain}"
    )
    both = (number, domain) == (1, "a.example")
    assert taken("{capture_id: 1, to_domain: a.example}", sighting) is both


@given(
    st.sampled_from(["a.example", "*.example", "b.a.example", "*.a.example"]),
    st.sampled_from(["a.example", "example", "b.a.example", ".example", "xa.example", ""]),
)
@settings(max_examples=50, deadline=None)
def test_in_domains(domain, host):
    """Against another way to say it: the host, or labels in front of what follows the star."""
    suffix = domain.removeprefix("*.")
    expected = host.endswith("." + suffix) if domain.startswith("*") else host == domain
    assert agent.in_domains(host, ["none.invalid", domain]) is expected
    assert agent.in_domains(host, []) is False


# Order and settings


def test_first_match_wins_and_the_main_options_are_last():
    text = """
- {name: one, match: {to_domain: a.example}, tenant: t1}
- {name: two, match: {to_domain: [a.example, b.example]}, tenant: t2}
- {name: three, match: {capture_id: 5}, action: ignore}
"""
    main = replace(PLAIN, tenant="main-tenant")
    table = rules(text, main)
    assert len(table) == 4
    routes = [
        agent.choose_route(table, seen(receiver=f"sip:1@{letter}.example")) for letter in "abc"
    ]
    assert [(route.name, route.tenant) for route in routes] == [
        ("one", "t1"),
        ("two", "t2"),
        ("main", "main-tenant"),
    ]
    ignored = agent.HepPacket(version=3, time=1, capture_id=5)
    assert agent.choose_route(table, seen(packet=ignored)).action == "ignore"


def test_a_rule_without_match_takes_all():
    table = rules("- {name: all}\n- {name: never}\n")
    assert agent.choose_route(table, seen()).name == "all"


def test_no_rule_without_conditions_is_a_fault_of_the_program():
    with pytest.raises(ValueError, match="last rule"):
        agent.choose_route((), seen())


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "---\n...\n", "[]", "\ufeff"])
def test_empty_file_is_the_main_options_only(text):
    table = rules(text)
    assert [rule.route.name for rule in table] == ["main"]
    assert agent.choose_route(table, seen()).name == "main"


MAIN = replace(
    PLAIN,
    tenant="t",
    product_tag="P",
    transaction_tags=("x", "y"),
    sip_local_domains=("sip.canyan.io",),
    account_tag_match_regexp="^(.+)$",
    rating_api_url="https://api.example",
)


def parts(route: agent.Route) -> dict[str, object]:
    """The settings of a route; a regexp as its pattern."""
    values = {name: getattr(route, name) for name in route.__dataclass_fields__}
    for name in ("account_match", "transaction_match"):
        if values[name] is not None:
            values[name] = values[name].pattern
    values["rewrite"] = tuple((x.field, x.match.pattern, x.replace) for x in route.rewrite)
    return values


INHERITED = {
    "name": "main",
    "action": "rate",
    "tenant": "t",
    "account": None,
    "destination_account": None,
    "local_domains": None,
    "account_match": "^(.+)$",
    "product_tag": "P",
    "tags": ("x", "y"),
    "destination": "to",
    "transaction_tag": "call-id",
    "rating_api_url": "https://api.example",
    "transaction_match": None,
    "rewrite": (),
    "carrier_ip": False,
}


def test_main_route():
    assert parts(agent.main_route(MAIN)) == INHERITED
    assert agent.main_route(PLAIN).account_match is None


@pytest.mark.parametrize("bad", ["(", "no group", "(?:x)"])
def test_main_route_with_a_bad_regexp(bad):
    with pytest.raises(agent.ConfigError) as caught:
        agent.main_route(replace(PLAIN, account_tag_match_regexp=bad))
    assert repr(bad) in str(caught.value) and "allowed" in str(caught.value)


SOURCES = ("history-info", "p-asserted-identity", "remote-party-id", "diversion", "from", "to")


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("name: wholesale", "name", "wholesale"),
        ("name: 12", "name", "12"),
        ("action: ignore", "action", "ignore"),
        ("action: rate", "action", "rate"),
        ("tenant: wholesale", "tenant", "wholesale"),
        ("tenant: 2001", "tenant", "2001"),
        ("account: from", "account", ("from",)),
        (
            "account: [header:X-Account, Request-URI]",
            "account",
            ("header:x-account", "request-uri"),
        ),
        (f"account: [{', '.join(SOURCES)}]", "account", SOURCES),
        ("destination_account: [header:X-B, to]", "destination_account", ("header:x-b", "to")),
        ("local_domains: A.example", "local_domains", ("a.example",)),
        (
            "local_domains: [a.example, '*.b.example']",
            "local_domains",
            ("a.example", "*.b.example"),
        ),
        ("local_domains: []", "local_domains", ()),
        ("account_match: '^0*([1-9].*)'", "account_match", "^0*([1-9].*)"),
        ("product_tag: SMS", "product_tag", "SMS"),
        ("tags: gold", "tags", ("gold",)),
        ("tags: [gold, 7]", "tags", ("gold", "7")),
        ("tags: []", "tags", ()),
        ("destination: request-uri", "destination", "request-uri"),
        ("destination: to", "destination", "to"),
        ("destination: rn", "destination", "rn"),
        ("carrier_ip: true", "carrier_ip", True),
        ("carrier_ip: no", "carrier_ip", False),
        ("rewrite: []", "rewrite", ()),
        (
            "rewrite: [{replace: '+', match: ^00, field: source}]",
            "rewrite",
            (("source", "^00", "+"),),
        ),
        (
            "rewrite:\n  - {field: account, match: '^(.)(.*)', replace: '\\2\\1'}\n"
            "  - field: destination_account\n    match: x\n    replace: ''",
            "rewrite",
            (("account", "^(.)(.*)", "\\2\\1"), ("destination_account", "x", "")),
        ),
        ("transaction_tag: call-id", "transaction_tag", "call-id"),
        ("transaction_tag: correlation-id", "transaction_tag", "correlation-id"),
        ("transaction_tag: header:X-CID", "transaction_tag", "header:X-CID"),
        ("rating_api_url: http://r.example:8080", "rating_api_url", "http://r.example:8080"),
        ("rating_api_url: https://r.example/a/", "rating_api_url", "https://r.example/a"),
        ("rating_api_url: 'http://[::1]:80'", "rating_api_url", "http://[::1]:80"),
    ],
)
def test_every_setting(written, key, value):
    """What a rule sets, and that it inherits all else from the main options."""
    expected = {**INHERITED, "name": "line 2", key: value}
    assert parts(first(f"\n- {written}\n", MAIN)) == expected


def test_a_part_as_transaction_tag():
    written = "transaction_tag: {match: '^(.+)_b2b-1$', from: correlation-id}"
    part = {"transaction_tag": "correlation-id", "transaction_match": "^(.+)_b2b-1$"}
    assert parts(first(f"\n- {written}\n", MAIN)) == {**INHERITED, "name": "line 2", **part}


@pytest.mark.parametrize(
    ("written", "ties"),
    [
        ("call-id", False),
        ("correlation-id", True),
        ("header:X", True),
        ("{from: call-id, match: (.+)}", True),
    ],
)
def test_which_routes_tie_legs(written, ties):
    assert first(f"- transaction_tag: {written}").ties is ties


@pytest.mark.parametrize(
    "text",
    [
        "- tenant: x",
        "- {name: a, account: [from, header:X], account_match: '^(a|b)', tags: [x, 'y, z']}",
        "- {local_domains: [], destination: rn, carrier_ip: true}",
        "- {transaction_tag: {from: header:X, match: 'icid-value=\"?([^\";]+)'}}",
        "- {rewrite: [{field: source, match: '^(0)0', replace: '\\0+\\1\"'}, "
        "{field: account, match: é, replace: ''}]}",
    ],
)
def test_a_route_is_the_same_after_it_was_packed(text):
    route = first(text, MAIN)
    assert parts(agent.unpack_route(route.packed)) == parts(route)


def test_a_rule_without_a_name_is_called_by_its_line():
    assert [rule.route.name for rule in rules("- tenant: a\n\n-\n  tenant: b\n")] == [
        "line 1",
        "line 4",
        "main",
    ]


def test_texts_are_taken_as_written():
    """YAML 1.1 would make 8, 750 and 1000 of these; a tenant 010 is none of them."""
    for written in ("010", "12:30", "1_000", "0x1F", "+5"):
        try:
            route = first(f"- {{tenant: {written}, tags: [{written}]}}")
        except agent.ConfigError as error:
            assert "allowed" in str(error)
            continue
        assert (route.tenant, route.tags) == (written, (written,))


# Account sources

FOUR_ENTRIES = [
    ("History-Info", "<sip:one@h>;index=1, <sip:two@h>;index=1.1"),
    ("History-Info", '"a, b" <sip:three@h?Reason=x%2cy>;index=1.2,\r\n <sip:four@h>;index=1.3'),
]


def account(
    sources: str | Iterable[str],
    headers: Headers = (),
    *,
    main: agent.Settings = PLAIN,
    more: str = "",
    callee: bool = False,
    **ends: str,
) -> str:
    """The account that a rule with these sources finds."""
    key = "destination_account" if callee else "account"
    listed = sources if isinstance(sources, str) else ", ".join(sources)
    route = first(f"- {{{key}: [{listed}]{more}}}", main)
    return agent.resolve_account(route, main, message(headers, **ends), callee)


@pytest.mark.parametrize(
    ("index", "found"), [(0, "four"), (1, "three"), (2, "two"), (3, "one"), (4, ""), (9, "")]
)
@pytest.mark.parametrize("callee", [False, True])
def test_history_info_is_counted_from_the_last(index, found, callee):
    main = replace(PLAIN, sip_header_history_info_index=index)
    assert account("history-info", FOUR_ENTRIES, main=main, callee=callee) == found


def test_history_info_under_another_name():
    main = replace(PLAIN, sip_header_history_info="X-History")
    headers = [("X-History", "<sip:one@h>, <sip:two@h>"), *FOUR_ENTRIES]
    assert account("history-info", headers, main=main) == "one"
    assert (
        account("history-info", FOUR_ENTRIES, main=replace(main, sip_header_history_info="")) == ""
    )


def test_history_info_of_one_entry_tells_no_forwarder():
    assert account("history-info", [("History-Info", "<sip:one@h>")]) == ""


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1000", "1000"),
        ('"1000"', "1000"),
        ("acme:1001", "acme:1001"),  # looks like a URI of some scheme, and is none
        ("<sip:1000@h>", "1000"),
        ('"Bob, <x>" <sip:1000@h>;tag=1', "1000"),
        ("sip:1000@h;user=phone", "1000"),
        ("<tel:+1-201-555>", "+1201555"),
        ("<sip:j%C3%B6rg@h>", "jörg"),
        ("jörg", "jörg"),
        ("", ""),
    ],
)
def test_header_source(value, found):
    assert account("header:X-Account", [("x-account", value)]) == found
    assert account("header:X-Account", [("X-Other", value)]) == ""


def test_header_source_takes_the_first_line():
    assert account("header:X-A", [("X-A", "1"), ("X-A", "2")]) == "1"


def test_header_source_of_octets_that_are_no_utf_8():
    sighted = message([("X-A", "x")])
    assert sighted.header("x-a") == ["x"]
    sighted.headers["x-a"] = ["caf\xe9"]
    route = first("- {account: header:X-A}".replace("header:X-A", "'header:X-A'"))
    assert agent.resolve_account(route, PLAIN, sighted, False) == "caf%E9"


PAI, RPID, DIVERSION = "P-Asserted-Identity", "Remote-Party-ID", "Diversion"
AT = "<sip:{}@{}>"


@pytest.mark.parametrize(
    ("source", "headers", "found"),
    [
        ("p-asserted-identity", [(PAI, "<sip:1@h>")], "1"),
        ("p-asserted-identity", [(PAI, '"B" <sip:1@h>')], "1"),
        ("p-asserted-identity", [(PAI, "<tel:+1-2>")], "+12"),
        # One sip and one tel URI (RFC 3325 section 9.1), in one line or in two, either first.
        ("p-asserted-identity", [(PAI, "<tel:+1-2>, <sip:1@h>")], "1"),
        ("p-asserted-identity", [(PAI, "<sip:1@h>, <tel:+1-2>")], "1"),
        ("p-asserted-identity", [(PAI, "<tel:+1-2>"), (PAI, "<sip:1@h>")], "1"),
        ("p-asserted-identity", [(PAI, "<sip:h>, <tel:+1-2>")], "+12"),
        ("p-asserted-identity", [(PAI, "nonsense"), (PAI, "<sip:1@h>")], "1"),
        ("p-asserted-identity", [(PAI, '"open <sip:1@h>')], ""),
        ("p-asserted-identity", [], ""),
        ("remote-party-id", [(RPID, '"B" <sip:1@h>;party=calling;privacy=off')], "1"),
        ("remote-party-id", [(RPID, "<sip:1@h>, <sip:2@h>")], "1"),
        ("remote-party-id", [], ""),
        # Topmost is the most recent (RFC 5806); no earlier one stands in for it.
        ("diversion", [(DIVERSION, "<sip:1@h>;reason=busy"), (DIVERSION, "<sip:2@h>")], "1"),
        ("diversion", [(DIVERSION, "<sip:1@h>,<sip:2@h>")], "1"),
        ("diversion", [(DIVERSION, "<sip:h>,<sip:2@h>")], ""),
        ("diversion", [(DIVERSION, "<tel:+1-2>,<sip:2@h>")], "+12"),
        ("diversion", [], ""),
        ("from", [], "2000"),
        ("to", [], "2001"),
        ("request-uri", [], "2002"),
    ],
)
@pytest.mark.parametrize("callee", [False, True])
def test_sources(source, headers, found, callee):
    assert account(source, headers, callee=callee) == found


def test_sources_in_their_order():
    sources = ["diversion", "header:X-A", "p-asserted-identity", "from"]
    headers = [(PAI, "<sip:pai@h>"), ("X-A", "xa"), (DIVERSION, "<sip:div@h>")]
    assert account(sources, headers) == "div"
    assert account(sources, headers[:2]) == "xa"
    assert account(sources, headers[:1]) == "pai"
    assert account(sources) == "2000"
    assert account(sources, sender="sip:h") == ""


LOCAL = ", local_domains: [sip.canyan.io, '*.local']"


@pytest.mark.parametrize(
    ("sources", "headers", "ends", "found"),
    [
        ("from", [], {}, "2000"),
        ("from", [], {"sender": "sip:1@x.local"}, "1"),
        ("from", [], {"sender": "sip:1@else.example"}, ""),
        ("from, to", [], {"sender": "sip:1@else.example"}, "2001"),
        ("request-uri", [], {}, ""),
        ("p-asserted-identity", [(PAI, AT.format("1", "sip.canyan.io"))], {}, "1"),
        ("p-asserted-identity", [(PAI, AT.format("1", "else"))], {}, ""),
        ("p-asserted-identity", [(PAI, "<sip:1@else>"), (PAI, "<sip:2@a.local>")], {}, "2"),
        ("diversion", [(DIVERSION, "<sip:1@else>"), (DIVERSION, "<sip:2@a.local>")], {}, ""),
        # A header that the operator named is trusted as it is.
        ("header:X-A", [("X-A", "<sip:1@else>")], {}, "1"),
    ],
)
def test_local_domains_of_a_rule(sources, headers, ends, found):
    assert account(sources, headers, more=LOCAL, **ends) == found


def test_local_domains_of_the_main_options_do_not_bind_the_sources_of_a_rule():
    main = replace(PLAIN, sip_local_domains=("sip.canyan.io",))
    assert account("from", main=main, sender="sip:1@else.example") == "1"


def test_local_domains_of_a_rule_replace_those_of_the_main_options():
    main = replace(PLAIN, sip_local_domains=("sip.canyan.io",))
    route = first("- {local_domains: other.example}", main)
    for sender, found in [("sip:1@other.example", "1"), ("sip:2@sip.canyan.io", "")]:
        assert agent.resolve_account(route, main, message(sender=sender), False) == found


@pytest.mark.parametrize(
    ("pattern", "user", "found"),
    [
        ("^0*([1-9].*)$", "00391234", "391234"),
        ("^0*([1-9].*)$", "bob", "bob"),  # no match: the tag as it is
        ("(39)?1234", "1234", ""),  # a match whose group took no part
        ("^x(.*)$", "x", ""),
        ("39(\\d+)", "+39123", "123"),
        ("(a)(b)", "ab", "a"),
    ],
)
def test_account_match(pattern, user, found):
    assert account("from", more=f", account_match: '{pattern}'", sender=f"sip:{user}@h") == found
    main = replace(PLAIN, account_tag_match_regexp=pattern, sip_local_domains=("h",))
    for callee, part in [(False, "sender"), (True, "receiver")]:
        sighted = message(**{part: f"sip:{user}@h"})
        assert agent.resolve_account(agent.main_route(main), main, sighted, callee) == found


# Patterns that take time exponential in the text with Python's re: 22 characters took seconds.
CATASTROPHES = [
    ("(a+)+$", "a" * 60_000 + "!"),
    ("(x|x)*y", "x" * 60_000),
    ("(.*)*(.*)*=(.*)", "q" * 60_000),
    ("^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 60_000),
]


@pytest.mark.parametrize(("pattern", "text"), CATASTROPHES)
def test_an_operators_regexp_takes_linear_time(pattern, text):
    start = time.process_time()
    rule = first(f"- {{account: ['header:X'], account_match: '{pattern}'}}")
    for size in (30, agent.MAX_TEXT):
        found = agent.resolve_account(rule, PLAIN, message([("X", text[-size:])]), False)
        assert found == text[-size:]
    headers = [("X", text)] * 20
    rules = agent.parse_routes(
        f"- match: {{header: {{X: '{pattern}'}}}}\n  tenant: other\n", "r", PLAIN
    )
    assert agent.choose_route(rules, seen(headers)).tenant == "default"
    # It takes 0.01 s; the time is the processor's, so a busy machine does not count.
    assert time.process_time() - start < 1


def test_regexps_are_those_of_the_former_agent():
    """RE2, as Go has it: what needs backtracking is refused with the configuration."""
    for pattern in ("(?=x)(a)", "(a)\\1", "(a{1001})"):
        assert "RE2" in complaint(f"- account_match: '{pattern}'\n")
        assert "RE2" in complaint(f"- match: {{header: {{X: '{pattern}'}}}}\n")
    assert account("from", more=", account_match: '^[[:digit:]]{2}(?P<rest>.*)$'") == "00"


def test_an_account_that_is_too_long_is_none():
    """Cut, it might be another's; so the next source has its turn."""
    long = "1" * (agent.MAX_TEXT + 1)
    assert account(["header:X", "from"], [("X", long)]) == "2000"
    assert account(["header:X", "from"], [("X", f"<sip:{long}@h>")]) == "2000"
    assert account(
        ["p-asserted-identity", "from"], [("P-Asserted-Identity", f"<sip:{long}@h>")]
    ) == ("2000")
    assert account("header:X", [("X", long[1:])]) == long[1:]


def test_of_many_values_the_first_are_looked_at():
    many = ", ".join(["<sip:h>"] * agent.MAX_VALUES + ["<sip:7@h>"])
    assert account("p-asserted-identity", [("P-Asserted-Identity", many)]) == ""
    assert account("p-asserted-identity", [("P-Asserted-Identity", many[9:])]) == "7"


def test_a_transaction_tag_that_is_too_long_is_the_call_id():
    route = first("- transaction_tag: header:X")
    for text, tag in (("x" * agent.MAX_TEXT, "x" * agent.MAX_TEXT), ("x" * 2_000, "1@h")):
        assert agent.transaction_tag(route, seen([("X", text)])) == tag


@pytest.mark.parametrize("over", [1, 100, 60_000])
def test_the_transaction_tag_of_a_long_call_id_is_its_digest(over):
    """Nobody may be able to choose a Call-ID that is not charged (rule 4)."""

    def tag(call_id: str) -> str:
        payload = sip_request(
            "INVITE", "sip:2001@h", call_id=call_id, from_tag="a", cseq=1, branch="z9hG4bK1"
        )
        parsed = agent.parse_sip(payload)
        assert parsed is not None
        sighting = agent.Sighting(agent.HepPacket(version=3, time=1), parsed)
        return agent.transaction_tag(agent.main_route(PLAIN), sighting)

    longest = "x" * agent.MAX_TEXT
    assert tag(longest) == longest
    # The ^ that no Call-ID holds is escaped as one that a sender wrote.
    assert re.fullmatch("x{64}\\^5e[0-9a-f]{32}", tag(longest + "y" * over))
    assert tag(longest + "y" * over) == tag(longest + "y" * over)
    assert tag(longest + "y" * over) != tag(longest + "z" * over)


NUMBERS = [
    ("sip:+1-201-555@h;user=phone", "+1201555"),
    ("sip:%2B1(201)%35.55@h;user=phone", "+1201555"),
    ("tel:+1-201-555", "+1201555"),
    ("tel:+1-201-555;ext=7", "+1201555"),
    ("sip:%2b1201555@h", "+1201555"),
    ("sip:%32000@h", "2000"),
    # Without user=phone it is a name, and a name keeps its dots.
    ("sip:j.doe-1@h", "j.doe-1"),
    ("sip:+1-201@h", "+1-201"),
]


@pytest.mark.parametrize(("uri", "number"), NUMBERS)
@pytest.mark.parametrize("part", ["from", "to", "request-uri"])
def test_numbers_are_told_as_rates_read_them(part, uri, number):
    """Rule 5: as text, for source, destination and accounts alike."""
    ends = {"from": "sender", "to": "receiver", "request-uri": "request"}
    sighted = message(**{ends[part]: uri})
    scheme = uri.partition(":")[0]
    told = f"{scheme}:{number}" + ("" if scheme == "tel" else "@h")
    assert agent.party_text(part, sighted) == told
    assert account(part, **{ends[part]: uri}) == number
    assert account(part, callee=True, **{ends[part]: uri}) == number


@pytest.mark.parametrize(("uri", "number"), NUMBERS)
@pytest.mark.parametrize(
    "name", ["P-Asserted-Identity", "Remote-Party-ID", "Diversion", "X-Account"]
)
def test_numbers_of_headers_are_accounts_as_rates_read_them(name, uri, number):
    source = "header:X-Account" if name == "X-Account" else name.lower()
    assert account(f"'{source}'", [(name, f'"A" <{uri}>;x=y')]) == number


def test_a_party_that_is_no_uri_is_not_told():
    sighted = message(sender="2000", receiver="nobody", request="x")
    assert [agent.party_text(part, sighted) for part in ("from", "to", "request-uri")] == [""] * 3


def test_account_match_of_no_account():
    assert account("diversion", more=", account_match: '^(.*)$'") == ""


# The former agent's order, where no route names sources

HERE = ("sip.canyan.io",)
HISTORY = ("History-Info", "<sip:hi@else>, <sip:now@else>")
CALLER = ("X-Caller", "<sip:hdr@else>")
PAI_HERE, PAI_ELSE = (PAI, "<sip:pai@sip.canyan.io>"), (PAI, "<sip:pai@else>")
FROM_HERE, FROM_ELSE = "sip:frm@sip.canyan.io", "sip:frm@else"


@pytest.mark.parametrize(
    ("headers", "sender", "local", "found"),
    [
        ([HISTORY, CALLER, PAI_HERE], FROM_HERE, HERE, "hi"),
        ([CALLER, PAI_HERE], FROM_HERE, HERE, "hdr"),
        ([PAI_HERE], FROM_HERE, HERE, "pai"),
        ([PAI_HERE], FROM_ELSE, HERE, "pai"),
        ([PAI_ELSE], FROM_HERE, HERE, "frm"),
        ([PAI_ELSE], FROM_ELSE, HERE, ""),
        ([], FROM_HERE, HERE, "frm"),
        ([], FROM_ELSE, HERE, ""),
        # Without local domains P-Asserted-Identity is trusted and From is not.
        ([PAI_ELSE], FROM_HERE, (), "pai"),
        ([], FROM_HERE, (), ""),
        ([HISTORY], FROM_HERE, (), "hi"),
        ([("History-Info", "<sip:now@else>"), PAI_HERE], FROM_HERE, HERE, "pai"),
        ([("X-Caller", ""), PAI_HERE], FROM_HERE, HERE, "pai"),
        ([], "tel:+1201", HERE, ""),
        ([(PAI, "<sip:pai@a.local>")], FROM_HERE, ("*.local",), "pai"),
    ],
)
def test_caller_as_the_former_agent_had_it(headers, sender, local, found):
    main = replace(PLAIN, sip_header_caller="X-Caller", sip_local_domains=local)
    sighted = message(headers, sender=sender)
    assert agent.resolve_account(agent.main_route(main), main, sighted, False) == found


@pytest.mark.parametrize(
    ("headers", "receiver", "local", "found"),
    [
        ([("X-Callee", "<sip:hdr@else>")], "sip:to@sip.canyan.io", HERE, "hdr"),
        ([("X-Callee", "hdr")], "sip:to@else", (), "hdr"),
        ([], "sip:to@sip.canyan.io", HERE, "to"),
        ([], "sip:to@SIP.Canyan.io:5060", HERE, "to"),
        ([], "sip:to@else", HERE, ""),
        ([], "sip:to@sip.canyan.io", (), ""),
        ([HISTORY, PAI_HERE, CALLER], "sip:to@else", HERE, ""),
    ],
)
def test_callee_as_the_former_agent_had_it(headers, receiver, local, found):
    main = replace(
        PLAIN, sip_header_caller="X-Caller", sip_header_callee="X-Callee", sip_local_domains=local
    )
    sighted = message(headers, receiver=receiver)
    assert agent.resolve_account(agent.main_route(main), main, sighted, True) == found


@pytest.mark.parametrize("callee", [False, True])
def test_a_header_without_a_name_is_no_account(callee):
    """Options that name no header must not make one of a line that begins with a colon."""
    sighted = message(
        [("", "<sip:victim@else>"), ("", "victim")], sender=FROM_ELSE, receiver=FROM_ELSE
    )
    assert agent.resolve_account(agent.main_route(PLAIN), PLAIN, sighted, callee) == ""


# Transaction tags


@pytest.mark.parametrize(
    ("source", "headers", "correlation", "tag"),
    [
        ("call-id", [("X-CID", "x")], "corr", "1@h"),
        ("correlation-id", [("X-CID", "x")], "corr", "corr"),
        ("correlation-id", [("X-CID", "x")], "", "1@h"),
        ("header:X-CID", [("x-cid", "x")], "corr", "x"),
        ("header:X-CID", [("X-CID", "x"), ("X-CID", "y")], "corr", "x"),
        ("header:X-CID", [("X-CID", "")], "corr", "1@h"),
        ("header:X-CID", [], "corr", "1@h"),
        ("header:X-CID", [("X-CID", "a b^")], "", "a^20b^5e"),
        ("correlation-id", [], "\xe9", "^e9"),
    ],
)
def test_transaction_tag(source, headers, correlation, tag):
    route = first(f"- {{transaction_tag: '{source}'}}")
    packet = agent.HepPacket(version=3, time=1, correlation_id=correlation)
    assert agent.transaction_tag(route, seen(headers, packet=packet)) == tag


PCV = "P-Charging-Vector"
SESSION = "ab30317f1a784dc48ff824d0d3715d86"


@pytest.mark.parametrize(
    ("source", "match", "headers", "tag"),
    [
        ("call-id", "^(.+)@h$", [], "1"),
        ("call-id", "^(.+?)(?:_b2b-1)*$", [], "1@h"),
        (f"header:{PCV}", 'icid-value="?([^";]+)', [(PCV, 'icid-value="x;y=1"')], "x"),
        (f"header:{PCV}", 'icid-value="?([^";]+)', [(PCV, "term-ioi=a;icid-value=x;b=c")], "x"),
        ("header:Session-ID", "^([0-9a-f]{32})", [("Session-ID", f"{SESSION};remote=0")], SESSION),
        ("header:X", "(a b)", [("X", "a b^")], "a^20b"),
        ("correlation-id", "^c(.*)", [], "orr"),
        # What does not match, or is not there, is the Call-ID.
        ("call-id", "^(2)", [], "1@h"),
        ("call-id", "^1()", [], "1@h"),
        ("call-id", "^1|(2)", [], "1@h"),
        (f"header:{PCV}", "icid-value=(.+)", [(PCV, "orig-ioi=a")], "1@h"),
        ("header:X", "(.*)", [], "1@h"),
        ("header:X", "(.*)", [("X", "x" * (agent.MAX_TEXT + 1))], "1@h"),
        ("correlation-id", "^(x)", [], "1@h"),
    ],
)
def test_a_part_of_what_ties(source, match, headers, tag):
    route = first(f"- transaction_tag: {{from: '{source}', match: '{match}'}}")
    packet = agent.HepPacket(version=3, time=1, correlation_id="corr")
    assert agent.transaction_tag(route, seen(headers, packet=packet)) == tag


def test_a_part_of_a_long_call_id_is_found():
    """Its digest is another one for each leg."""
    route = first("- transaction_tag: {from: call-id, match: '^(x{9})x*_b2b-1$'}")
    payload = sip_request(
        "INVITE",
        "sip:1@h",
        call_id="x" * agent.MAX_TEXT + "_b2b-1",
        from_tag="a",
        cseq=1,
        branch="z9hG4bK1",
    )
    parsed = agent.parse_sip(payload)
    assert parsed is not None
    sighting = agent.Sighting(agent.HepPacket(version=3, time=1), parsed)
    assert agent.transaction_tag(route, sighting) == "x" * 9


# Numbers


def rewriting(*steps: tuple[str, str, str]) -> agent.Route:
    lines = [f"{{field: {x}, match: '{y}', replace: '{z}'}}" for x, y, z in steps]
    return first(f"- rewrite: [{', '.join(lines)}]")


PLUS = ("destination", "^00", "+")


@pytest.mark.parametrize(
    ("steps", "told", "right"),
    [
        ([PLUS], "sip:0039347@h", "sip:+39347@h"),
        ([PLUS], "sips:0039347@[2001:db8::1]", "sips:+39347@[2001:db8::1]"),
        ([PLUS], "tel:0039347", "tel:+39347"),
        ([PLUS], "sip:39347@h", "sip:39347@h"),
        ([PLUS], "sip:@h", "sip:@h"),
        # A host is no number, and what is no address stays.
        ([PLUS], "sip:00host.example", "sip:00host.example"),
        ([("destination", "^", "+")], "urn:", "urn:"),
        ([("destination", "^", "+")], "", ""),
        ([("source", "^00", "+")], "sip:0039347@h", "sip:0039347@h"),
        # In order; each finds what the one before left, and replaces it once.
        ([PLUS, ("destination", "^0", "+39")], "sip:0039@h", "sip:+39@h"),
        ([PLUS, ("destination", "^0", "+39")], "sip:06123@h", "sip:+396123@h"),
        ([("destination", "0", "x")], "sip:700800@h", "sip:7x0800@h"),
        ([("destination", "^9(.)", r"\1")], "sip:9123@h", "sip:123@h"),
        ([("destination", "^(1)(2)?", r"\2\10[\0]")], "sip:13@h", "sip:10[1]3@h"),
        ([("destination", "^.*$", "")], "sip:1@h", "sip:@h"),
        ([("destination", "h$", "x")], "sip:1@h", "sip:1@h"),
    ],
)
def test_rewritten_numbers(steps, told, right):
    assert agent.rewritten_party(rewriting(*steps), "destination", told) == right


def test_a_number_without_rewrite_is_as_it_was():
    assert agent.rewritten_party(first("- name: x"), "destination", "sip:00@h") == "sip:00@h"


def test_a_long_number_is_rewritten_and_cut():
    """Nobody may write so long a number that its rate is another."""
    text = agent.uri_text(agent.parse_uri(f"sip:00{'1' * 2_000}@h"))
    assert len(text) == agent.MAX_TEXT and "@" not in text
    doubled = [("destination", "^.*$", r"\0\0")] * 40
    for steps in ([PLUS], [PLUS, *doubled]):
        told = agent.rewritten_party(rewriting(*steps), "destination", text)
        assert told.startswith("sip:+11") and len(told) <= agent.MAX_TEXT
    assert len(told) == agent.MAX_TEXT


@pytest.mark.parametrize(
    ("field", "steps", "right"),
    [
        ("account", [("account", "^39", "")], "347"),
        ("account", [("destination_account", "^39", "")], "39347"),
        ("account", [("source", "^39", "")], "39347"),
        ("destination_account", [("destination_account", "^(39)", r"+\1-")], "+39-347"),
        # The account is what account_match found of it, and "" is none.
        ("account", [("account", "7$", "")], "3934"),
        ("account", [("account", ".*", "")], ""),
        ("account", [("account", "^.*$", r"\0\0\0\0")] * 6, ""),
    ],
)
def test_rewritten_accounts(field, steps, right):
    route = replace(rewriting(*steps), **{field: ("from",)})
    callee = field == "destination_account"
    sighted = message(sender="sip:39347@h")
    assert agent.resolve_account(route, PLAIN, sighted, callee) == right


def test_account_match_comes_before_rewrite():
    route = first(
        "- {account: from, account_match: '^00(.*)', "
        "rewrite: [{field: account, match: '^', replace: +}]}"
    )
    assert agent.resolve_account(route, PLAIN, message(sender="sip:0039@h"), False) == "+39"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("tel:+1-201-555-0123;npdi;rn=+1-202-555-0199", "tel:+12025550199"),
        ("sip:+12015550123;npdi;rn=+12025550199@h;user=phone", "sip:+12025550199@h"),
        ("sip:+12015550123;rn=+1(202)555.0199;npdi@h", "sip:+12025550199@h"),
        ("sip:+12015550123@h:5060;NPDI;RN=2025550199;user=phone", "sip:2025550199@h"),
        ("sip:399@h;rn=C60399", "sip:C60399@h"),
        ("sip:1;rn=2;rn-context=+1;rn=3@h", "sip:2@h"),
        # Looked up and not ported; not looked up; what is no routing number.
        ("sip:+12015550123;npdi@h;user=phone", "sip:+12015550123@h"),
        ("tel:+1-201-555-0123", "tel:+12015550123"),
        ("sip:1@h;rn=", "sip:1@h"),
        ("sip:1@h;rn=zone", "sip:1@h"),
        ("sip:1@h;xrn=2", "sip:1@h"),
        ("sip:1@h?Subject=;rn=2", "sip:1@h"),
        ("nonsense", ""),
    ],
)
def test_routing_number(uri, told):
    """RFC 4694: rn= is where the number was ported to, npdi that it was looked up."""
    assert agent.party_text("rn", message(request=uri)) == told


# What is reported: a call through a proxy, copy by copy

PHONE, EDGE, CORE, GONE, CARRIER = [(f"192.0.2.{number}", 5060) for number in range(1, 6)]
Address = tuple[str, int]


def sent(
    source: Address,
    target: Address,
    hops: int = 1,
    status: int = 0,
    omit: Iterable[int] = (),
    capture_id: int = 1,
    **more: Any,
) -> pure.Arrival:
    """An INVITE or a reply to it, between two addresses; the top branch names who is asked."""
    asked = source if status else target
    vias = [(f"10.0.0.{hop}:5060", f"z9hG4bK-{hop}") for hop in range(hops - 1, 0, -1)]
    vias.insert(0, (f"10.0.0.{hops}:5060", f"z9hG4bK-{hops}-{asked[0]}"))
    if hops > 1:
        vias[-1] = ("10.0.0.1:5060", f"z9hG4bK-1-{EDGE[0]}")
    common: dict[str, Any] = {"call_id": "1@h", "from_tag": "a", "cseq": 1, "branch": ""}
    common |= {"from_uri": more.pop("from_uri", "sip:002000@sip.canyan.io"), "vias": vias}
    if status:
        payload = hepbuild.sip_reply(status, to_tag="b", **common, **more)
    else:
        payload = sip_request("INVITE", more.pop("request", "sip:0039@h"), **common, **more)
    # All within the reorder window.
    packet: dict[str, Any] = {"omit": omit, "capture_id": capture_id}
    frame = hepbuild.hep3(payload, src=source, dst=target, time_us=TIME, **packet)
    return pure.Arrival(1.0, frame)


TIME = 1_795_600_800_000_000


def begun(
    routes: str, arrivals: Iterable[pure.Arrival], restart: int = 0, **options: Any
) -> dict[str, Any]:
    """The body of the one begin that these messages bring about."""
    core = pure.Core(pure.settings(**options), routes, TIME / 1_000_000, restart)
    bodies = [event.body for event in core.play(arrivals, 5.0) if event.kind == "begin"]
    assert len(bodies) == 1
    body: dict[str, Any] = json.loads(bodies[0])
    return body


CARRIER_IP = "- carrier_ip: true\n"
IN, OUT = sent(PHONE, EDGE), sent(EDGE, CARRIER, 2)
ANSWERS = [sent(CARRIER, EDGE, 2, 200), sent(EDGE, PHONE, 1, 200)]
FAILED = [sent(EDGE, GONE, 2), sent(GONE, EDGE, 2, 503)]
THROUGH = [sent(EDGE, CORE, 2), sent(CORE, CARRIER, 3)]


@pytest.mark.parametrize(
    ("arrivals", "found"),
    [
        ([IN, OUT, *ANSWERS], CARRIER),
        ([IN, OUT, OUT, IN, *ANSWERS], CARRIER),
        ([OUT, IN, *ANSWERS], CARRIER),
        # Another carrier refused, or was silent; the latter is known by the answer only.
        ([IN, *FAILED, OUT, *ANSWERS], CARRIER),
        ([IN, *FAILED, OUT, ANSWERS[1]], CARRIER),
        ([IN, FAILED[0], OUT, *ANSWERS], CARRIER),
        ([IN, FAILED[0], OUT, ANSWERS[1]], None),
        # Two proxies: the one that it leaves last.
        ([IN, *THROUGH, ANSWERS[1]], CARRIER),
        ([IN, *reversed(THROUGH), ANSWERS[1]], CARRIER),
        ([IN, *THROUGH, sent(CARRIER, CORE, 3, 200), sent(CORE, EDGE, 2, 200)], CARRIER),
        # A proxy with an address for each side, and one that hides the hops below it.
        ([IN, sent(CORE, CARRIER, 2), ANSWERS[1]], CARRIER),
        ([IN, sent(EDGE, CARRIER, 1), ANSWERS[1]], CARRIER),
        # The mirror shows one side only, or the sender does not say where to.
        ([IN, *ANSWERS], None),
        ([OUT, *ANSWERS], None),
        ([IN, sent(EDGE, CARRIER, 2, omit=[4]), *ANSWERS], None),
    ],
)
def test_carrier_ip(arrivals, found):
    for restart in (0, 1):
        body = begun(CARRIER_IP, arrivals, restart)
        assert body.pop("carrier_ip", None) == (found and found[0])
        # Whatever it is, all else is as without it.
        assert body == begun("- name: other\n", arrivals)


def test_carrier_ip_is_told_where_the_callers_route_says_so():
    """Copies that leave the proxy may be of another rule."""
    rule = "- {match: {source_network: %s}, carrier_ip: true}\n"
    for order in ([IN, OUT], [OUT, IN]):
        assert begun(rule % PHONE[0], [*order, *ANSWERS])["carrier_ip"] == CARRIER[0]
        assert "carrier_ip" not in begun(rule % EDGE[0], [*order, *ANSWERS])


def test_carrier_ip_of_very_many_copies_is_bounded():
    copies = [sent(EDGE, (f"198.51.100.{number}", 5060), 2) for number in range(200)]
    for routes, kept in ((CARRIER_IP, agent.MAX_INVITE_COPIES), ("- name: other\n", 0)):
        core = pure.Core(pure.settings(), routes)
        core.play([IN, *copies], 0.1)
        ((attempt,),) = [call.attempts for call in core.calls()]
        assert len(attempt.sent_to) == kept


def test_carrier_ip_of_two_tenants():
    """A retail and a wholesale proxy in one path: each has a carrier of its own."""
    routes = "- {match: {capture_id: 2}, tenant: wholesale, carrier_ip: true}\n" + CARRIER_IP
    retail = [sent(PHONE, EDGE, capture_id=1), sent(EDGE, CORE, 2, capture_id=1)]
    wholesale = [sent(EDGE, CORE, 2, capture_id=2), sent(CORE, CARRIER, 3, capture_id=2)]
    for arrivals in ([*retail, *wholesale], [*wholesale, *retail]):
        core = pure.Core(pure.settings(), routes)
        events = core.play([*arrivals, ANSWERS[1]], 5.0)
        bodies = [json.loads(event.body) for event in events if event.kind == "begin"]
        found = {body["tenant"]: body.get("carrier_ip") for body in bodies}
        assert found == {"default": CORE[0], "wholesale": CARRIER[0]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("opensips-3.6/transaction-tcp/01_answered_caller_bye", "127.0.0.30"),
        ("opensips-3.6/transaction-tcp/09b_fork_serial_503", "127.0.0.31"),
        ("opensips-3.6/dialog-udp/09b_fork_serial_503", "127.0.0.31"),
        ("kamailio-5.6/transaction-udp/09b_fork_serial_503", "127.0.0.31"),
        ("kamailio-5.6/core-udp/14_ipv6", "::1"),
        ("opensips-3.6/requests-only-tcp/01_answered_caller_bye", None),
    ],
)
def test_carrier_ip_of_captures(name, found):
    """In the serial fork the callee at 127.0.0.30 answers 503, and 127.0.0.31 the call."""
    events = read_capture(str(harness.SELECTION / f"{name}.hepl"))
    arrivals = [pure.Arrival(time, frame) for time, frame in frames(events)]
    assert begun(CARRIER_IP, arrivals).get("carrier_ip") == found


REWRITE = r"""
- rewrite:
  - {field: source, match: ^00, replace: +}
  - {field: destination, match: ^00, replace: +}
  - {field: account, match: ^00, replace: ''}
"""


@pytest.mark.parametrize("restart", [0, 1])
def test_rewritten_numbers_are_reported(restart):
    to = [sent(PHONE, EDGE, to_uri="sip:0039@h"), *ANSWERS]
    body = begun(REWRITE, to, restart)
    assert body["source"] == "sip:+2000@sip.canyan.io"
    assert body["destination"] == "sip:+39@h"
    assert body["account_tag"] == "2000"
    plain = begun("", to, restart)
    assert (plain["source"], plain["account_tag"]) == ("sip:002000@sip.canyan.io", "002000")
    changed = {"source", "destination", "account_tag"}
    assert {key: body[key] for key in body.keys() - changed} == {
        key: plain[key] for key in plain.keys() - changed
    }


def test_two_callers_of_one_branch_are_told_apart_though_rewritten_alike():
    """The answer says who pays, by the From as it was sent."""
    routes = REWRITE + "  - {field: source, match: '^.*$', replace: all}\n"
    invites = [sent(PHONE, EDGE), sent(PHONE, EDGE, from_uri="sip:7@sip.canyan.io")]
    answers = [ANSWERS[1], sent(EDGE, PHONE, 1, 200, from_uri="sip:7@sip.canyan.io")]
    for answer, account in zip(answers, ("2000", "7"), strict=True):
        for restart in (0, 1):
            body = begun(routes, [*invites, answer], restart)
            assert (body["account_tag"], body["source"]) == (account, "sip:all@sip.canyan.io")


def test_a_record_of_a_call_has_what_the_api_gets():
    table = agent.RecordedTable(pure.settings(), agent.parse_routes(REWRITE, "r", pure.settings()))
    for arrival in (IN, ANSWERS[1]):
        packet = agent.decode_hep(arrival.frame, 0)
        parsed = agent.parse_sip(packet.payload, packet.time)
        assert parsed is not None
        table.handle(agent.Sighting(packet, parsed), 1.0)
    (record,) = table.unfinished()
    assert (record.source, record.account_tag) == ("sip:+2000@sip.canyan.io", "2000")


def test_the_proxy_looks_up_the_routing_number():
    """As an account that is missing, it is that of the nearest copy which has one."""
    copies = [
        sent(PHONE, EDGE, request="sip:1@h"),
        sent(EDGE, CORE, 2, request="sip:1;npdi;rn=2@h"),
        sent(CORE, CARRIER, 3, request="sip:1;npdi;rn=3@h"),
    ]
    for order in itertools.permutations(copies):
        for restart in (0, 1):
            body = begun("- destination: rn\n", [*order, ANSWERS[1]], restart)
            assert body["destination"] == "sip:2@h"
        assert begun("- destination: request-uri\n", [*order, ANSWERS[1]])["destination"] == (
            "sip:1@h"
        )
    looked_up = sent(PHONE, EDGE, request="sip:1;npdi@h;user=phone")
    assert begun("- destination: rn\n", [looked_up, *copies[1:], ANSWERS[1]])["destination"] == (
        "sip:1@h"
    )


def test_the_examples_of_the_documentation():
    page = (harness.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    texts = re.findall(r"```yaml\n(- .*?)```", page, re.S)
    named = {agent.parse_routes(text, "routes.yaml", PLAIN)[0].route.ties for text in texts}
    assert len(texts) == 4 and named == {True, False}
    sems, ims, session = [rule.route for rule in rules(texts[1])[:-1]]
    headers = [(PCV, 'icid-value="x";a=b'), ("Session-ID", f"{SESSION};remote={'0' * 32}")]
    tags = [agent.transaction_tag(route, seen(headers)) for route in (sems, ims, session)]
    assert tags == ["1@h", "x", SESSION]
    numbers = first(texts[3])
    told = ["sip:00391@h", "sip:0391@h", "sip:391@h"]
    assert [agent.rewritten_party(numbers, "destination", text) for text in told] == [
        "sip:+391@h",
        "sip:+39391@h",
        "sip:391@h",
    ]


# Errors: one line that begins NAME:LINE


def complaint(text: str) -> str:
    """What is said of a bad file, after NAME: and with the line first."""
    with pytest.raises(agent.ConfigError) as caught:
        agent.parse_routes(text, "conf/routes.yaml", PLAIN)
    assert caught.value.kind == "config"
    said = str(caught.value)
    assert "\n" not in said and re.match(r"conf/routes\.yaml:\d+: \S", said)
    # What a person reads on a terminal, whatever the file holds.
    assert len(said) < 1_000
    return said.removeprefix("conf/routes.yaml:")


@pytest.mark.parametrize(
    ("rule", "line", "words"),
    [
        # Unknown keys, and keys of the other level.
        ("tennant: x", 3, ["'tennant'", "tenant"]),
        ("capture_id: 1", 3, ["'capture_id'", "match"]),
        ("match: {tenant: x}", 3, ["match", "'tenant'", "capture_id"]),
        ("match:\n    sender: 10.0.0.1\n    Sender: 10.0.0.1", 5, ["match", "'Sender'"]),
        ("<<: {tenant: x}", 3, ["'<<'"]),
        ("[a, b]: c", 3, ["unknown key"]),
        ("1: c", 3, ["unknown key '1'"]),
        # Twice.
        ("tenant: a\n  tenant: b", 4, ["'tenant'", "twice"]),
        ("match: {sender: 10.0.0.1, sender: 10.0.0.2}", 3, ["'sender'", "twice"]),
        ("match: {capture_id: 1}\n  match: {capture_id: 2}", 4, ["'match'", "twice"]),
        ("match: {header: {X-A: a, X-A: b}}", 3, ["header", "twice"]),
        ("match: {header: {X-A: a, x-a: b}}", 3, ["header", "twice"]),
        # Wrong types.
        ("name: ''", 3, ["name", "''"]),
        ("name:", 3, ["name", "None"]),
        ("name: [a]", 3, ["name", "['a']"]),
        ("tenant: yes", 3, ["tenant", "True"]),
        ("tenant: 1.5", 3, ["tenant", "1.5"]),
        ("tenant: {a: b}", 3, ["tenant"]),
        ("tenant: 2026-11-24", 3, ["tenant", "2026"]),
        ("tenant: 2026-13-45", 3, ["tenant"]),  # no date, though it looks like one
        ("tenant: !!float abc", 3, ["tenant"]),
        ("tenant: !!binary '!'", 3, ["tenant"]),
        ("tenant: !!python/name:os.system ''", 3, ["tenant"]),
        ("tenant: !ours x", 3, ["tenant"]),
        ("tenant: =", 3, ["tenant"]),
        ("product_tag: []", 3, ["product_tag", "[]"]),
        ("tags: [[a]]", 3, ["tags"]),
        ("tags: {a: b}", 3, ["tags"]),
        ("tags: [a, '']", 3, ["tags", "''"]),
        ("local_domains: {a: b}", 3, ["local_domains"]),
        ("match: x", 3, ["match", "not a mapping"]),
        ("match: [a]", 3, ["match", "not a mapping"]),
        ("match:", 3, ["match", "not a mapping"]),
        ("match: {capture_id: abc}", 3, ["match", "capture_id", "'abc'"]),
        ("match: {capture_id: '12'}", 3, ["match", "capture_id", "'12'"]),
        ("match: {capture_id: -1}", 3, ["match", "capture_id", "-1"]),
        ("match: {capture_id: 4294967296}", 3, ["match", "capture_id", "4294967296"]),
        ("match: {capture_id: true}", 3, ["match", "capture_id", "True"]),
        ("match: {capture_id: [1, x]}", 3, ["match", "capture_id", "x"]),
        ("match: {capture_name: [[a]]}", 3, ["match", "capture_name"]),
        ("match: {header: X-A}", 3, ["match", "header", "not a mapping"]),
        ("match: {header: {}}", 3, ["match", "header"]),
        ("match: {header: [X-A]}", 3, ["match", "header"]),
        ("match: {header: {'X A': a}}", 3, ["match", "header", "'X A'"]),
        ("match: {header: {'': a}}", 3, ["match", "header", "''"]),
        ("match: {header: {X-A: [a, b]}}", 3, ["match", "header", "a"]),
        ("match: {header: {X-A: }}", 3, ["match", "header", "None"]),
        ("match: {header: {X-A: yes}}", 3, ["match", "header", "True"]),
        # A condition on nothing never holds.
        ("match: {capture_id: []}", 3, ["match", "capture_id", "[]"]),
        ("match: {sender: []}", 3, ["match", "sender", "[]"]),
        ("match: {to_domain: []}", 3, ["match", "to_domain", "[]"]),
        # Values that are not one of a few.
        ("action: drop", 3, ["action", "'drop'", "rate, ignore"]),
        ("action: [rate]", 3, ["action", "rate, ignore"]),
        ("destination: from", 3, ["destination", "'from'", "to, request-uri"]),
        ("account: [from, paid]", 3, ["account", "'paid'", "header:NAME"]),
        ("account: 'header:'", 3, ["account", "'header:'"]),
        ("account: 'header:X A'", 3, ["account", "'header:x a'"]),
        ("destination_account: call-id", 3, ["destination_account", "'call-id'"]),
        ("transaction_tag: from", 3, ["transaction_tag", "'from'", "correlation-id"]),
        ("transaction_tag: [call-id]", 3, ["transaction_tag"]),
        ("transaction_tag: 'header:'", 3, ["transaction_tag", "'header:'"]),
        ("transaction_tag: {from: call-id}", 3, ["transaction_tag", "no 'match'", "from, match"]),
        ("transaction_tag: {match: (.)}", 3, ["transaction_tag", "no 'from'"]),
        ("transaction_tag: {}", 3, ["transaction_tag", "no 'from'"]),
        ("transaction_tag:\n    from: call-id\n    mach: (.)", 5, ["transaction_tag", "'mach'"]),
        ("transaction_tag: {from: to, match: (.)}", 3, ["from: 'to'", "correlation-id"]),
        ("transaction_tag: {from: call-id, match: x}", 3, ["match", "'x'", "group 1", "tag"]),
        ("transaction_tag: {from: call-id, match: '('}", 3, ["match", "missing )"]),
        ("transaction_tag: {from: call-id, match: }", 3, ["match", "None"]),
        ("transaction_tag: {from: call-id, match: [(.)]}", 3, ["match", "['(.)']"]),
        ("carrier_ip: yes please", 3, ["carrier_ip", "'yes please'", "true, false"]),
        ("carrier_ip: 1", 3, ["carrier_ip", "1", "true, false"]),
        ("carrier_ip:", 3, ["carrier_ip", "None", "true, false"]),
        ("rewrite: x", 3, ["rewrite", "not a list", "field, match, replace"]),
        ("rewrite: {field: source}", 3, ["rewrite", "not a list"]),
        ("rewrite: [x]", 3, ["rewrite", "not a mapping"]),
        ("rewrite:\n  - {field: source, match: x}", 4, ["rewrite", "no 'replace'"]),
        ("rewrite: [{field: to, match: x, replace: y}]", 3, ["field: 'to'", "source, destination"]),
        ("rewrite: [{field: source, match: '(', replace: y}]", 3, ["match: '('", "missing )"]),
        ("rewrite: [{field: source, match: '', replace: y}]", 3, ["match: ''"]),
        ("rewrite: [{field: source, match: x, replace: }]", 3, ["replace: None"]),
        ("rewrite: [{field: source, match: x, replace: é}]", 3, ["replace: 'é'", "ASCII"]),
        ("rewrite: [{field: source, match: (x), replace: '\\2'}]", 3, ["replace", "\\0 to \\1"]),
        ("rewrite: [{field: source, match: x, replace: '\\g<0>'}]", 3, ["replace", "\\0 to \\9"]),
        ("rewrite: [{field: source, match: x, replace: '\\'}]", 3, ["replace", "\\0 to \\9"]),
        # Regular expressions.
        ("account_match: '('", 3, ["account_match", "'('", "missing )"]),
        ("account_match: abc", 3, ["account_match", "'abc'", "group"]),
        ("account_match: '(?:a)'", 3, ["account_match", "group"]),
        ("account_match: ['(a)']", 3, ["account_match"]),
        ('account_match: "a\\n("', 3, ["account_match"]),
        ("match: {header: {X-A: '['}}", 3, ["match", "header", "'['", "missing ]"]),
        # Networks.
        ("match: {sender: 10.0.0.0/33}", 3, ["match", "sender", "'10.0.0.0/33'"]),
        ("match: {sender: localhost}", 3, ["match", "sender", "'localhost'"]),
        ("match: {source_network: [10.0.0.1, 300.1.1.1]}", 3, ["source_network", "'300.1.1.1'"]),
        ("match: {destination_network: '::1/129'}", 3, ["destination_network", "'::1/129'"]),
        # URLs.
        ("rating_api_url: rating.example", 3, ["rating_api_url", "'rating.example'", "http://"]),
        ("rating_api_url: ftp://rating.example", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://h:99999'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://h:x'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://[::1'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://h/?q=1'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://h/#f'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 'http://h /'", 3, ["rating_api_url", "http://"]),
        ("rating_api_url: 8080", 3, ["rating_api_url", "'8080'"]),
    ],
)
def test_bad_rules(rule, line, words):
    said = complaint(f"# ours\n- name: good\n- {rule}\n")
    assert said.startswith(f"{line}: ")
    assert "allowed" in said
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    "url", ["http://u:s3cret@h", "http://u:s3cret@h:99999", "https://u:s3cret@h/?q", "u:s3cret@h"]
)
def test_password_in_a_url_is_refused_and_not_told(url):
    said = complaint(f"- rating_api_url: '{url}'\n")
    assert said.startswith("1: rating_api_url: ") and "rating_api_username" in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\n", 1),
        ("# c\nrules:\n- name: x\n", 2),
        ("just text", 1),
        ("42", 1),
        ("- just text", 1),
        ("- name: a\n-\n- name: c\n", 2),
        ("- [a]\n", 1),
    ],
)
def test_not_a_list_of_rules(text, line):
    said = complaint(text)
    assert said.startswith(f"{line}: ") and "allowed" in said
    assert "not a list" in said or "not a mapping" in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- name: [a\n", 2),
        ("- name: a\n  tenant: 'x\n", 3),
        ("- name: a\n\ttenant: x\n", 2),
        ("\t- name: a\n", 1),
        ("- name: a\n tenant: b\n", 2),
        ("- tenant: *nobody\n", 1),
        ("- a: b: c\n", 1),
        ("- name: a\n--- \n- name: b\n", 2),
        ("}", 1),
        ("- name: a\n- @x\n", 2),
        ("%YAML 9\n---\n", 1),
        ("- tenant: a\0b\n", 1),
        ("- tenant: a\x01b\n", 1),
        ("- tenant: \x7f\n", 1),
    ],
)
def test_not_yaml(text, line):
    said = complaint(text)
    assert said.startswith(f"{line}: ")
    assert "allowed" in said


# Octets of memory and seconds that a bad file may cost the process that reads it.
MEMORY, DEADLINE = 400 << 20, 20
READ = """
import sys
import rating_agent_hep as agent
try:
    print("taken", len(agent.parse_routes(sys.stdin.read(), "r.yaml", agent.Settings())))
except agent.ConfigError as error:
    print(error)
"""


def laughs(levels: int) -> list[str]:
    """Lists that each hold nine times the one before: `levels` of them are 9**levels texts."""
    lists = ["&a0 [lol]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return lists


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("".join(f"- tags: {each}\n" for each in laughs(12)), id="laughs in tags"),
        pytest.param(f"- tenant: [{', '.join(laughs(12))}]\n", id="laughs in a text"),
        pytest.param(f"- action: [{', '.join(laughs(12))}]\n", id="laughs in a choice"),
        pytest.param(f"- transaction_tag: [{', '.join(laughs(12))}]\n", id="laughs in a source"),
        pytest.param(
            f"- match: {{capture_id: [{', '.join(laughs(12))}]}}\n", id="laughs in numbers"
        ),
        pytest.param(
            f"- match: {{header: {{X-A: [{', '.join(laughs(12))}]}}}}\n", id="laughs in a regexp"
        ),
        pytest.param(f"- ? [{', '.join(laughs(12))}]\n  : x\n", id="laughs in a key"),
        pytest.param(f"- match:\n    ? [{', '.join(laughs(12))}]\n    : x\n", id="laughs in match"),
        pytest.param("- tenant: &a [*a]\n", id="recursive"),
        pytest.param("- ? &a [*a]\n  : x\n", id="recursive key"),
        pytest.param("- tenant: " + "[" * 5_000, id="nested without end"),
        pytest.param("- tenant: " + "[" * 400 + "]" * 400 + "\n", id="nested"),
        pytest.param("- " * 5_000, id="nested lists"),
        pytest.param("{a: " * 5_000, id="nested mappings"),
        pytest.param("- tenant: " + "1" * 5_000 + "\n", id="long number"),
    ],
)
def test_hostile_files_cost_little_and_get_one_line(text):
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=harness.ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-300:]
    assert done.stderr == ""
    assert len(lines) == 1
    # A long number may be taken for the text that it is.
    assert re.match(r"r\.yaml:\d+: ", lines[0]) or ("1" * 5_000 in text and lines[0] == "taken 2")
    assert len(lines[0]) < 6_000


KEYS = """name action tenant account destination_account local_domains account_match product_tag
tags destination transaction_tag rating_api_url match""".split()
MATCH = """capture_id capture_name sender source_network destination_network from_domain to_domain
request_domain header""".split()
ODD_VALUES = (
    *("", "x", "''", "yes", "~", "12", "1.5", "2026-13-45", "!!int x", "!!float x", "!!set {a}"),
    *("&a x", "*a", "[]", "{}", "[a, b]", "[[a]]", "{a: b}", "{[a]: b}", "[", "}", "'", "\t", "\0"),
    *("(", "'('", "(.*)", "10.0.0.0/8", "::1/200", "http://h", "'http://[::1'", "header:X", "0b_"),
    *(
        "!!binary x",
        "!!timestamp x",
        "!!omap x",
        "!!pairs [a]",
        "=",
        "<<",
        "|",
        "? a",
        "- a",
        "# c",
    ),
)
rule_lines = st.one_of(
    st.tuples(st.sampled_from(["- ", "  "]), st.sampled_from(KEYS), st.sampled_from(ODD_VALUES)),
    st.tuples(
        st.sampled_from(["- match:\n    ", "    ", "    header:\n      "]),
        st.sampled_from(MATCH),
        st.sampled_from(ODD_VALUES),
    ),
).map(lambda line: f"{line[0]}{line[1]}: {line[2]}\n")


@given(st.lists(rule_lines, min_size=1, max_size=6).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_rules_or_one_line(text):
    try:
        table = rules(text)
    except agent.ConfigError as error:
        assert re.match(r"routes\.yaml:\d+: \S", str(error)) and "\n" not in str(error)
    else:
        assert table[-1].route.name == "main" and table[-1].conditions == ()
