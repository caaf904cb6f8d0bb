"""A Ray cluster of two nodes on this machine, each with a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def needs_ray() -> None:
    """Skip where Ray is not installed."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'lowrank-dse[ray]'")


@pytest.fixture(scope="package")
def nodes(cache_folder: Path) -> Iterator[object]:
    """What the nodes start uses the tests' own caches. Tests may remove nodes, and leave two plain ones."""
    from worker_support import ray_nodes

    with ray_nodes(cache_folder, 2) as created:
        yield created
