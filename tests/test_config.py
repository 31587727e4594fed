"""Options: where they come from, what is refused and how that is said; the program's exit."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import harness
import hepbuild
import rating_agent_hep as agent

PROGRAM = str(harness.ROOT / "rating_agent_hep.py")
PREFIX = "RATING_AGENT_HEP_"
NAMES = [option.name for option in agent.OPTIONS]
SECRETS = [option.name for option in agent.OPTIONS if option.secret]
SECRET = "hunter2"

# The defaults as DESIGN.md has them, also of options that are still to come.
DEFAULTS: dict[str, Any] = {
    "listen_udp": ":9060",
    "listen_tcp": ":9060",
    "listen_tls": "",
    "tls_cert": "",
    "tls_key": "",
    "tls_client_ca": "",
    "listen_status": "",
    "status_max_silence": 0.0,
    "hep_allow": (),
    "hep_auth_key": (),
    "hep_auth_key_file": "",
    "hep_rate_limit": 0,
    "hep_idle_timeout": 0.0,
    "hep_forward": (),
    "hep_forward_ca_file": "",
    "rating_api_url": "http://localhost:8080",
    "rating_api_timeout": 5.0,
    "rating_api_concurrency": 16,
    "rating_api_ca_file": "",
    "rating_api_token": "",
    "rating_api_token_file": "",
    "rating_api_username": "",
    "rating_api_password": "",
    "rating_api_password_file": "",
    "tenant": "default",
    "product_tag": "VOICE",
    "transaction_tags": (),
    "sip_local_domains": (),
    "sip_header_caller": "",
    "sip_header_callee": "",
    "sip_header_history_info": "History-Info",
    "sip_header_history_info_index": 1,
    "account_tag_match_regexp": "",
    "routes": "",
    "begin_on": "answer",
    "unknown_party": "drop",
    "max_calls": 200_000,
    "invite_timeout": 600.0,
    "max_call_duration": 21_600.0,
    "expired_call_end": "deadline",
    "unanswered_bye": "end",
    "reorder_window": 2.0,
    "state_dir": "",
    "call_records": "",
    "statsd_host": "",
    "statsd_port": 8125,
    "statsd_prefix": "rating_agent_hep",
    "log_level": "info",
    "log_format": "json",
    "debug": False,
    "shutdown_timeout": 10.0,
    "cluster_url": "",
    "cluster_password": "",
    "cluster_password_file": "",
    "cluster_name": "rating",
    "cluster_shards": 64,
}

# For each option a text that is valid and not its default, and the value it stands for. What
# stands in braces is a file of the test.
SAMPLES: dict[str, tuple[str, Any]] = {
    "listen_udp": ("127.0.0.1:9061", "127.0.0.1:9061"),
    "listen_tcp": ("[::1]:9062", "[::1]:9062"),
    "listen_status": (":9064", ":9064"),
    "status_max_silence": ("60", 60.0),
    "listen_tls": ("127.0.0.1:9063", "127.0.0.1:9063"),
    "tls_cert": ("{server.pem}", ...),
    "tls_key": ("{server.key}", ...),
    "tls_client_ca": ("{ca.pem}", ...),
    "hep_allow": (
        "10.1.2.3 10.0.0.0/8,2001:DB8::/32",
        ("10.1.2.3/32", "10.0.0.0/8", "2001:db8::/32"),
    ),
    "hep_auth_key": ("one two", ("one", "two")),
    "hep_auth_key_file": ("{keys}", ...),
    "hep_rate_limit": ("5000", 5000),
    "hep_idle_timeout": ("3600", 3600.0),
    "hep_forward": ("udp://a:1 tls://[::1]:2", ("udp://a:1", "tls://[::1]:2")),
    "hep_forward_ca_file": ("{ca.pem}", ...),
    "rating_api_url": ("https://rating.example:8443/base/", "https://rating.example:8443/base"),
    "rating_api_timeout": ("2.5", 2.5),
    "rating_api_concurrency": ("3", 3),
    "rating_api_ca_file": ("{ca.pem}", ...),
    "rating_api_token_file": ("{token}", ...),
    "rating_api_password_file": ("{password}", ...),
    "rating_api_token": ("to.ken-1~+/=", "to.ken-1~+/="),
    "rating_api_username": ("billing", "billing"),
    "rating_api_password": ("pass, word: 1", "pass, word: 1"),
    "tenant": ("acme", "acme"),
    "product_tag": ("0123", "0123"),
    "transaction_tags": ("one two", ("one", "two")),
    "sip_local_domains": ("A.example,*.b.example", ("a.example", "*.b.example")),
    "sip_header_caller": ("X-Caller", "X-Caller"),
    "sip_header_callee": ("X-Callee", "X-Callee"),
    "sip_header_history_info": ("X-History", "X-History"),
    "sip_header_history_info_index": ("0", 0),
    "account_tag_match_regexp": ("[0-9]{2}([0-9]+)", "[0-9]{2}([0-9]+)"),
    "routes": ("{routes.yaml}", ...),
    "begin_on": ("ack", "ack"),
    "unknown_party": ("reject", "reject"),
    "max_calls": ("10", 10),
    "invite_timeout": ("30", 30.0),
    "max_call_duration": ("3600", 3600.0),
    "expired_call_end": ("last-seen", "last-seen"),
    "unanswered_bye": ("ignore", "ignore"),
    "reorder_window": ("0", 0.0),
    "statsd_host": ("127.0.0.1", "127.0.0.1"),
    "statsd_port": ("8126", 8126),
    "statsd_prefix": ("hep", "hep"),
    "log_level": ("warning", "warning"),
    "log_format": ("text", "text"),
    "debug": ("yes", True),
    "state_dir": ("/var/lib/rating-agent-hep", "/var/lib/rating-agent-hep"),
    "call_records": ("/var/log/calls.jsonl", "/var/log/calls.jsonl"),
    "shutdown_timeout": ("0.5", 0.5),
    "cluster_url": ("redis://10.0.0.5:6379/1", "redis://10.0.0.5:6379/1"),
    "cluster_password": ("Passwort-3", "Passwort-3"),
    "cluster_password_file": ("{redis-password}", ...),
    "cluster_name": ("site.b", "site.b"),
    "cluster_shards": ("8", 8),
}

# Files of secrets, and the options they give a value besides their own.
SECRET_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "hep_auth_key_file": ("a, key\r\n\nthe other\n", {"hep_auth_key": ("a, key", "the other")}),
    "rating_api_token_file": ("to.ken-2\n", {"rating_api_token": "to.ken-2"}),
    "cluster_password_file": ("Passwort-4\n", {"cluster_password": "Passwort-4"}),
    "rating_api_password_file": (
        "pass, word: \u00fc",
        {"rating_api_password": "pass, word: \u00fc"},
    ),
}

ADDRESSES = ["9060", "host:", "host:x", ":-1", ":99999", "::1:9060", "[::1]", ":90 60"]
COUNTS = ["0", "-1", "1.5", "1e3", "x", ""]
BAD: dict[str, list[str]] = {
    "listen_udp": ADDRESSES,
    "listen_tcp": ADDRESSES,
    "listen_status": ADDRESSES,
    "status_max_silence": ["-1", "86401", "nan", "x", ""],
    "listen_tls": ADDRESSES,
    "hep_allow": ["10.0.0.0/33", "host", "10.0.0.0/8/8", "1.2.3", '["10.0.0.0/8"'],
    # An empty key would be that of a packet without one.
    "hep_auth_key": ['["one"', '["one", ""]', "one\x00two", '["one\\n"]'],
    "hep_auth_key_file": ["/no/such/file", "/"],
    "hep_rate_limit": ["-1", "1.5", "10000001", "x", ""],
    "hep_idle_timeout": ["-1", "604801", "nan", "x", ""],
    "hep_forward": ["homer.example:9060", "http://homer.example:9060", "udp://homer.example", "["],
    "hep_forward_ca_file": ["/no/such/file", "/"],
    "rating_api_url": [
        "",
        "localhost:8080",
        "//localhost",
        "ftp://localhost",
        "http://",
        "http://:8080",
        "http://localhost:0",
        "http://localhost:99999",
        "http://localhost:port",
        "http://local host",
        "http://localhost?x=1",
        "http://localhost?",
        "http://localhost#x",
        "http://user@localhost",
    ],
    "rating_api_timeout": ["0", "-1", "301", "nan", "inf", "5s", "x", ""],
    "rating_api_concurrency": [*COUNTS, "1001"],
    "rating_api_ca_file": ["/no/such/file", "/", "/dev/null", __file__],
    "rating_api_token_file": ["/no/such/file", "/", "/dev/null", __file__],
    "rating_api_password_file": ["/no/such/file", "/", "/dev/null", __file__],
    "cluster_password_file": ["/no/such/file", "/", "/dev/null", __file__],
    # What can't stand in a header would fail at each request, and the log would show it.
    "rating_api_token": ["one\ntwo", "one\rtwo", "one\x00two", "one\u2603two"],
    "tenant": [""],
    "transaction_tags": ['["one"'],
    "sip_local_domains": ['["one"'],
    "sip_header_caller": ["X Caller", "X-Caller:", "X-\u00fc"],
    "sip_header_callee": ["X Callee", "X-Callee:", "X-\u00fc"],
    "sip_header_history_info": ["History Info", "History-Info:"],
    "sip_header_history_info_index": ["-1", "101", "1.5", "x", ""],
    "account_tag_match_regexp": ["(", "[0-9]+", "(?:x)", "*(x)", "(?=x)(y)", "(\udcff)"],
    "routes": ["/no/such/file", "/"],
    "begin_on": ["", "ANSWER", "bye"],
    "unknown_party": ["", "Drop", "keep", "true"],
    "max_calls": [*COUNTS, "100000001"],
    "invite_timeout": ["0", "86401", "nan", "x", ""],
    "max_call_duration": ["0", "86401", "nan", "x", ""],
    "expired_call_end": ["", "last_seen", "never"],
    "unanswered_bye": ["", "yes", "ended"],
    "reorder_window": ["-1", "61", "nan", "x", ""],
    "statsd_port": [*COUNTS, "65536"],
    "log_level": ["", "INFO", "trace"],
    "log_format": ["", "JSON", "xml"],
    "debug": ["maybe", "2"],
    "shutdown_timeout": ["-1", "3601", "nan", "x", ""],
    "cluster_url": ["http://redis", "redis", "redis:", "redis://user:geheim@host", "a:b@c"],
    "cluster_password": ["a\u00e9"],
    "cluster_name": ["", "a:b", "a b", "x" * 65],
    "cluster_shards": [*COUNTS, "4097"],
}
ANY_TEXT = {
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "rating_api_username",
    "rating_api_password",
    "product_tag",
    "statsd_host",
    "statsd_prefix",
    "state_dir",
    "call_records",
}


def load(*argv: str, **environ: str) -> agent.Settings:
    return configuration(*argv, **environ).settings


def configuration(*argv: str, **environ: str) -> agent.Configuration:
    return agent.load_configuration(argv, {PREFIX + k.upper(): v for k, v in environ.items()})


def refused(*argv: str, **environ: str) -> str:
    """The message of a configuration that must be refused: one line for a terminal."""
    with pytest.raises(agent.ConfigError) as caught:
        configuration(*argv, **environ)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def refusal(*argv: str, **environ: str) -> str:
    """The same, which also has to say what is allowed."""
    message = refused(*argv, **environ)
    assert "allowed" in message, message
    return message


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A function that writes a configuration file and returns the flag that names it."""

    def write(text: str | bytes, name: str = "agent.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return f"--config={path}"

    return write


def sample(name: str, folder: Path) -> tuple[str, Any]:
    """A valid text and its value; the test fails here for an option without a sample."""
    text, value = SAMPLES[name]
    if not text.startswith("{"):
        return text, value
    path = folder / text[1:-1]
    if name == "routes":
        path.write_text("- name: first\n  match: {capture_id: 1}\n")
    elif name in SECRET_FILES:
        path.write_text(SECRET_FILES[name][0])
    elif not path.exists():
        harness.certificates(folder)
    return str(path), str(path)


def needed(name: str, folder: Path) -> dict[str, str]:
    """Options that one option can't go without."""
    groups = {"listen_tls": ("tls_cert", "tls_key"), "call_records": ("state_dir",)}
    names = groups.get(name, ())
    return {other: sample(other, folder)[0] for other in names}


# Defaults


def test_defaults_are_those_of_the_design() -> None:
    fields = {field.name for field in dataclasses.fields(agent.Settings)}
    assert fields == set(NAMES) and len(NAMES) == len(fields)
    assert vars(agent.Settings()) == {name: DEFAULTS[name] for name in NAMES}
    for name in NAMES:
        assert type(getattr(agent.Settings(), name)) is type(DEFAULTS[name]), name
    assert load() == agent.Settings()


def test_nothing_given_means_run() -> None:
    found = configuration()
    assert (found.command, found.arguments, found.warnings) == ("run", [], [])
    assert [rule.route.name for rule in found.rules] == ["main"]


# Where options come from


@pytest.mark.parametrize("name", NAMES)
def test_each_option_by_flag_environment_and_file_in_both_spellings(
    name: str, tmp_path: Path, config: Any
) -> None:
    text, value = sample(name, tmp_path)
    assert value != getattr(agent.Settings(), name), "the sample must not be the default"
    more = needed(name, tmp_path)
    values = {name: value, **SECRET_FILES.get(name, ("", {}))[1], **more}
    wanted = dataclasses.replace(agent.Settings(), **values)
    dashed = name.replace("_", "-")
    for spelling in (name, dashed):
        assert load(f"--{spelling}={text}", **more) == wanted
        assert load(f"--{spelling}", text, **more) == wanted
        assert load(config(f"{spelling}: {json.dumps(text)}\n"), **more) == wanted
    assert load(**{name: text}, **more) == wanted


@pytest.mark.parametrize(
    ("name", "texts", "values"),
    [
        ("tenant", ("a", "b", "c"), ("a", "b", "c")),
        ("max_calls", ("1", "2", "3"), (1, 2, 3)),
        ("invite_timeout", ("1.5", "2.5", "3.5"), (1.5, 2.5, 3.5)),
        ("listen_udp", (":1", ":2", ":3"), (":1", ":2", ":3")),
        ("transaction_tags", ("a b", "c", "d,e"), (("a", "b"), ("c",), ("d", "e"))),
        ("debug", ("true", "false", "true"), (True, False, True)),
        ("debug", ("false", "true", "false"), (False, True, False)),
        ("begin_on", ("ack", "answer", "ack"), ("ack", "answer", "ack")),
    ],
)
def test_command_line_over_environment_over_file(
    name: str, texts: tuple[str, ...], values: tuple[Any, ...], config: Any
) -> None:
    in_file = config(f'{name}: "{texts[0]}"\n')
    assert getattr(load(in_file), name) == values[0]
    assert getattr(load(in_file, **{name: texts[1]}), name) == values[1]
    flag = f"--{name}={texts[2]}"
    assert getattr(load(in_file, flag, **{name: texts[1]}), name) == values[2]
    assert getattr(load(flag, in_file), name) == values[2]
    assert getattr(load(flag, **{name: texts[1]}), name) == values[2]


def test_an_empty_value_is_a_value(config: Any) -> None:
    in_file = config("product_tag: SMS\nlisten_udp: ':1'\ntransaction_tags: [a]\n")
    found = load(in_file, "--transaction-tags=", product_tag="", listen_udp="")
    assert (found.product_tag, found.listen_udp, found.transaction_tags) == ("", "", ())


def test_the_file_may_be_named_by_flag_or_environment(config: Any) -> None:
    path = config("tenant: acme\n").partition("=")[2]
    assert load("-c", path).tenant == load("--config", path).tenant == "acme"
    assert load(config=path).tenant == "acme"
    other = config("tenant: other\n", "other.yaml").partition("=")[2]
    assert load("-c", other, config=path).tenant == "other"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}\n", "\ufefftenant: default\n"])
