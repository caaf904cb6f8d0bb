"""`dse evaluate`: a model, dense or at a point, on tasks; no study needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dse.config import DatasetTaskConfig, EvaluationConfig, TaskConfig, load_dataset_task
from dse.cost import cost
from dse.decomposition import METHODS, FactorBank, decompose, longest_window, named_calibration, requests_of_points
from dse.design_point import DesignPoint
from dse.errors import ConfigError
from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator, PairedDrop, evaluator_for
from dse.files import cache_dir
from dse.models import LoadedModel, load_model
from dse.study import StudyListener, resolve_device

__all__ = ["bank_of_point", "evaluate_command"]


def evaluate_command(options: argparse.Namespace, listener: StudyListener) -> dict[str, Any]:
    """Evaluate; with a point, the dense model too, so that the drop is paired over the same documents.

    Raises:
        UserError: Model, point, task or calibration text cannot be had.
    """
    if options.seed < 0:
        raise ConfigError(f"`--seed >= 0` must hold, but got {options.seed}")
    tasks = [load_dataset_task(Path(task)) or TaskConfig(task=task) for task in options.task]
    heads = {task.head for task in tasks if isinstance(task, DatasetTaskConfig)}
    listener.on_message(f"loading {options.model}")
    loaded = load_model(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=str(resolve_device(options.device)),
        trust_remote_code=options.trust_remote_code,
        head=next(iter(heads), None),
    )
    point = DesignPoint.read(options.point, loaded.topology)
    arithmetic = cost(loaded.topology, point)
    settings = EvaluationConfig(limit=options.limit, seed=options.seed, batch_size=options.batch_size)
    evaluator = evaluator_for(loaded, tasks, settings)
    cache = None if options.no_cache else EvaluationCache(cache_dir() / "evaluations")
    dense, reused = _evaluate(evaluator, cache, DesignPoint.dense(), "", "evaluate dense", listener)
    result, drop, graded = dense, None, {}
    if not point.is_dense:
        bank = bank_of_point(loaded, point, options, listener)
        with decompose(loaded, point, bank):
            result, reused = _evaluate(evaluator, cache, point, bank.identity(point), "evaluate point", listener)
        drop = result.accuracy_drop(dense)
        graded = {
            name: _drop_json(found)
            for name in result.graded_metrics
            if (found := result.graded_drop(name, dense)) is not None
        }
    return {
        "model": options.model,
        "point_id": point.id,
        "point": point.to_json(),
        "reduction": arithmetic.reduction,
        "parameters": arithmetic.parameters,
        **result.to_json(),
        "cached_documents": reused,
        "accuracy": result.accuracy,
        "perplexity": result.perplexity,
        "dense": None
        if point.is_dense
        else {"accuracy": dense.accuracy, "perplexity": dense.perplexity, **dense.to_json()},
        "accuracy_drop": None if drop is None else _drop_json(drop),
        "graded_drops": graded,
    }


def _drop_json(drop: PairedDrop) -> dict[str, Any]:
    names = ("low", "high", "documents", "p_value", "smallest_detectable", "test")
    return {"estimate": drop.value, **{name: getattr(drop, name) for name in names}}


def _evaluate(
    evaluator: ModelEvaluator,
    cache: EvaluationCache | None,
    point: DesignPoint,
    factors: str,
    phase: str,
    listener: StudyListener,
) -> tuple[EvaluationResult, int]:
    """The result, and how many documents' answers were known before."""
    identity = evaluator.identity(point.id, factors)
    answers = Answers() if cache is None else cache.read(identity)
    result = evaluator.evaluate(lambda done, total: listener.on_phase(phase, done, total), answers=answers)
    reused = answers.reused
    if cache is not None and answers.scored:
        cache.write(identity, answers)
    return result, reused


def bank_of_point(
    loaded: LoadedModel, point: DesignPoint, options: argparse.Namespace, listener: StudyListener
) -> FactorBank:
    """The factors of a point, calibrated as the options say where its method is.

    Raises:
        CalibrationError: The calibration text is missing or too short.
    """
    calibration = None
    if any(METHODS[method].is_calibrated for method in requests_of_points([point])):
        calibration = named_calibration(
            loaded.tokenizer,
            options.calibration,
            tokens=options.calibration_tokens,
            longest_window=longest_window(loaded.model),
        )
        listener.on_message(f"calibration text: {calibration.description}")
    return FactorBank.build(loaded, [point], calibration, progress=listener.on_phase)
