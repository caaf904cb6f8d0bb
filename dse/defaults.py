"""Defaults shared by the command line, study files and the library. Imports nothing, to keep `--help` fast."""

from __future__ import annotations

__all__ = ["CALIBRATION_TOKENS", "RENAMED_OBJECTIVES"]

CALIBRATION_TOKENS = 12288
"""The builtin text `general` has more tokens than this with the tokenizers of common models."""

RENAMED_OBJECTIVES = {"gold_log_likelihood": "target_log_likelihood"}
"""Objective names of version 0.1 to the present ones; the old names are read for one more release."""
