"""Run a study from its file: open or make its folder, say if nothing is left to do, else prepare it and loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.config import FidelityConfig, StudyConfig, load_study, parse_study
from dse.evaluation import EvaluationCache
from dse.files import cache_dir
from dse.study.ending import looked_again
from dse.study.events import StudyListener
from dse.study.final_documents import final_pending
from dse.study.folder import StudyFolder
from dse.study.interrupts import noticing_interrupts
from dse.study.loop import StudyLoop
from dse.study.setup import prepare_study
from dse.study.study import Study, begun_study, write_reports

__all__ = ["run_study"]


def run_study(
    study: StudyConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    trials: int | None = None,
    use_cache: bool = True,
    listener: StudyListener | None = None,
) -> Study:
    """Run a study, or go on with one, until its budget of trials is spent.

    Args:
        study: A study file, or what it holds as a mapping or a parsed config.
        out: Folder of the study; `runs/<study name>` by default.
        trials: Evaluated points in all, the dense model included; overrides the file.
        use_cache: Whether answers of earlier evaluations of the same model, point and documents are used, and this
            study's kept in the user's cache. Otherwise they lie in the study's folder until it is finished.
        listener: Told of progress.

    Returns:
        The finished study.

    Raises:
        UserError: The study cannot be run as it stands; nothing was evaluated, and nothing measured before is lost.
        KeyboardInterrupt: Stopped by the user; all finished trials are kept and the same call goes on.
    """
    config = _config_of(study)
    if trials is not None:
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"trials": trials})})
    folder = StudyFolder(Path(out) if out is not None else Path("runs") / config.name)
    watcher = listener or StudyListener()
    folder.check_usable()
    with folder.locked():
        config = folder.with_settled_multiple(config)
        begun = begun_study(folder.path)
        folder.check_same(config, begun.evaluated_trials if begun is not None else 0)
        begun = begun if folder.storage.exists() else None
        if begun is not None and _is_finished(begun, config, watcher):
            folder.write_config(config)
            finished = Study(folder.path)
            write_reports(finished)
            return finished
        cache = EvaluationCache(cache_dir() / "evaluations" if use_cache else folder.answers)
        prepared = prepare_study(config, watcher, None if begun is None else begun.attributes["objectives"], cache)
        folder.write_config(prepared.config)
        with folder.logging_to_file(), noticing_interrupts() as interrupts:
            StudyLoop(prepared, folder, watcher, interrupts).run()
        folder.drop_answers()
    return Study(folder.path)


def _config_of(study: StudyConfig | Mapping[str, Any] | str | Path) -> StudyConfig:
    if isinstance(study, StudyConfig):
        return study
    return parse_study(dict(study)) if isinstance(study, Mapping) else load_study(Path(study))


def _is_finished(study: Study, config: StudyConfig, listener: StudyListener) -> bool:
    """Whether nothing is left to do: no model needs loading to say so."""
    if config.fidelity is not None and _has_pending(study, config.fidelity):
        return False
    if study.evaluated_trials >= config.budget.trials:
        listener.on_message(f"complete: all {config.budget.trials} trials are there")
        return True
    if study.is_exhausted:
        listener.on_message(
            f"complete: {study.evaluated_trials} trials are there, and the space holds no further point"
        )
        return True
    return False


def _has_pending(study: Study, fidelity: FidelityConfig) -> bool:
    """Whether stopped trials wait for their second look, or the front for fresh documents."""
    has_stopped = any(record.state == "stopped" for record in study.records)
    if fidelity.resume_stopped is not None and has_stopped and not looked_again(study.attributes, len(study.records)):
        return True
    return bool(fidelity.final_documents) and final_pending(study.front_records, study.attributes.get("final", {}))