def test_a_file_that_sets_nothing(text: str, config: Any) -> None:
    assert load(config(text)) == agent.Settings()


def test_an_unknown_environment_variable_is_ignored() -> None:
    environ = {PREFIX + "NOPE": "x", PREFIX + "RATING_API_TOKN": SECRET, "TENANT": "other"}
    found = agent.load_configuration([], environ)
    assert found.settings == agent.Settings() and found.warnings == []


AWKWARD = [
    "-x",
    "--debug",
    "a=b",
    '"quoted"',
    "it's",
    "%s %(x)d",
    "${HOME}",
    "@file",
    "~",
    "#x",
    "[x",
    "a: b",
    " x ",
    "True",
    "1e3",
    "\u00e4\u2603",
    "\U0001f4de",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_texts_are_taken_as_they_are(text: str, config: Any) -> None:
    assert load(f"--product-tag={text}").product_tag == text
    assert load(product_tag=text).product_tag == text
    assert load(config(f"product_tag: {json.dumps(text, ensure_ascii=False)}")).product_tag == text


def test_plain_yaml_scalars_are_texts_as_written(config: Any) -> None:
    found = load(config("tenant: 0123\nproduct_tag: 1e3\nsip_header_caller: null\nstatsd_host: ~"))
    assert (found.tenant, found.product_tag) == ("0123", "1e3")
    assert (found.sip_header_caller, found.statsd_host) == ("", "")


@pytest.mark.parametrize("value", ["one,two", "one two", "one, two", " one  two ,", "one\ttwo"])
def test_lists_as_words(value: str, config: Any) -> None:
    for name in ("transaction_tags", "sip_local_domains", "hep_auth_key"):
        assert getattr(load(f"--{name}={value}"), name) == ("one", "two")
        assert getattr(load(**{name: value}), name) == ("one", "two")
        assert getattr(load(config(f"{name}: {json.dumps(value)}")), name) == ("one", "two")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[one, two]", ("one", "two")),
        ("\n  - one\n  - two\n", ("one", "two")),
        ("[one item, 'two, items']", ("one item", "two, items")),
        ('["\U0001f4de \u2603", 007, yes]', ("\U0001f4de \u2603", "007", "yes")),
        ("[]", ()),
        ("", ()),
    ],
)
def test_lists_as_yaml(text: str, values: tuple[str, ...], config: Any) -> None:
    found = load(config(f"transaction_tags: {text}\nhep_auth_key: {text}\n"))
    assert found.transaction_tags == found.hep_auth_key == values


