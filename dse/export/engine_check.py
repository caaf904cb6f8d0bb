"""Verify an export in an engine: a fresh process loads the folder, and its tokens and log-probabilities must match."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dse.engines import Engine, EngineSettings, engine_named
from dse.errors import ConfigError, ExportError
from dse.export.engine_card import update_card
from dse.export.engine_expectation import (
    EngineExpectation,
    VerifiedEngine,
    read_engine_expectation,
    weight_file_sizes,
    write_engine_expectation,
)
from dse.export.formats import EXPORT_FORMATS, export_format

__all__ = [
    "EngineReport",
    "check_engine",
    "engines_of",
    "failed_check",
    "note_verified",
    "verify_export",
    "verify_in_engine",
]


@dataclass(frozen=True)
class EngineReport:
    """Comparison of an export, run by an engine, with the model it was written from.

    Attributes:
        folder: The export.
        engine: Name of the engine.
        versions: Package to version.
        max_difference: Largest difference of a log-probability (nats).
        tolerance: Largest difference allowed.
        prompts: Number of prompts.
        differing_prompts: Those whose greedy continuation differs by more than a tie.
        weight_bytes: Size of the files that hold weights.
        problem: Why the export is invalid; "" if it is valid.
    """

    folder: Path
    engine: str
    versions: Mapping[str, str]
    max_difference: float
    tolerance: float
    prompts: int
    differing_prompts: int
    weight_bytes: int
    problem: str

    @property
    def is_valid(self) -> bool:
        """Whether the engine's outputs match."""
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        """The attributes as a JSON mapping; an infinite difference becomes None."""
        difference = self.max_difference if math.isfinite(self.max_difference) else None
        own = {"folder": str(self.folder), "versions": dict(self.versions), "max_difference": difference}
        return vars(self) | own | {"is_valid": self.is_valid}


def engines_of(form: str) -> tuple[str, ...]:
    """Names of the engines that load a format, the one that verifies it first."""
    from dse.engines import ENGINES

    own = export_format(form).engine
    kind = ENGINES[own].format
    return (own, *(name for name, engine in ENGINES.items() if engine.format == kind and name != own))


def check_engine(form: str, name: str, python: str | None = None) -> Engine:
    """The engine of this name, which loads the format and is installed.

    Raises:
        ConfigError: The name is unknown, or the engine does not load the format.
        EngineUnavailableError: It is not installed; the message gives the remedy.
    """
    engine = engine_named(name)
    if name not in engines_of(form):
        raise ConfigError(
            f"an export of format {form} must be verified in {' or '.join(engines_of(form))}, but got '{name}'; export"
            f" with `--format {_format_for(engine)}` for {engine.title}"
        )
    engine.check_available(python)
    return engine


def _format_for(engine: Engine) -> str:
    own = [form.name for form in EXPORT_FORMATS.values() if form.engine == engine.name]
    return own[0] if own else "transformers"


