"""Defaults that the command line, study files and the library share. It imports nothing, so that `--help` is quick."""

from __future__ import annotations

__all__ = ["CALIBRATION_TOKENS"]

CALIBRATION_TOKENS = 12288
"""So many that the shipped text `general` holds them in the tokens of common models, with some left over."""
