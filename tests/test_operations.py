"""docs/operations.md has every metric and log event of the module, and no other."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness
import rating_agent_hep as agent

TREE = ast.parse((harness.ROOT / "rating_agent_hep.py").read_text(encoding="utf-8"))
PAGE = (harness.ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


Names = dict[str, list[ast.expr]]


def texts(node: ast.AST, names: Names) -> set[str]:
    """The texts that an expression may be; * stands for what can't be told.

    ``names`` has what the function that it stands in assigns to its variables.
    """
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) | texts(node.orelse, names)
    if isinstance(node, ast.Name):
        return {text for value in names.get(node.id, ()) for text in texts(value, {})}
    if isinstance(node, ast.JoinedStr):
        found = {""}
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            ends = texts(inner, names) or {"*"}
            found = {text + end for text in found for end in ends}
        return found
    return set()


def functions() -> Iterator[tuple[ast.AST, Names]]:
    """Each function with what it assigns to plain names, a tuple's parts one by one."""
    for function in ast.walk(TREE):
        if not isinstance(function, ast.FunctionDef):
            continue
        names: Names = {}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign):
                continue
            target, value = node.targets[0], node.value
            pairs: Any = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
            for one, what in pairs:
                if isinstance(one, ast.Name):
                    names.setdefault(one.id, []).append(what)
        yield function, names


def argument_texts(index: int, *wanted: str) -> set[str]:
    """What the calls of functions and methods of these names have as one of their arguments."""
    found = set()
    for function, names in functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and len(node.args) > index:
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in wanted:
                    found |= texts(node.args[index], names)
    return found


def first_texts(*wanted: str) -> set[str]:
    return argument_texts(0, *wanted)


def events_of_the_code() -> set[str]:
    found = argument_texts(1, "_log_whole", "_warn")
    for function, names in functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "event":
                        found |= texts(value, names)
    kinds = first_texts("_notice") | {"begin", "end"}
    found |= {f"call_{kind}" for kind in kinds}
    found |= {f"dropped_{kind}" for kind in first_texts("_shut_out")}
    # These stand for what was just found.
    return found - {"call_*", "dropped_*"}


def metrics_of_the_code() -> dict[str, str]:
    """Each name, or pattern, with its kind."""
    found = dict.fromkeys(first_texts("count"), "counter")
    # The module's own clock is called time as well, without a name.
    found |= {name: "timer" for name in first_texts("time") if "." in name}
    whole = agent.Agent(agent.Settings(), [], agent.WarningLimiter())
    found |= {re.sub(r"^(calls\.state\.).*", r"\1*", name): "gauge" for name in whole.gauges()}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("gauges["):
            target = node.targets[0]
            assert isinstance(target, ast.Subscript)
            found |= dict.fromkeys(texts(target.slice, {}), "gauge")
    kinds = {f"packets.dropped.{kind}" for kind in first_texts("_drop", "_shut_out")}
    for layer in ("Hep", "Sip"):
        kinds |= {
            f"packets.malformed.{layer.lower()}_{kind.replace('-', '_')}"
            for kind in first_texts(f"{layer}Error")
        }
    kinds |= {f"packets.malformed.{kind}" for kind in first_texts("malformed")}
    found |= dict.fromkeys(kinds, "counter")
    # These stand for what was just found.
    malformed = [f"packets.malformed.{layer}*" for layer in ("", "hep_", "sip_")]
    for pattern in ("packets.dropped.*", *malformed):
        del found[pattern]
    return found


def rows(heading: str) -> dict[str, str]:
    """The tables below a heading: first column to second."""
    part = re.split(rf"^{heading}$", PAGE, flags=re.M)[1]
    part = re.split(r"^## ", part, flags=re.M)[0]
    lines = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", part, re.M)
    assert len(lines) == len({name for name, _, _ in lines})
    assert all(len(meaning) > 7 for _, _, meaning in lines)
    return {name: kind for name, kind, _ in lines}


