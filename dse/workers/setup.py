"""Prepare a study: from its file to the model, the search space, the factor bank and the trial evaluator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

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
from dse.engines import EnginePair, engine_named, engine_timings
from dse.errors import ConfigError
from dse.evaluation import EvaluationCache, ModelEvaluator, evaluator_for
from dse.evaluation.divergence import DenseDivergence
from dse.export import engine_pair
from dse.measurement import check_workload, device_in_use, device_lock, passing_measurements
from dse.measurement.device_profile import ProductTimings
from dse.models import LoadedModel, load_model
from dse.models.residency import place_weights, visible_devices
from dse.out_of_memory import out_of_memory_by_phase
from dse.pareto import Objective
from dse.search.space_sensitivity import study_table
from dse.search.spaces.base import SearchSpace
from dse.search.user_points import checked_user_points
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.trial.device_rank_multiple import settled_study
from dse.trial.healed_trial import TrialHealer
from dse.trial.measurement_plan import MeasurementPlan, open_study_meter
from dse.trial.measurements import TrialMeasurer
from dse.trial.objectives import (
    RequiredMeasurements,
    check_engine,
    check_phases,
    check_tasks,
    required_measurements,
    resolve_objectives,
)
from dse.trial.other_text import OtherText
from dse.trial.rungs import MultiFidelityEvaluator
from dse.trial.trial_evaluator import TrialEvaluator
from dse.workers.device_defaults import with_device_defaults
from dse.workers.final_documents import FinalEvaluator
from dse.workers.float32_comparison import half_precision_notice
from dse.workers.listener import StudyListener

__all__ = ["PreparedStudy", "bank_requests", "load_study_model", "prepare_study", "resolve_device", "study_bank"]


@dataclass(frozen=True, eq=False)
class PreparedStudy:
    """A study that is ready to run.

    Attributes:
        config: The study file, with everything that depends on the device resolved.
        loaded: The model.
        space: The search space.
        objectives: The objectives that can be measured here.
        plan: How trials are measured.
        evaluator: Evaluates a point.
        enqueued: The user's own points.
        calibration: The calibration text; None if no method needs one.
        final: Evaluates the front on final documents; None without them.
        table: The sensitivity table of the space; None without a sensitivity profile.
        pair: The serving engine; None if everything is measured in this process.
    """

    config: StudyConfig
    loaded: LoadedModel
    space: SearchSpace
    objectives: tuple[Objective, ...]
    plan: MeasurementPlan
    evaluator: TrialEvaluator
    enqueued: tuple[DesignPoint, ...]
    calibration: CalibrationWindows | None
    final: FinalEvaluator | None = None
    table: SensitivityTable | None = None
    pair: EnginePair | None = None

    @cached_property
    def healer(self) -> TrialHealer:
        """Heals points; made when the first one is healed.

        Raises:
            CalibrationError: A text cannot be read or is too short.
            ModelError: The model has no output head whose inputs suffice for the loss.
        """
        if self.config.healing is None:
            raise ValueError("a study without the section `healing` heals nothing")
        evaluator = self.evaluator.fidelity.evaluator if self.final is None else self.final.evaluator
        bank, report = self.evaluator.bank, self.evaluator.on_phase
        return TrialHealer(self.config, self.config.healing, self.loaded, bank, evaluator, report)

    @cached_property
    def other_text(self) -> OtherText:
        """Compares points with the dense model on text of another source than the calibration's."""
        return OtherText(self.loaded, self.evaluator.bank, self.config.calibration)

    def close(self) -> None:
        """End the serving engine, if there is one."""
        if self.pair is not None:
            self.pair.close()


