"""What is written once per study, and what must be the same when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.errors import StudyError
from dse.measurement import describe_environment
from dse.sensitivity.allocation_constraints import STACK_ROLES
from dse.study.setup import PreparedStudy
from dse.topology import Decomposable, Topology

__all__ = ["check_same_facts", "study_facts"]

_MUST_STAY = {
    "model_fingerprint": ("model weights", "pin `model.revision`"),
    "evaluation_fingerprint": ("tasks, documents or lm-eval version", "restore them"),
    "divergence_fingerprint": ("held-out text", "restore it"),
    "calibration_fingerprint": ("calibration text", "restore it"),
}
"""Fact to what it stands for and the remedy: trials from before and after would not compare."""


def study_facts(prepared: PreparedStudy) -> dict[str, Any]:
    """Model, data, device, versions and seeds of a study, JSON-safe."""
    calibration, evaluator = prepared.calibration, prepared.evaluator
    divergence = evaluator.climber.divergence
    return {
        "environment": describe_environment(),
        "model_fingerprint": prepared.loaded.fingerprint,
        "model_ref": prepared.loaded.ref,
        "architecture": prepared.loaded.topology.architecture,
        "parameters_dense": prepared.loaded.topology.parameters_dense,
        "device": str(prepared.loaded.device),
        "dtype": str(prepared.loaded.dtype).removeprefix("torch."),
        "calibration": None if calibration is None else calibration.description,
        "calibration_fingerprint": None if calibration is None else calibration.fingerprint,
        "evaluation_fingerprint": evaluator.evaluator.fingerprint if evaluator.evaluator else None,
        "divergence_fingerprint": None if divergence is None else divergence.fingerprint,
        "energy_meter": evaluator.plan.meter.name if evaluator.plan.meter else None,
        "energy_source": evaluator.plan.meter.source if evaluator.plan.meter else None,
        "seeds": {
            "sampler": prepared.config.sampler.seed,
            "documents": prepared.config.evaluation.seed,
            "calibration": prepared.config.calibration.seed,
        },
        "shape": _shape(prepared.loaded.topology),
        "number_of_points": str(prepared.space.number_of_points()),
    }


def _shape(topology: Topology) -> dict[str, Any]:
    """Layers, roles, and the roles inside blocks and stacks: what a map of a point's ranks is drawn on."""
    blocks = {b.role: [topology.decomposable(n).role for n in topology.tensors_of(b.name)] for b in topology.blocks}
    stacks = {role: list(members) for role, members in STACK_ROLES.items() if role not in topology.roles}
    return {
        "layers": topology.layer_count,
        "roles": list(dict.fromkeys([*topology.roles, *(tensor.role for tensor in topology.experts)])),
        "blocks": blocks,
        "stacks": stacks,
        "sizes": _sizes(topology),
    }


def _sizes(topology: Topology) -> dict[str, list[int]]:
    """Role to (rows, columns), and name to them where a layer's tensor differs from the first of its role.

    The shape of fused experts begins with their number.
    """
    sizes: dict[str, list[int]] = {}
    parts: tuple[Decomposable, ...] = (*topology.tensors, *topology.experts)
    for tensor in parts:
        size = list(tensor.shape)
        if sizes.setdefault(tensor.role, size) != size:
            sizes[tensor.name] = size
    return sizes


def check_same_facts(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to go on where new trials would not compare with those that are there.

    Returns:
        Notices of what differs but does no harm to ratios.

    Raises:
        StudyError: The model, the tasks or the calibration text have changed.
    """
    for fact, (what, remedy) in _MUST_STAY.items():
        if before.get(fact) != now[fact]:
            raise StudyError(
                f"{folder} was begun with other {what} ({before.get(fact)}, now {now[fact]}); {remedy}, or choose"
                " another `--out`"
            )
    if _hardware(before) != _hardware(now):
        return [
            f"this study was begun on other hardware ({_hardware(before)}, now {_hardware(now)}): latencies are ratios"
            " to the dense model beside each point, and those of two machines may differ"
        ]
    return []


def _hardware(facts: Mapping[str, Any]) -> str:
    environment = facts.get("environment") or {}
    gpus = [str(gpu.get("name")) for gpu in environment.get("gpus") or [] if isinstance(gpu, Mapping)]
    return ", ".join([str(facts.get("device")), str((environment.get("cpu") or {}).get("model")), *gpus])