def verify_export(
    folder: str | Path,
    engine: str | None = None,
    *,
    python: str | None = None,
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> EngineReport:
    """Verify a folder that `dse export` wrote, in an engine, and note a success in the folder and its model card.

    Args:
        folder: The export.
        engine: transformers, vllm, onnxruntime or openvino; None means the engine of its format.
        python: The engine's interpreter; None means `DSE_<ENGINE>_PYTHON`, else this one.
        options: Options of the engine.
        trust_remote_code: Whether Python files of the folder may run; folders with factors have one.

    Raises:
        ExportError: The folder is not an export that can be verified, or its code may not run.
        ConfigError: The engine is unknown or does not load the format.
        EngineUnavailableError: The engine is not installed.
        EngineError: The engine cannot load the folder, died or hung.
    """
    path = Path(folder)
    expected = read_engine_expectation(path)
    name = engine or export_format(expected.format).engine
    engine_kind = check_engine(expected.format, name, python)
    code = sorted(file.name for file in path.glob("*.py"))
    if code and engine_kind.format == "huggingface" and not trust_remote_code:
        raise ExportError(
            f"verifying '{folder}' in {engine_kind.title} runs its Python file {code[0]}, which must be allowed; read"
            " it and add --trust-remote-code (trust_remote_code=True)"
        )
    report = verify_in_engine(path, expected, name, python=python, options=options)
    if report.is_valid:
        update_card(path, note_verified(path, expected, report))
    return report


def note_verified(folder: Path, expected: EngineExpectation, report: EngineReport) -> EngineExpectation:
    """Add the engine of a valid report to the folder's `verification.json`."""
    entry = VerifiedEngine(dict(report.versions), report.max_difference)
    noted = replace(expected, verified={**expected.verified, report.engine: entry})
    write_engine_expectation(folder, noted)
    return noted


def verify_in_engine(
    folder: Path,
    expected: EngineExpectation,
    name: str,
    *,
    python: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> EngineReport:
    """Start the engine on the folder and compare; writes nothing.

    Raises:
        EngineUnavailableError: The engine is not installed.
        EngineError: The engine cannot load the folder, died or hung.
    """
    engine = engine_named(name)
    on_gpu = engine.format == "huggingface" and torch.cuda.is_available()
    settings = EngineSettings(
        python=python,
        options=_options(name, expected, options or {}),
        device="cuda:0" if on_gpu else "cpu",
        dtype=expected.dtype,
        threads=torch.get_num_threads(),
    )
    with engine.start(folder.absolute(), settings) as session:
        log_probabilities = session.log_probabilities(expected.prompts)
        tokens = session.greedy(expected.prompts, expected.new_tokens)
        versions = dict(session.versions)
    sizes = weight_file_sizes(folder, export_format(expected.format).weight_files)
    difference = _largest_difference(log_probabilities, expected.log_probabilities)
    differing = sum(
        _differs(*row, expected.tolerance) for row in zip(tokens, expected.tokens, expected.margins, strict=True)
    )
    problems = []
    if not difference <= expected.tolerance:
        problems.append(
            f"log-probabilities must differ by at most {expected.tolerance:g}, but differ by {difference:.3g}"
        )
    if differing:
        problems.append(f"greedy tokens must be equal, but differ for {differing} of {len(expected.prompts)} prompts")
    changed = sorted(name for name, _ in sizes.items() ^ dict(expected.weight_files).items())
    if changed:
        problems.append(f"weight files must have their sizes, but {changed[0]} has another or is missing")
    count = len(expected.prompts)
    problem = "; ".join(problems)
    return EngineReport(
        folder, name, versions, difference, expected.tolerance, count, differing, sum(sizes.values()), problem
    )


def _options(name: str, expected: EngineExpectation, own: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM reserves room for the model's longest text unless it is told how long texts are."""
    length = max(map(len, expected.prompts)) + expected.new_tokens
    defaults = {"max_model_len": length, "enforce_eager": True} if name == "vllm" else {}
    return {**defaults, **own}


def _largest_difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Infinite if a shape differs or a value is NaN."""
    if [len(row) for row in found] != [len(row) for row in expected]:
        return float("inf")
    pairs = [(a, b) for row, wanted in zip(found, expected, strict=True) for a, b in zip(row, wanted, strict=True)]
    largest = max((abs(a - b) for a, b in pairs), default=0.0)
    return largest if all(a == a for a, _ in pairs) else float("inf")


def _differs(found: Sequence[int], wanted: Sequence[int], margins: Sequence[float], tolerance: float) -> bool:
    """Whether a continuation leaves the expected one, other than at a tie, where rounding decides."""
    if len(found) != len(wanted):
        return True
    place = next((i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]), None)
    return place is not None and margins[place] > 2 * tolerance


def failed_check(report: EngineReport, destination: Path) -> ExportError:
    """The error of an export whose check failed."""
    return ExportError(
        f"an export must reproduce the decomposed model in {report.engine}, but '{destination}' does not:"
        f" {report.problem}; its files were removed"
    )
