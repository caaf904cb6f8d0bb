"""Export trials of a study: the study knows the model, the bank and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse.design_point import DesignPoint
from dse.errors import ExportError, StudyError
from dse.export.point_export import ExportResult, export_points
from dse.export.staging import ExportRequest
from dse.search.spaces.base import SearchSpace
from dse.study import Study, StudyListener, load_study_model, open_study, study_bank

__all__ = ["export"]


def export(
    study: Study | str | Path,
    trials: int | Sequence[int],
    out: str | Path,
    *,
    dense: bool = False,
    listener: StudyListener | None = None,
) -> tuple[ExportResult, ...]:
    """Write the models of these trials as folders that transformers loads without `dse`.

    Args:
        study: An open study, or its folder.
        trials: One trial or several.
        out: The new folder; with several trials, each gets `trial-<n>` inside it.
        dense: Write merged dense weights instead of factors: for runtimes without low-rank layers; saves nothing.
        listener: Told of progress.

    Returns:
        One result per trial.

    Raises:
        StudyError: A trial does not exist or is not complete, or the model has changed since the study.
        ExportError: The folder is taken, or a reload differs; no folder is left then.
    """
    opened = study if isinstance(study, Study) else open_study(study)
    numbers = [trials] if isinstance(trials, int) else list(dict.fromkeys(trials))
    if not numbers:
        raise ExportError("an export needs at least one trial, but got none; name some with --trial")
    watcher = listener or StudyListener()
    records = [opened.record(number) for number in numbers]
    folder = Path(out)
    watcher.on_message(f"loading {opened.config.model.ref}")
    loaded = load_study_model(opened.config)
    _check_same_model(opened, loaded.fingerprint)
    space = SearchSpace.from_config(opened.config.constrained_space, loaded.topology)
    points = [DesignPoint.from_json(record.point, loaded.topology) for record in records]
    bank, _ = study_bank(opened.config, loaded, space, watcher, points)
    requests = [
        ExportRequest(
            point,
            folder if len(numbers) == 1 else folder / f"trial-{record.trial}",
            dense,
            _card_facts(opened, record.trial),
        )
        for record, point in zip(records, points, strict=True)
    ]
    return export_points(loaded, requests, bank, progress=watcher.on_phase)


def _check_same_model(study: Study, fingerprint: str) -> None:
    before = study.attributes.get("facts", {}).get("model_fingerprint")
    if before is not None and before != fingerprint:
        raise StudyError(
            f"the study was run on model {before}, but '{study.config.model.ref}' is now {fingerprint};"
            " pin `model.revision` or restore the model"
        )


def _card_facts(study: Study, trial: int) -> dict[str, Any]:
    """What the model card tells beside sizes."""
    table = study.trials()
    rows = table.set_index("trial", drop=False)
    dense = table[(table["decomposed_tensors"] == 0) & (table["state"] == "complete")]
    environment = study.attributes.get("facts", {}).get("environment", {})
    return {
        "study": study.config.name,
        "trial": trial,
        "row": rows.loc[trial].to_dict(),
        "dense_row": dense.iloc[0].to_dict() if len(dense) else {},
        "environment": environment,
        "versions": environment.get("packages"),
    }
