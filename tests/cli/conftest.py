"""One `rsm up` that tests share if they leave it unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rsm.broker import Client
from tests.support.rsm_command import Deployment


@pytest.fixture(scope="session")
def standing() -> Iterator[Deployment]:
    """Two engines with steps of 20 ms. Tests must cancel their unfinished calls."""
    deployment = Deployment("standing", "--engines", "2", "--max-num-seqs", "64", "--engine-arg", "step_s=0.02")
    try:
        deployment.up("e0", "e1")
        yield deployment
    finally:
        deployment.clean_up()


@pytest.fixture
def producer(standing: Deployment) -> Iterator[Client]:
    with Client(settings=standing.settings) as made:
        yield made
