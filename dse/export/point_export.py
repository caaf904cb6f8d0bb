"""Export design points: write, reload in a fresh process, compare, and only then put in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.cost import check_point, cost
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.errors import ExportError
from dse.export.model_card import CardContent, model_card
from dse.export.staging import ExportRequest, StagedExport, check_target, stage
from dse.export.verification import ReloadReport, verify_folders
from dse.export.weights import writing_errors
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["ExportResult", "export_point", "export_points"]


@dataclass(frozen=True)
class ExportResult:
    """An export in its place.

    Attributes:
        folder: Where it is.
        is_dense: Whether it holds dense matrices alone, and so saves nothing.
        parameters: In this folder, tied ones once.
        reduction: 1 - parameters / parameters of the dense model.
        bytes_on_disk: Of all its files.
        weight_file_bytes: Of its safetensors.
        dense_weight_bytes: What the dense model's weights take in the same dtype, without a file's header.
        max_logit_difference: Largest difference on reloading; None where it was not verified.
        tolerance: What was allowed.
        files: Names of its files, sorted.
    """

    folder: Path
    is_dense: bool
    parameters: int
    reduction: float
    bytes_on_disk: int
    weight_file_bytes: int
    dense_weight_bytes: int
    max_logit_difference: float | None
    tolerance: float
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The attributes as a JSON mapping."""
        return vars(self) | {"folder": str(self.folder), "files": list(self.files)}


def export_point(
    loaded: LoadedModel,
    point: DesignPoint,
    bank: FactorSource,
    folder: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    dense: bool = False,
    verify: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Write one point as a Hugging Face folder; see `export_points`.

    Args:
        loaded: The dense model; it is as before afterwards, to the bit.
        point: What to decompose.
        bank: Holds the point's factors.
        folder: Where it goes: nothing may be there yet, or an empty folder.
        facts: What the model card shall tell beside sizes; see `ExportRequest`.
        dense: Whether to multiply the factors out.
        verify: Whether to reload it in a fresh process and compare before it is put in place.
        progress: Called as ("write", exports, exports) and ("verify", exports, exports).

    Raises:
        ExportError: The destination is taken, the architecture cannot be exported, or the reload differs.
        PointError: The point does not fit the model.
        StorageFullError: The disk has no room or cannot be written.
    """
    request = ExportRequest(point, folder, dense, facts or {})
    return export_points(loaded, [request], bank, verify=verify, progress=progress)[0]


def export_points(
    loaded: LoadedModel,
    requests: Sequence[ExportRequest],
    bank: FactorSource,
    *,
    verify: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> tuple[ExportResult, ...]:
    """Write several points, each to its own folder; all of them are verified in one fresh process.

    Every export is written beside its destination and renamed into it at the end: a folder is there complete and
    verified, or not at all. If one fails, none is put in place.

    Args:
        loaded: The dense model; it is as before afterwards, to the bit.
        requests: What to write where.
        bank: Holds the points' factors.
        verify: Whether to reload in a fresh process and compare.
        progress: Called as ("write", exports, exports) and ("verify", exports, exports).

    Raises:
        ExportError: A destination is taken, the architecture cannot be exported, or a reload differs.
        PointError: A point does not fit the model.
        StorageFullError: The disk has no room or cannot be written.
    """
    _check_requests(loaded, requests)
    staged: list[StagedExport] = []
    try:
        for request in requests:
            progress("write", len(staged), len(requests))
            staged.append(stage(loaded, request, bank))
        progress("write", len(staged), len(requests))
        reports = _verified(staged, progress) if verify else [None] * len(staged)
        results = [_finish(loaded, *pair) for pair in zip(staged, reports, strict=True)]
        for export in staged:
            export.publish()
        return tuple(results)
    finally:
        for export in staged:
            export.discard()


def _check_requests(loaded: LoadedModel, requests: Sequence[ExportRequest]) -> None:
    """Find what can be found wrong before anything is written."""
    targets = [request.folder.absolute() for request in requests]
    for request, target in zip(requests, targets, strict=True):
        check_target(request.folder)
        if targets.count(target) > 1 or any(target in other.parents for other in targets):
            raise ExportError(f"every export must have a folder of its own, but '{request.folder}' is named for two")
        check_point(loaded.topology, request.point)


def _verified(staged: Sequence[StagedExport], progress: ProgressCallback) -> tuple[ReloadReport, ...]:
    progress("verify", 0, len(staged))
    reports = verify_folders([(export.folder, export.expectation) for export in staged])
    for export, report in zip(staged, reports, strict=True):
        if not report.is_valid:
            raise ExportError(
                f"an export must give back the decomposed model, but '{export.request.folder}' (point"
                f" {export.request.point.id}) does not: {report.problem}; nothing was left on disk"
            )
    progress("verify", len(staged), len(staged))
    return reports


def _finish(loaded: LoadedModel, export: StagedExport, report: ReloadReport | None) -> ExportResult:
    """Write the model card and the design point, and add up what the folder takes."""
    request, dense_parameters = export.request, loaded.topology.parameters_dense
    parameters = dense_parameters if request.is_dense else cost(loaded.topology, request.point).parameters
    tolerance = export.expectation.tolerance
    difference = None if report is None else report.max_difference
    with writing_errors(request.folder):
        point_text = json.dumps(request.point.to_json(), indent=2, sort_keys=True) + "\n"
        (export.folder / "design_point.json").write_text(point_text, encoding="utf-8")
        weight_bytes = sum(file.stat().st_size for file in export.folder.glob("*.safetensors"))
        content = CardContent(
            base_model=_base_name(loaded, request),
            revision=loaded.revision,
            fingerprint=loaded.fingerprint,
            topology=loaded.topology,
            point=request.point,
            is_dense=request.is_dense,
            auto_class=export.auto_class,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            parameters=parameters,
            weight_file_bytes=weight_bytes,
            dense_weight_bytes=export.dense_weight_bytes,
            other_bytes=_folder_bytes(export.folder) - weight_bytes,
            max_difference=difference,
            tolerance=tolerance,
            facts=request.facts,
        )
        (export.folder / "README.md").write_text(model_card(content), encoding="utf-8")
        return ExportResult(
            folder=request.folder,
            is_dense=request.is_dense,
            parameters=parameters,
            reduction=1 - parameters / dense_parameters,
            bytes_on_disk=_folder_bytes(export.folder),
            weight_file_bytes=weight_bytes,
            dense_weight_bytes=export.dense_weight_bytes,
            max_logit_difference=difference,
            tolerance=tolerance,
            files=tuple(sorted(file.name for file in export.folder.iterdir())),
        )


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _base_name(loaded: LoadedModel, request: ExportRequest) -> str:
    """What to call the dense model; of a local path only its last part, since others cannot use the rest."""
    named = request.facts.get("base_model")
    if named is not None:
        return str(named)
    path = Path(loaded.ref).expanduser()
    is_local = path.is_absolute() or loaded.ref.startswith((".", "~")) or path.exists()
    return (path.stem if path.suffix == ".gguf" else path.resolve().name) if is_local else loaded.ref
