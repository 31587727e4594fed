"""scripts/benchmark.py: its packets, and that it compares the revisions that it was told to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmark
import harness
import rating_agent_hep as agent

MODULE = "rating_agent_hep.py"
# Behind the module: it reads each message twice.
SLOWER = """

def _slower(payload, time=0, once=parse_sip):
    once(payload, time)
    return once(payload, time)


parse_sip = _slower
"""


def test_a_packet_gets_another_time_and_keeps_the_rest() -> None:
    (data,) = benchmark.Mirror(7, 1).packets(0)
    packet = agent.decode_hep(data, 0)
    moved = agent.decode_hep(benchmark.stamped(data, 1_790_000_000_123_456), 0)
    assert moved.time == 1_790_000_000_123_456 != packet.time
    assert moved.payload == packet.payload and moved.source_ip == packet.source_ip


def test_twice_is_what_a_proxy_received_and_what_it_forwarded() -> None:
    mirror = benchmark.Mirror(7, 1, twice=True)
    caller = {letter: f"z9hG4bK{letter}00000007" for letter in "iab"}
    proxy = {letter: f"z9hG4bK{letter}p00000007" for letter in "iab"}
    for index, letter in enumerate("iiiiabb"):
        texts = [
            agent.decode_hep(data, 0).payload.decode()
            for data in mirror.packets(index * benchmark.LAG)
        ]
        branches = [re.findall(r"^Via: .*;branch=(\w+)\r$", text, re.M) for text in texts]
        assert len({re.sub(r"Via: .*\r\n", "", text) for text in texts}) == 1
        received, sent = [caller[letter]], [proxy[letter], caller[letter]]
        # INVITE, ACK and BYE come from the caller, replies from the callee.
        request = index in (0, 4, 5)
        assert branches == ([received, sent] if request else [sent, received])


def test_options_that_a_revision_does_not_know_are_left_out(monkeypatch: Any) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(benchmark, "Process", lambda *words, **_: started.append(words))
    known = benchmark.known_options(harness.ROOT)
    bench = benchmark.Bench(1, True, harness.ROOT, known)
    bench.start_agent("--max-calls=5", "--no-such-option=1")
    assert "--max-calls=5" in started[0] and "--no-such-option=1" not in started[0]
    assert bench.remarks == ["without --no-such-option=1"]
    benchmark.Bench(1, True).start_agent("--no-such-option=1")
    assert "--no-such-option=1" in started[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of its own with script and module."""
    root = tmp_path / "tree"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(harness.ROOT / MODULE, root)
    shutil.copy(harness.ROOT / "scripts" / "benchmark.py", root / "scripts")
    git(root, "init", "--quiet")
    return root


def git(root: Path, *words: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True)


def run(root: Path, *words: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, what was printed and the figures of one run; it leaves no folder behind."""
    scratch, figures = root.parent / "scratch", root.parent / "figures.json"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "benchmark.py"), "--brief", *words]
        + ["--rounds=1", f"--json={figures}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert list(scratch.iterdir()) == []
    found = json.loads(figures.read_text())["figures"] if figures.exists() else []
    return done.returncode, done.stdout + done.stderr, found


def test_the_working_tree_is_compared_with_the_revision(tree: Path) -> None:
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "old")
    with (tree / MODULE).open("a") as module:
        module.write(SLOWER)
    status, printed, figures = run(tree, "--against=HEAD", "--only", "core")
    assert status == 0, printed
    assert [figure["name"] for figure in figures] == [
        "core: CPU a call, each message once",
        "core: CPU a call, each message twice",
    ]
    for figure in figures:
        assert len(figure["old"]) == len(figure["new"]) == len(figure["ratios"]) == 1
        # Reading is two fifths of it.
        assert figure["ratios"][0] > 1.2
        line = next(line for line in printed.splitlines() if figure["name"] in line)
        ratio = f"{figure['ratios'][0]:.3f}"
        assert f" us | {ratio} | {ratio} to {ratio} | less |" in line


def test_a_revision_that_cannot_give_a_figure_is_said_to(tree: Path) -> None:
    module = (tree / MODULE).read_text()
    (tree / MODULE).write_text(module + "\ndel CallTable\n")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "old")
    (tree / MODULE).write_text(module)
    status, printed, figures = run(tree, "--against=HEAD", "--only", "core")
    assert status == 0, printed
    assert re.search(r"^\| core \|.* not compared: old: .*no attribute 'CallTable'", printed, re.M)
    assert [figure["name"] for figure in figures] == ["core"] and "failed" in figures[0]


def test_a_revision_that_is_not_there(tree: Path) -> None:
    status, printed, figures = run(tree, "--against=nowhere", "--only", "core")
    assert status == 1 and figures == []
    assert "--against nowhere: fatal: " in printed and "Traceback" not in printed
