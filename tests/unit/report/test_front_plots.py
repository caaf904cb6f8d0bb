from __future__ import annotations

import io
import json
from collections.abc import Callable

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from dse.errors import ConfigError
from dse.pareto import Objective, objectives_named
from dse.report.front_figure import domains, figure_json, plot_front
from dse.report.front_panels import front_panels
from dse.report.front_png import front_png
from dse.report.palette import Palette
from dse.report.trials_table import front_table

MakeTrials = Callable[..., pd.DataFrame]


@pytest.fixture
def small(make_trials: MakeTrials) -> pd.DataFrame:
    return make_trials(
        [
            {"accuracy": 0.7, "decode_latency_s": 0.040, "parameters": 100e6},
            {"accuracy": 0.6, "decode_latency_s": 0.030, "parameters": 90e6},
            {"accuracy": 0.5, "decode_latency_s": 0.035, "parameters": 80e6},  # on the front because of its parameters
            {"accuracy": 0.4, "decode_latency_s": 0.050, "parameters": 110e6},
            {"accuracy": 0.9, "decode_latency_s": 0.010, "parameters": 10e6, "state": "failed"},
        ]
    )


def test_panels_contain_every_complete_trial_once_in_shown_units(
    small: pd.DataFrame, three: tuple[Objective, ...]
) -> None:
    latency, parameters = front_panels(small, three)
    assert [panel.x.objective.name for panel in (latency, parameters)] == ["decode_latency_s", "parameters"]
    assert latency.x.title == "Decode latency (ms), lower is better"
    assert latency.y.title == "Accuracy, higher is better"
    assert latency.colour is not None
    assert latency.colour.short_title == "Parameters (M)"
    assert latency.front.trials.tolist() == [1, 2]
    assert latency.others.trials.tolist() == [3]
    assert latency.dense.trials.tolist() == [0]
    assert latency.front.x == pytest.approx([30.0, 35.0])
    assert latency.front.colour == pytest.approx([90.0, 80.0])


def test_staircase_is_the_front_of_the_two_shown_objectives(small: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    latency, parameters = front_panels(small, three)
    assert latency.staircase == pytest.approx(np.array([[30, 0.6], [40, 0.7]]))
    assert parameters.staircase == pytest.approx(np.array([[80, 0.5], [90, 0.6], [100, 0.7]]))
    assert latency.steps_after
    (reduction,) = front_panels(small, three, x="reduction")
    assert not reduction.steps_after


def test_error_bars_span_the_interval(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    trials = study_trials.assign(accuracy_high=study_trials["accuracy_high"] + 0.02)
    panel = front_panels(trials, three)[0]
    row = trials.iloc[panel.front.rows[0]]
    assert panel.front.x[0] - panel.front.x_error[0, 0] == pytest.approx(1000 * row["decode_latency_s_low"])
    assert panel.front.y[0] + panel.front.y_error[1, 0] == pytest.approx(row["accuracy_high"])


def test_trial_numbers_do_not_overlap(make_trials: MakeTrials) -> None:
    two = objectives_named(["accuracy", "parameters"])
    near = [{"accuracy": 0.6 + 0.001 * i, "parameters": 80.0 + 0.1 * i} for i in range(3)]
    trials = make_trials([{"accuracy": 0.9, "parameters": 100.0}, *near, {"accuracy": 0.1, "parameters": 50.0}])
    (panel,) = front_panels(trials, two)
    sides = dict(zip(panel.front.trials.tolist(), panel.label_sides(), strict=True))
    assert sides[4] == ("left", "top"), "an isolated point has its number on the side of the ideal"
    assert len({sides[1], sides[2], sides[3]}) == 3


def test_figure_has_every_group_in_every_panel(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    figure = plot_front(study_trials, three)
    assert [trace.name for trace in figure.data] == 2 * [
        "Other trials",
        "Two-objective front",
        "Pareto front",
        "Dense model",
        "Knee",
    ]
    front = front_table(study_trials, three)
    drawn = {int(text) for text in figure.data[2].text} | {0}
    assert drawn == set(front["trial"])
    assert figure.layout.xaxis.title.text == "Decode latency (ms), lower is better"
    assert figure.layout.xaxis2.title.text == "Parameters (M), lower is better"
    assert figure.data[1].line.shape == "hv"
    assert figure.data[2].error_y.visible is None
    assert figure.data[2].error_y.array is not None
    assert sum(bool(trace.showlegend) for trace in figure.data) == 5


def test_hover_text_is_complete_and_escaped(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    trials = study_trials.copy()
    number = int(front_table(trials, three)["trial"].iloc[1])
    trials.loc[trials["trial"] == number, "point_id"] = "<b>bad</b></script>"
    figure = plot_front(trials, three)
    text = figure.data[2].hovertext[list(figure.data[2].text).index(str(number))]
    assert text.startswith(f"<b>Trial {number}</b>  &lt;b&gt;bad&lt;/b&gt;&lt;/script&gt;<br>reduction ")
    for part in ("accuracy 0.", "±0.031", "pts [", "decode latency ", " ms ±", "x0.", "parameters ", " M"):
        assert part in text
    assert "<" not in figure_json(figure)
    assert json.loads(figure_json(figure))["data"][2]["name"] == "Pareto front"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_panels_do_not_overlap(count: int) -> None:
    boxes = [domains(index, count, True) for index in range(count)]
    for (left, right), (bottom, top) in boxes:
        assert 0 <= left < right <= 1
        assert 0 <= bottom < top <= 1 + 1e-9
    for index, (x, y) in enumerate(boxes):
        for other_x, other_y in boxes[:index]:
            assert x[0] >= other_x[1] or y[1] <= other_y[0]


def _pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return np.round(255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).astype(int)


def _count(pixels: np.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) <= 2).sum())


def test_png_is_deterministic_and_shows_every_group(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    png = front_png(study_trials, three, title="costs $5 & <b> $x_1$", dpi=60)
    assert png == front_png(study_trials, three, title="costs $5 & <b> $x_1$", dpi=60), (
        "the same trials give the same bytes"
    )
    pixels = _pixels(png)
    assert pixels.shape[1] > 1.5 * pixels.shape[0]
    for colour in (Palette.DENSE, Palette.TRIALS, Palette.FRONT):
        assert _count(pixels, colour) > 30
    without = _pixels(front_png(study_trials[study_trials["trial"] != 0], three, dpi=60))
    assert _count(without, Palette.DENSE) == 0


def test_single_panel_with_chosen_axes(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    figure = plot_front(study_trials, three, x="reduction", y="decode_latency_s")
    assert figure.layout.xaxis.title.text == "Reduction (%), higher is better"
    assert figure.layout.yaxis.title.text == "Decode latency (ms), lower is better"
    assert len(figure.data) == 5
    assert max(np.concatenate([figure.data[0].x, figure.data[2].x])) > 20  # percent, not a fraction


@pytest.mark.parametrize("names", [["accuracy"], ["accuracy", "parameters"], ["decode_latency_s", "parameters"]])
@pytest.mark.parametrize("rows", [0, 1, 24])
def test_any_study_can_be_plotted(study_trials: pd.DataFrame, names: list[str], rows: int) -> None:
    objectives = objectives_named(names)
    assert len(plot_front(study_trials[:rows], objectives).data) == 5
    assert _pixels(front_png(study_trials[:rows], objectives, dpi=40)).size


def test_unknown_axis_is_refused_with_a_suggestion(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'parameters'"):
        plot_front(study_trials, three, x="parameter")
    with pytest.raises(ConfigError, match="'perplexity'"):
        front_png(study_trials, three, y="perplexity")
