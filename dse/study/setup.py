"""From a study file to everything that evaluating a point needs; whatever the user got wrong is found here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dse.config import StudyConfig
from dse.decomposition import (
    METHODS,
    CalibrationWindows,
    FactorBank,
    calibration_windows,
    held_out_windows,
    longest_window,
    requests_of_points,
)
from dse.design_point import DesignPoint
from dse.errors import ConfigError
from dse.evaluation import EvaluationCache, ModelEvaluator, evaluator_for
from dse.evaluation.divergence import DenseDivergence
from dse.measurement import check_workload
from dse.models import LoadedModel, load_model
from dse.pareto import Objective
from dse.search.space_sensitivity import study_table
from dse.search.spaces.base import SearchSpace
from dse.search.user_points import own_points
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study.device_rank_multiple import settled_study
from dse.study.evaluate_point import PointEvaluator
from dse.study.events import StudyListener
from dse.study.final_documents import FinalEvaluator
from dse.study.measurement_plan import MeasurementPlan, open_study_meter
from dse.study.objectives import RequiredMeasurements, check_tasks_serve, required_measurements, resolve_objectives
from dse.study.precision import half_precision_notice
from dse.study.rungs import MultiFidelityEvaluator

__all__ = ["PreparedStudy", "load_study_model", "prepare_study", "resolve_device", "study_bank"]


@dataclass(frozen=True, eq=False)
class PreparedStudy:
    """A study that is ready to run; nothing in its configuration is left for the device to settle."""

    config: StudyConfig
    loaded: LoadedModel
    space: SearchSpace
    objectives: tuple[Objective, ...]
    evaluator: PointEvaluator
    enqueued: tuple[DesignPoint, ...]
    calibration: CalibrationWindows | None
    final: FinalEvaluator | None = None
    divergences: SensitivityTable | None = None


def prepare_study(
    config: StudyConfig,
    listener: StudyListener,
    begun_with: Sequence[str] | None = None,
    cache: EvaluationCache | None = None,
) -> PreparedStudy:
    """Load the model, check the whole study against it, and build or open the factor bank.

    Cheap checks come first: a misspelt objective must not cost a download.

    Args:
        config: The study.
        listener: Told of progress.
        begun_with: Objectives of the trials that are there already; None for a new study.
        cache: Where answers of evaluations are kept and looked for; None keeps none.

    Raises:
        UserError: Anything in the study that cannot be: model, space, task, objective, meter, calibration text.
    """
    device = resolve_device(config.model.device)
    meter, meter_problem = open_study_meter(config, device)
    objectives, dropped = resolve_objectives(config, meter_problem, begun_with)
    for name, reason in dropped.items():
        listener.on_message(f"objective {name} is left out: {reason}")
    plan = MeasurementPlan.of(config, meter)
    listener.on_message(f"loading {config.model.ref}")
    loaded = load_study_model(config)
    if notice := half_precision_notice(loaded):
        listener.on_message(notice)
    _check_phases(objectives, loaded)
    config = settled_study(config, loaded, plan, listener)
    space = SearchSpace.from_config(config.constrained_space, loaded.topology)
    enqueued = own_points(config, space)
    has_grid, has_meter = len(plan.cells) > 1, meter is not None and config.measurement.meter is not None
    needs = required_measurements(objectives, bool(config.tasks), has_grid=has_grid, has_meter=has_meter)
    if required.latency or required.energy or required.memory:
        for cell in plan.cells:
            check_workload(loaded.model, cell)  # a prompt that does not fit the model, a mode that is not here
        plan.use_runtime(loaded, [entry.name for entry in objectives], listener.on_phase)
    plan.use_profile(loaded, space, config)  # what is left of a point matters whatever is measured of it
    evaluator = _evaluator(config, loaded) if config.tasks else None
    if evaluator is not None:
        check_tasks_serve(objectives, evaluator.metrics, evaluator.graded)
    fidelity = config.fidelity
    fresh = _evaluator(config, loaded, fidelity.final_documents) if fidelity and fidelity.final_documents else None
    bank, calibration = study_bank(config, loaded, space, listener, enqueued)
    climber = MultiFidelityEvaluator(
        loaded,
        evaluator,
        _divergence(config, loaded, needs, listener),
        cache,
        tuple(fidelity.shares) if fidelity else (),
        fidelity is not None,
    )
    point_evaluator = PointEvaluator(loaded, bank, needs, climber, plan, listener.on_phase)
    final = None if fresh is None else FinalEvaluator(loaded, bank, fresh, cache)
    divergences = study_table(config, loaded, space, bank, calibration, listener)
    return PreparedStudy(config, loaded, space, objectives, point_evaluator, enqueued, calibration, final, divergences)


def load_study_model(config: StudyConfig) -> LoadedModel:
    """The study's model, dense, on its device.

    Raises:
        ModelError: It cannot be loaded.
    """
    return load_model(
        config.model.ref,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=str(resolve_device(config.model.device)),
        trust_remote_code=config.model.trust_remote_code,
        role_names=config.space.role_names,
        head=config.head,
    )


def study_bank(
    config: StudyConfig,
    loaded: LoadedModel,
    space: SearchSpace,
    listener: StudyListener,
    points: Iterable[DesignPoint] = (),
) -> tuple[FactorBank, CalibrationWindows | None]:
    """The factor bank up to the largest ranks of the space, and the calibration text it was made with.

    Args:
        config: The study.
        loaded: Its model.
        space: Its space.
        listener: Told of progress.
        points: To be held beside the space's.

    Raises:
        CalibrationError: The calibration text is missing or too short.
        StorageFullError: The disk has no room for it.
    """
    requests = space.largest_ranks()
    for method, ranks in requests_of_points(points).items():
        held = requests.get(method, {})
        requests[method] = held | {name: max(rank, held.get(name, 0)) for name, rank in ranks.items()}
    calibration = None
    if any(METHODS[method].is_calibrated for method in requests):
        calibration = calibration_windows(
            loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model)
        )
        listener.on_message(f"calibration text: {calibration.description}")
    bank = FactorBank.build(loaded, requests, calibration, progress=listener.on_phase)
    return bank, calibration


def resolve_device(name: str) -> torch.device:
    """The torch device of a study file's `device`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: It is not a device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"`model.device` must be auto, cpu, cuda or cuda:<index>, but got '{name}'") from error


def _divergence(
    config: StudyConfig, loaded: LoadedModel, needs: RequiredMeasurements, listener: StudyListener
) -> DenseDivergence | None:
    """The dense model's side of the KL divergence, where an objective or the ladder's proxy asks for one."""
    tokens = config.evaluation.divergence_tokens if required.divergence else 0
    if not tokens and config.fidelity is not None:
        tokens = config.fidelity.proxy_tokens
    if not tokens:
        return None
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, tokens, longest_window=longest_window(loaded.model)
    )
    return DenseDivergence(loaded.model, windows, progress=listener.on_phase)


def _evaluator(config: StudyConfig, loaded: LoadedModel, fresh: int = 0) -> ModelEvaluator:
    return evaluator_for(loaded, config.tasks, config.evaluation, fresh=fresh)


def _check_phases(objectives: tuple[Objective, ...], loaded: LoadedModel) -> None:
    decode = [entry.name for entry in objectives if entry.name in ("decode_latency_s", "energy_per_token_j")]
    if decode and not loaded.topology.is_decoder:
        raise ConfigError(
            f"objective '{decode[0]}' needs a model that generates, but {loaded.topology.architecture} does not;"
            " use prefill_latency_s or prefill_energy_j"
        )