def test_networks_as_yaml(config: Any) -> None:
    found = load(config('hep_allow:\n- 192.0.2.9/24\n- "2001:db8::1"\n'))
    assert found.hep_allow == ("192.0.2.0/24", "2001:db8::1/128")


def test_local_domains_are_lower_case(config: Any) -> None:
    found = load(config("sip_local_domains: [SIP.Example, '*.Example']"))
    assert found.sip_local_domains == ("sip.example", "*.example")


@pytest.mark.parametrize(
    ("text", "value"),
    [(text, True) for text in ("true", "True", "yes", "on", "1")]
    + [(text, False) for text in ("false", "False", "no", "off", "0")],
)
def test_switches(text: str, value: bool, config: Any) -> None:
    assert load(f"--debug={text}").debug is value
    assert load(debug=text).debug is value
    assert load(config(f"debug: {text}\n")).debug is value


def test_a_switch_without_a_value_is_on() -> None:
    assert load("--debug").debug is True
    assert load("check", "--debug", "--tenant=x").tenant == "x"


def test_an_empty_listener_is_off_and_one_must_be_left(config: Any) -> None:
    assert load("--listen-udp=").listen_udp == ""
    assert load("--listen-udp=").listen_tcp == ":9060"
    assert load(config("listen_tcp:\n")).listen_tcp == ""
    for message in (
        refusal("--listen-udp=", "--listen-tcp="),
        refusal(listen_udp="", listen_tcp=""),
        refusal(config("listen_udp:\nlisten_tcp: ''\n")),
    ):
        assert all(f"listen_{kind}" in message for kind in ("udp", "tcp", "tls"))


