"""Export design points: write, reload in a new process, compare, and only then move to the destination."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.cost import check_point, point_cost
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
    """A finished export.

    Attributes:
        folder: Its folder.
        is_dense: Whether it holds only dense matrices, and so saves nothing.
        parameters: Number of parameters in this folder; tied ones count once.
        reduction: 1 - parameters / parameters of the dense model.
        bytes_on_disk: Size of all its files.
        weight_file_bytes: Size of its safetensors files.
        dense_weight_bytes: Size of the dense model's weights in the same dtype, without file headers.
        max_logit_difference: Largest difference on reloading; None if it was not verified.
        tolerance: Largest difference allowed.
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
    card_details: Mapping[str, Any] | None = None,
    dense: bool = False,
    verify: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Write one point as a Hugging Face folder; see `export_points`.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        point: The design point.
        bank: Source of the point's factors.
        folder: The destination, which must not exist or be empty.
        card_details: Details for the model card; see `ExportRequest`.
        dense: Whether to multiply the factors out.
        verify: Whether to reload it in a new process and compare before it is published.
        progress: Called as ("write", exports, exports) and ("verify", exports, exports).

    Raises:
        ExportError: The destination is taken, the architecture cannot be exported, or the reload differs.
        PointError: The point does not fit the model.
        StorageFullError: The disk has no room or cannot be written.
    """
    request = ExportRequest(point, folder, dense, card_details or {})
    return export_points(loaded, [request], bank, verify=verify, progress=progress)[0]


def export_points(
    loaded: LoadedModel,
    requests: Sequence[ExportRequest],
    bank: FactorSource,
    *,
    verify: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> tuple[ExportResult, ...]:
    """Write several points, each to its own folder; one new process verifies all of them.

    Every export is written beside its destination and renamed at the end: a folder is either complete and verified, or
    absent. If one fails, none is published.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        requests: The exports to write.
        bank: Source of the points' factors.
        verify: Whether to reload in a new process and compare.
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
    """Check everything that can be checked before writing."""
    targets = [request.folder.absolute() for request in requests]
    for request, target in zip(requests, targets, strict=True):
        check_target(request.folder)
        if targets.count(target) > 1 or any(target in other.parents for other in targets):
            raise ExportError(f"every export must have a folder of its own, but '{request.folder}' is used twice")
        check_point(loaded.topology, request.point)


def _verified(staged: Sequence[StagedExport], progress: ProgressCallback) -> tuple[ReloadReport, ...]:
    progress("verify", 0, len(staged))
    reports = verify_folders([(export.folder, export.expectation) for export in staged])
    for export, report in zip(staged, reports, strict=True):
        if not report.is_valid:
            raise ExportError(
                f"an export must reproduce the decomposed model, but '{export.request.folder}' (point"
                f" {export.request.point.id}) does not: {report.problem}; its files were removed"
            )
    progress("verify", len(staged), len(staged))
    return reports


def _finish(loaded: LoadedModel, export: StagedExport, report: ReloadReport | None) -> ExportResult:
    """Write the model card and the design point, and add up the sizes."""
    request, dense_parameters = export.request, loaded.topology.parameters_dense
    parameters = dense_parameters if request.is_dense else point_cost(loaded.topology, request.point).parameters
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
            details=request.card_details,
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
    """Display name of the dense model; for a local path only its last part, since the rest means nothing to others."""
    named = request.card_details.get("base_model")
    if named is not None:
        return str(named)
    path = Path(loaded.ref).expanduser()
    is_local = path.is_absolute() or loaded.ref.startswith((".", "~")) or path.exists()
    return (path.stem if path.suffix == ".gguf" else path.resolve().name) if is_local else loaded.ref
