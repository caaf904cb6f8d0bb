"""Parts that need Plotly Dash."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dash", reason="the live page needs Plotly Dash")

from dse.evaluation.paired_comparison import Comparison
from dse.pareto import OBJECTIVES
from dse.report.dashboard import StudySnapshot
from dse.report.dashboard.axis_values import AxisChoice
from dse.report.dashboard.page_callbacks import PageCallbacks
from dse.report.dashboard.page_layout import slider_bounds
from dse.report.dashboard.progress_plot import progress_plot, proposer_shares
from dse.report.dashboard.status_parts import duration, lanes_part, seconds_left, tiles_part
from dse.report.dashboard.trial_parts import commands_of, differences_part
from dse.report.worker_lanes import WorkerLane

NOW_S = 1_800_000_000.0


def _text(part: Any) -> str:
    return json.dumps(
        part.to_plotly_json() if hasattr(part, "to_plotly_json") else part, default=lambda p: p.to_plotly_json()
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (4.21, "4.2 s"),
        (42.4, "42 s"),
        (200, "3 min"),
        (7500, "2 h 5 min"),
        (7200, "2 h"),
        (3e5, "3 d 11 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_ignores_a_pause_of_the_study(snapshot: StudySnapshot) -> None:
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    records, at = {}, begin
    for trial in range(12):
        at += datetime.timedelta(hours=9 if trial == 6 else 0, seconds=10)
        record = dataclasses.replace(snapshot.records[0], trial=trial, started_at=at.isoformat())
        records[trial] = record
    paused = dataclasses.replace(snapshot, records=records, evaluated=12, budget=20)
    assert seconds_left(paused, NOW_S) == pytest.approx(80)
    assert seconds_left(dataclasses.replace(paused, budget=12), NOW_S) is None


def test_lanes_of_several_workers(snapshot: StudySnapshot) -> None:
    lanes = tuple(
        WorkerLane(
            f"worker {i}",
            "working",
            device=f"cuda:{i}",
            host="node",
            phase="evaluate",
            done=i,
            total=4,
            trial=i,
            trial_started_s=NOW_S - 30,
            updated_s=NOW_S,
            temperature_celsius=60.0 + i,
            power_w=300.0,
        )
        for i in range(3)
    )
    text = _text(lanes_part(dataclasses.replace(snapshot, lanes=lanes), NOW_S))
    for expected in ("cuda:2", "62 \\u00b0C", "300 W", "30 s", "evaluate"):
        assert expected in text
    silent = _text(lanes_part(dataclasses.replace(snapshot, lanes=lanes), NOW_S + 500))
    assert silent.count("not running") == 3


def test_a_study_whose_worker_does_not_tell_has_one_lane(snapshot: StudySnapshot) -> None:
    text = _text(lanes_part(dataclasses.replace(snapshot, lanes=()), snapshot.read_s))
    assert "worker 1" in text
    assert f'"{snapshot.running[0].trial}"' in text


def test_one_lane_shows_the_last_reading_of_the_meter(snapshot: StudySnapshot) -> None:
    windows = [{"gross_j": 300.0, "duration_s": 2.0}, {"gross_j": None, "duration_s": 9.0}]
    energy = {"decode": {"windows": windows, "conditions_after": [{"temperature_celsius": 71.0}]}}
    records = {**snapshot.records, 3: dataclasses.replace(snapshot.records[3], energy=energy)}
    text = _text(lanes_part(dataclasses.replace(snapshot, records=records), snapshot.read_s))
    assert "71 \\u00b0C" in text
    assert "150 W" in text


def test_gains_of_proposers_sum_to_the_hypervolume(snapshot: StudySnapshot) -> None:
    dense = next(step for step in snapshot.steps if step.origin == "dense")
    total = sum(share.gained for share in proposer_shares(snapshot))
    assert total + dense.gained == pytest.approx(snapshot.steps[-1].volume)
    assert sum(share.evaluations for share in proposer_shares(snapshot)) == len(snapshot.steps) - 1
    assert len(progress_plot(snapshot, "light")["data"]) == 1 + len(proposer_shares(snapshot))


def test_documents_that_would_settle_a_difference(folder: Path, snapshot: StudySnapshot) -> None:
    row = Comparison("t", "acc", 0.5, 0.48, 0.03, 0.03, change=-0.02, low=-0.06, high=0.02, p_value=0.4, documents=300)
    found = dataclasses.make_dataclass("Found", ["quality", "costs"])((row,), ())
    text = _text(differences_part(snapshot, 0, 1, found))
    # The half-width of 4 points must halve: four times the documents.
    assert "about 900 more documents" in text
    settled = dataclasses.replace(row, high=-0.001, p_value=0.04)
    text = _text(differences_part(snapshot, 0, 1, dataclasses.replace(found, quality=(settled,))))
    assert "yes, p = 0.040" in text


def test_commands_name_the_folder_and_leave_the_dense_model_out(snapshot: StudySnapshot) -> None:
    quoted = dataclasses.replace(snapshot, directory="runs/a b")
    assert commands_of(quoted, 0, 3) == [
        "dse compare 'runs/a b' --trials 0 3",
        "dse export 'runs/a b' --trial 3 --out exports/synthetic-3",
    ]


def test_slider_bounds_enclose_the_values_on_round_numbers(snapshot: StudySnapshot) -> None:
    choice = AxisChoice("decode_latency_s", "Decode latency", OBJECTIVES["decode_latency_s"], True)
    bounds = slider_bounds(snapshot, choice)
    assert bounds is not None
    low, high, step, symbol = bounds
    values = 1000 * snapshot.trials["decode_latency_s"].dropna()
    assert low <= values.min() < low + step
    assert high - step < values.max() <= high
    assert symbol == "ms"


def test_a_new_trial_patches_only_the_traces_that_changed(folder: Path, snapshot: StudySnapshot) -> None:
    class Source:
        def __init__(self) -> None:
            self.now = snapshot

        def snapshot(self) -> StudySnapshot:
            return self.now

    source = Source()
    page = PageCallbacks(source)  # type: ignore[arg-type]
    view = ("v", "parameters", "accuracy", "none", "absolute", None, None, "light", [], [], [], [])
    figure, drawn, _ = page.draw_front(*view, None)
    assert len(figure["data"]) == len(drawn["traces"])
    source.now = dataclasses.replace(snapshot, pending=())
    patch, _, _ = page.draw_front(*view, drawn)
    places = [operation["location"][:2] for operation in patch.to_plotly_json()["operations"]]
    names = {figure["data"][place[1]]["name"] for place in places if place[0] == "data"}
    assert names == {"In flight or queued"}


def test_tiles_count_what_the_table_holds(snapshot: StudySnapshot) -> None:
    text = _text(tiles_part(snapshot, [], NOW_S))
    assert f'"{int(snapshot.trials["on_front"].sum())}"' in text
    assert "1 failed" in text
    assert "of 20" in text