@pytest.mark.parametrize(
    ("argv", "command", "files"),
    [
        (["run"], "run", []),
        (["agent"], "run", []),
        (["--tenant=x", "agent", "--debug"], "run", []),
        (["check"], "check", []),
        (["decode", "a", "b"], "decode", ["a", "b"]),
        (["--tenant=x", "decode", "a"], "decode", ["a"]),
        (["decode", "a", "--tenant=x"], "decode", ["a"]),
    ],
)
def test_commands(argv: list[str], command: str, files: list[str]) -> None:
    found = agent.load_configuration(argv, {})
    assert (found.command, found.arguments) == (command, files)


# The former agent

FORMER_FILE = """\
listen_udp: ":9061"
listen_tcp: "127.0.0.1:9062"
message_bus_uri: amqp://rating:busword@bus:5672
state_manager: other
redis_address: redis-host:6379
redis_password: rediswordy
redis_db: 31
tenant: acme
sip_header_caller: X-Caller
sip_header_callee: X-Callee
sip_header_history_info: History-Info
sip_header_history_info_index: 2
sip_local_domains: "a.example,b.example"
account_tag_match_regexp: "^0*([0-9]+)$"
product_tag: CALL
transaction_tags: one,two
"""
FORMER_VALUES = {
    "message_bus_uri": "amqp://rating:busword@bus:5672",
    "state_manager": "other",
    "redis_address": "redis-host:6379",
    "redis_password": "rediswordy",
    "redis_db": "31",
}
FORMER_SETTINGS = agent.Settings(
    listen_udp=":9061",
    listen_tcp="127.0.0.1:9062",
    tenant="acme",
    sip_header_caller="X-Caller",
    sip_header_callee="X-Callee",
    sip_header_history_info_index=2,
    sip_local_domains=("a.example", "b.example"),
    account_tag_match_regexp="^0*([0-9]+)$",
    product_tag="CALL",
    transaction_tags=("one", "two"),
)


def check_former_warning(found: agent.Configuration) -> None:
    assert len(found.warnings) == 1
    for name, value in FORMER_VALUES.items():
        assert name in found.warnings[0]
        assert value not in found.warnings[0]
    assert "busword" not in repr(found) and "rediswordy" not in repr(found)


def test_the_former_agents_file(config: Any) -> None:
    found = configuration(config(FORMER_FILE))
    assert found.settings == FORMER_SETTINGS
    check_former_warning(found)
    dashed = re.sub(r"^\w+", lambda name: name[0].replace("_", "-"), FORMER_FILE, flags=re.M)
    assert load(config(dashed)) == FORMER_SETTINGS
    check_former_warning(configuration(config(dashed)))


def test_the_former_agents_environment() -> None:
    environ = dict(re.findall(r'^(\w+): "?(.*?)"?$', FORMER_FILE, re.M))
    found = configuration(**environ)
    assert found.settings == FORMER_SETTINGS
    check_former_warning(found)


def test_the_former_agents_file_and_environment_together_give_one_warning(config: Any) -> None:
    found = configuration(config(FORMER_FILE), **FORMER_VALUES)
    assert found.settings == FORMER_SETTINGS
    check_former_warning(found)


def test_the_single_listener_of_the_first_versions_in_the_file(config: Any) -> None:
    assert load(config("listen: :9063\n")).listen_udp == ":9063"
    message = refusal(config("listen: :9063\nlisten_udp: :9064\n"))
    assert "agent.yaml:2: " in message


def test_the_single_listener_of_the_first_versions_in_the_environment() -> None:
    """Ignored, it would leave the agent on another port than its configuration says."""
    assert load(listen=":9063").listen_udp == ":9063"


def test_the_former_agents_redis_is_a_cluster(config: Any) -> None:
    text = FORMER_FILE.replace("state_manager: other", "state_manager: redis")
    cluster = {"cluster_url": "redis://redis-host:6379/31", "cluster_password": "rediswordy"}
    found = configuration(config(text))
    assert found.settings == dataclasses.replace(FORMER_SETTINGS, **cluster)
    (warning,) = found.warnings
    assert "message_bus_uri" in warning and "redis" not in warning and "state" not in warning
    environ = {**FORMER_VALUES, "state_manager": "redis"}
    assert load(**environ).cluster_url == cluster["cluster_url"]
    assert load(state_manager="redis").cluster_url == "redis://localhost:6379/0"
    # Ours goes before, and then the others have no effect.
    found = configuration("--cluster-url=unix:///run/redis.sock", **environ)
    assert found.settings.cluster_url == "unix:///run/redis.sock"
    assert "redis_address" in found.warnings[0]


def test_with_a_cluster_the_journal_has_no_effect() -> None:
    found = configuration("--cluster-url=redis://a", "--state-dir=/tmp")
    assert found.warnings == ["with cluster_url there is no journal: state_dir has no effect"]


# What is refused


def test_each_option_has_bad_values_or_takes_any_text() -> None:
    assert set(BAD) | ANY_TEXT == set(NAMES)
    assert not set(BAD) & ANY_TEXT


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in BAD for text in BAD[name]])
def test_bad_values(name: str, text: str, config: Any) -> None:
    in_file = config(f"{name}: {json.dumps(text)}\n")
    for message in (
        refusal(f"--{name}={text}"),
        refusal(f"--{name.replace('_', '-')}", text),
        refusal(**{name: text}),
        refusal(in_file),
    ):
        assert re.search(rf"\b{name}\b", message), message
        if name in SECRETS:
            assert text not in message and repr(text)[1:-1] not in message
        elif text and "@" not in text:
            assert repr(text)[1:-1] in message, "what was wrong"


