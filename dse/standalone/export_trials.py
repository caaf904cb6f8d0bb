"""Export trials of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dse.errors import ExportError, StudyError
from dse.export.formats import export_format
from dse.export.point_export import ExportResult, check_engines, export_points
from dse.export.staging import ExportRequest
from dse.healing import read_healed
from dse.report.trials_table import dense_row
from dse.search.spaces.base import SearchSpace
from dse.study import Study, StudyListener, load_study_model, open_study, study_bank
from dse.study.healed_front import healed_folder
from dse.trial_record import TrialRecord

__all__ = ["export_trials"]


def export_trials(
    study: Study | str | Path,
    trials: int | Sequence[int],
    out: str | Path,
    *,
    format: str = "transformers",
    dense: bool = False,
    healed: bool = False,
    verify_in: Sequence[str] = (),
    python: str | None = None,
    listener: StudyListener | None = None,
) -> tuple[ExportResult, ...]:
    """Write the models of these trials as folders that engines load without `dse`, each verified in its engine.

    Args:
        study: An open study, or its folder.
        trials: One trial number or several.
        out: The new folder; for several trials, each gets `trial-<n>` inside it.
        format: transformers, dense, onnx, openvino or decilm; see `dse.export.formats`.
        healed: Whether to write the trained weights of trials that `heal_study` has healed.
        dense: The same as `format="dense"`: merged weights instead of factors, which saves nothing.
        verify_in: Further engines that must reproduce the model, for example `vllm`.
        python: Interpreter of these engines, or of the format's own engine if none is named.
        listener: Receives progress.

    Returns:
        One result per trial.

    Raises:
        StudyError: A trial does not exist, is not complete or is not healed, or the model has changed since the study.
        ExportError: The format does not fit the model or the point, the folder is taken, or an engine computes
            something else; no folder is left then.
        EngineUnavailableError: An engine is not installed.
        EngineError: An engine cannot load an export, died or hung.
    """
    opened = study if isinstance(study, Study) else open_study(study)
    numbers = [trials] if isinstance(trials, int) else list(dict.fromkeys(trials))
    if not numbers:
        raise ExportError("an export needs at least one trial, but got none; name some with --trial")
    if dense and format not in ("transformers", "dense"):
        raise ExportError(f"`--dense` stands for `--format dense`, but the format is '{format}'; name one of them")
    form = export_format("dense" if dense else format)
    check_engines([form.name], verify_in, python)
    listener = listener or StudyListener()
    records = [opened.record(number) for number in numbers]
    weights = [_healed_weights(opened, record) if healed else None for record in records]
    folder = Path(out)
    listener.on_message(f"loading {opened.config.model.ref}")
    loaded = load_study_model(opened.config)
    opened.check_model(loaded.fingerprint)
    space = SearchSpace.from_config(opened.config.constrained_space, loaded.topology)
    bank, _ = study_bank(opened.config, loaded, space, listener, [record.point for record in records])
    requests = [
        ExportRequest(
            record.point,
            folder if len(numbers) == 1 else folder / f"trial-{record.trial}",
            form.name,
            _card_details(opened, record.trial, is_healed=healed),
            trained,
        )
        for record, trained in zip(records, weights, strict=True)
    ]
    return export_points(loaded, requests, bank, verify_in=verify_in, python=python, progress=listener.on_phase)


def _healed_weights(study: Study, record: TrialRecord) -> dict[str, Tensor]:
    found = read_healed(healed_folder(study.folder.path, record.trial), record.point)
    if found is None:
        raise StudyError(
            f"trial {record.trial} must be healed before its trained weights are exported; run"
            f" `dse heal {study.folder.path} --trial {record.trial}`"
        )
    return found[0]


def _card_details(study: Study, trial: int, *, is_healed: bool) -> dict[str, Any]:
    """Provenance and measurements for the model card."""
    table = study.trials()
    dense = dense_row(table)
    environment = study.attributes.get("facts", {}).get("environment", {})
    return {
        "study": study.config.name,
        "trial": trial,
        "is_healed": is_healed,
        "row": table.set_index("trial", drop=False).loc[trial].to_dict(),
        "dense_row": {} if dense is None else dense.to_dict(),
        "environment": environment,
        "versions": environment.get("packages"),
    }
