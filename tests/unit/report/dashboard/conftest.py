from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy

from dse.report.dashboard import StudySnapshot
from dse.study.live_study import LiveStudy


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four objectives with 16 finished trials of every state, one in flight and one queued."""
    path = tmp_path_factory.mktemp("synthetic") / "run"
    study = SyntheticStudy(path, budget=20).fill(16)
    study.start_trial(queue=1)
    study.close()
    return path


@pytest.fixture(scope="session")
def snapshot(folder: Path) -> StudySnapshot:
    return LiveStudy(folder).snapshot()
