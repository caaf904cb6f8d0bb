"""A study in optuna-dashboard, read through the API that its page uses."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from tiny_study import tiny_study

from dse.study import Study, run_study

optuna_dashboard = pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard: pip install '.[test]'")


class Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def study(tiny_folder: Path, tmp_path: Path) -> Study:
    """Random points without limits on what the sampler proposes: some are infeasible."""
    config = tiny_study(tiny_folder, budget={"trials": 8})
    config["space"]["limits"] = {"reduction": {"min": 0.02, "max": 0.3}}
    return run_study(config, out=tmp_path / "run")


@pytest.fixture
def api(study: Study) -> Iterator[str]:
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{study.folder.path / 'study.db'}")
    with make_server("127.0.0.1", 0, optuna_dashboard.wsgi(storage), handler_class=Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()
    storage.remove_session()
    storage.engine.dispose()


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("default")
def test_the_dashboard_shows_what_its_users_expect(study: Study, api: str) -> None:
    (summary,) = read(f"{api}/studies")["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == ("tiny", ["maximize", "minimize"])
    shown = read(f"{api}/studies/{summary['study_id']}")
    assert shown["objective_names"] == ["accuracy", "parameters"]
    states = {"complete": "Complete", "duplicate": "Complete", "infeasible": "Pruned", "failed": "Fail"}
    assert {trial["number"]: trial["state"] for trial in shown["trials"]} == {
        record.trial: states[record.state] for record in study.records
    }
    assert {"Complete", "Pruned"} <= {trial["state"] for trial in shown["trials"]}
    records = {record.trial: record for record in study.records}
    for trial in shown["trials"]:
        record, attributes = records[trial["number"]], {e["key"]: e["value"] for e in trial["user_attrs"]}
        assert (max(trial["constraints"]) <= 0) == record.feasible
        assert json.loads(attributes["constraints"]).keys() == {"reduction_min", "reduction_max"}
        assert json.loads(attributes["record"])["point_id"] == record.point_id
        if record.state == "complete":
            assert trial["values"] == pytest.approx([record.value("accuracy"), record.value("parameters")])
