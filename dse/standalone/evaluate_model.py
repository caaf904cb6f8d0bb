"""Evaluate a model on tasks, dense or at a design point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse.config import DatasetTaskConfig, EvaluationConfig, TaskConfig, load_dataset_task
from dse.cost import point_cost
from dse.decomposition import decompose
from dse.design_point import DesignPoint
from dse.evaluation import Answers, EvaluationCache, EvaluationResult, ModelEvaluator, PairedInterval, evaluator_for
from dse.files import cache_dir
from dse.measurement import device_in_use
from dse.standalone.model_request import CalibrationText, ModelRequest, point_factors
from dse.study import StudyListener

__all__ = ["evaluate_model"]


def evaluate_model(
    model: ModelRequest,
    tasks: Sequence[str],
    settings: EvaluationConfig,
    *,
    point: str = "dense",
    calibration: CalibrationText | None = None,
    use_cache: bool = True,
    listener: StudyListener | None = None,
) -> dict[str, Any]:
    """Evaluate a model. At a point, also evaluate the dense model and pair the accuracy drop by document.

    Args:
        tasks: lm-eval tasks, dse_* tasks, or YAML files.
        settings: Documents per task, seed and batch size.
        point: JSON text, a JSON file, or "dense".
        calibration: Text for calibrated methods; None means the default text.
        use_cache: Whether to read and write answers in the user's cache.

    Returns:
        The results as a JSON document.

    Raises:
        UserError: The model, point, a task or the calibration text is not valid.
    """
    watcher = listener or StudyListener()
    task_configs = [load_dataset_task(Path(task)) or TaskConfig(task=task) for task in tasks]
    heads = {task.head for task in task_configs if isinstance(task, DatasetTaskConfig)}
    loaded = model.load(watcher, head=next(iter(heads), None))
    found = DesignPoint.read(point, loaded.topology)
    cost = point_cost(loaded.topology, found)
    evaluator = evaluator_for(loaded, task_configs, settings)
    cache = EvaluationCache(cache_dir() / "evaluations") if use_cache else None
    with device_in_use(loaded.device):
        dense, reused = _evaluate(evaluator, cache, DesignPoint.dense(), "", "evaluate dense", watcher)
    result, drop, graded = dense, None, {}
    if not found.is_dense:
        bank = point_factors(loaded, found, calibration or CalibrationText(), watcher)
        with device_in_use(loaded.device), decompose(loaded, found, bank):
            result, reused = _evaluate(evaluator, cache, found, bank.identity(found), "evaluate point", watcher)
        drop = result.accuracy_drop(dense)
        graded = {
            name: _drop_json(metric_drop)
            for name in result.graded_metrics
            if (metric_drop := result.graded_drop(name, dense)) is not None
        }
    return {
        "model": model.ref,
        "point_id": found.id,
        "point": found.to_json(),
        "reduction": cost.reduction,
        "parameters": cost.parameters,
        **result.to_json(),
        "cached_documents": reused,
        "accuracy": result.accuracy,
        "perplexity": result.perplexity,
        "dense": None
        if found.is_dense
        else {"accuracy": dense.accuracy, "perplexity": dense.perplexity, **dense.to_json()},
        "accuracy_drop": None if drop is None else _drop_json(drop),
        "graded_drops": graded,
    }


def _drop_json(drop: PairedInterval) -> dict[str, Any]:
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
    """The result, and the number of documents whose answers came from the cache."""
    identity = evaluator.identity(point.id, factors)
    answers = Answers() if cache is None else cache.read(identity)
    result = evaluator.evaluate(lambda done, total: listener.on_phase(phase, done, total), answers=answers)
    reused = answers.reused
    if cache is not None and answers.scored:
        cache.write(identity, answers)
    return result, reused
