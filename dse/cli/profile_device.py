"""`dse profile-device`: which ranks of which matrices take less time than dense on this device."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dse.config import load_search_space
from dse.cost import break_even_rank
from dse.design_point import TensorChoice
from dse.errors import ConfigError, ProfileError
from dse.files import write_text
from dse.measurement import device_lock
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import ModelProfile, Phase
from dse.measurement.device_profile.product_timings import ProductShape
from dse.models import LoadedModel, load_model
from dse.report.rank_curves import RankCurve, RankPanel, rank_curves_html
from dse.runtime import timings_for
from dse.search.spaces.base import SearchSpace
from dse.sensitivity import SensitivityProfile
from dse.sensitivity.option_latency import option_shapes
from dse.study import StudyListener, resolve_device, settled_space

__all__ = ["print_profile", "profile_device", "write_plot"]

Entry = tuple[str, TensorChoice, Phase, int]


def profile_device(options: argparse.Namespace, listener: StudyListener) -> dict[str, Any]:
    """Time what is not timed yet, and compare every matrix at every rank with dense.

    Every timing is kept as it is taken, so that the same command goes on where it was stopped.

    Raises:
        UserError: Model or space cannot be had.
    """
    device = resolve_device(options.device)
    listener.on_message(f"loading {options.model}")
    loaded = load_model(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=str(device),
        trust_remote_code=options.trust_remote_code,
    )
    profile = model_profile(loaded, timings_for(loaded.model))
    space = _space(options, loaded, profile, listener)
    entries = list(_entries(loaded, options, space))
    if not entries:
        raise ConfigError("a rank must lie within the break-even of some matrix, but none does; lower `--ranks`")
    shapes = [
        shape
        for name, choice, phase, _ in entries
        for one in (None, choice)
        for shape in profile.shapes_of(name, one, phase)
    ]
    if options.profile is not None:
        shapes += _shapes_of_profile(profile, loaded, options)
    missing = profile.missing(shapes)
    with device_lock(device):
        for done, shape in enumerate(missing):
            listener.on_phase("products", done, len(missing))
            profile.timings.best_seconds(shape)
    listener.on_phase("products", len(missing), len(missing))
    return {
        "model": options.model,
        "conditions": dataclasses.asdict(profile.timings.conditions),
        "file": str(profile.timings.path),
        "timed_now": len(missing),
        "rank_multiple": None if space is None else space.config.ranks.settled_multiple,
        "matrices": [_row(profile, *entry) for entry in entries],
    }


def _shapes_of_profile(profile: ModelProfile, loaded: LoadedModel, options: argparse.Namespace) -> list[ProductShape]:
    """What `dse allocate --latency-reduction` adds up over a sensitivity profile's options."""
    table = SensitivityProfile.read(Path(options.profile)).table
    phases = {phase for name in _phases(loaded) for phase in (Phase.of(name, b, options.prompt) for b in options.batch)}
    ordered = sorted(phases, key=lambda phase: (phase.name, phase.rows))
    return [shape for phase in ordered for shape in option_shapes(table, profile, phase)]


def _phases(loaded: LoadedModel) -> tuple[str, ...]:
    return ("decode", "prefill") if loaded.topology.is_decoder else ("prefill",)


def _space(
    options: argparse.Namespace, loaded: LoadedModel, profile: ModelProfile, listener: StudyListener
) -> SearchSpace | None:
    """The space whose ranks are timed, its rank multiple settled for all phases and batch sizes asked for."""
    if options.space is None:
        return None
    phases = [Phase.of(name, batch, options.prompt) for name in _phases(loaded) for batch in options.batch]
    config = settled_space(load_search_space(Path(options.space)), loaded, phases, profile.timings, listener)
    return SearchSpace.from_config(config, loaded.topology)


def _entries(loaded: LoadedModel, options: argparse.Namespace, space: SearchSpace | None) -> Iterator[Entry]:
    """Each matrix of one role and shape once, at each rank, in each phase and batch."""
    topology = loaded.topology
    seen = set()
    names = _phases(loaded)
    for name, choice in _choices(loaded, options, space):
        matrix = topology.matrix(name)
        key = (matrix.role, matrix.shape, choice)
        if key in seen:
            continue
        seen.add(key)
        for batch in options.batch:
            for phase in names:
                yield name, choice, Phase.of(phase, batch, options.prompt), batch