def prepare_study(
    config: StudyConfig,
    listener: StudyListener,
    started_with: Sequence[str] | None = None,
    cache: EvaluationCache | None = None,
    *,
    with_table: bool = True,
) -> PreparedStudy:
    """Check the whole study, load the model, and build or open the factor bank.

    Cheap checks come first: a misspelt objective must not cost a download.

    Args:
        config: The study.
        listener: Receives progress.
        started_with: Objectives of the existing trials; None for a new study.
        cache: Keeps the answers of evaluations; None keeps none.
        with_table: Whether to measure the sensitivity table, if the search uses one.

    Raises:
        UserError: A part of the study is not possible: model, space, task, objective, meter or calibration text.
    """
    device = resolve_device(config.model.device)
    meter, meter_problem = open_study_meter(config, device)
    objectives, dropped = resolve_objectives(config, meter_problem, started_with)
    for name, reason in dropped.items():
        listener.on_message(f"objective {name} is left out: {reason}")
    check_engine(config)
    if config.measurement.is_external:
        engine_named(config.measurement.engine).check_available(config.measurement.python)
    plan = MeasurementPlan.of(config, meter)
    listener.on_message(f"loading {config.model.ref}")
    loaded = load_study_model(config)
    if notice := half_precision_notice(loaded):
        listener.on_message(notice)
    check_phases(objectives, loaded)
    config = with_device_defaults(config, loaded, plan.cells[0], listener.on_message)
    plan = MeasurementPlan.of(config, meter)
    pair = engine_pair(config.measurement, loaded) if config.measurement.is_external else None
    timings = None if pair is None else _engine_timings(config, loaded, pair, listener)
    with out_of_memory_by_phase(listener.on_phase, "device_profile") as progress:
        config = settled_study(config, loaded, plan, progress, listener.on_message, timings)
    space = SearchSpace.from_config(config.constrained_space, loaded.topology)
    enqueued = checked_user_points(config, space)
    measures_in_engine = config.measurement.is_external and config.measurement.when == "every_trial"
    required = required_measurements(
        objectives,
        bool(config.tasks),
        has_grid=len(plan.cells) > 1,
        has_meter=meter is not None and config.measurement.meter is not None,
        has_engine=measures_in_engine,
    )
    if required.latency or required.energy or required.memory or required.serving:
        for cell in plan.cells:
            with device_in_use(loaded.device):
                check_workload(loaded.model, cell)  # a prompt that exceeds the model's context, an unavailable mode
    plan = plan.with_profile(loaded, space, config, timings)
    evaluator = evaluator_for(loaded, config.tasks, config.evaluation) if config.tasks else None
    if evaluator is not None:
        check_tasks(objectives, evaluator.metrics, evaluator.graded)
    final_evaluator = _final_evaluator(config, loaded, evaluator)
    bank, calibration = study_bank(config, loaded, space, listener, enqueued)
    fidelity = MultiFidelityEvaluator(
        loaded,
        evaluator,
        _divergence(config, loaded, required, listener),
        cache,
        shares=tuple(config.fidelity.shares) if config.fidelity else (),
        has_rungs=config.fidelity is not None,
    )
    if pair is not None:
        pair.source = bank
    measurer = TrialMeasurer(loaded, required, plan, listener.on_phase, pair if measures_in_engine else None)
    table = None
    if with_table:
        report = passing_measurements(listener.on_phase, loaded.device)
        with device_in_use(loaded.device), out_of_memory_by_phase(report, "sensitivity") as progress:
            table = study_table(config, loaded, space, bank, calibration, progress=progress, notify=listener.on_message)
    if pair is not None and measures_in_engine and required.serving:
        listener.on_message(f"starting {pair.engine.title} on the dense model")
        with device_lock(loaded.device):
            pair.start()
    return PreparedStudy(
        config=config,
        loaded=loaded,
        space=space,
        objectives=objectives,
        plan=plan,
        evaluator=TrialEvaluator(loaded, bank, fidelity, measurer, listener.on_phase),
        enqueued=enqueued,
        calibration=calibration,
        final=None if final_evaluator is None else FinalEvaluator(loaded, bank, final_evaluator, cache),
        table=table,
        pair=pair,
    )