def compare(code: set[str], page: set[str]) -> list[str]:
    """A pattern of the code is on the page as it is, or spelled out there."""
    faults = [
        f"not on the page: {name}"
        for name in sorted(code)
        if not any(fnmatchcase(shown, name) for shown in page)
    ]
    faults += [
        f"not in the code: {shown}"
        for shown in sorted(page)
        if not any(fnmatchcase(shown, name) for name in code)
    ]
    return faults


def test_every_metric_is_on_the_page_and_no_other() -> None:
    code, page = metrics_of_the_code(), rows("## Metrics")
    assert len(page) > 50
    assert compare(set(code), set(page)) == []
    for shown, kind in page.items():
        kinds = {code[name] for name in code if fnmatchcase(shown, name)}
        assert kind in kinds, (shown, kind, kinds)


def test_every_log_event_is_on_the_page_and_no_other() -> None:
    page = rows("## Log events")
    assert len(page) > 30
    assert compare(events_of_the_code(), set(page)) == []


def test_the_comparison_tells_wrong_from_right() -> None:
    assert compare({"a.b", "c.*"}, {"a.b", "c.d"}) == []
    assert compare({"a.b"}, set()) == ["not on the page: a.b"]
    assert compare(set(), {"a.b"}) == ["not in the code: a.b"]


def prometheus_names(suffix: str) -> set[str]:
    """The families of all metrics, as /metrics ("_total") or statsd-exporter ("") has them."""
    found = set()
    for name, kind in rows("## Metrics").items():
        family = f"rating_agent_hep_{agent.prometheus_name(name)[0]}"
        if kind == "timer" and suffix:
            found |= {f"{family}_seconds_count", f"{family}_seconds_sum"}
        elif kind == "timer":
            # statsd-exporter's summaries, in seconds.
            found |= {family, f"{family}_count", f"{family}_sum"}
        else:
            found.add(family + suffix * (kind == "counter"))
    return found


def test_alerts_are_of_metrics_that_are_there() -> None:
    part = PAGE[PAGE.index("## Alerts") : PAGE.index("## Sizing")]
    used = set(re.findall(r"rating_agent_hep_\w+", part))
    assert len(used) > 5
    assert used <= prometheus_names("_total") | {"rating_agent_hep_healthy"}
    for label, value in re.findall(r'\{(\w+)="([a-z_]+)"\}', part):
        assert (label, value) in {
            *(("state", state) for state in agent.STATES),
            ("reason", "no_account"),
            ("job", "rating-agent-hep") if "-" in value else ("reason", "no_account"),
        }


def test_dashboard_is_of_metrics_that_statsd_exporter_has() -> None:
    text = (harness.ROOT / "conf" / "grafana" / "rating-agent-hep.json").read_text()
    dashboard: dict[str, Any] = json.loads(text)
    queries = [x["expr"] for panel in dashboard["panels"] for x in panel.get("targets", [])]
    assert len(queries) >= 10
    used = {name for query in queries for name in re.findall(r"rating_agent_hep_\w+", query)}
    assert used and used <= prometheus_names("")
    mapping = yaml.safe_load((harness.ROOT / "conf" / "statsd" / "mapping.yaml").read_text())
    labels = {entry["name"]: set(entry["labels"]) for entry in mapping["mappings"]}
    assert set(labels) <= used, "what has parts is shown by its parts"
    for query in queries:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        (name, *_) = re.findall(r"rating_agent_hep_\w+", query)
        for wanted in re.findall(r"by \((\w+)\)|\{(\w+)=", query):
            label = "".join(wanted)
            assert label in labels.get(name, set()) | {"quantile", "instance"}, query
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24 and panel["title"]


# The systemd unit


UNIT = harness.ROOT / "conf" / "rating-agent-hep.service"
SOCKETS = sorted(UNIT.parent.glob("*.socket"))