def _choices(
    loaded: LoadedModel, options: argparse.Namespace, space: SearchSpace | None
) -> Iterable[tuple[str, TensorChoice]]:
    topology = loaded.topology
    if options.profile is not None:
        profile = SensitivityProfile.read(Path(options.profile))
        if profile.origin.model != loaded.fingerprint:
            raise ProfileError(
                f"a sensitivity profile must be of the model at hand ({loaded.fingerprint}), but {options.profile} is"
                f" of {profile.origin.model}; name its model"
            )
        choices = (pair for unit in profile.table.units for option in unit.options for pair in option.choices)
        yield from (pair for pair in choices if not pair[1].is_removal)
        return
    if space is None:
        for matrix in topology.matrices:
            for rank in sorted(options.ranks):
                if rank <= break_even_rank(*matrix.shape):
                    yield matrix.name, TensorChoice("svd", rank)
        return
    for dimension, size in space.dimensions.items():
        for level in range(1, size):
            for name, choice in space.point({**space.dense_levels, dimension: level}):
                if not choice.is_removal:
                    yield name, choice


def _row(profile: ModelProfile, name: str, choice: TensorChoice, phase: Phase, batch: int) -> dict[str, Any]:
    matrix = profile.topology.matrix(name)
    dense_s, point_s = (profile.group_seconds(name, one, phase) for one in (None, choice))
    return {
        "role": matrix.role,
        "out_features": matrix.shape[0],
        "in_features": matrix.shape[1],
        "example": name,
        "method": choice.method,
        "rank": choice.rank,
        "phase": phase.name,
        "batch_size": batch,
        "rows": phase.rows,
        "dense_s": dense_s,
        "decomposed_s": point_s,
        "ratio": point_s / dense_s if dense_s else None,
        "is_faster": profile.is_faster(name, choice, phase),
    }


def write_plot(document: Mapping[str, Any], path: str) -> None:
    """Draw the document as a page.

    Raises:
        StorageFullError: The file cannot be written.
    """
    conditions = document["conditions"]
    where = (
        f"{conditions['device']}, {conditions['dtype']}, {conditions['threads']} threads, {conditions['torch_version']}"
    )
    page = rank_curves_html(_panels(document), title=f"Device profile of {document['model']}", notes=(where,))
    write_text(Path(path), page)


def _panels(document: Mapping[str, Any]) -> list[RankPanel]:
    """A plot for each role and shape, a curve for each method, phase and batch size."""
    panels: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    several = len({row["method"] for row in document["matrices"]}) > 1
    for row in document["matrices"]:
        label = f"{row['phase']}, batch {row['batch_size']}" + (f", {row['method']}" if several else "")
        curves = panels.setdefault((row["role"], row["out_features"], row["in_features"]), {})
        curves.setdefault(label, []).append(row)
    return [
        RankPanel(
            f"{role}, {rows} x {columns}", break_even_rank(rows, columns), tuple(map(_curve, curves, curves.values()))
        )
        for (role, rows, columns), curves in panels.items()
    ]


def _curve(label: str, rows: list[dict[str, Any]]) -> RankCurve:
    timed = sorted((row for row in rows if row["ratio"] is not None), key=lambda row: int(row["rank"]))
    dense = f"{1e6 * rows[0]['dense_s']:.0f} us"
    return RankCurve(label, tuple(row["rank"] for row in timed), tuple(row["ratio"] for row in timed), dense)


def print_profile(document: Mapping[str, Any]) -> None:
    """A line for each matrix and phase, and its ranks across."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("matrix", "shape", "phase", "batch", "dense", "time relative to dense, by rank"):
        table.add_column(column, justify="left" if column in ("matrix", "phase") or "," in column else "right")
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in document["matrices"]:
        shape = f"{row['out_features']} x {row['in_features']}"
        lines.setdefault((row["role"], shape, row["phase"], row["batch_size"]), []).append(row)
    for (role, shape, phase, batch), rows in lines.items():
        ranks = "  ".join(f"{row['rank']}: {row['ratio']:.2f}" for row in sorted(rows, key=lambda row: row["rank"]))
        table.add_row(role, shape, phase, str(batch), f"{1e6 * rows[0]['dense_s']:.0f} us", ranks)
    console.print(table)
    conditions = document["conditions"]
    console.print(
        f"{conditions['device']}, {conditions['dtype']}, {conditions['threads']} threads, torch"
        f" {conditions['torch_version']}; times are of all that shares the matrix's input;"
        f" {document['timed_now']} products timed now, the others known",
        soft_wrap=True,
    )
