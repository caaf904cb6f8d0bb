"""Measure a model in a serving engine, without a study; and the front of a finished study, in an engine of choice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.config import MeasurementConfig
from dse.decomposition import apply_point
from dse.design_point import DesignPoint
from dse.engines import EngineSettings, engine_named
from dse.errors import StudyError
from dse.export import engine_pair
from dse.measurement import EnergyMeter, IdlePower, LatencySpec, device_lock, measure_idle_power
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.search.spaces.base import SearchSpace
from dse.study import Study, StudyListener, load_study_model, study_bank
from dse.study.serving_front import engine_attribute, measure_front, measured_entry, waiting_trials
from dse.study.storage import StudyStorage
from dse.trial import EngineMeasurer, MeasurementPlan, serving_entry
from dse.trial_record import TrialRecord

__all__ = ["EngineRequest", "measure_in_engine", "measure_study"]


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """The engine to measure in.

    Attributes:
        engine: transformers, vllm, onnxruntime or openvino.
        python: The engine's interpreter; None for `DSE_<ENGINE>_PYTHON`, else the one of this process.
        options: Options of the engine.
        requests: Requests of one turn; None for one for each place in the batch.
        time_limit_s: An engine that takes longer to start or to answer is killed.
    """

    engine: str
    python: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    requests: int | None = None
    time_limit_s: float = EngineSettings.time_limit_s

    def config(self, cells: MeasurementConfig) -> MeasurementConfig:
        """A `measurement` section with this engine and the cells of another one."""
        changes = {
            "engine": engine_named(self.engine).name,
            "python": self.python,
            "options": dict(self.options),
            "engine_time_limit_s": self.time_limit_s,
        }
        requests = cells.requests if self.requests is None else self.requests
        return cells.model_copy(update={**changes, "requests": requests})


def measure_in_engine(
    loaded: LoadedModel,
    point: DesignPoint,
    source: Any,
    request: EngineRequest,
    cells: tuple[LatencySpec, ...],
    *,
    meter: EnergyMeter | None = None,
    progress: ProgressCallback,
) -> tuple[list[dict[str, Any]], IdlePower | None]:
    """Measure every cell in the engine, candidate and dense model in turn.

    Args:
        loaded: The dense model.
        point: The design point; the dense point measures the dense model alone.
        source: Source of the point's factors.
        request: The engine.
        cells: Concurrency (batch size), prompt and output lengths, and how to measure.
        meter: An open energy meter; None measures no energy.
        progress: Progress callback.

    Returns:
        The measured cells as JSON documents, and the idle power.

    Raises:
        EngineUnavailableError: The engine is not installed, or cannot run the dense model.
        EngineError: The engine cannot take the point, died or hung.
    """
    sizes = [(spec.batch_size, spec.prompt_tokens, spec.new_tokens) for spec in cells]
    config = request.config(
        MeasurementConfig(
            batch_size=list(dict.fromkeys(size[0] for size in sizes)),
            prompt_tokens=list(dict.fromkeys(size[1] for size in sizes)),
            new_tokens=list(dict.fromkeys(size[2] for size in sizes)),
        )
    )
    pair = engine_pair(config, loaded, source)
    with contextlib.closing(pair), device_lock(loaded.device):
        pair.start()
        applied = apply_point(loaded.model, loaded.topology, point, source)
        try:
            idle = None if meter is None else measure_idle_power(meter)
            measurer = EngineMeasurer(loaded, MeasurementPlan(cells, meter, requests=request.requests), pair, progress)
            measured = measurer.cells(applied, is_dense=point.is_dense, meter=meter, idle=idle, meter_every_cell=True)
        finally:
            applied.undo()
    return [serving_entry([cell]) for cell in measured], idle


def measure_study(directory: str | Path, request: EngineRequest, listener: StudyListener | None = None) -> Study:
    """Measure the front of a finished study, and the trials tied with it, in an engine; trials measured before stay.

    Args:
        directory: The folder of the study.
        request: The engine. Lengths and concurrency are those of the study.
        listener: Receives progress.

    Returns:
        The study, with quantities such as `vllm.tpot_s` and with its reports written again.

    Raises:
        StudyError: The folder holds no study, the study has no dense trial, or its model has changed.
        EngineUnavailableError: The engine is not installed, or cannot run the dense model.
    """
    watcher = listener or StudyListener()
    study = Study(Path(directory))
    engine_named(request.engine).check_available(request.python)
    with study.folder.locked():
        baseline = next((r for r in study.records if r.is_dense and r.state == "complete"), None)
        if baseline is None:
            raise StudyError(f"an engine measures relative to the dense model, but {directory} has no dense trial")
        attribute = engine_attribute(request.engine)
        found = study.attributes.get(attribute, {})
        table = study.trials()
        if str(baseline.trial) in found and not waiting_trials(table, study.records, found):
            watcher.on_message(f"complete: {request.engine} has measured the front")
            return study
        watcher.on_message(f"loading {study.config.model.ref}")
        loaded = load_study_model(study.config)
        study.check_model(loaded.fingerprint)
        space = SearchSpace.from_config(study.config.constrained_space, loaded.topology)
        bank, _ = study_bank(study.config, loaded, space, watcher, [record.point for record in study.records])
        settings = request.config(study.config.measurement)
        plan = MeasurementPlan.of(study.config.model_copy(update={"measurement": settings}), None)
        storage = StudyStorage.open_existing(study.folder.storage)
        with contextlib.closing(storage), contextlib.closing(engine_pair(settings, loaded, bank)) as pair:
            measurer = EngineMeasurer(loaded, plan, pair, watcher.on_phase)

            def measure(record: TrialRecord, dense: Mapping[str, float] | None) -> dict[str, Any]:
                watcher.on_message(f"measuring trial {record.trial} in {pair.engine.title}")
                return measured_entry(measurer, record.point, bank, dense)

            measure_front(
                measure,
                baseline,
                lambda known: waiting_trials(table, study.records, known),
                found,
                lambda known: storage.set_attribute(attribute, known),
            )
    measured = Study(Path(directory))
    measured.write_reports()
    return measured
