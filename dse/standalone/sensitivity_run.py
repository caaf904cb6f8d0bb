"""Measure the sensitivity profile of a model, and write it with its heat map."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dse.config import CalibrationConfig, CalibrationSource, SearchSpaceConfig, load_search_space
from dse.decomposition import BUILTIN_TEXTS, CalibrationWindows, calibration_windows, held_out_windows, longest_window
from dse.design_point import PIVOTED
from dse.errors import ConfigError
from dse.files import write_bytes, write_text
from dse.measurement import device_in_use, passing_measurements
from dse.models import LoadedModel
from dse.out_of_memory import out_of_memory_by_phase
from dse.report.front_png import heat_map_png
from dse.report.sensitivity_heat_map import heat_map_html, heat_map_of
from dse.search.spaces.base import SearchSpace
from dse.sensitivity import (
    DEFAULT_PROFILE_TOKENS,
    PROFILE_WINDOW,
    ProfileSettings,
    SensitivityProfile,
    measure_profile,
    profile_origin,
)
from dse.standalone.model_request import CalibrationText, ModelRequest
from dse.study import StudyListener

__all__ = ["PreparedSensitivity", "SensitivityRequest", "run_sensitivity", "write_profile"]

_MIN_CALIBRATION_TOKENS = 64  # the schema's lower bound


@dataclass(frozen=True)
class SensitivityRequest:
    """The settings of a sensitivity profile.

    Attributes:
        space: Search-space file or shipped name. Only its layers, roles, methods, forms, widths and rank multiple are
            used. None means all tensors.
        methods: Decomposition methods; None means the default. Excludes `space`.
        with_stacks: Whether query, key, value and gate, up are also measured as stacked matrices.
        with_widths: Whether MLPs with fewer channels are also measured; a space with widths always measures them.
        with_pivoted: Whether pivoted factors are options too; those of a space always are.
        tokens: Tokens of text on which the divergence is measured; None means the default.
        text: That text: a builtin text or a file. None means the part of the calibration text that is not used for
            calibration.
        calibration: Text for calibrated methods.
    """

    model: ModelRequest
    space: str | None = None
    methods: tuple[str, ...] | None = None
    with_stacks: bool = False
    with_widths: bool = False
    with_pivoted: bool = False
    tokens: int | None = None
    text: str | None = None
    calibration: CalibrationText = field(default_factory=CalibrationText)


def run_sensitivity(request: SensitivityRequest, listener: StudyListener | None = None) -> SensitivityProfile:
    """Load the model and measure its sensitivity profile, or read it from the cache.

    Raises:
        UserError: The model, space, a method or a text is not valid.
    """
    watcher = listener or StudyListener()
    return PreparedSensitivity.load(request, watcher).profile(watcher)


@dataclass(frozen=True)
class PreparedSensitivity:
    """A loaded model with the texts and settings of its profile.

    Attributes:
        loaded: The model.
        settings: Methods, tensors and rank multiple.
        calibration: Windows of calibration text; None if no method is calibrated.
        windows: Token ids of the text on which the divergence is measured.
        text: Description of that text.
    """

    loaded: LoadedModel
    settings: ProfileSettings
    calibration: CalibrationWindows | None
    windows: Tensor
    text: str

    @classmethod
    def load(cls, request: SensitivityRequest, listener: StudyListener) -> PreparedSensitivity:
        """Load the model and its texts.

        Raises:
            UserError: The model, space, a method or a text is not valid.
        """
        if request.methods is not None and request.space is not None:
            raise ConfigError("give `--method` or `--space`, whose file names methods, not both")
        space = None if request.space is None else load_search_space(Path(request.space))
        if request.methods is not None:
            ProfileSettings(methods=request.methods)  # reject an unknown method before the model is loaded
        loaded = request.model.load(listener, role_names=None if space is None else space.role_names)
        settings = _settings(request, space, loaded)
        config = CalibrationConfig(
            sources=[_source(request.calibration.name)], tokens=max(_MIN_CALIBRATION_TOKENS, request.calibration.tokens)
        )
        calibration = None
        if settings.is_calibrated:
            calibration = calibration_windows(loaded.tokenizer, config, longest_window=longest_window(loaded.model))
            listener.on_message(f"calibration text: {calibration.description}")
        windows, text = _text(request, config, loaded)
        listener.on_message(f"measuring divergence on {windows.numel()} tokens of {text}")
        return cls(loaded, settings, calibration, windows, text)

    def profile(self, listener: StudyListener) -> SensitivityProfile:
        """Measure the profile, or read it from the cache."""
        report = passing_measurements(listener.on_phase, self.loaded.device)
        with device_in_use(self.loaded.device), out_of_memory_by_phase(report, "calibrate") as progress:
            return measure_profile(
                self.loaded, self.windows, self.calibration, self.settings, text=self.text, progress=progress
            )

    def read(self, path: Path) -> SensitivityProfile:
        """Read a profile file and check that it has this model, these texts and these settings.

        Raises:
            ProfileError: The file is missing, damaged, or of another model, text or set of methods.
        """
        origin = profile_origin(self.loaded, self.windows, self.calibration, self.settings)
        return SensitivityProfile.read(path, origin)


def write_profile(profile: SensitivityProfile, folder: str | Path) -> list[Path]:
    """Write profile.json and the heat map as sensitivity.png and sensitivity.html.

    Returns:
        The paths of the three files.

    Raises:
        StorageFullError: The disk is full or the folder is not writable.
    """
    out, heat_map = Path(folder), heat_map_of(profile)
    paths = [out / "profile.json", out / "sensitivity.png", out / "sensitivity.html"]
    profile.write(paths[0])
    write_bytes(paths[1], heat_map_png(heat_map))
    write_text(paths[2], heat_map_html(heat_map))
    return paths


def _settings(request: SensitivityRequest, space: SearchSpaceConfig | None, loaded: LoadedModel) -> ProfileSettings:
    if space is None:
        methods = ProfileSettings().methods if request.methods is None else request.methods
        return ProfileSettings(
            methods,
            with_stacks=request.with_stacks,
            with_widths=request.with_widths,
            forms=("", PIVOTED) if request.with_pivoted else ("",),
        )
    experts = loaded.topology.experts_by_name
    names = tuple(n for n in SearchSpace.from_config(space, loaded.topology).tensor_names() if n not in experts)
    if not names:
        raise ConfigError(
            f"a sensitivity profile needs at least one matrix, but space '{space.name}' has fused expert tensors only;"
            " run a study, which measures them itself"
        )
    return ProfileSettings(
        tuple(space.methods),
        names,
        space.ranks.settled_multiple,
        with_stacks=request.with_stacks,
        with_widths=request.with_widths or space.widths,
        forms=tuple(dict.fromkeys([*space.factor_forms, *([PIVOTED] if request.with_pivoted else [])])),
    )


def _text(request: SensitivityRequest, config: CalibrationConfig, loaded: LoadedModel) -> tuple[Tensor, str]:
    """Windows of the text on which the divergence is measured, and a description of that text."""
    tokens, longest = request.tokens or DEFAULT_PROFILE_TOKENS, longest_window(loaded.model)
    if request.text is None:
        windows = held_out_windows(loaded.tokenizer, config, tokens, longest_window=longest)
        return windows, f"held-out text of '{request.calibration.name}'"
    own = CalibrationConfig(
        sources=[_source(request.text)], tokens=max(_MIN_CALIBRATION_TOKENS, tokens), window=PROFILE_WINDOW
    )
    return calibration_windows(loaded.tokenizer, own, longest_window=longest).token_ids, f"'{request.text}'"


def _source(text: str) -> CalibrationSource:
    return CalibrationSource(builtin=text) if text in BUILTIN_TEXTS else CalibrationSource(file=text)
