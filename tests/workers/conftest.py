"""A node, for the tests of what it does and of who may ask it."""

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
    """One that listens; whatever is left of it and of its engines is killed in the end."""
    made = Node(settings, tmp_path / "node.log")
    try:
        yield made.up()
    finally:
        made.end()
        for process in processes_of(settings):
            process.kill()


@pytest.fixture
def manager(settings: Settings) -> Iterator[MultiEngineManager]:
    """One without engines of its own."""
    made = MultiEngineManager(settings=settings, start_timeout=START_S)
    made.start()
    yield made
    made.stop()
