"""Time the matrix products of a model on this device, dense and decomposed, and compare them by rank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.config import MeasurementConfig, load_search_space
from dse.cost import break_even_rank
from dse.design_point import TensorChoice
from dse.engines import engine_timings
from dse.errors import ConfigError, ProfileError
from dse.export import engine_pair
from dse.measurement import device_lock
from dse.measurement.device_profile import ModelProfile, Phase, ProductTimings, profile_model, timings_for
from dse.model_parts import Matrix, Mlp
from dse.models import LoadedModel
from dse.report.rank_curves import RankCurve, RankPanel, rank_curves_html
from dse.search.spaces.base import SearchSpace
from dse.sensitivity import SensitivityProfile, option_shapes
from dse.standalone.measure_engine import EngineRequest
from dse.standalone.model_request import ModelRequest
from dse.study import StudyListener
from dse.topology import Topology
from dse.trial import settled_space

__all__ = ["RankTimingRequest", "rank_timings_html", "time_ranks"]

_Entry = tuple[str, TensorChoice, Phase, int]


@dataclass(frozen=True)
class RankTimingRequest:
    """The ranks and workloads to time. Exactly one of `ranks`, `space` and `profile` is set.

    Attributes:
        ranks: Ranks, for every matrix up to its break-even rank.
        space: A search-space file or shipped name, whose ranks are timed.
        profile: A profile.json of `dse sensitivity`, whose options are timed, as `dse allocate` needs for latencies.
        prompt_tokens: Prompt length of prefill in tokens.
        engine: The serving engine whose products are timed; None times them with torch in this process.
    """

    ranks: Sequence[int] = ()
    space: str | None = None
    profile: str | None = None
    batch_sizes: Sequence[int] = (1,)
    prompt_tokens: int = 128
    engine: EngineRequest | None = None


def time_ranks(
    model: ModelRequest, request: RankTimingRequest, listener: StudyListener | None = None
) -> dict[str, Any]:
    """Time every product that is not timed yet, and compare each matrix at each rank with dense.

    Each timing is stored as soon as it is taken, so an interrupted run continues where it stopped.

    Returns:
        The timings as a JSON document.

    Raises:
        UserError: The model, space or profile is not valid, or no rank is within a break-even rank.
    """
    watcher = listener or StudyListener()
    loaded = model.load(watcher)
    with _timings(loaded, request, watcher) as timings:
        return _timed(model, loaded, request, profile_model(loaded, timings), watcher)


@contextlib.contextmanager
def _timings(loaded: LoadedModel, request: RankTimingRequest, listener: StudyListener) -> Iterator[ProductTimings]:
    """Product timings of torch in this process, or of the requested engine while it runs."""
    if request.engine is None:
        yield timings_for(loaded.model)
        return
    config = request.engine.config(MeasurementConfig())
    with contextlib.closing(engine_pair(config, loaded)) as pair:
        listener.on_message(f"starting {pair.engine.title} on the dense model")
        with device_lock(loaded.device):
            pair.start()
            timings = engine_timings(pair, loaded.model, listener.on_message)
        yield timings


def _timed(
    model: ModelRequest,
    loaded: LoadedModel,
    request: RankTimingRequest,
    profile: ModelProfile,
    watcher: StudyListener,
) -> dict[str, Any]:
    """Time what is missing, and compare."""
    space = _space(request, loaded, profile, watcher)
    entries = list(_entries(loaded, request, space))
    if not entries:
        raise ConfigError("a rank must lie within the break-even of some matrix, but none does; lower `--ranks`")
    shapes = [
        shape
        for name, choice, phase, _ in entries
        for one in (None, choice)
        for shape in profile.part_shapes(name, one, phase)
    ]
    if request.profile is not None:  # the products that `dse allocate --latency-reduction` sums over the options
        table = SensitivityProfile.read(Path(request.profile)).table
        phases = sorted(set(_phases(loaded, request)), key=lambda phase: (phase.name, phase.rows))
        shapes += [shape for phase in phases for shape in option_shapes(table, profile, phase)]
    missing = profile.missing(shapes)
    with device_lock(loaded.device):
        for done, shape in enumerate(missing):
            watcher.on_phase("products", done, len(missing))
            profile.timings.seconds(shape)
    watcher.on_phase("products", len(missing), len(missing))
    return {
        "model": model.ref,
        "conditions": dataclasses.asdict(profile.timings.conditions),
        "file": str(profile.timings.path),
        "timed_now": len(missing),
        "rank_multiple": None if space is None else space.config.ranks.settled_multiple,
        "matrices": [_row(profile, *entry) for entry in entries],
    }


def _phases(loaded: LoadedModel, request: RankTimingRequest) -> list[Phase]:
    return [
        Phase.of(name, batch, request.prompt_tokens) for name in _phase_names(loaded) for batch in request.batch_sizes
    ]


def _phase_names(loaded: LoadedModel) -> tuple[str, ...]:
    return ("decode", "prefill") if loaded.topology.is_decoder else ("prefill",)


def _space(
    request: RankTimingRequest, loaded: LoadedModel, profile: ModelProfile, listener: StudyListener
) -> SearchSpace | None:
    """The space whose ranks are timed, with its rank multiple settled for all requested phases and batch sizes."""
    if request.space is None:
        return None
    space = load_search_space(Path(request.space))
    config = settled_space(
        space, loaded, _phases(loaded, request), profile.timings, listener.on_phase, listener.on_message
    )
    return SearchSpace.from_config(config, loaded.topology)


def _entries(loaded: LoadedModel, request: RankTimingRequest, space: SearchSpace | None) -> Iterator[_Entry]:
    """Each matrix of one role and shape once, at each rank or width, in each phase and batch size."""
    seen = set()
    for name, choice in _choices(loaded, request, space):
        part = _part(loaded.topology, name, choice)
        key = (part.role, part.shape, choice)
        if key in seen:
            continue
        seen.add(key)
        for batch in request.batch_sizes:
            for phase in _phase_names(loaded):
                yield name, choice, Phase.of(phase, batch, request.prompt_tokens), batch


def _choices(
    loaded: LoadedModel, request: RankTimingRequest, space: SearchSpace | None
) -> Iterable[tuple[str, TensorChoice]]:
    if request.profile is not None:
        return _choices_of_profile(loaded, request.profile)
    if space is not None:
        points = (
            space.point({**space.dense_levels, dimension: level})
            for dimension, size in space.dimensions.items()
            for level in range(1, size)
        )
        return (pair for point in points for pair in point if not pair[1].is_removal)
    return (
        (matrix.name, TensorChoice("svd", rank))
        for matrix in loaded.topology.matrices
        for rank in sorted(request.ranks)
        if rank <= break_even_rank(*matrix.shape)
    )


def _choices_of_profile(loaded: LoadedModel, path: str) -> Iterator[tuple[str, TensorChoice]]:
    profile = SensitivityProfile.read(Path(path))
    if profile.origin.model != loaded.fingerprint:
        raise ProfileError(
            f"a sensitivity profile must be of the given model ({loaded.fingerprint}), but {path} is of"
            f" {profile.origin.model}; give `--model` its model"
        )
    for unit in profile.table.units:
        for option in unit.options:
            yield from (pair for pair in option.choices if not pair[1].is_removal)


def _part(topology: Topology, name: str, choice: TensorChoice) -> Matrix | Mlp:
    """The matrix that a choice decomposes, or the MLP whose width it reduces."""
    return topology.mlp(name) if choice.is_width else topology.matrix(name)


def _row(profile: ModelProfile, name: str, choice: TensorChoice, phase: Phase, batch: int) -> dict[str, Any]:
    matrix = _part(profile.topology, name, choice)
    dense_s, point_s = (profile.part_seconds(name, one, phase) for one in (None, choice))
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


def rank_timings_html(document: Mapping[str, Any]) -> str:
    """Plot a document of `time_ranks` as a page: time relative to dense by rank, one plot per matrix."""
    conditions = document["conditions"]
    where = (
        f"{conditions['device']}, {conditions['dtype']}, {conditions['threads']} threads, {conditions['torch_version']}"
    )
    return rank_curves_html(_panels(document), title=f"Device profile of {document['model']}", notes=(where,))


def _panels(document: Mapping[str, Any]) -> list[RankPanel]:
    """One plot per role and shape, with one curve per method, phase and batch size."""
    panels: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    has_methods = len({row["method"] for row in document["matrices"]}) > 1
    for row in document["matrices"]:
        label = f"{row['phase']}, batch {row['batch_size']}" + (f", {row['method']}" if has_methods else "")
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
