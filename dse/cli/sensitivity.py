"""`dse sensitivity` and `dse allocate`: a model's profile, and points made from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dse.cli.allocation_latency import latency_figures, timed_table
from dse.config import CalibrationConfig, CalibrationSource, SearchSpaceConfig, load_search_space
from dse.decomposition import (
    BUILTIN_TEXTS,
    METHODS,
    CalibrationWindows,
    calibration_windows,
    held_out_windows,
    longest_window,
)
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError
from dse.files import write_bytes, write_json, write_text
from dse.models import LoadedModel, load_model
from dse.report.front_png import heat_map_png
from dse.report.heat_map import heat_map_html
from dse.report.sensitivity_heat_map import heat_map_of
from dse.search.spaces.base import SearchSpace
from dse.sensitivity import (
    DEFAULT_PROFILE_TOKENS,
    PROFILE_WINDOW,
    ProfileSettings,
    SensitivityProfile,
    measure_profile,
    profile_origin,
)
from dse.sensitivity.allocation import Allocation, allocate
from dse.sensitivity.allocation_constraints import Constraints
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study import StudyListener, resolve_device

__all__ = ["allocate_command", "print_allocations", "print_profile", "profile_command", "write_profile"]


def profile_command(options: argparse.Namespace, listener: StudyListener) -> SensitivityProfile:
    """Load the model and measure its profile, or find it in the cache.

    Raises:
        UserError: Model, space, method or text cannot be had.
    """
    return _Subject(options, listener).profile(listener)


def allocate_command(options: argparse.Namespace, listener: StudyListener) -> list[dict[str, Any]]:
    """One point for each reduction asked for.

    Raises:
        UserError: As `profile_command`; a profile is of another model or text, products are not timed on this device,
            or a budget cannot be reached.
    """
    if options.profile is not None:
        path = Path(options.profile)
        SensitivityProfile.read(path)  # a damaged file is told before the model is loaded
    subject = _Subject(options, listener)
    if options.profile is None:
        profile = subject.profile(listener)
    else:
        origin = profile_origin(subject.loaded, subject.windows, subject.calibration, subject.settings)
        profile = SensitivityProfile.read(path, origin)
    methods = _refit_names(profile) if options.refit else {}
    constraints = Constraints(
        untouched_layers=frozenset(options.untouched_layers),
        dense_roles=frozenset(options.dense_roles),
        most_removed_blocks=options.max_removed,
    )
    table, wanted_as = profile.table, "reduction"
    if options.latency_reduction is not None:
        table, wanted_as = timed_table(table, subject.loaded, options), "latency_reduction"
    documents = []
    for wanted in getattr(options, wanted_as):
        found = _allocated(table, wanted_as, wanted, constraints)
        point = _renamed(found.point, methods)
        document = {
            f"wanted_{wanted_as}": wanted,
            "reduction": found.reduction,
            **latency_figures(table, found, options),
            "parameters": found.parameters,
            "predicted_divergence": found.divergence,
            "removed_blocks": len(point.removed),
            "point_id": point.id,
            "point": point.to_json(),
        }
        if options.out is not None:
            path = Path(options.out) / f"{wanted_as.replace('_', '-')}-{wanted:g}.json"
            write_json(path, point.to_json())
            document["file"] = str(path)
        documents.append(document)
    return documents


def _allocated(table: SensitivityTable, wanted_as: str, wanted: float, constraints: Constraints) -> Allocation:
    if wanted_as == "reduction":
        return allocate(table, reduction=wanted, constraints=constraints)
    return allocate(table, latency_s=(table.latency_dense_s or 0.0) * (1.0 - wanted), constraints=constraints)


def _refit_names(profile: SensitivityProfile) -> dict[str, str]:
    """The profile's methods to those that refit them.

    Raises:
        ConfigError: Nothing refits one of them.
    """
    refits = {method.refit_of: name for name, method in METHODS.items() if method.refit_of}
    for method in profile.origin.methods:
        if method not in refits:
            raise ConfigError(
                f"`--refit` needs a profile by {' or '.join(refits)}, but this one is by '{method}'; leave it out"
            )
    return refits


def _renamed(point: DesignPoint, methods: Mapping[str, str]) -> DesignPoint:
    """The same ranks, by other methods."""
    return DesignPoint(
        tuple((n, c if c.is_removal else TensorChoice(methods.get(c.method, c.method), c.rank)) for n, c in point)
    )


class _Subject:
    """What a profile is of: the model, its texts and the settings, from the command's options."""

    def __init__(self, options: argparse.Namespace, listener: StudyListener) -> None:
        if options.method is not None and options.space is not None:
            raise ConfigError("give `--method` or `--space`, whose file names methods, not both")
        space = None if options.space is None else load_search_space(Path(options.space))
        if options.method is not None:
            ProfileSettings(methods=tuple(options.method))  # refused before a model is loaded
        listener.on_message(f"loading {options.model}")
        self.loaded = load_model(
            options.model,
            revision=options.revision,
            dtype=options.dtype,
            device=str(resolve_device(options.device)),
            trust_remote_code=options.trust_remote_code,
            role_names=None if space is None else space.role_names,
        )
        self.settings = _settings(options, space, self.loaded)
        config = CalibrationConfig(sources=[_source(options.calibration)], tokens=max(64, options.calibration_tokens))
        self.calibration: CalibrationWindows | None = None
        if self.settings.is_calibrated:
            self.calibration = calibration_windows(
                self.loaded.tokenizer, config, longest_window=longest_window(self.loaded.model)
            )
            listener.on_message(f"calibration text: {self.calibration.description}")
        self.windows, self.text = _text(options, config, self.loaded)
        listener.on_message(f"divergence is measured on {self.windows.numel()} tokens of {self.text}")

    def profile(self, listener: StudyListener) -> SensitivityProfile:
        """Measured now, or found in the cache."""
        return measure_profile(
            self.loaded, self.windows, self.calibration, self.settings, text=self.text, progress=listener.on_phase
        )


