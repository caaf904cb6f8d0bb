"""Allocate ranks under parameter or latency budgets, from a sensitivity profile."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dse.decomposition import METHODS
from dse.design_point import DesignPoint
from dse.errors import AllocationError, ConfigError
from dse.files import write_json
from dse.measurement.device_profile import Phase, profile_model, timings_for
from dse.models import LoadedModel
from dse.sensitivity import (
    Allocation,
    AllocationConstraints,
    SensitivityProfile,
    SensitivityTable,
    allocate,
    option_shapes,
    with_latencies,
)
from dse.standalone.sensitivity_run import PreparedSensitivity, SensitivityRequest
from dse.study import StudyListener

__all__ = ["AllocationRequest", "LatencyBudget", "allocate_points"]


@dataclass(frozen=True)
class LatencyBudget:
    """The workload of a latency budget.

    Attributes:
        phase: decode or prefill.
        prompt_tokens: Prompt length in tokens.
        dense_s: Measured latency of the dense model in seconds; None means the sum of its timed products.
    """

    phase: Literal["decode", "prefill"] = "decode"
    batch_size: int = 1
    prompt_tokens: int = 128
    dense_s: float | None = None


@dataclass(frozen=True)
class AllocationRequest:
    """Budgets, constraints and the profile of an allocation.

    Attributes:
        sensitivity: The model and the settings of its profile.
        reductions: Shares to remove, of the parameters or (with `latency`) of the latency.
        latency: Workload of a latency budget; None for a parameter budget.
        profile: A profile.json to use instead of measuring.
        constraints: Constraints on every allocation.
        with_refit: Whether the points name the method that refits the profile's method.
        out: Folder for one JSON file per point; None writes none.
    """

    sensitivity: SensitivityRequest
    reductions: Sequence[float]
    latency: LatencyBudget | None = None
    profile: str | None = None
    constraints: AllocationConstraints = field(default_factory=AllocationConstraints)
    with_refit: bool = False
    out: str | None = None


def allocate_points(request: AllocationRequest, listener: StudyListener | None = None) -> list[dict[str, Any]]:
    """The point with the least predicted divergence for each requested reduction.

    Returns:
        One JSON document per point.

    Raises:
        UserError: The model, space, a method or a text is not valid; the profile is of another model or text; products
            are not timed on this device; or a budget cannot be met.
    """
    watcher = listener or StudyListener()
    if request.profile is not None:
        SensitivityProfile.read(Path(request.profile))  # reject a damaged file before the model is loaded
    prepared = PreparedSensitivity.load(request.sensitivity, watcher)
    profile = prepared.profile(watcher) if request.profile is None else prepared.read(Path(request.profile))
    methods = _refit_methods(profile) if request.with_refit else {}
    table = profile.table
    if request.latency is not None:
        table = _timed_table(table, prepared.loaded, request, request.latency)
    return [_document(table, request, wanted, methods) for wanted in request.reductions]


def _document(
    table: SensitivityTable, request: AllocationRequest, wanted: float, methods: Mapping[str, str]
) -> dict[str, Any]:
    budget = "reduction" if request.latency is None else "latency_reduction"
    found = _allocation(table, request, wanted)
    point = _with_methods(found.point, methods)
    document = {
        f"wanted_{budget}": wanted,
        "reduction": found.reduction,
        **_latency_document(table, found, request.latency),
        "parameters": found.parameters,
        "predicted_divergence": found.divergence,
        "removed_blocks": len(point.removed),
        "narrow_mlps": len(point.widths),
        "point_id": point.id,
        "point": point.to_json(),
    }
    if request.out is not None:
        path = Path(request.out) / f"{budget.replace('_', '-')}-{wanted:g}.json"
        write_json(path, point.to_json())
        document["file"] = str(path)
    return document


def _allocation(table: SensitivityTable, request: AllocationRequest, wanted: float) -> Allocation:
    if request.latency is None:
        return allocate(table, reduction=wanted, constraints=request.constraints)
    return allocate(table, latency_s=(table.latency_dense_s or 0.0) * (1.0 - wanted), constraints=request.constraints)


def _refit_methods(profile: SensitivityProfile) -> dict[str, str]:
    """The profile's methods -> the methods that refit them."""
    refits = {method.refit_of: name for name, method in METHODS.items() if method.refit_of}
    for method in profile.origin.methods:
        if method not in refits:
            raise ConfigError(
                f"`--refit` needs a profile of {' or '.join(refits)}, but this profile is of '{method}'; remove"
                " `--refit` or measure another profile"
            )
    return refits


