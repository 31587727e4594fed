"""scripts/fuzz.py: a short run, the inputs that once failed, and that a fault is found and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fuzz
import harness
import rating_agent_hep as agent

SEED = 20_261_124
# Inputs of each target: about two seconds each.
SHORT = {"hep": 60_000, "splitter": 8_000, "sip": 15_000, "table": 400, "agent": 900}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """The target `agent` sets the log up for itself."""
    state = agent.log.handlers[:], agent.log.propagate, agent.log.level
    yield
    agent.log.handlers[:], agent.log.propagate = state[:2]
    agent.log.setLevel(state[2])


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_a_short_run(name: str, tmp_path: Path) -> None:
    report = fuzz.fuzz(name, SEED, SHORT[name], 60.0, tmp_path)
    assert report.faults == []
    assert report.inputs == SHORT[name] and report.messages >= SHORT[name]
    assert 0 < report.worst <= fuzz.MAX_MILLISECONDS


CORPUS = sorted(fuzz.CORPUS.iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_what_once_failed(path: Path) -> None:
    assert fuzz.replay([path]) == []


def test_the_corpus_is_there() -> None:
    assert {path.name.partition("-")[0] for path in CORPUS} >= {"sip", "table"}


def test_inputs_reach_what_they_are_for() -> None:
    """Mutations that were all refused at once would find nothing."""
    mutator = fuzz.Mutator("1:any")
    decoded = parsed = events = 0
    for _ in range(300):
        with suppress(agent.HepError):
            agent.decode_hep(mutator.packet(), fuzz.ARRIVAL)
            decoded += 1
        with suppress(agent.SipError):
            parsed += agent.parse_sip(mutator.message(), 1) is not None
        number, steps = fuzz.read_steps(mutator.steps())
        table = agent.CallTable(fuzz.SETTINGS[number], fuzz.RULES[number])
        for _, data in steps:
            try:
                packet = agent.decode_hep(data, fuzz.ARRIVAL)
                message = agent.parse_sip(packet.payload, packet.time)
            except (agent.HepError, agent.SipError):
                continue
            if message:
                events += len(table.handle(agent.Sighting(packet, message), 1.0))
    assert 90 < decoded < 270 and 60 < parsed < 270 and events > 300


BREAKS: dict[str, tuple[str, Any]] = {
    "hep": ("_number", lambda chunks, kind: int.from_bytes(chunks[kind], "big")),
    "splitter": ("MAX_HEP_FRAME", 2_000),
    "sip": ("_head_end", lambda payload, start: (len(payload), False)),
    "table": ("_note_bye", lambda call, bye, now: 1 / 0),
    "agent": ("printable_id", lambda text: text.encode("ascii").decode()),
}


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_a_fault_is_found_and_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With something of the module broken."""
    with monkeypatch.context() as patch:
        patch.setattr(agent, *BREAKS[name])
        arguments = ["--target", name, "--inputs", "20000", "--seconds", "60", "--seed", "3"]
        assert fuzz.main([*arguments, "--corpus", str(tmp_path)]) == 1
        kept = sorted(tmp_path.iterdir())
        assert 0 < len(kept) <= fuzz.MAX_FAULTS and str(kept[0]) in capsys.readouterr().out
        assert fuzz.main(["--replay", *map(str, kept)]) == 1
    assert fuzz.main(["--replay", *map(str, kept)]) == 0


def test_a_slow_input_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "MAX_MILLISECONDS", 0.000_1)
    report = fuzz.fuzz("sip", 1, 10, 60.0, tmp_path)
    assert "over 0.0001" in report.faults[0]


def test_growing_memory_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    monkeypatch.setattr(fuzz, "MAX_GROWTH", 8 * 1024 * 1024)
    leak = fuzz.Target(lambda mutator: b"x", lambda data: (kept.append(bytes(5_000)), (1, 0.0))[1])
    monkeypatch.setitem(fuzz.TARGETS, "hep", leak)
    report = fuzz.fuzz("hep", 1, 20_000, 60.0, tmp_path)
    assert "octets more" in report.faults[0]


def test_two_processes_and_their_report(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(harness.ROOT / "scripts" / "fuzz.py"), "--processes=2"),
            *("--inputs=300", "--target=hep", "--target=sip", "--json", f"--corpus={tmp_path}"),
        ],
        capture_output=True,
        timeout=60,
    )
    reports = json.loads(done.stdout)
    assert [(x["target"], x["inputs"], x["faults"]) for x in reports] == [
        ("hep", 600, []),
        ("sip", 600, []),
    ]
    assert done.returncode == 0
