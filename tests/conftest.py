"""Paths, gevent's patches before any test imports a socket, and what several files start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import rating_agent_hep  # noqa: F401

# isort: split
import gevent

import harness

# The files that take longest, in this order: `make test` gives each worker a file at a time, and
# one that is begun last would be waited for alone.
LONGEST = "crash scenarios captures agent sockets unknown_party access config status soak".split()

# What a worker keeps for its whole life.
KEEPERS: list[Any] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep gevent's loop from ending in a worker, which has nothing to wait for between tests.

    Its next test, and its end, come from a thread of execnet's, of which the loop does not know;
    that thread wakes it all the same.
    """
    if hasattr(config, "workerinput"):
        KEEPERS.append(gevent.get_hub().loop.async_())
        KEEPERS[0].start(lambda: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; else the order stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def api() -> Iterator[harness.RatingServer]:
    """A rating API that answers ok and keeps each request."""
    with harness.RatingServer() as server:
        yield server
