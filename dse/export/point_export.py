"""Export design points: write, reload in a new process, compare, and only then move to the destination."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dse.cost import check_point, point_cost
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.errors import ExportError
from dse.export.dense_form import dense_form_parameters
from dse.export.engine_card import update_card
from dse.export.engine_check import EngineReport, check_engine, failed_check, note_verified, verify_in_engine
from dse.export.engine_expectation import (
    EngineExpectation,
    VerifiedEngine,
    weight_file_sizes,
    write_engine_expectation,
)
from dse.export.formats import export_format
from dse.export.model_card import CardContent, model_card
from dse.export.staging import ExportRequest, StagedExport, check_target, stage
from dse.export.verification import ReloadReport, verify_folders
from dse.export.weights import writing_errors
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["ExportResult", "check_engines", "export_point", "export_points"]


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        folder: Its folder.
        format: Name of its format.
        is_dense: Whether it holds only dense matrices, and so saves nothing.
        parameters: Number of parameters in this folder; tied ones count once.
        reduction: 1 - parameters / parameters of the dense model.
        bytes_on_disk: Size of all its files.
        weight_file_bytes: Size of the files that hold weights.
        dense_weight_bytes: Size of the dense model's weights in the same dtype, without file headers.
        max_logit_difference: Largest difference on reloading in transformers; None if it was not reloaded there.
        tolerance: Largest difference allowed.
        files: Names of its files, sorted.
        engine_reports: One for each engine that ran it.
    """

    folder: Path
    format: str
    is_dense: bool
    parameters: int
    reduction: float
    bytes_on_disk: int
    weight_file_bytes: int
    dense_weight_bytes: int
    max_logit_difference: float | None
    tolerance: float
    files: tuple[str, ...]
    engine_reports: tuple[EngineReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The attributes as a JSON mapping."""
        reports = [report.to_json() | {"folder": str(self.folder)} for report in self.engine_reports]
        return vars(self) | {"folder": str(self.folder), "files": list(self.files), "engine_reports": reports}


def export_point(
    loaded: LoadedModel,
    point: DesignPoint,
    bank: FactorSource,
    folder: Path,
    *,
    card_details: Mapping[str, Any] | None = None,
    format: str = "transformers",
    verify: bool = True,
    verify_in: Sequence[str] = (),
    python: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Write one point as a Hugging Face folder; see `export_points`.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        point: The design point.
        bank: Source of the point's factors.
        folder: The destination, which must not exist or be empty.
        card_details: Details for the model card; see `ExportRequest`.
        format: Name of the format; see `dse.export.formats`.
        verify: Whether to verify it before it is published; otherwise it holds no `verification.json`.
        verify_in: Further engines that must reproduce the model.
        python: Interpreter of these engines, or of the format's own engine if none is named.
        progress: Called as ("write", exports, exports) and ("verify", exports, exports).

    Raises:
        ExportError: The destination is taken, the architecture cannot be exported, or the reload differs.
        PointError: The point does not fit the model.
        StorageFullError: The disk has no room or cannot be written.
    """
    request = ExportRequest(point, folder, format, card_details or {})
    return export_points(loaded, [request], bank, verify=verify, verify_in=verify_in, python=python, progress=progress)[
        0
    ]


def export_points(
    loaded: LoadedModel,
    requests: Sequence[ExportRequest],
    bank: FactorSource,
    *,
    verify: bool = True,
    verify_in: Sequence[str] = (),
    python: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> tuple[ExportResult, ...]:
    """Write several points, each to its own folder; new processes verify all of them.

    Every export is written beside its destination and renamed at the end: a folder is either complete and verified, or
    absent. If one fails, none is published.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        requests: The exports to write.
        bank: Source of the points' factors.
        verify: Whether to verify before anything is published. Otherwise the folders hold no `verification.json`.
        verify_in: Further engines that must reproduce the model, for example `vllm`.
        python: Interpreter of these engines, or of the format's own engine if none is named.
        progress: Called as ("write", exports, exports) and ("verify", exports, exports).

    Raises:
        ExportError: A destination is taken, the architecture cannot be exported, or a reload differs.
        EngineUnavailableError: An engine is not installed.
        EngineError: An engine cannot load an export.
        PointError: A point does not fit the model.
        StorageFullError: The disk has no room or cannot be written.
    """
    _check_requests(loaded, requests)
    if verify:
        check_engines([request.format for request in requests], verify_in, python)
    staged: list[StagedExport] = []
    try:
        for request in requests:
            progress("write", len(staged), len(requests))
            staged.append(stage(loaded, request, bank, expect=verify))
        progress("write", len(staged), len(requests))
        checks = _verified(staged, verify_in, python, progress) if verify else [_Checks()] * len(staged)
        results = [_finish(loaded, *pair) for pair in zip(staged, checks, strict=True)]
        for export in staged:
            export.publish()
        return tuple(results)
    finally:
        for export in staged:
            export.discard()


def check_engines(formats: Iterable[str], verify_in: Sequence[str], python: str | None) -> None:
    """Check that every engine that will verify these formats is installed and loads them.

    Raises:
        ConfigError: An engine is unknown or does not load a format.
        EngineUnavailableError: An engine is not installed; the message gives the remedy.
    """
    for form in dict.fromkeys(formats):
        for name in _engines(form, verify_in):
            check_engine(form, name, _interpreter(name, verify_in, python))


def _engines(form: str, verify_in: Sequence[str]) -> tuple[str, ...]:
    """Engines that run an export of this format before it is published; transformers reloads it anyway."""
    own = (export_format(form).engine,) if export_format(form).is_graph else ()
    return tuple(dict.fromkeys((*own, *verify_in)))


def _interpreter(name: str, verify_in: Sequence[str], python: str | None) -> str | None:
    return python if not verify_in or name in verify_in else None


def _check_requests(loaded: LoadedModel, requests: Sequence[ExportRequest]) -> None:
    """Check everything that can be checked before writing."""
    targets = [request.folder.absolute() for request in requests]
    for request, target in zip(requests, targets, strict=True):
        check_target(request.folder)
        if targets.count(target) > 1 or any(target in other.parents for other in targets):
            raise ExportError(f"every export must have a folder of its own, but '{request.folder}' is used twice")
        check_point(loaded.topology, request.point)
        request.form.check(loaded, request.point)


@dataclass(frozen=True)
class _Checks:
    """The reports of one export: of the reload in transformers, and of the engines that ran it."""

    reload: ReloadReport | None = None
    engines: tuple[EngineReport, ...] = ()


def _verified(
    staged: Sequence[StagedExport], verify_in: Sequence[str], python: str | None, progress: ProgressCallback
) -> list[_Checks]:
    progress("verify", 0, len(staged))
    reloads = _reloaded(staged)
    checks = []
    for done, export in enumerate(staged, start=1):
        engines = []
        for name in _engines(export.request.format, verify_in):
            if export.engine_expectation is None:
                raise ExportError(
                    f"an engine verifies models that generate text, but '{export.request.folder}' is none"
                )
            interpreter = _interpreter(name, verify_in, python)
            report = verify_in_engine(export.folder, export.engine_expectation, name, python=interpreter)
            if not report.is_valid:
                raise failed_check(report, export.request.folder)
            engines.append(report)
        checks.append(_Checks(reloads.get(export.folder), tuple(engines)))
        if engines and done < len(staged):
            progress("verify", done, len(staged))
    progress("verify", len(staged), len(staged))
    return checks


def _reloaded(staged: Sequence[StagedExport]) -> dict[Path, ReloadReport]:
    """Reports of the exports that transformers loads, all from one process, by temporary folder."""
    loadable = [export for export in staged if export.expectation is not None]
    if not loadable:
        return {}
    pairs = [(export.folder, export.expectation) for export in loadable if export.expectation is not None]
    reports = verify_folders(pairs)
    for export, report in zip(loadable, reports, strict=True):
        if not report.is_valid:
            raise ExportError(
                f"an export must reproduce the decomposed model, but '{export.request.folder}' (point"
                f" {export.request.point.id}) does not: {report.problem}; its files were removed"
            )
    return {export.folder: report for export, report in zip(loadable, reports, strict=True)}


def _finish(loaded: LoadedModel, export: StagedExport, checks: _Checks) -> ExportResult:
    """Write the model card and the design point, and add up the sizes."""
    request, dense_parameters = export.request, loaded.topology.parameters_dense
    if request.is_dense:
        parameters = dense_form_parameters(loaded.model.config, loaded.topology, request.point)
    else:
        parameters = point_cost(loaded.topology, request.point).parameters
    tolerance = 0.0 if export.expectation is None else export.expectation.tolerance
    difference = None if checks.reload is None else checks.reload.max_difference
    with writing_errors(request.folder):
        point_text = json.dumps(request.point.to_json(), indent=2, sort_keys=True) + "\n"
        (export.folder / "design_point.json").write_text(point_text, encoding="utf-8")
        expected = _noted(export, checks)
        weight_bytes = sum(weight_file_sizes(export.folder, request.form.weight_files).values())
        content = CardContent(
            base_model=_base_name(loaded, request),
            revision=loaded.revision,
            fingerprint=loaded.fingerprint,
            topology=loaded.topology,
            point=request.point,
            format=request.format,
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
        if expected is not None:
            update_card(export.folder, expected)
        return ExportResult(
            folder=request.folder,
            format=request.format,
            is_dense=request.is_dense,
            parameters=parameters,
            reduction=1 - parameters / dense_parameters,
            bytes_on_disk=_folder_bytes(export.folder),
            weight_file_bytes=weight_bytes,
            dense_weight_bytes=export.dense_weight_bytes,
            max_logit_difference=difference,
            tolerance=tolerance,
            files=tuple(sorted(file.name for file in export.folder.iterdir())),
            engine_reports=checks.engines,
        )


def _noted(export: StagedExport, checks: _Checks) -> EngineExpectation | None:
    """The engine expectation with the engines that were verified, as written to the folder."""
    expected = export.engine_expectation
    if expected is None:
        return None
    if checks.reload is not None:
        packages = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
        expected = replace(expected, verified={"transformers": VerifiedEngine(packages)})
        write_engine_expectation(export.folder, expected)
    for report in checks.engines:
        expected = note_verified(export.folder, expected, report)
    return expected


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
