"""A study as one JSON document: progress, front, recommendation and files."""

from __future__ import annotations

import dataclasses
from typing import Any

from dse.report.text_tables import to_records
from dse.study.study import Study

__all__ = ["study_document"]

_ADVICE_KEYS = (
    "trial",
    "point_id",
    "reason",
    "accuracy_drop",
    "accuracy_drop_high",
    "meets_bound",
    "estimate_trial",
    "more_documents",
    "knee_trial",
)


def study_document(study: Study) -> dict[str, Any]:
    """The document that `dse run --json` and `dse front --json` print."""
    folder = study.folder
    advice = study.recommend() if study.has_accuracy else None
    return {
        "study": study.config.name,
        "directory": str(folder.path),
        "trials_evaluated": study.evaluated_trials,
        "trials_budget": study.config.budget.trials,
        "is_complete": study.evaluated_trials >= study.config.budget.trials or study.is_exhausted,
        "objectives": [
            {"name": entry.name, "unit": entry.unit, "direction": entry.direction} for entry in study.objectives
        ],
        "hypervolume": study.hypervolume,
        "reference": study.attributes.get("reference"),
        "origins": [dataclasses.asdict(share) for share in study.origin_shares],
        "front": to_records(study.front()),
        "tied": to_records(study.tied()),
        "recommendation": None if advice is None else {key: getattr(advice, key) for key in _ADVICE_KEYS},
        "files": {
            "study": str(folder.study_yaml),
            "trials": str(folder.trials_csv),
            "front": str(folder.front_csv),
            "page": str(folder.front_html),
            "picture": str(folder.front_png),
            "log": str(folder.log),
        },
    }
