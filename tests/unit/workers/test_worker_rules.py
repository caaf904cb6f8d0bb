"""Which workers may take part in a study, and how cores and GPUs are divided among them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dse.config import WorkersConfig
from dse.errors import ConfigError, StudyError
from dse.pareto import objectives_named
from dse.workers.outline import StudyOutline
from dse.workers.ray_cluster import RayCluster, Share
from dse.workers.same_study import check_same_devices, check_same_facts, check_same_versions
from dse.workers.study_worker import WorkerFacts

FIRST = WorkerFacts({"Python": "3.11.7", "dse": "1.0"}, "node-1", 10, "NVIDIA H200", shares_cache=True)


class Nodes(RayCluster):
    """A cluster whose nodes have these resources."""

    def __init__(self, nodes: list[dict[str, float]], **keys: Any) -> None:
        super().__init__(WorkersConfig(**keys))
        self._resources = nodes

    def _nodes(self) -> list[dict[str, float]]:  # type: ignore[override]
        return self._resources


@pytest.mark.parametrize(
    ("nodes", "keys", "share"),
    [
        ([{"CPU": 16, "GPU": 8}], {}, Share(8, 1.0, 1)),
        ([{"CPU": 16, "GPU": 8}], {"gpus_per_worker": 2}, Share(4, 1.0, 2)),
        ([{"CPU": 16, "GPU": 3}, {"CPU": 16, "GPU": 3}], {"gpus_per_worker": 2}, Share(2, 1.0, 2)),
        ([{"CPU": 16}], {"count": 4}, Share(4, 4.0, 0)),
        ([{"CPU": 6}, {"CPU": 6}], {"count": 3}, Share(3, 3.0, 0)),
        ([{"CPU": 2}], {"count": 8}, Share(8, 0.225, 0)),
        ([{"CPU": 2}, {"CPU": 4}], {}, Share(2, 2.0, 0)),
    ],
)
def test_gpus_or_cores_are_divided(nodes: list[dict[str, float]], keys: dict[str, Any], share: Share) -> None:
    assert Nodes(nodes, **keys).share() == share
    assert share.threads == max(1, int(share.cores))


@pytest.mark.parametrize(
    ("nodes", "keys", "rule"),
    [
        ([{"GPU": 8}], {"count": 9}, "`workers <= 8` must hold for 1 GPU each on nodes with 8 GPUs, but got 9"),
        ([{"GPU": 1}, {"GPU": 1}], {"gpus_per_worker": 2}, "`workers <= 0` must hold for 2 GPUs each"),
        ([{"CPU": 8}], {"gpus_per_worker": 2}, "`gpus_per_worker: 2` needs GPUs"),
    ],
)
def test_more_than_there_is_gets_one_line(nodes: list[dict[str, float]], keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Nodes(nodes, **keys).share()


def test_versions_must_agree() -> None:
    other = dataclasses.replace(FIRST, host="node-2", versions={"Python": "3.11.7", "dse": "0.9"})
    check_same_versions([FIRST, FIRST])
    with pytest.raises(StudyError, match=r"node-2 has dse 0\.9 and node-1 has 1\.0; install the same on every node"):
        check_same_versions([FIRST, other])


def test_model_and_data_must_agree() -> None:
    check_same_facts({"model_fingerprint": "a"}, {"model_fingerprint": "a"}, FIRST.name)
    with pytest.raises(StudyError, match=r"node-1 \(NVIDIA H200\) has other model weights \(b, not a\)"):
        check_same_facts({"model_fingerprint": "a"}, {"model_fingerprint": "b"}, FIRST.name)


def test_devices_must_agree_where_they_are_measured() -> None:
    other = dataclasses.replace(FIRST, host="node-2", device="NVIDIA L4")

    def outline(*names: str) -> StudyOutline:
        return cast(StudyOutline, SimpleNamespace(objectives=objectives_named(names)))

    check_same_devices(outline("accuracy", "parameters"), [FIRST, other], "refuse")
    check_same_devices(outline("accuracy", "decode_latency_s"), [FIRST, other], "accuracy_only")
    for name in ("decode_latency_s", "prefill_energy_j", "tpot_s"):
        with pytest.raises(StudyError, match=f"a study of {name} needs one kind of device, but node-2 has NVIDIA L4"):
            check_same_devices(outline("accuracy", name), [FIRST, other], "refuse")
