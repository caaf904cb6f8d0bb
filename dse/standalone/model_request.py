"""Which model to load and which calibration text to use, and the factors of a single point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dse.decomposition import METHODS, FactorBank, longest_window, named_calibration, requests_of_points
from dse.defaults import CALIBRATION_TOKENS
from dse.design_point import DesignPoint
from dse.models import Head, LoadedModel, load_model, load_topology
from dse.out_of_memory import out_of_memory_by_phase
from dse.study import StudyListener, resolve_device
from dse.topology import Topology

__all__ = ["CalibrationText", "ModelRequest", "point_factors"]


@dataclass(frozen=True)
class ModelRequest:
    """A model reference, its dtype and its device.

    Attributes:
        ref: Hub id, local folder, .gguf file, or demo:<name>.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether Python code that comes with the model may run.
        dtype: float32, float16 or bfloat16.
        device: auto, cpu, cuda or cuda:<index>.
    """

    ref: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    device: str = "auto"

    def load(
        self,
        listener: StudyListener,
        *,
        device: str | None = None,
        head: Head | None = None,
        role_names: Mapping[str, str] | None = None,
    ) -> LoadedModel:
        """Load the model.

        Args:
            listener: Receives a message before loading.
            device: Overrides `self.device`.
            head: The model head, for dataset tasks.
            role_names: Module path suffix -> role, for architectures that dse does not know.

        Raises:
            ModelError: The model cannot be resolved or loaded.
            ConfigError: The device is not valid.
        """
        place = str(resolve_device(self.device)) if device is None else device
        listener.on_message(f"loading {self.ref}")
        return load_model(
            self.ref,
            revision=self.revision,
            dtype=self.dtype,
            device=place,
            trust_remote_code=self.trust_remote_code,
            head=head,
            role_names=role_names,
        )

    def topology(self, role_names: Mapping[str, str] | None = None) -> Topology:
        """The model's topology, from its config only.

        Raises:
            ModelError: The model cannot be resolved.
        """
        return load_topology(
            self.ref, revision=self.revision, trust_remote_code=self.trust_remote_code, role_names=role_names
        )


@dataclass(frozen=True)
class CalibrationText:
    """Calibration text of methods that need it.

    Attributes:
        name: A builtin text (general, grammar, facts, python_docs) or a text file.
        tokens: Number of its tokens to use.
    """

    name: str = "general"
    tokens: int = CALIBRATION_TOKENS


def point_factors(
    loaded: LoadedModel, point: DesignPoint, text: CalibrationText, listener: StudyListener
) -> FactorBank:
    """The factors of a point, calibrated if its method needs calibration.

    Raises:
        CalibrationError: The calibration text is missing or too short.
    """
    calibration = None
    if any(METHODS[method].is_calibrated for method in requests_of_points([point])):
        calibration = named_calibration(
            loaded.tokenizer, text.name, tokens=text.tokens, longest_window=longest_window(loaded.model)
        )
        listener.on_message(f"calibration text: {calibration.description}")
    with out_of_memory_by_phase(listener.on_phase, "calibrate") as progress:
        return FactorBank.build(loaded, [point], calibration, progress=progress)