def _settings(options: argparse.Namespace, space: SearchSpaceConfig | None, loaded: LoadedModel) -> ProfileSettings:
    if space is None:
        methods = ProfileSettings().methods if options.method is None else tuple(options.method)
        return ProfileSettings(methods, with_stacks=options.stacks)
    experts = loaded.topology.experts_by_name
    names = tuple(n for n in SearchSpace.from_config(space, loaded.topology).tensor_names() if n not in experts)
    if not names:
        raise ConfigError(
            f"a sensitivity profile must have a matrix to measure, but space '{space.name}' holds fused expert tensors"
            " alone; a study measures those itself"
        )
    return ProfileSettings(tuple(space.methods), names, space.ranks.settled_multiple, with_stacks=options.stacks)


def _text(options: argparse.Namespace, config: CalibrationConfig, loaded: LoadedModel) -> tuple[Tensor, str]:
    """Windows of text, and what they are in words."""
    tokens, longest = options.tokens or DEFAULT_PROFILE_TOKENS, longest_window(loaded.model)
    if options.text is None:
        windows = held_out_windows(loaded.tokenizer, config, tokens, longest_window=longest)
        return windows, f"text that calibration on '{options.calibration}' leaves"
    own = CalibrationConfig(sources=[_source(options.text)], tokens=max(64, tokens), window=PROFILE_WINDOW)
    return calibration_windows(loaded.tokenizer, own, longest_window=longest).token_ids, f"'{options.text}'"


def _source(text: str) -> CalibrationSource:
    return CalibrationSource(builtin=text) if text in BUILTIN_TEXTS else CalibrationSource(file=text)


def write_profile(profile: SensitivityProfile, folder: str) -> list[Path]:
    """The profile and its heat map, as files.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    out, heat_map = Path(folder), heat_map_of(profile)
    paths = [out / "profile.json", out / "sensitivity.png", out / "sensitivity.html"]
    profile.write(paths[0])
    write_bytes(paths[1], heat_map_png(heat_map))
    write_text(paths[2], heat_map_html(heat_map))
    return paths


def print_profile(profile: SensitivityProfile, written: Sequence[Path]) -> None:
    """The heat map as a table, and where the files are."""
    heat_map = heat_map_of(profile)
    print(heat_map.title)
    width = max(9, *(len(column) for column in heat_map.columns)) + 2
    print("layer" + "".join(column.rjust(width) for column in heat_map.columns))
    for row, values in zip(heat_map.rows, heat_map.values, strict=True):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        print(row.rjust(5) + "".join(cell.rjust(width) for cell in cells))
    print(heat_map.note)
    print("files: " + ", ".join(str(path) for path in written))


def print_allocations(documents: Sequence[dict[str, Any]]) -> None:
    """One line a point."""
    latency = next((f"predicted {entry['phase']} latency  " for entry in documents if "phase" in entry), "")
    print(f"reduction  parameters  {latency}predicted KL (nats/token)  removed blocks  point")
    for entry in documents:
        seconds = ""
        if latency:
            words = f"{1e3 * entry['latency_s']:.4g} ms, -{100 * entry['latency_reduction']:.2f} %"
            seconds = f"{words:>{len(latency) - 2}}  "
        print(
            f"{100 * entry['reduction']:8.2f} %  {entry['parameters'] / 1e6:8.1f} M  {seconds}"
            f"{entry['predicted_divergence']:25.4f}  {entry['removed_blocks']:14d}  {entry.get('file', entry['point_id'])}"
        )
    if notes := {entry["latency_of"] for entry in documents if "latency_of" in entry}:
        print(f"latencies are predicted from {notes.pop()}")
    if not any("file" in entry for entry in documents):
        print("`--out DIR` writes them as files, `--json` prints them")
