"""Studies in a real PostgreSQL server, which is killed and restarted while they run."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import PASSWORD, PostgresServer, cannot_run
from study_support import Watcher, points_and_accuracies
from tiny_study import tiny_study, write_study

from dse.cli import main
from dse.config import parse_study
from dse.errors import ConfigError
from dse.study import StudyProgress, open_study, run_study
from dse.trial_record import TrialRecord

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'lowrank-dse[postgresql]'")
pytestmark = pytest.mark.skipif(bool(cannot_run()), reason=cannot_run() or "-")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    # Not in a folder of pytest, which closes them to the user that runs the server.
    with tempfile.TemporaryDirectory(prefix="dse-postgresql-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        created = PostgresServer.create(folder / "server")
        yield created
        created.kill()


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)


class Outages(Watcher):
    """Kills the server while the model loads, and after some trials; it is back three seconds later."""

    def __init__(self, server: PostgresServer, after: set[int]) -> None:
        super().__init__()
        self._server, self._after = server, after
        self.threads: list[threading.Timer] = []

    def on_message(self, message: str) -> None:
        super().on_message(message)
        if message.startswith("loading"):
            self._begin()

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        if progress.finished in self._after:
            self._after.discard(progress.finished)
            self._begin()

    def _begin(self) -> None:
        self._server.kill()
        self.threads.append(threading.Timer(3.0, self._server.start))
        self.threads[-1].start()


def test_a_killed_server_is_waited_for(
    server: PostgresServer, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = tiny_study(tiny_folder, sampler={"name": "tpe"}, budget={"trials": 10})
    expected = run_study(config, out=tmp_path / "file")
    watcher = Outages(server, {1, 4, 7})
    study = run_study({**config, "storage": server.url}, out=tmp_path / "run", listener=watcher)
    assert len(watcher.threads) == 4
    assert any("must answer" in message and message.endswith("waiting for it") for message in watcher.messages)
    assert points_and_accuracies(study) == points_and_accuracies(expected)
    assert [(r.trial, r.state, r.origin) for r in study.records] == [
        (r.trial, r.state, r.origin) for r in expected.records
    ]
    assert not (tmp_path / "run" / "study.db").exists()
    # Opened, resumed and extended like any other study.
    assert open_study(tmp_path / "run").records == study.records
    assert run_study({**config, "storage": server.url}, out=tmp_path / "run", trials=12).evaluated_trials == 12
    # A second study of the same name in the same database is another study.
    assert run_study({**config, "storage": server.url}, out=tmp_path / "other", trials=2).evaluated_trials == 2
    # The password is nowhere.
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert texts
    assert not any(PASSWORD.encode() in text for text in texts)
    assert PASSWORD not in caplog.text + " ".join(watcher.messages)


def test_bad_places_end_with_one_line(
    server: PostgresServer, tiny_folder: Path, tmp_path: Path, own_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 2})
    monkeypatch.setenv("PGPASSWORD", "not-the-password")
    nowhere = server.url.replace(str(server.port), "1")
    for url, words in ((server.url, "password authentication failed"), (nowhere, "must answer")):
        study_yaml = write_study(tmp_path / "study.yaml", {**config, "storage": url})
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert main(["run", str(study_yaml), "--out", str(tmp_path / words.replace(" ", "-"))]) == 2
        (line,) = [line for line in errors.getvalue().splitlines() if line.startswith("dse: error:")]
        assert words in line
        assert "not-the-password" not in errors.getvalue()


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("postgresql+psycopg://me:tea-for-2@host/db", "must not hold a password"),
        ("postgresql+psycopg://host/db?password=tea-for-2", "must not hold a password"),
        ("mysql://me:tea-for-2@host/db", "must look like postgresql"),
    ],
)
def test_a_url_with_a_password_is_refused_without_repeating_it(tiny_folder: Path, url: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        parse_study({**tiny_study(tiny_folder), "storage": url})
    assert "tea-for-2" not in str(caught.value)
