"""What the documents and the example configuration say is what the module does."""

from __future__ import annotations

import re
from pathlib import Path

import options_table
import pytest

import harness
import rating_agent_hep as agent

PAGES = [
    *(harness.ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")),
    *sorted((harness.ROOT / "docs").glob("*.md")),
]


def test_configuration_page_has_the_options_table_of_the_module() -> None:
    """`make docs` writes it."""
    page = (harness.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert options_table.insert(page) == page
    assert all(f"| `{option.name}` |" in page for option in agent.OPTIONS)


def test_configuration_page_shows_the_example_routes() -> None:
    page = (harness.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown, *_ = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert shown in (harness.ROOT / "conf" / "routes.yaml").read_text(encoding="utf-8")


def test_readme_is_short_and_names_every_page() -> None:
    readme = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    names = {str(path.relative_to(harness.ROOT)) for path in PAGES} - {"README.md"}
    assert {name for name in names if f"]({name})" not in readme} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the repository, and headings of the page that a link names."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize(
    ("page", "sentence", "limit"),
    [
        ("security", r"connections to each listener \| ([\d,]+),", agent.MAX_CONNECTIONS),
        ("security", r"both listeners \| (\d+) \|", agent.MAX_CONNECTIONS_PER_SENDER),
        ("security", r"time for a frame.* \| (\d+) s", agent.FRAME_TIMEOUT),
        ("security", r"TLS handshake \| (\d+) s", agent.HANDSHAKE_TIMEOUT),
        ("security", r"silent for (\d+) s\s+makes room", agent.CROWDED_IDLE),
        ("security", r"the last ([\d,]+) addresses", agent.MAX_SENDERS),
        ("reliability", r"At most ([\d,]+) events for one API", agent.MAX_EVENTS_IN_MEMORY),
        ("reliability", r"`state_dir`, ([\d,]+) events", agent.MAX_WAITING_EVENTS),
        ("reliability", r"for good, up to ([\d,]+) events", agent.MAX_REJECTED),
        ("reliability", r"groups that are (\d+) ms", agent.JOURNAL_INTERVAL * 1000),
        ("reliability", r"does not answer for (\d+) s", agent.JOURNAL_STALL),
        ("cluster", r"is (\d+) s longer than", agent.LEASE_MARGIN),
        ("cluster", r"entry waits ([\d.]+) s before", agent.HOLD),
        ("cluster", r"append every (\d+) ms", agent.APPEND_INTERVAL * 1000),
        ("cluster", r"ms, (\d+) packets at most", agent.APPEND_GROUP),
        ("cluster", r"; (\d+) MB of UDP packets", agent.MAX_UNAPPENDED / 2**20),
        ("cluster", r"more than (\d+) s\.", agent.LAG_UNHEALTHY),
        ("charging", r"over ([\d,]+) characters, the API", agent.MAX_TEXT),
        ("charging", r"\((\d+) minutes after its end\)", agent.REMEMBERED / 60),
    ],
)
def test_limits_are_those_of_the_module(page: str, sentence: str, limit: float) -> None:
    text = (harness.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (shown,) = re.findall(sentence, text)
    assert float(shown.replace(",", "")) == limit


def test_architecture_is_that_of_the_module() -> None:
    page = (harness.ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    module = (harness.ROOT / "rating_agent_hep.py").read_text(encoding="utf-8")
    part = page[page.index("## The rooms") : page.index("## The promises")]
    assert re.findall(r"^\| ([\w :]+) \| [^|]+ \|$", part, re.M)[1:] == re.findall(
        r"^# Room: (.+)$", module, re.M
    )
    for name in re.findall(r"`([\w./-]+)`", page):
        if "/" in name or name.endswith((".py", ".yaml")):
            assert (harness.ROOT / name).exists() or (harness.ROOT / "conf" / name).exists(), name
        else:
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", module), name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_shows_the_demo_as_it_prints() -> None:
    readme = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    for line in ("what the agent said:", "rated transactions", "call begun:", "call ended:"):
        assert line in readme


def test_readme_installs_the_unit_as_the_unit_says() -> None:
    readme = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    unit = (harness.ROOT / "conf" / "rating-agent-hep.service").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```\n(python3 -m venv .*?)^```$", readme, re.M | re.S)
    assert commands.count("\n") == 5
    assert [line for line in commands.splitlines() if f"#   {line}\n" not in unit] == []


def test_example_configuration_has_every_option_with_its_default() -> None:
    text = (harness.ROOT / "conf" / "rating-agent-hep.yaml").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^#([a-z_]+): (.*)$", text, re.M))
    assert list(lines) and set(lines) == {option.name for option in agent.OPTIONS}
    # These show an example in the place of an empty default.
    examples = {"sip_local_domains", "account_tag_match_regexp", "routes"}
    examples |= {"listen_tls", "tls_cert", "tls_key", "hep_allow", "hep_forward"}
    examples |= {"hep_auth_key_file", "rating_api_token_file", "cluster_password_file"}
    shown = {name: value for name, value in lines.items() if name not in examples}
    path = harness.ROOT / "conf" / "rating-agent-hep.yaml"
    assert agent.load_configuration(["-c", str(path)], {}).settings == agent.Settings()
    flags = [f"--{name}={value.strip(chr(34)).replace('[]', '')}" for name, value in shown.items()]
    assert agent.load_configuration(flags, {}).settings == agent.Settings()


def test_example_routes_are_valid() -> None:
    path = str(harness.ROOT / "conf" / "routes.yaml")
    rules = agent.load_rules(agent.Settings(routes=path))
    assert [rule.route.name for rule in rules] == ["wholesale", "internal", "main"]
    text = (harness.ROOT / "conf" / "routes.yaml").read_text(encoding="utf-8")
    steps = (*agent._TRANSACTION_KEYS, *agent._REWRITE_KEYS)
    for key in (*agent._MATCH_KEYS, *agent._ROUTE_VALUES, "rewrite", *steps):
        assert re.search(rf"\b{key}\b", text), f"conf/routes.yaml does not explain {key}"


def test_changelog_and_licence() -> None:
    changelog = (harness.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {agent.__version__} " in changelog
    assert "MIT License" in (harness.ROOT / "LICENSE").read_text(encoding="utf-8")
