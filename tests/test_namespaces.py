"""A live proxy, the agent and the rating API, each on an address that the others have not.

Proxy, carrier and caller are in one network namespace, the agent in another, the API in a third:
what would be right on one host only, as on loopback, fails here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
import sipservers

PROXY, AGENT, API, API_FOR_CALLER = "192.0.2.5", "192.0.2.10", "198.51.100.8", "203.0.113.8"
CARRIER = f"{PROXY}:5070"
# It shows the reply to the BYE, so the end comes while the scenario runs.
CAPTURE = "opensips-3.6/transaction-tcp/01_answered_caller_bye.hepl"
# Both ends of each link: namespace, device, address.
LINKS = [
    (("proxy", "agent", PROXY), ("agent", "proxy", AGENT)),
    (("agent", "api", "198.51.100.10"), ("api", "agent", API)),
    (("proxy", "api", "203.0.113.5"), ("api", "proxy", API_FOR_CALLER)),
]


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sipservers.program("ip"), *arguments], capture_output=True, text=True, timeout=20
    )


class Network:
    """The namespaces `proxy`, `agent` and `api`, with a link between any two of them."""

    def __init__(self) -> None:
        self._names = {name: f"rah-{os.getpid()}-{name}" for name in ("proxy", "agent", "api")}

    def __enter__(self) -> Network:
        proxy = self._names["proxy"]
        for command in (f"netns add {proxy}", f"-n {proxy} link add try type veth peer name tried"):
            done = ip(*command.split())
            if done.returncode:
                self.__exit__()
                # Not for want of a package, but of rights or in the kernel: so under CI, too.
                pytest.skip(f"no network namespaces here: ip {command}: {done.stderr.strip()}")
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        names = self._names
        commands = [f"netns add {names[name]}" for name in ("agent", "api")]
        for (place, device, address), (far, far_device, far_address) in LINKS:
            peer = f"peer name {far_device} netns {names[far]}"
            commands += [
                f"-n {names[place]} link add {device} type veth {peer}",
                f"-n {names[place]} addr add {address}/24 dev {device}",
                f"-n {names[place]} link set {device} up",
                f"-n {names[far]} addr add {far_address}/24 dev {far_device}",
                f"-n {names[far]} link set {far_device} up",
            ]
        commands += [f"-n {name} link set lo up" for name in names.values()]
        for command in commands:
            done = ip(*command.split())
            assert done.returncode == 0, (command, done.stderr)

    def __exit__(self, *_: object) -> None:
        for name in self._names.values():
            ip("netns", "del", name)

    def within(self, name: str, *command: str) -> list[str]:
        """What to start for a command in that namespace; its process is the command's own."""
        return [sipservers.program("ip"), "netns", "exec", self._names[name], *command]


def has_port(process: subprocess.Popen[bytes], kind: str, port: int) -> bool:
    """Does anybody in the namespace of the process have this port, `kind` being udp or tcp?"""
    with contextlib.suppress(OSError):
        # It starts in ours, where somebody else may have the port.
        if os.path.samefile(f"/proc/{process.pid}/ns/net", "/proc/self/ns/net"):
            return False
        tables = [Path(f"/proc/{process.pid}/net/{kind}{family}") for family in ("", "6")]
        lines = [line for table in tables for line in table.read_text().splitlines()[1:]]
        return any(int(line.split()[1].rpartition(":")[2], 16) == port for line in lines)
    return False


