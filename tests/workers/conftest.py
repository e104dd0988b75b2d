"""Fixtures for the tests of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rsm.broker import Settings
from rsm.engine import MultiEngineManager
from tests.support.nodes.process import START_S, Node
from tests.support.sim_processes import processes_of


@pytest.fixture
def node(settings: Settings, tmp_path: Path) -> Iterator[Node]:
    """A node that listens. Its remaining processes are killed after the test."""
    made = Node(settings, tmp_path / "node.log")
    try:
        yield made.up()
    finally:
        made.end()
        for process in processes_of(settings):
            process.kill()


@pytest.fixture
def manager(settings: Settings) -> Iterator[MultiEngineManager]:
    """A manager without engines of its own."""
    made = MultiEngineManager(settings=settings, start_timeout=START_S)
    made.start()
    yield made
    made.stop()
