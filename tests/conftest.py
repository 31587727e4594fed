"""Paths, gevent's patches before any test imports a socket, and what several files start."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import rating_agent_hep as agent

# isort: split
import harness


@pytest.fixture
def api() -> Iterator[harness.RatingServer]:
    """A rating API that answers ok and keeps each request."""
    with harness.RatingServer() as server:
        yield server


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile, before any limit of lines a second."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    agent.log.addHandler(handler)
    yield records
    agent.log.removeHandler(handler)
