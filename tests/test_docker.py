"""The Docker files and server configurations, as far as they can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import harness
import healthcheck
import rating_agent_hep as agent

COMPOSE = (harness.ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
DOCKERFILE = (harness.ROOT / "Dockerfile").read_text(encoding="utf-8")
MAKEFILE = (harness.ROOT / "Makefile").read_text(encoding="utf-8")
OPENSIPS = harness.ROOT / "conf" / "opensips"
STAGES = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M)


def without_comments(text: str) -> str:
    return re.sub(r"^\s*#(?!!).*$", "", text, flags=re.M)


def test_compose_file_against_the_published_schema() -> None:
    schema = json.loads((harness.ROOT / "tests" / "compose-spec" / "schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(COMPOSE))
    # The schema does tell wrong from right.
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({"services": {"a": {"imagee": "x"}}})


def test_profiles_are_those_of_the_issue() -> None:
    profiles: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", ["default"]):
            profiles.setdefault(profile, set()).add(name)
    assert profiles == {
        "default": {"rating-agent-hep", "sandbox"},
        "cluster": {"redis", "agent-1", "agent-2", "balancer"},
        "opensips": {"opensips", "carrier"},
        "kamailio": {"kamailio", "carrier"},
        "tester": {"tester"},
        "canyan": {"mongodb", "rabbitmq", "rating-api", "rating-engine", "rating-agent"},
        "statsd": {"statsd-exporter"},
    }
    (names,) = re.findall(r"^ALL_PROFILES := .*--profile ,(.+)\)$", MAKEFILE, re.M)
    assert set(names.split()) == set(profiles) - {"default"}


def test_every_path_service_volume_and_stage_that_is_named_is_there() -> None:
    volumes = yaml.safe_load(COMPOSE)["volumes"]
    for name, service in SERVICES.items():
        assert ("image" in service) and service.get("build", {}).get("target", "agent") in STAGES
        assert set(service.get("depends_on", [])) <= set(SERVICES), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (harness.ROOT / source).exists() if source[0] == "." else source in volumes
            assert there, (name, volume)
    assert STAGES[-1] == "agent", "the default image is the last stage"


def test_every_variable_has_a_default_and_every_host_is_a_service() -> None:
    variables = re.findall(r"\$\{([^}]+)\}", COMPOSE)
    assert len(variables) > 10 and all(":-" in variable for variable in variables)
    text = without_comments(COMPOSE) + MAKEFILE + (OPENSIPS / "opensips.cfg").read_text()
    text += without_comments((harness.ROOT / "conf" / "nginx" / "nginx.conf").read_text())
    before = r"https?://|mongodb://|redis://|sip:|\}@|--target |_HOST=|server (?=agent)"
    hosts = set(re.findall(rf"(?:{before})([a-z][a-z-]+\d?)", text))
    hosts |= set(re.findall(r"\[hid\] ([\w-]+):9060", text))
    assert hosts == {
        *("rating-agent-hep", "sandbox", "carrier", "opensips", "kamailio", "mongodb"),
        *("rabbitmq", "rating-api", "rating-agent", "statsd-exporter"),
        *("redis", "agent-1", "agent-2"),
    }
    assert hosts <= set(SERVICES)


def test_the_agent_knows_every_option_that_it_is_given() -> None:
    names = set(re.findall(r"RATING_AGENT_HEP_([A-Z_]+)", COMPOSE + DOCKERFILE))
    assert {"STATE_DIR", "RATING_API_URL", "SIP_LOCAL_DOMAINS", "STATSD_HOST"} <= names
    assert names <= {option.name.upper() for option in agent.OPTIONS}
    environment = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for name, value in SERVICES["rating-agent-hep"]["environment"].items()
    }
    settings = agent.load_configuration([], environment).settings
    assert settings.rating_api_url == "http://sandbox:8000"
    grace = float(SERVICES["rating-agent-hep"]["stop_grace_period"].removesuffix("s"))
    assert grace > settings.shutdown_timeout


def test_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    allowed = [
        line[1:]
        for line in (harness.ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for source in line.split()[:-1]
    ]
    assert "rating_agent_hep.py" in sources
    for source in sources:
        assert (harness.ROOT / source).exists(), source
        assert any(fnmatch(source, p) or source.startswith(f"{p}/") for p in allowed), source
    # Also what pip reads while it builds the package.
    assert {"setup.py", "README.md", "pyproject.toml"} <= set(sources)


def test_the_image_of_the_agent() -> None:
    stage = DOCKERFILE[DOCKERFILE.index(" AS agent\n") :]
    assert "\nUSER 10001\n" in stage and "pip" not in stage
    assert '\nENTRYPOINT ["/opt/agent/bin/rating-agent-hep"]\n' in stage, "no shell: SIGTERM"
    state = "/var/lib/rating-agent-hep"
    assert f"\nENV RATING_AGENT_HEP_STATE_DIR={state} \\\n" in stage
    assert f"\nVOLUME {state}\n" in stage
    assert SERVICES["rating-agent-hep"]["volumes"] == [f"state:{state}"]
    assert "\nHEALTHCHECK " in stage


def test_hadolint() -> None:
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        reason = "hadolint has no wheel for this platform"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    done = subprocess.run(
        [found, "--no-color", str(harness.ROOT / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_healthcheck_sees_an_agent_and_its_absence(tmp_path: Path) -> None:
    with harness.AgentProcess("--rating-api-url=http://127.0.0.1:1") as running:
        tcp, udp = (f"{host}:{port}" for host, port in (running.tcp, running.udp))
        by_tcp = {"RATING_AGENT_HEP_LISTEN_TCP": tcp}
        by_udp = {"RATING_AGENT_HEP_LISTEN_TCP": "", "RATING_AGENT_HEP_LISTEN_UDP": udp}
        assert healthcheck.healthy(by_tcp) and healthcheck.healthy(by_udp)
        script = str(harness.ROOT / "scripts" / "healthcheck.py")
        assert (
            subprocess.run([sys.executable, script], env={**os.environ, **by_tcp}).returncode == 0
        )
        assert running.stop() == 0
    assert not healthcheck.healthy(by_tcp) and not healthcheck.healthy(by_udp)
    assert subprocess.run([sys.executable, script], env={**os.environ, **by_tcp}).returncode == 1


def test_healthcheck_asks_healthz(capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--rating-api-url=http://127.0.0.1:1", "--listen-status=:0")
    with harness.AgentProcess(*options, "--status-max-silence=1") as running:
        by_status = {"RATING_AGENT_HEP_LISTEN_STATUS": running.status.removeprefix("http://")}
        harness.wait_until(lambda: not healthcheck.healthy(by_status), "it has heard nothing")
        assert "no SIP over HEP came" in capfd.readouterr().out
        assert running.stop() == 0
    with harness.AgentProcess(*options) as running:
        port = running.status.rpartition(":")[2]
        for host in ("", "0.0.0.0", "127.0.0.1"):
            assert healthcheck.healthy({"RATING_AGENT_HEP_LISTEN_STATUS": f"{host}:{port}"})
        assert running.stop() == 0
    assert not healthcheck.healthy({"RATING_AGENT_HEP_LISTEN_STATUS": f":{port}"})


def test_makefile_has_the_targets_of_the_tutorial() -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M))
    assert targets >= {
        *("docker-build", "docker-pull", "docker-start", "docker-start-opensips"),
        *("docker-start-kamailio", "docker-test-opensips", "docker-test-kamailio", "docker-test"),
        *("test-opensips", "test-kamailio", "test-images", "docker-logs", "docker-stop"),
    }
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=harness.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    dry = ["make", "--dry-run", "docker-test", "docker-test-opensips", "docker-test-kamailio"]
    said = subprocess.run(dry, cwd=harness.ROOT, capture_output=True, text=True).stdout
    files = re.findall(r"/scenarios/(\S+)", said)
    assert len(files) > 10
    assert all((harness.ROOT / "tests" / "scenarios" / file).exists() for file in files)


def test_opensips_configuration_has_what_the_agent_needs() -> None:
    """Only its text: no OpenSIPS is to be had here."""
    text = without_comments((OPENSIPS / "opensips.cfg").read_text(encoding="utf-8"))
    for left, right in ("{}", "()", "[]"):
        assert text.count(left) == text.count(right)
    assert text.count('"') % 2 == 0
    assert "[hid] rating-agent-hep:9060; transport=tcp; version=3" in text
    since_36 = (OPENSIPS / "opensips-3.6.cfg").read_text(encoding="utf-8")
    parameters = dict(re.findall(r'modparam\("proto_hep", "(\w+)", (\d+)\)', since_36))
    assert 5 < int(parameters["hep_max_retries"]) < 1 << 15
    assert int(parameters["hep_retry_cooldown"]) <= 5
    assert '"trace_id", "[tid]uri=hep:hid"' in text and "socket=hep_tcp:" in text
    mirror = 'trace("tid", "m", "sip");'
    assert re.search(r"^route \{\s*" + re.escape(mirror), text, re.M)
    for name in ("onreply_route", "local_route"):
        assert re.search(rf"^{name} \{{\s*" + re.escape(mirror) + r"\s*\}", text, re.M), name
    assert "record_route();" in text and "ds_select_dst(1, 0)" in text
    modules = set(re.findall(r'loadmodule "(\w+)\.so"', text))
    assert set(re.findall(r'modparam\("(\w+)"', text)) <= modules
    folder = OPENSIPS / re.findall(r'"text:///etc/opensips/(\w+)"', text)[0]
    columns, row = (folder / "dispatcher").read_text().splitlines()
    # A colon inside a value is escaped.
    assert len(columns.split()) == len(re.split(r"(?<!\\):", row)) == 10
    assert "sip\\:carrier\\:5060" in row
    assert "dispatcher:9" in (folder / "version").read_text().splitlines()


def test_readme_and_pages_show_the_settings_of_the_configurations() -> None:
    pages = {name: harness.ROOT / "docs" / f"{name}.md" for name in ("opensips", "kamailio")}
    for name, page in pages.items():
        text = (harness.ROOT / "conf" / name / f"{name}.cfg").read_text(encoding="utf-8")
        shown = page.read_text(encoding="utf-8")
        settings = re.findall(
            r'modparam\("(?:proto_hep|siptrace|tracer)", "(\w+)", ([^)]+)\)', text
        )
        assert len(settings) >= 5
        for parameter, value in settings:
            if re.fullmatch(r"\d+", value):
                assert f'"{parameter}", {value})' in shown, (name, parameter)
            else:
                assert f'"{parameter}", "' in shown, (name, parameter)


def test_statsd_mapping_is_of_metrics_that_the_agent_sends() -> None:
    mapping = yaml.safe_load((harness.ROOT / "conf" / "statsd" / "mapping.yaml").read_text())
    module = (harness.ROOT / "rating_agent_hep.py").read_text(encoding="utf-8")
    prefix = f"{agent.Settings().statsd_prefix}."
    for entry in mapping["mappings"]:
        assert entry["match"].startswith(prefix) and entry["match"].endswith(".*")
        name = entry["match"].removeprefix(prefix).rstrip(".*")
        if name.startswith("tenants."):
            assert name.removeprefix("tenants.") in agent.Traffic.__slots__, entry
        else:
            assert f"{name}." in module, entry
