"""Every error that `dse` raises on purpose.

```
DseError
├── UserError                      the caller can mend it: CLI prints one line and exits 2
│   ├── ConfigError                a study file, search space or option is wrong
│   ├── PointError                 a design point cannot be read or applied
│   │   └── RankError              a rank lies outside its interval
│   ├── ModelError                 a model reference cannot be resolved or loaded
│   │   └── UnknownArchitectureError   no decomposable tensors could be named
│   ├── TaskError                  an evaluation task cannot be found or read
│   ├── CalibrationError           calibration text is missing or too short
│   ├── StudyError                 a study folder is missing, locked or another study's
│   ├── MeterUnavailableError      energy was asked for and no meter exists
│   ├── ProfileError               a sensitivity profile is damaged, or of another model or text
│   ├── AllocationError            a budget no allocation reaches, or constraints that exclude each other
│   ├── StorageFullError           the disk is full or not writable
│   └── ExportError                an export could not be written or did not verify
└── TrialError                     one trial failed: recorded with its reason, the study goes on
    ├── NonFiniteError             weights, logits or scores are NaN or infinite
    ├── OutOfMemoryError           the device has no room for this point
    └── InvalidMeasurementError    a measurement was taken but cannot be trusted
```

A message states the rule, the value and the remedy, for example
`` `rank <= 144` must hold for 'layers.3.key' (break-even of 192 x 576), but got rank=200; lower it or leave the
tensor dense. ``
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AllocationError",
    "CalibrationError",
    "ConfigError",
    "DseError",
    "ExportError",
    "InvalidMeasurementError",
    "MeterUnavailableError",
    "ModelError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PointError",
    "ProfileError",
    "RankError",
    "StorageFullError",
    "StudyError",
    "TaskError",
    "TrialError",
    "UnknownArchitectureError",
    "UserError",
    "did_you_mean",
]


class DseError(Exception):
    """Root of the tree; catch it to catch everything that `dse` raises on purpose."""


class UserError(DseError):
    """The caller can mend it; the command line prints the message and exits with 2."""


class ConfigError(UserError):
    """A study file, search-space file or option breaks its schema or contradicts itself."""


class PointError(UserError):
    """A design point cannot be read, or cannot be applied to this model."""


class RankError(PointError):
    """A rank lies outside 1 <= rank <= break-even."""


class ModelError(UserError):
    """A model reference cannot be resolved, downloaded or loaded."""


class UnknownArchitectureError(ModelError):
    """The model's layers were found, but no rule names their tensors."""


class TaskError(UserError):
    """An evaluation task cannot be found, read, or lacks the metric asked for."""


class CalibrationError(UserError):
    """Calibration text is missing, unreadable or shorter than the tokens asked for."""


class StudyError(UserError):
    """A study folder is missing, in use, damaged, or belongs to another study."""


class MeterUnavailableError(UserError):
    """Energy was asked for where no energy meter exists."""


class ProfileError(UserError):
    """A sensitivity profile is missing, damaged, or of another model, calibration text or set of methods."""


class AllocationError(UserError):
    """No allocation reaches the budget, or the constraints exclude each other."""


class StorageFullError(UserError):
    """The disk is full or the folder cannot be written."""


class ExportError(UserError):
    """An export could not be written, or its reload differs from the decomposed model."""


class TrialError(DseError):
    """One trial failed; it is recorded with this reason and the study goes on."""


class NonFiniteError(TrialError):
    """Weights, logits or scores became NaN or infinite."""


class OutOfMemoryError(TrialError):
    """The device has no room for this point; `bytes_asked` is what it had no room for, where the allocator said."""

    def __init__(self, message: str, bytes_asked: int | None = None) -> None:
        super().__init__(message)
        self.bytes_asked = bytes_asked


class InvalidMeasurementError(TrialError):
    """A measurement was taken but cannot be trusted; the message gives the reason."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return `` "; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
