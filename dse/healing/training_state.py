"""The state of a healing that a killed process continues from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dse.files import disk_errors
from dse.healing.trained_weights import TrainedWeights

__all__ = ["TrainingState", "read_state", "write_state"]

_FILE = "training_state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Where a healing stands.

    Attributes:
        identity: Of the text and the settings; a state of others is not used.
        steps: Steps of the whole schedule.
        evaluated_every: Steps from one evaluation to the next.
        learning_rate: Peak of the schedule.
        kl_before: Divergence on the text of another source before the first step.
        rates_tried: Learning rate to the divergence after the first steps.
        masters: The float32 weights after `step` steps.
        step: Steps done.
        seconds: Spent so far.
        history: Tokens and divergence of every evaluation.
        best: The weights of the best evaluation.
        best_kl: Their divergence.
        best_step: Steps after which they were reached; 0 for the point's own weights.
        evaluations_without_gain: Evaluations since the best one.
        moments: The optimizer's moments by name.
    """

    identity: str
    steps: int
    evaluated_every: int
    learning_rate: float
    kl_before: float
    rates_tried: Mapping[str, float]
    masters: Mapping[str, Tensor]
    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_kl: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    moments: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.best:
            self.best, self.best_kl = self.masters, self.kl_before

    def note(self, kl: float, weights: TrainedWeights, step_tokens: int) -> None:
        """Record an evaluation, and keep the weights if they are the best so far."""
        self.history.append((self.step * step_tokens, kl))
        if kl < self.best_kl:
            self.best, self.best_kl, self.best_step = weights.state(), kl, self.step
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1

    def take(self, optimizer: torch.optim.Optimizer, masters: Mapping[str, nn.Parameter]) -> None:
        """Copy the weights and the moments of the optimizer."""
        self.masters = {name: master.detach().to("cpu", copy=True) for name, master in masters.items()}
        self.moments = {
            f"{moment} {name}": optimizer.state[master][moment].to("cpu", copy=True)
            for name, master in masters.items()
            for moment in _MOMENTS
            if master in optimizer.state
        }

    def restore_moments(self, optimizer: torch.optim.Optimizer, masters: Mapping[str, nn.Parameter]) -> None:
        """Set the moments of the optimizer and its count of steps."""
        for name, master in masters.items():
            found = {moment: self.moments.get(f"{moment} {name}") for moment in _MOMENTS}
            if all(tensor is not None for tensor in found.values()):
                own: dict[str, Any] = {m: t.to(master.device) for m, t in found.items() if t is not None}
                optimizer.state[master] = own | {"step": torch.tensor(float(self.step))}


def write_state(folder: Path, state: TrainingState) -> None:
    """Write the state; a kill leaves the old or the new one.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    groups = {"masters": state.masters, "best": state.best, "moments": state.moments}
    tensors = {f"{group} {name}": tensor for group, found in groups.items() for name, tensor in found.items()}
    facts = {key: value for key, value in vars(state).items() if key not in groups}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_FILE}.{os.getpid()}"
        try:
            safetensors.torch.save_file(
                {name: tensor.clone() for name, tensor in tensors.items()}, temporary, {"state": json.dumps(facts)}
            )
            temporary.replace(folder / _FILE)
        finally:
            temporary.unlink(missing_ok=True)


def read_state(folder: Path, identity: str) -> TrainingState | None:
    """The state in this folder; None if there is none, if it cannot be read, or if it is of other settings."""
    try:
        with safe_open(folder / _FILE, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("state", "{}"))
            groups: dict[str, dict[str, Tensor]] = {"masters": {}, "best": {}, "moments": {}}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, _, name = key.partition(" ")
                groups[group][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if facts.get("identity") != identity:
        return None
    history = [(int(tokens), float(kl)) for tokens, kl in facts.pop("history")]
    return TrainingState(**facts, history=history, **groups)  # type: ignore[arg-type]