def _with_methods(point: DesignPoint, methods: Mapping[str, str]) -> DesignPoint:
    """The same ranks with other methods."""
    return DesignPoint(tuple((n, replace(c, method=methods.get(c.method, c.method))) for n, c in point))


def _timed_table(
    table: SensitivityTable, loaded: LoadedModel, request: AllocationRequest, budget: LatencyBudget
) -> SensitivityTable:
    """The table with latencies predicted from products timed on this device."""
    if budget.phase == "decode" and not loaded.topology.is_decoder:
        raise AllocationError(
            f"a decode latency needs a model that generates, but {loaded.topology.architecture} does not; use"
            " `--phase prefill`"
        )
    profile = profile_model(loaded, timings_for(loaded.model))
    phase = Phase.of(budget.phase, budget.batch_size, budget.prompt_tokens)
    shapes = option_shapes(table, profile, phase)
    missing, conditions = profile.missing(shapes), profile.timings.conditions
    if missing:
        raise AllocationError(
            f"a latency budget needs the {len(shapes)} products of the profile's options timed on this device"
            f" ({conditions.device}, {conditions.dtype}, {conditions.threads} threads), but {len(missing)} are not;"
            f" first run `{_timing_command(request, budget)}`"
        )
    return with_latencies(table, profile, phase, dense_s=budget.dense_s)


def _latency_document(table: SensitivityTable, found: Allocation, budget: LatencyBudget | None) -> dict[str, Any]:
    """The predicted latency of an allocation; empty without a latency budget."""
    if budget is None or found.latency_s is None or not table.latency_dense_s:
        return {}
    dense = "its measured latency" if budget.dense_s is not None else "the sum of its products"
    return {
        "phase": budget.phase,
        "batch_size": budget.batch_size,
        "prompt_tokens": budget.prompt_tokens,
        "latency_s": found.latency_s,
        "latency_dense_s": table.latency_dense_s,
        "latency_reduction": 1.0 - found.latency_s / table.latency_dense_s,
        "latency_is_predicted": True,
        "latency_dense_is_predicted": budget.dense_s is None,
        "latency_of": f"product timings on this device; the latency of the dense model is {dense}",
    }


def _timing_command(request: AllocationRequest, budget: LatencyBudget) -> str:
    """The command that times the missing products; it needs the sensitivity profile as a file."""
    sensitivity, model = request.sensitivity, request.sensitivity.model
    options = ["--model", model.ref]
    options += ["--revision", model.revision] if model.revision else []
    options += ["--trust-remote-code"] if model.trust_remote_code else []
    options += ["--device", model.device, "--dtype", model.dtype]
    file, before = request.profile, ""
    if file is None:
        file = "sensitivity/profile.json"
        settings = ["--calibration", sensitivity.calibration.name]
        settings += ["--calibration-tokens", str(sensitivity.calibration.tokens)]
        settings += [part for method in sensitivity.methods or () for part in ("--method", method)]
        settings += ["--stacks"] if sensitivity.with_stacks else []
        settings += ["--widths"] if sensitivity.with_widths else []
        settings += ["--pivoted"] if sensitivity.with_pivoted else []
        for name in ("space", "tokens", "text"):
            value = getattr(sensitivity, name)
            settings += [] if value is None else [f"--{name}", str(value)]
        before = shlex.join(["dse", "sensitivity", *options, *settings, "--out", "sensitivity"]) + " && "
    workload = ["--batch", str(budget.batch_size), "--prompt", str(budget.prompt_tokens)]
    return before + shlex.join(["dse", "profile-device", *options, "--profile", file, *workload])
