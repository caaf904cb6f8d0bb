"""What the page does: follow the study, draw what changed, and answer the reader's choices."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dash import ALL, ClientsideFunction, Dash, Input, Output, Patch, State, ctx, no_update

from dse.errors import UserError
from dse.pareto.knee import knee_index
from dse.pareto.objective import directions_of
from dse.report.dashboard.axis_values import AxisChoice, axis_choices, default_axes
from dse.report.dashboard.front_plot import FrontView, front_plot
from dse.report.dashboard.health import health_of
from dse.report.dashboard.page_layout import NO_COLOUR, axis_options, range_sliders, slider_bounds
from dse.report.dashboard.progress_plot import progress_plot, proposer_shares
from dse.report.dashboard.rank_difference import difference_plot, rank_difference
from dse.report.dashboard.snapshot import StudySnapshot, StudySource
from dse.report.dashboard.status_parts import health_part, lanes_part, proposers_part, status_part, tiles_part
from dse.report.dashboard.trial_groups import GROUPS, RangeFilter, groups_of, kept_by
from dse.report.dashboard.trial_parts import (
    choice_text,
    commands_of,
    commands_part,
    differences_part,
    head_part,
    trial_options,
    trials_part,
)
from dse.report.trials_table import objective_matrix

__all__ = ["PageCallbacks"]

_SLIDERS = {"type": "range", "key": ALL}


class PageCallbacks:
    """The callbacks of one page; each reads the present snapshot, which is cheap while the study has not changed."""

    def __init__(self, source: StudySource) -> None:
        self._source = source

    def register(self, app: Dash) -> None:
        """Connect every callback with the parts of the page."""
        sliders = [Input(_SLIDERS, "value"), State(_SLIDERS, "id"), State(_SLIDERS, "min"), State(_SLIDERS, "max")]
        app.clientside_callback(
            ClientsideFunction("watch", "theme"), Output("theme", "data"), Input("theme-button", "n_clicks")
        )
        app.callback(
            Output("version", "data"),
            Output("status", "children"),
            Output("updated", "children"),
            Output("tiles", "children"),
            Output("lanes", "children"),
            Output("health-list", "children"),
            Input("poll", "n_intervals"),
            State("version", "data"),
        )(self.follow)
        app.callback(
            Output("choices", "data"),
            *[Output(name, prop) for name in ("x", "y", "colour") for prop in ("options", "value")],
            Output("ranges", "children"),
            Input("version", "data"),
            State("choices", "data"),
            *[State(name, "value") for name in ("x", "y", "colour")],
        )(self.offer)
        app.callback(
            *[Output(_SLIDERS, name) for name in ("min", "max", "step", "value")],
            Input("version", "data"),
            Input("reset-ranges", "n_clicks"),
            State(_SLIDERS, "id"),
            *[State(_SLIDERS, name) for name in ("min", "max", "value")],
        )(self.stretch)
        app.callback(
            Output("front-plot", "figure"),
            Output("front-drawn", "data"),
            Output("front-words", "children"),
            Input("version", "data"),
            *[Input(name, "value") for name in ("x", "y", "colour", "relative", "first", "second")],
            Input("theme", "data"),
            *sliders,
            State("front-drawn", "data"),
        )(self.draw_front)
        app.callback(
            Output("table", "children"), Input("version", "data"), Input("show", "value"), *sliders
        )(self.list_trials)
        app.callback(
            Output("progress-plot", "figure"),
            Output("proposers", "children"),
            Input("version", "data"),
            Input("theme", "data"),
        )(self.draw_progress)
        app.callback(
            *[Output(name, prop) for name in ("first", "second") for prop in ("options", "value")],
            Output("slot", "value"),
            Input("version", "data"),
            Input("front-plot", "clickData"),
            State("slot", "value"),
            State("first", "value"),
            State("second", "value"),
        )(self.choose)
        app.callback(
            *[Output(f"{name}-head", "children") for name in ("first", "second")],
            Output("comparison", "hidden"),
            Output("differences", "children"),
            Output("difference-plot", "figure"),
            Output("difference-words", "children"),
            Output("commands", "children"),
            Output("compared", "data"),
            Input("first", "value"),
            Input("second", "value"),
            Input("theme", "data"),
            Input("version", "data"),
            State("compared", "data"),
        )(self.compare)

    def follow(self, _intervals: int | None, version: str | None) -> tuple[Any, ...]:
        """State, tiles, workers and health at this moment; the version triggers the rest if a trial changed."""
        snapshot, now = self._source.snapshot(), time.time()
        notices = health_of(snapshot, now)
        clock = datetime.datetime.fromtimestamp(snapshot.read_s).strftime("%H:%M:%S")
        return (
            no_update if snapshot.trials_version == version else snapshot.trials_version,
            status_part(snapshot, now),
            f"last change seen at {clock}",
            tiles_part(snapshot, notices, now),
            lanes_part(snapshot, now),
            health_part(notices),
        )

    def offer(
        self, version: str | None, offered: Sequence[str] | None, x: str | None, y: str | None, colour: str | None
    ) -> tuple[Any, ...]:
        """Axes and ranges to choose from, whenever there are new ones."""
        snapshot = self._source.snapshot()
        choices = axis_choices(snapshot.trials, snapshot.objectives)
        keys = [*(choice.key for choice in choices), *(c.key for c in choices if slider_bounds(snapshot, c) is not None)]
        if version is None or keys == offered:
            return (no_update,) * 8
        options = axis_options(choices)
        across, up = default_axes(snapshot.objectives)
        third = next((o.name for o in snapshot.objectives if o.name not in (across, up)), NO_COLOUR)
        colours = [{"label": "one colour", "value": NO_COLOUR}, *options]
        ranged = [choice for choice in choices if choice.is_objective or choice.is_task or choice.key == "reduction"]
        sliders = range_sliders(snapshot, ranged)
        return keys, options, x or across, options, y or up, colours, colour or third, sliders

    def stretch(
        self,
        _version: str | None,
        _resets: int | None,
        ids: Sequence[Mapping[str, str]],
        lows: Sequence[float],
        highs: Sequence[float],
        values: Sequence[Sequence[float]],
    ) -> tuple[Any, ...]:
        """Extend the sliders to new trials; a range that the reader narrowed stays where it is."""
        snapshot = self._source.snapshot()
        choices = _by_key(snapshot)
        is_reset = ctx.triggered_id == "reset-ranges"
        found: list[list[Any]] = [[], [], [], []]
        for place, low, high, value in zip(ids, lows, highs, values, strict=True):
            choice = choices.get(place["key"])
            bounds = None if choice is None else slider_bounds(snapshot, choice)
            if bounds is None or (bounds[:2] == (low, high) and not is_reset):
                for column in found:
                    column.append(no_update)
                continue
            ends = list(value)
            if is_reset or value[0] <= low:
                ends[0] = bounds[0]
            if is_reset or value[1] >= high:
                ends[1] = bounds[1]
            for column, entry in zip(found, (*bounds[:3], ends), strict=True):
                column.append(entry)
        return tuple(found)

    def draw_front(
        self,
        version: str | None,
        x: str | None,
        y: str | None,
        colour: str | None,
        relative: str,
        first: int | None,
        second: int | None,
        theme: str | None,
        values: Sequence[Sequence[float]],
        ids: Sequence[Mapping[str, str]],
        lows: Sequence[float],
        highs: Sequence[float],
        drawn: Mapping[str, Any] | None,
    ) -> tuple[Any, ...]:
        """The front: a whole figure for a new view, and only the traces that changed for new trials."""
        if version is None or theme is None or x is None or y is None:
            return (no_update,) * 3
        snapshot = self._source.snapshot()
        choices = _by_key(snapshot)
        filters = _filters(choices, values, ids, lows, highs)
        view = FrontView(
            choices[x], choices[y], choices.get(colour or ""), relative == "relative", filters, theme, first, second
        )
        figure = front_plot(snapshot, view)
        digests = [_digest(trace) for trace in figure["data"]]
        key, layout = [x, y, colour, relative, theme], _digest(figure["layout"])
        now = {"view": key, "traces": digests, "layout": layout}
        words = _front_words(snapshot, view)
        if drawn is None or drawn["view"] != key:
            return figure, now, words
        if drawn == now:
            return no_update, no_update, words
        patch = Patch()
        for index, (before, after) in enumerate(zip(drawn["traces"], digests, strict=True)):
            if before != after:
                patch["data"][index] = figure["data"][index]
        if drawn["layout"] != layout:
            patch["layout"] = figure["layout"]
        return patch, now, words

    def list_trials(
        self,
        version: str | None,
        show: str,
        values: Sequence[Sequence[float]],
        ids: Sequence[Mapping[str, str]],
        lows: Sequence[float],
        highs: Sequence[float],
    ) -> Any:
        """The table of the trials inside the ranges."""
        if version is None:
            return no_update
        snapshot = self._source.snapshot()
        kept = kept_by(snapshot.trials, _filters(_by_key(snapshot), values, ids, lows, highs))
        return trials_part(snapshot, kept, show)

    def draw_progress(self, version: str | None, theme: str | None) -> tuple[Any, ...]:
        """The hypervolume and the proposers."""
        if version is None or theme is None:
            return no_update, no_update
        snapshot = self._source.snapshot()
        return progress_plot(snapshot, theme), proposers_part(proposer_shares(snapshot), theme)

    def choose(
        self,
        version: str | None,
        click: Mapping[str, Any] | None,
        slot: str,
        first: int | None,
        second: int | None,
    ) -> tuple[Any, ...]:
        """The two chosen trials: at first the dense model and the knee, then what the reader clicks."""
        if version is None:
            return (no_update,) * 5
        snapshot = self._source.snapshot()
        options = trial_options(snapshot)
        known = {option["value"] for option in options}
        if ctx.triggered_id == "front-plot" and click is not None:
            trial = click["points"][0].get("customdata")
            if trial not in known:
                return (no_update,) * 5
            if slot == "A":
                return no_update, trial, no_update, no_update, "B"
            return no_update, no_update, no_update, trial, "A"
        if first is None and options:
            first = next((option["value"] for option in options if "dense" in option["label"]), None)
        if second is None and len(options) > 1:
            second = _knee(snapshot)
        return options, first, options, second, no_update

    def compare(
        self, first: int | None, second: int | None, theme: str | None, version: str | None, compared: str | None
    ) -> tuple[Any, ...]:
        """The two chosen trials side by side."""
        if version is None or theme is None:
            return (no_update,) * 8
        snapshot = self._source.snapshot()
        records = [None if trial is None else snapshot.records.get(trial) for trial in (first, second)]
        standing = [None if trial is None else _standing(snapshot, trial) for trial in (first, second)]
        key = _digest([first, second, theme, standing, [None if r is None else repr(r.quantities) for r in records]])
        if key == compared:
            return (no_update,) * 8
        heads = [head_part(snapshot, letter, trial) for letter, trial in (("A", first), ("B", second))]
        if first is None or second is None or records[0] is None or records[1] is None or first == second:
            return (*heads, True, no_update, no_update, no_update, no_update, key)
        found: Any
        try:
            found = self._source.compare(first, second)
        except UserError as error:
            found = f"Not paired: {error}"
        difference = rank_difference(records[0].point, records[1].point, snapshot.shape)
        return (
            *heads,
            False,
            differences_part(snapshot, first, second, found),
            difference_plot(difference, theme),
            difference.sentence,
            commands_part(commands_of(snapshot, first, second)),
            key,
        )


def _by_key(snapshot: StudySnapshot) -> dict[str, AxisChoice]:
    return {choice.key: choice for choice in axis_choices(snapshot.trials, snapshot.objectives)}


def _filters(
    choices: Mapping[str, AxisChoice],
    values: Sequence[Sequence[float]],
    ids: Sequence[Mapping[str, str]],
    lows: Sequence[float],
    highs: Sequence[float],
) -> list[RangeFilter]:
    """The sliders that were narrowed; an end that was not moved stays open for trials to come."""
    found = []
    for value, place, low, high in zip(values, ids, lows, highs, strict=True):
        if value[0] > low or value[1] < high:
            ends = (value[0] if value[0] > low else -np.inf, value[1] if value[1] < high else np.inf)
            if place["key"] in choices:
                found.append(RangeFilter(choices[place["key"]], *ends))
    return found


def _front_words(snapshot: StudySnapshot, view: FrontView) -> str:
    """The plot in words."""
    if snapshot.trials.empty:
        return "No trial is finished yet; the plot fills by itself."
    groups = groups_of(snapshot.trials)
    kept = kept_by(snapshot.trials, view.filters)
    words = {**{name: text.lower() for name, text in GROUPS.items()}, "front": "on the Pareto front", "dense": "dense"}
    counts = [(int((mask & kept).sum()), words[name]) for name, mask in groups.items()]
    shown = ", ".join(f"{count:,} {name}" for count, name in counts if count)
    outside = int((~kept).sum())
    more = f" {outside:,} trials are outside the ranges." if outside else ""
    axes = "; ".join(f"{axis.label}: {choice_text(snapshot, axis)}" for axis in (view.x, view.y))
    return f"Shown: {shown}.{more} {axes}. Bars are 95 % intervals; the ring marks the knee. Drag to zoom, double-click to reset."


def _knee(snapshot: StudySnapshot) -> int | None:
    """The knee of the front; without one, a point of the front."""
    table = snapshot.trials
    groups = groups_of(table)
    front = np.flatnonzero(groups["front"])
    if len(front) == 0:
        return None
    objectives = snapshot.objectives
    found = knee_index(objective_matrix(table, objectives), directions_of(objectives), ~groups["dense"])
    return int(table["trial"].iloc[int(front[0]) if found is None else found])


def _standing(snapshot: StudySnapshot, trial: int) -> str:
    rows = np.flatnonzero(snapshot.trials["trial"].to_numpy() == trial) if len(snapshot.trials) else []
    return next((name for name, mask in groups_of(snapshot.trials).items() for row in rows if mask[row]), "")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()