def unit(path: Path = UNIT, section: str = "Service") -> dict[str, list[str]]:
    """The settings of one section, each with its values."""
    text = path.read_text(encoding="utf-8")
    part = text.partition(f"[{section}]\n")[2].partition("\n[Install]")[0]
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", part, re.M):
        found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_the_agent_as_it_wants_to_be_started() -> None:
    service = unit()
    assert service["Type"] == ["notify"] and int(service["WatchdogSec"][0]) >= 10
    assert int(service["TimeoutStopSec"][0]) > agent.Settings().shutdown_timeout
    assert int(service["LimitNOFILE"][0]) >= agent.MAX_CONNECTIONS
    (start,), (before,) = service["ExecStart"], service["ExecStartPre"]
    assert before == f"{start} check"
    program, *options = start.split()
    # The package installs a program of that name, and the folders are those of the unit.
    assert program.endswith("/bin/rating-agent-hep")
    assert options[-2:] == ["--state-dir", f"%S/{service['StateDirectory'][0]}"]
    config = str(harness.ROOT / "conf" / "rating-agent-hep.yaml")
    assert options[0] == "-c" and options[1].endswith("/rating-agent-hep.yaml")
    settings = agent.load_configuration(["-c", config, *options[2:]], {}).settings
    assert settings.state_dir == options[-1]
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(service["RestrictAddressFamilies"][0].split())


def test_the_socket_units_are_of_the_service_and_of_options() -> None:
    names = [socket.name for socket in SOCKETS]
    assert " ".join(sorted(names, reverse=True)) == unit()["Sockets"][0] and len(names) == 2
    installed = UNIT.read_text(encoding="utf-8").partition("[Unit]")[0]
    for name, listen in zip(sorted(names), ("ListenStream", "ListenDatagram"), strict=True):
        settings = unit(UNIT.with_name(name), "Socket")
        assert settings["Service"] == [UNIT.name] and settings[listen] == ["9060"]
        (passed,) = settings["FileDescriptorName"]
        assert f"rating-agent-{passed}.socket" == name
        # The same address that the agent would open itself.
        assert getattr(agent.Settings(), f"listen_{passed.removeprefix('hep-')}") == ":9060"
        assert settings["BindIPv6Only"] == ["both"] and name in installed


def test_the_units_by_systemd_analyze(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the units are checked as text only")
    for socket in SOCKETS:
        shutil.copy(socket, tmp_path)
    copy = tmp_path / UNIT.name
    # It must be there for `verify`.
    text = UNIT.read_text(encoding="utf-8").replace("/opt/rating-agent-hep/bin/", "/bin/true ")
    copy.write_text(text, encoding="utf-8")
    sockets = [tmp_path / socket.name for socket in SOCKETS]
    verify = ["systemd-analyze", "verify", copy, *sockets]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    copy.write_text(text.replace("WatchdogSec=30", "WatchdogSek=30"), encoding="utf-8")
    sockets[0].write_text(sockets[0].read_text().replace("ReceiveBuffer", "ReceiveBufer"))
    done = subprocess.run(verify, capture_output=True, text=True)
    for fault in ("WatchdogSek", "ReceiveBufer"):
        assert fault in done.stderr, "it tells wrong from right"
    # 0 to 10, of which 2 and less is called OK; hardly anything is left to forbid.
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", UNIT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


def test_the_agent_needs_no_memory_that_is_written_and_executed(tmp_path: Path) -> None:
    """MemoryDenyWriteExecute, by the kernel's own switch for it (Linux 6.3, PR_SET_MDWE)."""
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):\n"
        "    sys.exit(77)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    probe = tmp_path / "probe.py"
    probe.write_text("import mmap\nmmap.mmap(-1, 4096, prot=7)\n")
    command = [sys.executable, str(starter)]
    refused = subprocess.run([*command, str(probe)], capture_output=True, text=True)
    if refused.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert refused.returncode == 1 and "PermissionError" in refused.stderr
    program = str(harness.ROOT / "rating_agent_hep.py")
    options = ["--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0", "--listen-status=:0"]
    process = subprocess.Popen(
        [*command, program, *options, f"--state-dir={tmp_path / 'state'}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    while "journal_opened" not in seen:
        seen.append(json.loads(process.stdout.readline())["event"])
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=harness.DEADLINE)
    assert process.returncode == 0 and "journal_failed" not in rest
