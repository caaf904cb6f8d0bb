"""The outline of a prepared study: what the driver knows of it. It holds no model and travels between machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dse.config import StudyConfig
from dse.design_point import DesignPoint
from dse.measurement import describe_environment
from dse.model_parts import Decomposable
from dse.pareto import Objective
from dse.search.spaces.base import SearchSpace
from dse.sensitivity.allocation_constraints import STACK_ROLES
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology
from dse.trial.measurement_plan import MeasurementPlan
from dse.workers.setup import PreparedStudy

__all__ = ["StudyOutline"]


@dataclass(frozen=True, eq=False)
class StudyOutline:
    """What proposing and storing need to know of a study that workers have prepared.

    Attributes:
        config: The study file, with everything that depends on the device resolved.
        topology: The model's tensors.
        space: The search space.
        objectives: The objectives that can be measured.
        plan: How trials are measured; without the meter, which belongs to a worker.
        enqueued: The user's own points.
        table: The sensitivity table of the space; None without a sensitivity profile.
        facts: Model, data, device, versions and seeds, JSON-safe.
        has_final: Whether the front is evaluated on final documents.
    """

    config: StudyConfig
    topology: Topology
    space: SearchSpace
    objectives: tuple[Objective, ...]
    plan: MeasurementPlan
    enqueued: tuple[DesignPoint, ...]
    table: SensitivityTable | None
    facts: dict[str, Any]
    has_final: bool

    @classmethod
    def of(cls, prepared: PreparedStudy) -> StudyOutline:
        """The outline of a study that is prepared in this process."""
        return cls(
            config=prepared.config,
            topology=prepared.loaded.topology,
            space=prepared.space,
            objectives=prepared.objectives,
            plan=dataclasses.replace(prepared.plan, meter=None),
            enqueued=prepared.enqueued,
            table=prepared.table,
            facts=_facts(prepared),
            has_final=prepared.final is not None,
        )


def _facts(prepared: PreparedStudy) -> dict[str, Any]:
    config, loaded, calibration = prepared.config, prepared.loaded, prepared.calibration
    meter = prepared.plan.meter
    return {
        "environment": describe_environment(),
        "model_fingerprint": loaded.fingerprint,
        "model_ref": loaded.ref,
        "architecture": loaded.topology.architecture,
        "parameters_dense": loaded.topology.parameters_dense,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "calibration": None if calibration is None else calibration.description,
        "calibration_fingerprint": None if calibration is None else calibration.fingerprint,
        **prepared.evaluator.fidelity.fingerprints,
        "energy_meter": None if meter is None else meter.name,
        "energy_source": None if meter is None else meter.source,
        "seeds": {
            "sampler": config.sampler.seed,
            "documents": config.evaluation.seed,
            "calibration": config.calibration.seed,
        },
        "shape": _shape(loaded.topology),
        "number_of_points": str(prepared.space.number_of_points()),
    }


def _shape(topology: Topology) -> dict[str, Any]:
    """Layers, roles, the roles inside blocks, stacks and MLPs, and matrix sizes: what a map of a point needs."""
    blocks = {b.role: [topology.decomposable(n).role for n in topology.tensors_of(b.name)] for b in topology.blocks}
    stacks = {role: list(members) for role, members in STACK_ROLES.items() if role not in topology.roles}
    return {
        "layers": topology.layer_count,
        "roles": list(dict.fromkeys([*topology.roles, *(tensor.role for tensor in topology.experts)])),
        "blocks": blocks,
        "stacks": stacks,
        "mlp": [tensor.role for tensor in topology.mlps[0].tensors] if topology.mlps else [],
        "sizes": _sizes(topology),
    }


def _sizes(topology: Topology) -> dict[str, list[int]]:
    """Role to its shape, and tensor name to its shape where that differs from the first tensor of the role.

    The shape is (rows, columns), of fused experts (experts, rows, columns).
    """
    sizes: dict[str, list[int]] = {}
    parts: tuple[Decomposable, ...] = (*topology.tensors, *topology.experts)
    for tensor in parts:
        size = list(tensor.shape)
        if sizes.setdefault(tensor.role, size) != size:
            sizes[tensor.name] = size
    return sizes
