"""What README, docs/ and conf/ show of OpenSIPS, checked for faults that one host or version hides.

OpenSIPS is no package of Debian's, so its lines can't be run here; docs/opensips.md says where they
were. Each rule below is a fault that a live server had.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest
import yaml

import harness

CONFIGURATIONS = sorted((harness.ROOT / "conf" / "opensips").glob("*.cfg"))
DOCUMENTS = [harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").glob("*.md"))]
SINCE_36 = ("hep_max_retries", "hep_retry_cooldown")
MARK = "# OpenSIPS 3.6 and 4.0"  # over lines that 3.4 and 3.5 refuse to start with
LOOPBACK = re.compile(r"\bhep_(?:udp|tcp|tls):(?:127\.|localhost\b|lo\b|\[?(?:0*:)+0*1\b)")


def blocks(path: Path) -> list[str]:
    """The pieces that somebody copies: the fenced parts of a page, or a whole configuration."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S) if path.suffix == ".md" else [text]


def faults(block: str) -> list[str]:
    """What is wrong with lines of opensips.cfg; empty where nothing is."""
    lines = block.splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = []
    if LOOPBACK.search(code):
        found.append("a HEP socket on loopback: the mirror can't leave the host")
    for target in re.findall(r'"hep_id", "([^"]+)"', code):
        version = re.search(r"version=(\d)", target)
        transport = re.search(r"transport=(\w+)", target)
        older = version is not None and version[1] != "3"
        needed = "udp" if older else transport[1] if transport else "tcp"
        if not re.search(rf"^\s*socket\s*=\s*hep_{needed}:", code, re.M):
            found.append(f"hep_id goes over {needed}, and there is no socket=hep_{needed}")
        if "hep_async_max_postponed_chunks" not in code and needed != "udp":
            found.append("32 messages may wait, a tenth of a second")
    if any(name in code for name in SINCE_36) and not block.startswith(MARK):
        found.append("3.4 and 3.5 do not start with these lines")
    routes = {name for name in ("route", "local_route") if re.search(rf"^{name} \{{", code, re.M)}
    if "trace(" in code and "route" in routes and "local_route" not in routes:
        found.append("what the proxy sends itself is not mirrored")
    if re.search(r'^local_route \{\s*trace\([^)]*"m"', code, re.M) and "onreply_route" not in code:
        found.append("the answer to the proxy's own BYE is not mirrored")
    for before in re.findall(r'^(.*)trace\([^)]*, "d"', code, re.M | re.S):
        if "create_dialog()" not in before.rpartition("\n}")[2]:
            found.append("scope d without create_dialog() warns at each request")
    return found


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGURATIONS], ids=lambda path: path.name)
def test_no_document_shows_a_fault(path: Path) -> None:
    assert [fault for block in blocks(path) for fault in faults(block)] == []
    assert LOOPBACK.search(path.read_text(encoding="utf-8")) is None, "also outside of the blocks"


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("socket=hep_tcp:127.0.0.1:6061\n", "on loopback"),
        ("socket = hep_udp:localhost:6061\n", "on loopback"),
        ("socket=hep_tls:[::1]:6061\n", "on loopback"),
        ("socket=hep_tcp:lo:6061\n", "on loopback"),
        ('socket=hep_tcp:*:1\nmodparam("", "hep_id", "[a] b:1; transport=udp")\n', "over udp"),
        ('socket=hep_tcp:*:1\nmodparam("", "hep_id", "[a] b:1; version=2")\n', "over udp"),
        ('socket=hep_udp:*:1\nmodparam("", "hep_id", "[a] b:1")\n', "over tcp"),
        ('socket=hep_tcp:*:1\nmodparam("", "hep_id", "[a] b:1; transport=tls")\n', "over tls"),
        ('socket=hep_tcp:*:1\nmodparam("", "hep_id", "[a] b:1")\n', "may wait"),
        ('modparam("proto_hep", "hep_max_retries", 32767)\n', "do not start"),
        ('route {\n    trace("tid", "m", "sip");\n}\n', "sends itself"),
        ('local_route {\n    trace("tid", "m", "sip");\n}\n', "own BYE is not"),
        ('route {\n    trace("tid", "d", "sip");\n}\nlocal_route {\n}\n', "warns"),
    ],
)
def test_the_rules_tell_wrong_from_right(block: str, fault: str) -> None:
    assert any(fault in found for found in faults(block)), faults(block)


def test_documents_name_the_agent_by_its_address() -> None:
    """OpenSIPS looks a name up for each message, and a DNS server that is silent stops calls."""
    text = "\n".join(block for path in DOCUMENTS for block in blocks(path))
    hosts = re.findall(r'"hep_id", "\[\w+\] *([^;"]+):\d+', text)
    assert hosts and {str(ipaddress.ip_address(host)) for host in hosts} == set(hosts)


def test_the_lines_are_there_at_all() -> None:
    """A rule about lines that nobody shows would hold for ever."""
    for path in (harness.ROOT / "README.md", harness.ROOT / "docs" / "opensips.md"):
        shown = "\n".join(blocks(path))
        words = ["socket=hep_tcp:", "local_route {", "hep_async_max_postponed_chunks", *SINCE_36]
        assert [word for word in words if word not in shown] == [], path
    page = "\n".join(blocks(harness.ROOT / "docs" / "opensips.md"))
    assert '"d"' in page and "socket=hep_udp:" in page and "socket=hep_tls:" in page


def test_each_version_has_a_configuration_that_it_starts_with() -> None:
    """3.6 is opensips.cfg and the lines that 3.4 does not know, nothing else."""
    older, newer = (path.read_text(encoding="utf-8") for path in reversed(CONFIGURATIONS))
    assert [path.name for path in CONFIGURATIONS] == ["opensips-3.6.cfg", "opensips.cfg"]
    assert not any(name in older for name in SINCE_36)
    code = [line for line in newer.splitlines() if line and not line.startswith("#")]
    assert code[0] == 'include_file "opensips.cfg"'
    names = [re.findall(r'^modparam\("proto_hep", "(\w+)", \d+\)$', line) for line in code[1:]]
    assert names == [[name] for name in SINCE_36]
    page = (harness.ROOT / "docs" / "opensips.md").read_text(encoding="utf-8")
    assert all(line in page for line in code[1:])


def test_the_container_starts_with_the_configuration_of_its_version() -> None:
    services = yaml.safe_load((harness.ROOT / "docker-compose.yaml").read_text())["services"]
    command = services["opensips"]["entrypoint"]
    assert ":-opensips/opensips:3.6}" in services["opensips"]["image"]
    assert "/etc/opensips/${OPENSIPS_CONFIG:-opensips-3.6.cfg}" in command
    assert command[command.index("-m") + 1] == "512"
