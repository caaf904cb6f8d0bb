"""Run a study: open or create its folder, return at once if it is complete, else prepare and drive it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.config import FidelityConfig, StudyConfig, WorkersConfig, load_study, parse_study
from dse.evaluation import EvaluationCache
from dse.files import cache_dir
from dse.study.driver import StudyDriver
from dse.study.finish import finish_study, has_resumed_stopped
from dse.study.folder import StudyFolder
from dse.study.healed_front import healing_pending
from dse.study.resume import resume_or_start
from dse.study.serving_front import serving_pending
from dse.study.study import Study, started_study
from dse.workers.final_documents import final_pending
from dse.workers.interface import LocalWorker, Workers
from dse.workers.lane_listener import LaneListener
from dse.workers.listener import Interrupts, StudyListener, watching_interrupts
from dse.workers.setup import prepare_study

__all__ = ["run_study"]


def run_study(
    study: StudyConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    trials: int | None = None,
    use_cache: bool = True,
    workers: WorkersConfig | Mapping[str, Any] | int | None = None,
    listener: StudyListener | None = None,
) -> Study:
    """Run a study, or resume one, until its budget of trials is spent.

    Args:
        study: A study file, its content as a mapping, or a parsed config.
        out: The study's folder; `runs/<study name>` by default.
        trials: Total number of evaluated points, the baseline included; overrides the file.
        use_cache: Reuse answers of earlier evaluations of the same model, point and documents, and keep this study's in
            the user's cache. Otherwise the answers are kept in the study's folder until the study is finished.
        workers: Number of workers, or the keys of a study file's `workers`, which they override.
        listener: Receives progress.

    Returns:
        The finished study.

    Raises:
        UserError: The study cannot run; nothing measured before is lost.
        KeyboardInterrupt: Stopped by the user; all finished trials are kept, and the same call resumes.
    """
    config = _config_of(study)
    if trials is not None:
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"trials": trials})})
    config = config.with_workers(workers)
    folder = StudyFolder(Path(out) if out is not None else Path("runs") / config.name)
    folder.check_usable()
    watcher = listener or StudyListener()
    with folder.locked():
        config = folder.with_settled_multiple(config)
        folder.choose_storage(config)
        started = started_study(folder.path)
        folder.check_same(config, started.evaluated_trials if started is not None else 0)
        started = started if folder.storage.exists() else None
        if started is not None and _is_finished(started, config, watcher):
            folder.write_config(config)
            finished = Study(folder.path)
            finished.write_reports()
            return finished
        folder.choose_storage(config)  # a study without trials was replaced
        started_with = None if started is None else started.attributes["objectives"]
        with _ready_workers(config, folder, started_with, watcher, use_cache=use_cache) as ready:
            finished = _drive(ready, folder)
        folder.drop_answers()
    return finished


@dataclass(frozen=True)
class _Ready:
    """Workers that have prepared the study, and who watches them."""

    workers: Workers
    listener: StudyListener
    interrupts: Interrupts


@contextlib.contextmanager
def _ready_workers(
    config: StudyConfig,
    folder: StudyFolder,
    started_with: Sequence[str] | None,
    listener: StudyListener,
    *,
    use_cache: bool,
) -> Iterator[_Ready]:
    """Prepare the study in this process, or on the workers that it asks for."""
    if config.workers is not None:
        from dse.workers.ray_workers import ray_workers

        answers = None if use_cache else folder.answers
        on_ray = ray_workers(config, config.workers, listener, folder.workers, started_with, answers)
        with on_ray as workers, watching_interrupts() as interrupts:
            yield _Ready(workers, listener, interrupts)
        return
    with LaneListener(listener, folder.workers) as watcher:
        cache = EvaluationCache(cache_dir() / "evaluations" if use_cache else folder.answers)
        prepared = prepare_study(config, watcher, started_with, cache)
        try:
            with watching_interrupts() as interrupts:
                yield _Ready(LocalWorker(prepared, watcher, interrupts), watcher, interrupts)
        finally:
            prepared.close()


def _drive(ready: _Ready, folder: StudyFolder) -> Study:
    """Run the study to its end."""
    folder.write_config(ready.workers.outline.config)
    with folder.logging_to_file():
        driver = StudyDriver(ready.workers, folder, ready.listener, ready.interrupts)
        with driver.closing():
            unfinished = resume_or_start(driver)
            driver.measure_idle("idle_power_before")
            driver.search_until_spent(unfinished)
            driver.measure_idle("idle_power_after")
            finish_study(driver)
        finished = Study(folder.path)
        finished.write_reports()
    return finished


def _config_of(study: StudyConfig | Mapping[str, Any] | str | Path) -> StudyConfig:
    if isinstance(study, StudyConfig):
        return study
    return parse_study(dict(study)) if isinstance(study, Mapping) else load_study(Path(study))


def _is_finished(study: Study, config: StudyConfig, listener: StudyListener) -> bool:
    """Whether nothing is left to do; found out without loading the model."""
    if config.fidelity is not None and _has_pending(study, config.fidelity):
        return False
    if config.measurement.when == "front" and serving_pending(config, study.trials(), study.records, study.attributes):
        return False
    if healing_pending(config, study.front_records, study.attributes):
        return False
    if study.evaluated_trials >= config.budget.trials:
        listener.on_message(f"complete: all {config.budget.trials} trials are done")
        return True
    if study.is_exhausted:
        listener.on_message(f"complete: {study.evaluated_trials} trials are done, and the space is exhausted")
        return True
    return False


def _has_pending(study: Study, fidelity: FidelityConfig) -> bool:
    """Whether stopped trials may still resume, or points on the front lack the final documents."""
    has_stopped = any(record.state == "stopped" for record in study.records)
    may_resume = fidelity.resume_stopped is not None and has_stopped
    if may_resume and not has_resumed_stopped(study.attributes, len(study.records)):
        return True
    return bool(fidelity.final_documents) and final_pending(study.front_records, study.attributes.get("final", {}))