def load_study_model(config: StudyConfig) -> LoadedModel:
    """Load the study's model, dense, on its device.

    Raises:
        ModelError: The model cannot be loaded.
    """
    device = resolve_device(config.model.device)
    # On a GPU the weights are read once it is known where they fit.
    on_disk = device.type == "cuda" if config.residency == "auto" else config.residency != "dense_and_candidate"
    with device_in_use(device):
        loaded = load_model(
            config.model.ref,
            revision=config.model.revision,
            dtype=config.model.dtype,
            device=str(device),
            trust_remote_code=config.model.trust_remote_code,
            role_names=config.space.role_names,
            head=config.head,
            weights_on_disk=on_disk,
        )
    chosen = place_weights(loaded, config.residency, visible_devices(device))
    if chosen == "candidate" and config.measurement.mode == "cuda_graph":
        raise ConfigError(
            f"{device} has room for one side of a trial only (`residency: candidate`), but CUDA graphs need both in one"
            " place; set `measurement.mode: eager`, or a smaller dtype"
        )
    return loaded


def study_bank(
    config: StudyConfig,
    loaded: LoadedModel,
    space: SearchSpace,
    listener: StudyListener,
    points: Iterable[DesignPoint] = (),
) -> tuple[FactorBank, CalibrationWindows | None]:
    """Build or open the factor bank for a study, and read its calibration text.

    Args:
        config: The study.
        loaded: Its model.
        space: Its search space; the bank holds its largest ranks.
        listener: Receives progress.
        points: Further points that the bank must hold.

    Raises:
        CalibrationError: The calibration text is missing or too short.
        StorageFullError: The disk has too little room.
    """
    requests = bank_requests(space, points)
    calibration = None
    if any(METHODS[method].is_calibrated for method in requests):
        calibration = calibration_windows(
            loaded.tokenizer, config.calibration, longest_window=longest_window(loaded.model)
        )
        listener.on_message(f"calibration text: {calibration.description}")
    report = passing_measurements(listener.on_phase, loaded.device)
    with device_in_use(loaded.device), out_of_memory_by_phase(report, "calibrate") as progress:
        bank = FactorBank.build(loaded, requests, calibration, progress=progress)
    return bank, calibration


def bank_requests(space: SearchSpace, points: Iterable[DesignPoint] = ()) -> dict[str, dict[str, int]]:
    """Method to tensor to the largest rank that a study of this space and these points can ask for."""
    requests = space.largest_ranks()
    for method, ranks in requests_of_points(points).items():
        held = requests.get(method, {})
        requests[method] = held | {name: max(rank, held.get(name, 0)) for name, rank in ranks.items()}
    return requests


def resolve_device(name: str) -> torch.device:
    """The torch device of a study file's `device`; `auto` is CUDA if available, else the CPU.

    Raises:
        ConfigError: The name is not a device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"`model.device` must be auto, cpu, cuda or cuda:<index>, but got '{name}'") from error


def _engine_timings(
    config: StudyConfig, loaded: LoadedModel, pair: EnginePair, listener: StudyListener
) -> ProductTimings | None:
    """Product timings in the study's engine, if the study needs any."""
    settings = config.measurement
    if not (settings.only_if_faster or settings.predict_latency or config.space.ranks.multiple == "device"):
        return None
    listener.on_message(f"starting {pair.engine.title} on the dense model")
    with device_lock(loaded.device):
        pair.start()
        return engine_timings(pair, loaded.model, listener.on_message)


def _final_evaluator(
    config: StudyConfig, loaded: LoadedModel, evaluator: ModelEvaluator | None
) -> ModelEvaluator | None:
    if config.fidelity is None or not config.fidelity.final_documents:
        return None
    shared = None if evaluator is None else evaluator.batch_size
    return evaluator_for(
        loaded, config.tasks, config.evaluation, fresh=config.fidelity.final_documents, batch_size=shared
    )


def _divergence(
    config: StudyConfig, loaded: LoadedModel, required: RequiredMeasurements, listener: StudyListener
) -> DenseDivergence | None:
    """The baseline's side of the KL divergence, if an objective or the proxy rung needs it."""
    tokens = config.evaluation.divergence_tokens if required.divergence else 0
    if not tokens and config.fidelity is not None:
        tokens = config.fidelity.proxy_tokens
    if not tokens:
        return None
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, tokens, longest_window=longest_window(loaded.model)
    )
    report = passing_measurements(listener.on_phase, loaded.device)
    with device_in_use(loaded.device), out_of_memory_by_phase(report, "kl_divergence") as progress:
        return DenseDivergence(loaded.model, windows, progress=progress)
