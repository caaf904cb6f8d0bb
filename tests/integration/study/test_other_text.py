"""Calibrated studies compare their front with the dense model on text of another source."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import tiny_study

from dse.study import StudyListener, run_study
from dse.study.other_text_front import other_text_words
from dse.trial.other_text import other_text_ratio


class Messages(StudyListener):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_message(self, message: str) -> None:
        self.seen.append(message)


def entry(own: float, other: float) -> dict[str, dict[str, float]]:
    return {"own": {"value": own}, "other": {"value": other}}


def test_a_calibrated_study_reports_both_divergences_once(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(
        tiny_folder,
        space={
            "name": "calibrated",
            "methods": ["whitened_svd"],
            "roles": ["up", "key"],
            "ranks": {"absolute": [2, 6]},
        },
        calibration={"tokens": 512, "window": 32},
        budget={"trials": 4},
    )
    messages = Messages()
    study = run_study(config, out=tmp_path / "run", listener=messages)
    table = study.trials()
    front = table[table["on_front"] & (table["decomposed_tensors"] > 0)]
    assert (front["kl_divergence_other"] > 0).all()
    assert (front["kl_divergence"] > 0).all()
    words = study.facts()["Text of another source"]
    assert words.startswith("points on the front diverge ")
    assert words in messages.seen
    stored = study.attributes["other_text"]
    assert run_study(config, out=tmp_path / "run").attributes["other_text"] == stored


def test_the_ratio_is_the_median_over_points_and_a_large_one_asks_for_more_text() -> None:
    found = {
        "1": entry(0.1, 0.2),
        "2": entry(0.1, 0.1),
        "3": entry(0.2, 1.0),
        "4": {"reason": "no head"},
        "5": entry(0.0, 0.1),
    }
    assert other_text_ratio(found) == pytest.approx(2.0)
    assert "calibrate on more text" in other_text_words(found)
    assert "calibrate" not in other_text_words({"1": entry(0.1, 0.12)})
    assert other_text_words({}) == ""
