"""A Ray cluster of several nodes on this machine, each with a pretended GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'lowrank-dse[ray]'")


@pytest.fixture(scope="module")
def ray_cluster(cache_folder: Path) -> Iterator[object]:
    """A head without devices and three nodes with one GPU each; what they start uses the tests' own caches."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "DSE_CACHE": str(cache_folder / "dse"),
            "HF_HOME": str(cache_folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
            "RAY_AUTH_MODE": "disabled",
        }.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
        for _ in range(3):
            cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
