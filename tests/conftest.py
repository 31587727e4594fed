"""Paths, gevent's patches before any test imports a socket, and what several files start."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import rating_agent_hep as agent

# isort: split
import gevent

import harness
import ratings

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


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile, before any limit of lines a second."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    agent.log.addHandler(handler)
    yield records
    agent.log.removeHandler(handler)


@pytest.fixture
def server() -> Iterator[ratings.Server]:
    """A rating API that may be rude; it answers ok until it is told otherwise."""
    made = ratings.Server()
    yield made
    made.close()


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """A function that returns the JSON lines logged so far, as they would be on stdout."""
    logger = agent.log
    before = (logger.handlers[:], logger.propagate, logger.level)
    stream = io.StringIO()
    agent.set_up_logging(agent.Settings(), stream)
    # These tests count warnings, so none may be held back.
    for handler in logger.handlers:
        handler.filters.clear()
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def deliveries(log: Any) -> Iterator[Callable[..., agent.Delivery]]:
    """Makes deliveries and ends their workers when the test is over."""
    made: list[agent.Delivery] = []

    def make(**more: Any) -> agent.Delivery:
        more = {"rating_api_timeout": 0.3, "rating_api_concurrency": 4} | more
        chosen = agent.Settings(**more)
        made.append(agent.Delivery(chosen, agent.Metrics(chosen)))
        return made[-1]

    yield make
    for delivery in made:
        delivery.stop()
