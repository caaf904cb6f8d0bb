"""The two texts of healing: windows to train on, and windows of another source that decide when to stop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition.calibration_text import CalibrationWindows, available_windows, general_text_windows
from dse.errors import CalibrationError

__all__ = ["healing_windows", "windows_of_other_text"]

_OTHER_WINDOW = 128


def healing_windows(
    tokenizer: Any, config: CalibrationConfig, tokens: int, *, longest_window: int | None = None
) -> CalibrationWindows:
    """Windows to train on: up to this many tokens of the sources, or all that they have if that is less.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        config: The sources with their weights, the window and the seed.
        tokens: Most tokens that are useful. Training visits a window again when it has seen all.
        longest_window: The model's context in tokens.

    Raises:
        CalibrationError: A text cannot be read, or is shorter than one window.
    """
    return available_windows(tokenizer, config.model_copy(update={"tokens": tokens}), longest_window=longest_window)


def windows_of_other_text(
    tokenizer: Any, tokens: int, *, file: str | None = None, longest_window: int | None = None
) -> Tensor:
    """Windows of text of another source.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        tokens: Most tokens.
        file: UTF-8 file; None takes the package's general text that is in no builtin source.
        longest_window: The model's context in tokens.

    Returns:
        Shape (windows, window), int64.

    Raises:
        CalibrationError: The text cannot be read, or is shorter than two windows.
    """
    window = min(_OTHER_WINDOW, longest_window or _OTHER_WINDOW)
    if file is None:
        windows = general_text_windows(tokenizer, window, 0)
    else:
        config = CalibrationConfig(sources=[CalibrationSource(file=file)], tokens=max(64, tokens), window=window)
        windows = available_windows(tokenizer, config).token_ids
    if len(windows) < 2:
        raise CalibrationError(
            f"text of another source must hold two windows of {window} tokens, but '{file}' holds {len(windows)};"
            " name a longer one"
        )
    return windows[: max(2, tokens // window)]