BAD_FILES = [
    ("unknown key", "tenant: x\n\nlisten_udpp: :1\n", 3),
    ("unknown key, no likely one", "tenant: x\nzzzzzz: 1\n", 2),
    ("a flag that is no option of the file", "config: other.yaml\n", 1),
    ("a number as a key", "1: 2\n", 1),
    ("a list as a key", "? [tenant]\n: x\n", 1),
    ("a key twice", "tenant: x\ntenant: y\n", 2),
    ("a key twice, spelled differently", "listen_udp: ':1'\nlisten-udp: ':2'\n", 2),
    ("a list", "- tenant\n- x\n", 1),
    ("a text", "tenant\n", 1),
    ("a number", "1\n", 1),
    ("nested mapping", "tenant: x\nsip_local_domains: {a: b}\n", 2),
    ("nested mapping in a block", "tenant:\n  name: x\n", 2),
    ("mapping in a list", "tenant: x\ntransaction_tags:\n- a\n- b: c\n", None),
    ("list in a list", "tenant: x\ntransaction_tags: [a, [b]]\n", 2),
    ("list for a text", "product_tag: [a, b]\n", 1),
    ("list for a number", "max_calls: [1]\n", None),
    ("a tag", "tenant: x\nproduct_tag: !tag y\n", 2),
    ("unclosed quote", 'tenant: x\nproduct_tag: "y\n', None),
    ("unclosed bracket", "transaction_tags: [a, b\n", None),
    ("a tab for indentation", "tenant: x\n\ttransaction_tags: a\n", 2),
    ("colon in a value", "tenant: x\nproduct_tag: y: z\n", 2),
    ("two documents", "tenant: x\n---\ntenant: y\n", 2),
    ("unknown alias", "tenant: *x\n", 1),
    ("not UTF-8", b"tenant: x\nproduct_tag: \xff\n", None),
    ("NUL", b"tenant: x\nproduct_tag: \0\n", None),
    ("control character", b"tenant: \x1b[31m\n", None),
    ("UTF-16 cut short", "tenant: x".encode("utf-16")[:-1], None),
]


@pytest.mark.parametrize(
    ("text", "line"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES]
)
def test_bad_files(text: str | bytes, line: int | None, config: Any) -> None:
    message = refusal(config(text))
    if line is None:
        assert "agent.yaml" in message or "max_calls" in message
    else:
        assert re.search(rf"/agent\.yaml:{line}: ", message), message


def test_an_unknown_key_brings_the_likely_ones(config: Any) -> None:
    message = refusal(config("rating_api_timout: 1\n"))
    assert "'rating_api_timout'" in message and "rating_api_timeout" in message


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "none" / "none.yaml"):
        for message in (refusal("-c", str(path)), refusal(config=str(path))):
            assert str(path) in message
    locked = tmp_path / "locked.yaml"
    locked.write_text("tenant: x\n")
    locked.chmod(0)
    if not os.access(locked, os.R_OK):
        assert str(locked) in refusal("-c", str(locked))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--nope"], "--nope"),
        (["--nope=1"], "--nope"),
        (["--rating-api"], "--rating-api"),
        (["--tenan=x"], "--tenan"),
        (["-x"], "-x"),
        (["--tenant"], "--tenant"),
        (["--config"], "--config"),
        (["walk"], "command"),
        (["run", "file"], "file"),
        (["check", "file"], "file"),
        (["agent", "file"], "file"),
        (["walk\n\x1b[31m"], "command"),
        (["--nope\n\x1b[31m"], "--nope"),
    ],
)
def test_bad_command_lines(argv: list[str], named: str) -> None:
    assert named in refusal(*argv)


ROUTES = [
    ("missing", None, None),
    ("not UTF-8", b"- name: \xff\n", None),
    ("NUL", b"- name: \0\n", None),
    ("not YAML", b"- name: [\n", None),
    ("a mapping", b"name: x\n", 1),
    ("rule no mapping", b"- name: x\n- y\n", 2),
    ("unknown key", b"- name: x\n  tenannt: y\n", 2),
    ("unknown key in match", b"- name: x\n  match: {capture: 1}\n", 2),
    ("key twice", b"- name: x\n  tenant: a\n  tenant: b\n", 3),
    ("bad action", b"- name: x\n  action: drop\n", 2),
    ("bad capture id", b"- name: x\n  match: {capture_id: -1}\n", 2),
    ("bad network", b"- match: {sender: 10.0.0.0/33}\n", 1),
    ("bad account source", b"- name: x\n  account: [nobody]\n", 2),
    ("bad regexp", b"- name: x\n  account_match: '('\n", 2),
    ("regexp without group", b"- name: x\n  account_match: x\n", 2),
    ("bad header regexp", b"- match: {header: {X-A: '('}}\n", 1),
    ("bad header name", b"- match: {header: {'X A': x}}\n", 1),
    ("bad URL", b"- name: x\n  rating_api_url: ftp://x\n", 2),
    ("bad destination", b"- name: x\n  destination: from\n", 2),
    ("bad transaction tag", b"- name: x\n  transaction_tag: cseq\n", 2),
    ("empty tenant", b"- name: x\n  tenant: ''\n", 2),
]