def agent_lines(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "agent.log").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line.get("event") == event]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def folder(network: Network, tmp_path_factory: Any) -> Iterator[Path]:
    """Everything on its own default ports; yields the folder of the log files."""
    folder: Path = tmp_path_factory.mktemp("namespaces")
    sipp, kamailio = sipservers.program("sipp"), sipservers.program("kamailio")
    scripts = harness.ROOT / "scripts"
    programs = {
        "api": [sys.executable, str(scripts / "rating_sandbox.py"), "--listen", "0.0.0.0:8000"],
        "agent": [
            *(sys.executable, str(harness.ROOT / "rating_agent_hep.py"), harness.LOCAL),
            # Nobody but the proxy, by the address that its mirror comes from.
            *(f"--rating-api-url=http://{API}:8000", f"--hep-allow={PROXY}"),
        ],
        "carrier": [
            *(sipp, "-sf", str(sipservers.SCENARIOS / "carrier.xml"), "-nostdin"),
            *("-i", PROXY, "-bind_local", "-p", "5070"),
        ],
        "proxy": [
            *(kamailio, "-DD", "-E", "-f", str(sipservers.CONFIGURATION), "-Y", str(folder)),
            *("-m", "32", "-A", f'AGENT_URI="sip:{AGENT}:9060"'),
            *("-A", f'CARRIER_URI="sip:{CARRIER}"'),
        ],
    }
    ports = {"api": ("tcp", 8000), "agent": ("udp", 9060), "carrier": ("udp", 5070)}
    ports["proxy"] = ("udp", 5060)
    with contextlib.ExitStack() as cleanup:
        for name, command in programs.items():
            place = "proxy" if name == "carrier" else name
            log = folder / f"{name}.log"
            started = cleanup.enter_context(
                sipservers.running(network.within(place, *command), log, folder)
            )
            harness.wait_until(
                lambda p=started, n=name: has_port(p, *ports[n]) or p.poll() is not None,
                f"{name} listens",
            )
            assert started.poll() is None, log.read_text(errors="replace")
        yield folder


def scenario(network: Network, name: str, *arguments: str) -> tuple[int, str]:
    """Run a scenario from where the proxy is; exit status, and what was printed."""
    file = str(sipservers.SCENARIOS / f"{name}.yaml")
    url = f"http://{API_FOR_CALLER}:8000"
    command = [sys.executable, sipservers.RUN_SCENARIO, file, "-a", url, *arguments]
    done = subprocess.run(
        network.within("proxy", *command), capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_calls_through_a_proxy_on_another_address(network: Network, folder: Path) -> None:
    status, output = scenario(network, "test_opensips_call", "--target", f"{PROXY}:5060")
    assert status == 0, output
    (begin,), (end,) = agent_lines(folder, "call_begin"), agent_lines(folder, "call_end")
    assert begin["reason"] == "answer" and begin["call_id"] == end["call_id"]


def test_a_cancelled_call_gives_the_proxy_nothing_to_complain_of(
    network: Network, folder: Path
) -> None:
    """The carrier's 487 once had the CANCEL's single Via: "no via found in request"."""
    status, output = scenario(network, "test_cancelled", "--target", f"{PROXY}:5060")
    assert status == 0, output
    assert "ERROR" not in (folder / "proxy.log").read_text(errors="replace")


def test_a_recorded_opensips_over_tcp_from_another_address(network: Network, folder: Path) -> None:
    def counts() -> list[int]:
        return [len(agent_lines(folder, kind)) for kind in ("call_begin", "call_end")]

    before = counts()
    capture = str(harness.SELECTION / CAPTURE)
    where = ("--target", f"{AGENT}:9060", "--replay", capture)
    status, output = scenario(network, "test_opensips_call", *where)
    assert status == 0, output
    # The line of an end is written behind its answer, of which the scenario may know already.
    harness.wait_until(lambda: counts() == [x + 1 for x in before], "begin and end are logged")


def test_the_agent_sees_the_addresses_that_were_given(network: Network, folder: Path) -> None:
    """A call that another host mirrors is not taken: so the two above came from the proxy's own."""
    before = len(agent_lines(folder, "call_begin"))
    replay = [sys.executable, str(harness.ROOT / "scripts" / "hep_replay.py"), "--fast", "--now"]
    replay += ["--fresh", "--transport", "udp", "--to", "198.51.100.10:9060"]
    capture = str(harness.SELECTION / CAPTURE)
    done = subprocess.run(network.within("api", *replay, capture), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    harness.wait_until(lambda: agent_lines(folder, "dropped_not_allowed"), "the agent says so")
    assert len(agent_lines(folder, "call_begin")) == before
