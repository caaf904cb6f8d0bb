"""Every error that `dse` raises deliberately.

```
DseError
├── UserError                      user-fixable: the command line prints one line and exits with 2
│   ├── ConfigError                a study file, search space or option is wrong
│   ├── PointError                 a design point cannot be read or applied
│   │   └── RankError              a rank lies outside its interval
│   ├── ModelError                 a model reference cannot be resolved or loaded
│   │   └── UnknownArchitectureError   no decomposable tensors could be named
│   ├── TaskError                  an evaluation task cannot be found or read
│   ├── CalibrationError           calibration text is missing or too short
│   ├── StudyError                 a study folder is missing, locked, or holds another study
│   ├── MeterUnavailableError      energy was requested, but no meter exists
│   ├── ProfileError               a sensitivity profile is damaged, or for another model or text
│   ├── AllocationError            no allocation meets the budget, or constraints conflict
│   ├── StorageFullError           the disk is full or not writable
│   ├── EngineUnavailableError     a serving engine is not installed, or does not start
│   └── ExportError                an export could not be written or did not verify
└── TrialError                     one trial failed; its reason is recorded and the study continues
    ├── NonFiniteError             weights, logits or scores are NaN or infinite
    ├── OutOfMemoryError           the device has too little memory for this point
    ├── EngineError                a serving engine failed, died or hung, or cannot take a form
    └── InvalidMeasurementError    a measurement is not valid
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
    "EngineError",
    "EngineUnavailableError",
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
    """Base class of every error that `dse` raises deliberately."""


class UserError(DseError):
    """User-fixable error. The command line prints its message and exits with 2."""


class ConfigError(UserError):
    """A study file, search-space file or option violates its schema or contradicts itself."""


class PointError(UserError):
    """A design point cannot be read, or cannot be applied to this model."""


class RankError(PointError):
    """A rank lies outside 1 <= rank <= break-even."""


class ModelError(UserError):
    """A model reference cannot be resolved, downloaded or loaded."""


class UnknownArchitectureError(ModelError):
    """The model's layers were found, but no rule maps their tensors to roles."""


class TaskError(UserError):
    """An evaluation task cannot be found or read, or lacks the requested metric."""


class CalibrationError(UserError):
    """Calibration text is missing, unreadable, or shorter than the requested number of tokens."""


class StudyError(UserError):
    """A study folder is missing, in use or damaged, or it holds another study."""


class MeterUnavailableError(UserError):
    """Energy was requested, but no energy meter exists."""


class ProfileError(UserError):
    """A sensitivity profile is missing or damaged, or for another model, calibration text or set of methods."""


class AllocationError(UserError):
    """No allocation meets the budget, or the constraints conflict."""


class EngineUnavailableError(UserError):
    """A serving engine is not installed in its interpreter, or does not start."""


class StorageFullError(UserError):
    """The disk is full or the folder is not writable."""


class ExportError(UserError):
    """An export could not be written, or the reloaded model differs from the decomposed one."""


class TrialError(DseError):
    """One trial failed. The study records the reason and continues."""


class NonFiniteError(TrialError):
    """Weights, logits or scores became NaN or infinite."""


class OutOfMemoryError(TrialError):
    """The device has too little memory for this point.

    Attributes:
        bytes_asked: Size of the allocation that failed; None if the allocator did not report it.
    """

    def __init__(self, message: str, bytes_asked: int | None = None) -> None:
        super().__init__(message)
        self.bytes_asked = bytes_asked


class EngineError(TrialError):
    """A serving engine failed, died or exceeded its time limit, or cannot take the form of an export."""


class InvalidMeasurementError(TrialError):
    """A measurement is not valid; the message gives the reason."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """The suffix `` "; did you mean 'x'?"`` for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