@pytest.mark.parametrize(
    ("text", "line"), [case[1:] for case in ROUTES], ids=[case[0] for case in ROUTES]
)
def test_bad_routes_files(text: bytes | None, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    if text is not None:
        path.write_bytes(text)
    message = refusal(f"--routes={path}")
    if line is None:
        assert str(path) in message
    else:
        assert f"{path}:{line}: " in message


def test_good_routes_are_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- name: a\n  tenant: x\n- name: b\n  action: ignore\n")
    rules = configuration(f"--routes={path}", "--tenant=main-tenant").rules
    assert [(rule.route.name, rule.route.tenant, rule.route.action) for rule in rules] == [
        ("a", "x", "rate"),
        ("b", "main-tenant", "ignore"),
        ("main", "main-tenant", "rate"),
    ]


# Secrets

MISPLACED = [
    "rating_api_tokn: hunter2",
    "api_token: hunter2",
    "rating_api_token hunter2",
    "rating_api_token=hunter2",
    "rating_api_token: {a: hunter2}",
    "rating_api_token: [a, [hunter2]]",
    "rating_api_token: [{a: hunter2}]",
    'rating_api_token: "hunter2',
    "rating_api_token: hunter2: x",
    "rating_api_token: *hunter2",
    "rating_api_token: @hunter2",
    "rating_api_token: !hunter2",
    "rating_api_token: !hunter2 x",
    "rating_api_token: '%' hunter2",
    'rating_api_token: "\\hunter2"',
    "rating_api_password: a\nrating_api_password: hunter2",
    "? {rating_api_token: hunter2}\n: b",
    "- rating_api_token: hunter2",
    "rating_api_url: http://user:hunter2@localhost",
    "rating_api_url: http://user:hunter2@localhost:port",
    "rating_api_url: ftp://user:hunter2@localhost",
    "rating_api_url: http://user:hunter2@localhost?x",
    "rating_api_url: user:hunter2@localhost",
    "redis_passwort: hunter2",
    "message_bus_url: amqp://user:hunter2@localhost",
    "rating_api_token: hunter2\nmax_calls: x",
    "redis_password: hunter2\nmax_calls: x",
]


@pytest.mark.parametrize("text", MISPLACED)
def test_secrets_in_a_wrong_place_of_the_file_stay_secret(text: str, config: Any) -> None:
    assert SECRET not in refused(config(text + "\n"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--rating-api-tokn=hunter2"],
        ["--rating-api-tokn", "hunter2"],
        ["--rating_api_passwd=hunter2", "check"],
        ["--redis-password=hunter2"],
        ["--message-bus-uri=amqp://user:hunter2@localhost"],
        ["check", "rating_api_token=hunter2"],
        ["check", "--rating-api-token", "my", "hunter2"],
        ["--rating-api-password", "my", "hunter2"],
        ["--rating-api-url=http://user:hunter2@localhost"],
        ["--rating-api-url=http://user:hunter2@localhost:port"],
        ["--rating-api-token=hunter2", "--max-calls=x"],
        ["--rating-api-token=hunter2", "--nope"],
        ["--rating-api-token=hunter2\n"],
    ],
    ids=" ".join,
)
def test_secrets_in_a_wrong_place_of_the_command_line_stay_secret(argv: list[str]) -> None:
    assert SECRET not in refused(*argv)


def test_secrets_in_routes_stay_secret(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    for text in (
        "rating_api_url: http://user:hunter2@localhost",
        "rating_api_url: http://user:hunter2@localhost:port",
        "rating_api_token: hunter2",
    ):
        path.write_text(f"- name: x\n  {text}\n")
        message = refused(f"--routes={path}")
        assert f"{path}:2: " in message and SECRET not in message


def test_effective_options_have_no_secrets() -> None:
    assert {"rating_api_token", "rating_api_password", "hep_auth_key"} <= set(SECRETS)
    found = configuration(*(f"--{name}={SECRET}" for name in SECRETS))
    lines = list(agent.effective(found))
    assert SECRET not in "".join(lines)
    for name in SECRETS:
        assert f'{name}: "***"' in lines, "that one is set may be seen"
    assert SECRET not in repr(found), "nor has what a traceback may show"
    assert {'rating_api_token: ""', "hep_auth_key: []"} <= set(agent.effective(configuration()))


@pytest.mark.parametrize("name", SECRET_FILES)
def test_secrets_from_files(name: str, tmp_path: Path) -> None:
    path = sample(name, tmp_path)[0]
    found = configuration(f"--{name}={path}")
    (secret, value), *_ = SECRET_FILES[name][1].items()
    lines = list(agent.effective(found))
    assert f'{name}: "{path}"' in lines
    for text in (value,) if isinstance(value, str) else value:
        assert text not in "".join(lines) + repr(found)
    message = refusal(f"--{name}={path}", f"--{secret}={SECRET}")
    assert message == f"{secret}, {name}: both set; allowed: one of them"
    for text in ("", "\n", "\r\n\n"):
        Path(path).write_text(text)
        assert refusal(f"--{name}={path}") == f"{name}: {path}: empty; allowed: one line"
    Path(path).write_bytes(b"hunter2\xff")
    assert f"{name}: {path}: not UTF-8" in refusal(f"--{name}={path}")
    Path(path).write_text("hunter2\x00\nhunter2\n")
    if name != "rating_api_password_file":
        message = refusal(f"--{name}={path}")
        assert name in message and SECRET not in message
    for text in ("hunter2\nhunter3\n", "hunter2\rhunter3"):
        Path(path).write_text(text)
        if secret == "hep_auth_key":
            assert load(f"--{name}={path}").hep_auth_key == (SECRET, "hunter3")
        else:
            message = refusal(f"--{name}={path}")
            assert message == f"{name}: {path}: several lines; allowed: one line"


# Certificates


def test_certificates_are_loaded_before_a_socket_opens(tmp_path: Path) -> None:
    harness.certificates(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    harness.certificates(other)
    cert, key, ca = (str(tmp_path / name) for name in ("server.pem", "server.key", "ca.pem"))
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    listen = "--listen-tls=127.0.0.1:0"
    good = [listen, f"--tls-cert={cert}", f"--tls-key={key}"]
    assert configuration(*good).tls is not None
    assert configuration(*good, f"--tls-client-ca={ca}").tls is not None
    assert configuration(listen, f"--tls-cert={both}").tls is not None
    assert configuration(*good[1:]).tls is None, "and nothing listens"
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(Path(cert).read_text()[:300])
    for flags, named in (
        ([listen], "tls_cert: empty"),
        ([listen, f"--tls-cert={cert}"], f"tls_key: {cert}: "),
        ([*good, "--tls-cert=/no/such/file"], "tls_cert: /no/such/file: No such file"),
        ([*good, f"--tls-cert={key}"], f"tls_cert: {key}: "),
        ([*good, f"--tls-cert={damaged}"], f"tls_cert: {damaged}: "),
        ([*good, "--tls-key=/no/such/file"], "tls_key: /no/such/file: No such file"),
        ([*good, f"--tls-key={cert}"], f"tls_key: {cert}: "),
        ([*good, f"--tls-key={other}/server.key"], f"tls_key: {other}/server.key: "),
        ([*good, f"--tls-key={tmp_path}"], f"tls_key: {tmp_path}: Is a directory"),
        ([*good, "--tls-client-ca=/dev/null"], "tls_client_ca: /dev/null: "),
        ([*good, f"--tls-client-ca={key}"], f"tls_client_ca: {key}: "),
    ):
        assert refusal(*flags).startswith(named), (flags, refusal(*flags))


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    harness.certificates(tmp_path, passphrase=b"hunter2")
    files = (f"--tls-cert={tmp_path}/server.pem", f"--tls-key={tmp_path}/server.key")
    line = one_line(program("--listen-tls=127.0.0.1:0", *files))
    assert "tls_key: " in line and "without passphrase" in line


# The real program


def program(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; the environment has no options but those given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    env |= {PREFIX + name.upper(): value for name, value in environ.items()}
    command = [sys.executable, PROGRAM, *argv]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=env, timeout=harness.DEADLINE
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr of a program that refused its configuration."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith("\n"), done.stderr
    return done.stderr


@pytest.fixture
def taken() -> Any:
    """Addresses that are in use already: one of UDP, one of TCP."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
    ):
        udp.bind(("127.0.0.1", 0))
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        yield tuple(f"127.0.0.1:{sock.getsockname()[1]}" for sock in (udp, tcp))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (["--max-calls=x"], "max_calls"),
        (["--nope"], "--nope"),
        (["walk"], "command"),
        (["-c", "/no/such/file"], "/no/such/file"),
        (["--config={file}"], "agent.yaml:1"),
        (["--routes={file}"], "agent.yaml:1"),
        (
            ["--rating-api-token-file=/no/such/file"],
            "rating_api_token_file: /no/such/file: No such",
        ),
        (["--rating-api-ca-file={file}"], "rating_api_ca_file: "),
        (["--listen-tls=127.0.0.1:0", "--tls-cert={file}"], "tls_cert: "),
        (["--rating-api-tokn=hunter2"], "--rating-api-tokn"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_configuration_opens_no_socket(
    bad: list[str], named: str, taken: tuple[str, str], config: Any
) -> None:
    """Both addresses are in use: had it tried to bind one, the message would be about that."""
    path = config("nope: 1\n").partition("=")[2]
    bad = [word.replace("{file}", path) for word in bad]
    listen = [f"--listen-udp={taken[0]}", f"--listen-tcp={taken[1]}"]
    line = one_line(program(*listen, *bad))
    assert named in line
    assert SECRET not in line
    assert not any(address in line for address in taken)


def test_a_file_of_no_text_is_one_line(config: Any) -> None:
    assert "agent.yaml" in one_line(program(config(b"tenant: \xff\n")))
    assert "agent.yaml" in one_line(program(config(b"tenant: \0\n")))


def test_an_address_in_use_is_named(taken: tuple[str, str]) -> None:
    udp, tcp = taken
    assert udp in one_line(program(f"--listen-udp={udp}", "--listen-tcp="))
    assert tcp in one_line(program("--listen-udp=", f"--listen-tcp={tcp}"))
    assert tcp in one_line(program("--listen-udp=127.0.0.1:0", f"--listen-tcp={tcp}"))


def test_an_address_that_can_not_be_had_is_named() -> None:
    # One is for documents and of no machine, the other no host name, so nobody is asked for it.
    for address in ("192.0.2.1:9060", "a..b:9060"):
        assert address in one_line(program(f"--listen-udp={address}", "--listen-tcp="))


def test_check_prints_the_effective_options_without_secrets(config: Any) -> None:
    in_file = config("rating_api_token: hunter2\ntenant: acme\n")
    done = program("check", in_file, "--max-calls=7", rating_api_password=SECRET, product_tag="X")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line in ('tenant: "acme"', "max_calls: 7", 'product_tag: "X"', 'statsd_host: ""'):
        assert line in lines
    options = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    assert options == NAMES
    assert SECRET not in done.stdout
    assert any("route main" in line for line in lines)


def test_check_refuses_a_bad_file(config: Any) -> None:
    line = one_line(program("check", config("tenant: acme\nrating_api_tokn: hunter2\n")))
    assert "agent.yaml:2: " in line and "'rating_api_tokn'" in line
    assert SECRET not in line


def test_check_takes_the_former_agents_file_and_says_so(config: Any) -> None:
    done = program("check", config(FORMER_FILE))
    assert (done.returncode, done.stderr) == (0, "")
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert len([line for line in comments if "message_bus_uri" in line]) == 1
    assert "busword" not in done.stdout and "rediswordy" not in done.stdout


def test_check_output_is_a_configuration_file(tmp_path: Path, config: Any) -> None:
    # A cluster keeps no call records, so the two options do not go together.
    left_out = {*SECRETS, "cluster_url"}
    flags = [f"--{name}={sample(name, tmp_path)[0]}" for name in NAMES if name not in left_out]
    done = program("check", *flags)
    assert done.returncode == 0
    assert load(config(done.stdout, "again.yaml")) == load(*flags)
    assert load(*flags) != agent.Settings()


def test_call_records_of_a_cluster_are_refused() -> None:
    done = program("check", "--call_records=-", "--cluster_url=redis://127.0.0.1:1/0")
    assert done.returncode == 2
    assert "call_records: a cluster keeps no call records; allowed: " in done.stderr


@pytest.mark.parametrize("text", [*AWKWARD, "two\nlines", "tab\there", "back\\slash"])
def test_effective_options_are_read_again_as_they_were(text: str, config: Any) -> None:
    given = config(f"product_tag: {json.dumps([text], ensure_ascii=False)[1:-1]}\n")
    found = configuration(given, f"--transaction-tags={json.dumps([text, 'b c'])}")
    assert found.settings.product_tag == text
    assert found.settings.transaction_tags == (text, "b c")
    again = config("\n".join(agent.effective(found)), "again.yaml")
    assert load(again) == found.settings


def shown(value: Any) -> str:
    """A default as --help has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g} s"
    return str(value) if value not in ("", ()) else "none"


def test_help_has_each_option_once_with_its_default() -> None:
    done = program("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "run (the default; also agent)" in " ".join(done.stdout.split())
    text = " ".join(done.stdout.partition("\noptions:")[2].split())
    for name in NAMES:
        dashed = name.replace("_", "-")
        flags = re.findall(rf"--{dashed}\b(?!-)", text)
        assert len(flags) == 1, name
        entry = re.search(rf" --{dashed}(?: VALUE| \[VALUE\]|,)[^()]*\(default: ([^()]*)\)", text)
        assert entry, name
        assert entry[1].strip() == shown(DEFAULTS[name]), name
    assert len(re.findall(r"\(default: ", text)) == len(NAMES)


def test_help_shows_no_secrets(config: Any) -> None:
    done = program("--help", config("rating_api_password: hunter2"), rating_api_token=SECRET)
    assert done.returncode == 0
    assert SECRET not in done.stdout + done.stderr


def test_version() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, agent.__version__ + "\n", "")


# decode


def count_frames(path: Path) -> int:
    """The packets of a .hepl capture, by the total length of each frame in each connection."""
    count = 0
    streams: dict[int, bytes] = {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["ev"] != "data":
            streams = {} if event["ev"] == "stop" else streams
            streams.pop(event.get("conn"), None)
            continue
        octets = base64.b64decode(event["data"])
        if event["transport"] == "udp":
            count += 1
            continue
        stream = streams.get(event["conn"], b"") + octets
        while len(stream) >= 6 and len(stream) >= (size := int.from_bytes(stream[4:6], "big")):
            stream = stream[size:]
            count += 1
        streams[event["conn"]] = stream
    return count


def test_decode_all_captures() -> None:
    folder = harness.captures_folder()
    paths = sorted(folder.rglob("*.hepl"))
    assert {path.parent.name[-3:] for path in paths} >= {"udp"}
    done = program("decode", *map(str, paths))
    assert (done.returncode, done.stderr) == (0, "")
    heads: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if not line.startswith("    "):
            head = re.match(r"(.*\.hepl):\d+: HEP[123] \d{4}-\d\d-\d\dT[\d:.]+Z .* > ", line)
            assert head, line
            heads[head[1]] = heads.get(head[1], 0) + 1
    assert heads == {str(path): count_frames(path) for path in paths if count_frames(path)}
    assert sum(heads.values()) > len(paths)
    assert "    INVITE sip:" in done.stdout and "    SIP/2.0 200 " in done.stdout


@pytest.fixture
def invite() -> bytes:
    return hepbuild.sip_request(
        "INVITE", "sip:2001@b", call_id="c1", from_tag="f", cseq=1, branch="z9hG4bK1"
    )


def test_decode_a_plain_file_of_frames(tmp_path: Path, invite: bytes) -> None:
    path = tmp_path / "frames.bin"
    key = {"auth_key": SECRET, "capture_id": 7, "capture_name": "node", "correlation_id": "corr"}
    path.write_bytes(
        hepbuild.hep3(invite, **key)
        + hepbuild.hep3(invite, src=("2001:db8::1", 5060), dst=("2001:db8::2", 5061))
        + hepbuild.hep3(invite, compress="zlib")
    )
    done = program("decode", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    heads = [line for line in done.stdout.splitlines() if not line.startswith("    ")]
    assert len(heads) == 3
    when = "2026-09-21T14:13:20.123Z"
    assert heads[0].startswith(f"{path}:1: HEP3 {when} 10.0.0.1 port 5060 > 10.0.0.2 port 5060")
    assert "capture id 7" in heads[0] and "'node'" in heads[0] and "'corr'" in heads[0]
    assert "2001:db8::1 port 5060 > 2001:db8::2 port 5061" in heads[1]
    assert done.stdout.count("    INVITE sip:2001@b SIP/2.0\n") == 3
    assert done.stdout.count("    Call-ID: c1\n") == 3
    assert SECRET not in done.stdout


def test_decode_hep2(tmp_path: Path, invite: bytes) -> None:
    path = tmp_path / "hep2.bin"
    for padded in (True, False):
        path.write_bytes(hepbuild.hep2(invite, capture_id=9, padded=padded))
        done = program("decode", str(path))
        assert (done.returncode, done.stderr) == (0, "")
        assert ":1: HEP2 2026-09-21T14:13:20.123Z 10.0.0.1 port 5060 > 10.0.0.2" in done.stdout
        assert "capture id 9" in done.stdout
        assert "    INVITE sip:2001@b SIP/2.0\n" in done.stdout


def hepl(*events: Any) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def datagram(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"t": 0.0, "ev": "data", "transport": "udp", "conn": 0, "data": encoded}


GOOD = datagram(hepbuild.hep3(b"x"))
DAMAGED = {
    "junk": b"junk",
    "junk after a frame": hepbuild.hep3(b"x") + b"junk",
    "a frame cut short": hepbuild.hep3(b"x") + hepbuild.hep3(b"y")[:-1],
    "a head cut short": hepbuild.hep3(b"x") + b"HEP3",
    "a length of nothing": b"HEP3\0\0",
    "JSON cut short": hepl(GOOD)[:-10],
    "JSON of another kind": hepl(GOOD) + b"[1]\n",
    "no data": hepl({"ev": "data", "transport": "udp", "conn": 0}),
    "no transport": hepl({"ev": "data", "data": "AAAA", "conn": 0}),
    "data that is no text": hepl(GOOD | {"data": 5}),
    "data that is no base64": hepl(GOOD | {"data": "x"}),
    "not UTF-8": hepl(GOOD) + b'{"ev": "\xff"}\n',
    "a stream without framing": hepl(GOOD | {"transport": "tcp", "data": "AAAAAAAAAAAA"}),
}


def test_decode_damaged_files(tmp_path: Path) -> None:
    """Each brings its line, and the good file behind them is decoded all the same."""
    paths = {}
    for number, (name, data) in enumerate(DAMAGED.items()):
        paths[name] = tmp_path / f"{number}.bin"
        paths[name].write_bytes(data)
    good = tmp_path / "good.hepl"
    good.write_bytes(hepl(GOOD))
    missing = tmp_path / "missing"
    names = [*map(str, paths.values()), str(missing), str(tmp_path), str(good)]
    done = program("decode", *names)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr, done.stderr
    told = {line.partition(" ")[2].partition(":")[0] for line in done.stderr.splitlines()}
    silent = [name for name, path in paths.items() if str(path) not in told]
    assert silent == [], "damage that is not told of"
    assert told == {str(path) for path in (*paths.values(), missing, tmp_path)}
    assert len(done.stderr.splitlines()) == len(names) - 1
    assert f"{good}:1: HEP3 " in done.stdout


def test_decode_tells_a_malformed_packet_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "some.hepl"
    path.write_bytes(hepl(GOOD, datagram(b"junk"), datagram(hepbuild.hep3(b"after"))))
    done = program("decode", str(path))
    assert f"{path}:2: malformed: " in done.stdout
    assert "    after\n" in done.stdout


def test_decode_without_a_file() -> None:
    assert "allowed" in one_line(program("decode"))


def test_decode_lets_no_control_character_through(tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    evil = b"\x1b[31m \x07\x08\x00 \x7f \x9b31m \xc2\x9b31m \r overwritten \xe2\x80\xae bidi"
    payload = (
        b"INVITE sip:a SIP/2.0\r\nX-Evil: " + evil + b"\r\nX: \xc3\xa4\r\n\r\n\x1b]0;title\x07"
    )
    frame = hepbuild.hep3(payload, capture_name=evil, correlation_id=evil, auth_key=evil)
    path.write_bytes(frame + hepbuild.hep3(evil))
    done = program("decode", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
    assert r"\x1b[31m" in done.stdout, "it is shown, escaped"
    assert "X: \u00e4" in done.stdout


def test_decode_into_a_reader_that_has_seen_enough() -> None:
    path = next((harness.SELECTION / "opensips-3.6" / "transaction-tcp").glob("01_*.hepl"))
    command = [sys.executable, PROGRAM, "decode", *[str(path)] * 50]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline().startswith(str(path).encode())
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait(timeout=harness.DEADLINE) == 0
