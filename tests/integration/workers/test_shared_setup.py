"""Set-up that workers share: the factor bank on machines without the driver's cache folder, and who is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_support import Watcher
from worker_support import check_complete, worker_study

from dse.errors import StudyError
from dse.study import run_study

TRIALS = 8

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own threads and sockets


@pytest.fixture(scope="module")
def two_machines(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """Two nodes of one GPU each; the second one has a cache folder of its own."""
    import ray
    from ray.cluster_utils import Cluster

    other = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HOME": str(cache_folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
            "RAY_AUTH_MODE": "disabled",
        }.items():
            patch.setenv(name, value)
        patch.delenv("DSE_CACHE", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
        cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"DSE_CACHE": str(other)})
        yield cluster, other
        ray.shutdown()
        cluster.shutdown()


def test_a_machine_without_the_cache_folder_fetches_the_bank(
    two_machines: tuple[Any, Path], tiny_folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    cluster, other = two_machines
    shutil.rmtree(cache_folder / "dse" / "factor_banks", ignore_errors=True)  # banks of other tests
    config = worker_study(tiny_folder, TRIALS)
    undisturbed = run_study(config, out=tmp_path / "here")
    (bank,) = (path for path in (cache_folder / "dse" / "factor_banks").iterdir() if path.name.startswith("svd-"))
    (bank / "marker.txt").write_text("fetched, not built")
    try:
        workers = {"ray_address": cluster.address, "count": 2}
        study = run_study(config, out=tmp_path / "run", workers=workers)
    finally:
        (bank / "marker.txt").unlink()
    check_complete(study, TRIALS, undisturbed)
    fetched = other / "factor_banks" / bank.name
    assert (fetched / "marker.txt").read_text() == "fetched, not built"
    names = sorted(path.name for path in bank.iterdir() if not path.name.startswith("."))
    assert sorted(path.name for path in fetched.iterdir() if path.name[0] != "." and path.name != "marker.txt") == names
    assert all((fetched / name).read_bytes() == (bank / name).read_bytes() for name in names)


def test_a_worker_with_another_version_is_refused(
    two_machines: tuple[Any, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    import dse

    cluster, _ = two_machines
    copy = tmp_path / "other"
    copy.mkdir()
    (copy / "dse").mkdir()
    source = Path(dse.__file__).parent
    for entry in source.iterdir():
        if entry.name not in ("__init__.py", "__pycache__"):
            (copy / "dse" / entry.name).symlink_to(entry)
    text = (source / "__init__.py").read_text()
    (copy / "dse" / "__init__.py").write_text(text.replace(dse.__version__, "0.0.9"))
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"PYTHONPATH": path})
    watcher = Watcher()
    workers = {"ray_address": cluster.address, "count": 3}
    with pytest.raises(StudyError, match=r"all workers must run the same versions, but .* has dse"):
        run_study(worker_study(tiny_folder, TRIALS), out=tmp_path / "run", workers=workers, listener=watcher)
    assert not watcher.started
