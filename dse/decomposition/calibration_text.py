"""Calibration text: the token windows that calibrated methods run through the model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dse.config import CalibrationConfig, CalibrationSource
from dse.errors import CalibrationError, did_you_mean
from dse.models import context_tokens

__all__ = [
    "BUILTIN_TEXTS",
    "CalibrationWindows",
    "available_windows",
    "calibration_windows",
    "general_text_windows",
    "held_out_windows",
    "longest_window",
    "named_calibration",
]

_DATA = Path(__file__).resolve().parent.parent / "data" / "calibration"
_HELD_OUT_TEXT = _DATA.parent / "general_heldout.txt"
_HELD_OUT_WINDOW = 128
"""Tokens per window. Shorter windows give more of them, and so a better estimate of their spread."""


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """Token windows that calibration runs through the model.

    Attributes:
        token_ids: Shape (windows, window), int64.
        fingerprint: 16 hexadecimal digits of the tokens and their arrangement.
        description: The sources of the text, for records.
    """

    token_ids: Tensor
    fingerprint: str
    description: str

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.token_ids.numel()

    def spread(self, tokens: int) -> Tensor:
        """A subset of whole windows with about this many tokens, evenly spaced over all windows.

        Windows are ordered by source, so the first ones alone would leave out the last sources.

        Args:
            tokens: Target number of tokens.

        Returns:
            Shape (windows', window).
        """
        return self.token_ids[self.spread_rows(tokens)]

    def spread_rows(self, tokens: int) -> Tensor:
        """Indices of the windows of `spread`, ascending."""
        count = min(len(self.token_ids), max(1, tokens // self.token_ids.shape[1]))
        return torch.linspace(0, len(self.token_ids) - 1, count).long()


def _shipped(name: str) -> str:
    return (_DATA / f"{name}.txt").read_text(encoding="utf-8")


def _python_docs() -> str:
    """The language reference that every Python installation contains."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


BUILTIN_TEXTS: dict[str, Callable[[], str]] = {
    **{name: partial(_shipped, name) for name in ("general", "grammar", "facts")},
    "python_docs": _python_docs,
}
"""Texts that need no network: three in this package, and the language reference of the Python installation."""


def calibration_windows(
    tokenizer: Any, config: CalibrationConfig, *, longest_window: int | None = None
) -> CalibrationWindows:
    """Tokenise the sources and draw windows by seed, each source contributing its share.

    A source shorter than its share contributes all it has; the other sources make up the difference.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        config: Sources, tokens, window and seed.
        longest_window: The model's context in tokens, if it is shorter than the configured window.

    Raises:
        CalibrationError: A text cannot be read, or all sources together have too few tokens.
    """
    drawn = available_windows(tokenizer, config, longest_window=longest_window)
    window = drawn.token_ids.shape[1]
    if len(drawn.token_ids) < max(1, config.tokens // window):
        raise CalibrationError(
            f"calibration text must hold {config.tokens} tokens in whole windows of {window}, but its sources hold"
            f" {drawn.tokens}; lower `calibration.tokens` or name more text"
        )
    return drawn


def available_windows(
    tokenizer: Any, config: CalibrationConfig, *, longest_window: int | None = None
) -> CalibrationWindows:
    """As `calibration_windows`, but sources with too little text give what they have.

    Raises:
        CalibrationError: A text cannot be read, or no source holds a whole window.
    """
    pieces, counts, _ = _drawn(tokenizer, config, longest_window)
    window = pieces[0].shape[1]
    if not sum(counts):
        raise CalibrationError(f"calibration text must hold a window of {window} tokens, but no source does")
    token_ids = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    description = ", ".join(
        f"{_name(source)} ({count * window} tokens)" for source, count in zip(config.sources, counts, strict=True)
    )
    digest = hashlib.sha256(f"{tuple(token_ids.shape)}".encode() + token_ids.numpy().tobytes())
    return CalibrationWindows(token_ids, digest.hexdigest()[:16], description)


def general_text_windows(tokenizer: Any, window: int, seed: int) -> Tensor:
    """All windows of general text that is in no source, shape (windows, window)."""
    return _windows_of(tokenizer, _HELD_OUT_TEXT.read_text(encoding="utf-8"), window, seed)


def held_out_windows(
    tokenizer: Any, config: CalibrationConfig, tokens: int, *, longest_window: int | None = None
) -> Tensor:
    """Windows of the same sources that calibration does not use, filled up with general text that is in no source.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        config: The calibration: its sources, and how many of their windows it uses.
        tokens: Number of tokens needed.
        longest_window: The model's context in tokens, if it is shorter than a window.

    Returns:
        Shape (windows, window), int64.

    Raises:
        CalibrationError: A text cannot be read, or too little text is left.
    """
    pieces, counts, _ = _drawn(tokenizer, config, longest_window)
    window = min(_HELD_OUT_WINDOW, pieces[0].shape[1])
    wanted = max(2, tokens // window)
    unused = [_cut(piece[count:], window) for piece, count in zip(pieces, counts, strict=True)]
    # A long source gives no more than its share, so that it does not dominate.
    shares = _shares(unused, config.sources, wanted)
    found = [piece[:share] for piece, share in zip(unused, shares, strict=True)]
    missing = wanted - sum(shares)
    if missing > 0:
        found.append(general_text_windows(tokenizer, window, config.seed)[:missing])
    windows = torch.cat(found)
    if len(windows) < wanted:
        raise CalibrationError(
            f"KL divergence needs {tokens} tokens of text outside the calibration windows, but only"
            f" {windows.numel()} are left; lower `calibration.tokens` or the number of tokens, or name more text"
        )
    return windows


def named_calibration(
    tokenizer: Any, text: str, *, tokens: int, longest_window: int | None = None
) -> CalibrationWindows:
    """Calibration windows of one text, given by the name of a builtin text or the path of a UTF-8 file.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        text: Name or path.
        tokens: Number of tokens.
        longest_window: The model's context in tokens, if it is shorter than the default window.

    Raises:
        CalibrationError: The text cannot be read, or is too short.
    """
    source = CalibrationSource(builtin=text) if text in BUILTIN_TEXTS else CalibrationSource(file=text)
    config = CalibrationConfig(sources=[source], tokens=max(64, tokens))
    return calibration_windows(tokenizer, config, longest_window=longest_window)


def longest_window(model: Any) -> int | None:
    """The longest sequence that the model's position embeddings allow, in tokens; None if its config does not say."""
    return context_tokens(model)


def _name(source: CalibrationSource) -> str:
    return source.builtin or source.file or f"{source.dataset}/{source.config or ''}[{source.split}]"


def _read(source: CalibrationSource) -> str:
    if source.builtin is not None:
        if source.builtin not in BUILTIN_TEXTS:
            raise CalibrationError(
                f"a builtin calibration text must be one of {', '.join(BUILTIN_TEXTS)}, but got '{source.builtin}'"
                f"{did_you_mean(source.builtin, BUILTIN_TEXTS)}"
            )
        return BUILTIN_TEXTS[source.builtin]()
    if source.file is not None:
        try:
            return Path(source.file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise CalibrationError(
                f"calibration file {source.file} must be readable UTF-8 text, but: {reason}"
            ) from error
    return _read_dataset(source)


def _read_dataset(source: CalibrationSource) -> str:
    """The text column of a hub dataset, joined."""
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split)
        return "\n\n".join(text for text in rows[source.column] if text.strip())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"calibration dataset '{source.dataset}' must be loadable, but: {reason}; without the hub, name a `file` or"
            f" a `builtin` ({', '.join(BUILTIN_TEXTS)})"
        ) from error


def _drawn(
    tokenizer: Any, config: CalibrationConfig, longest_window: int | None
) -> tuple[list[Tensor], list[int], int]:
    """The shuffled windows of each source, how many of them calibration uses, and how many it needs in total."""
    window = min(config.window, longest_window or config.window)
    pieces = [_windows_of(tokenizer, _read(source), window, config.seed) for source in config.sources]
    wanted = max(1, config.tokens // window)
    return pieces, _shares(pieces, config.sources, wanted), wanted


def _cut(windows: Tensor, window: int) -> Tensor:
    """Windows cut into shorter ones, without the remainder; shape (windows', window)."""
    whole = windows.shape[1] // window
    return windows[:, : whole * window].reshape(-1, window)


def _windows_of(tokenizer: Any, text: str, window: int, seed: int) -> Tensor:
    """Whole windows of the text in an order drawn by `seed`, shape (windows, window)."""
    # Hides the warning about a sequence longer than the model's context.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    windows = _cut(token_ids.unsqueeze(0), window)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _shares(pieces: Sequence[Tensor], sources: Sequence[CalibrationSource], wanted: int) -> list[int]:
    """Split `wanted` windows by the weights of the sources; no source gives more than its piece holds.

    Largest-remainder rounding over the sources that still have windows, repeated until all windows are assigned or no
    source has any left.
    """
    counts, weights, available = [0] * len(pieces), [source.weight for source in sources], [len(p) for p in pieces]
    while sum(counts) < wanted:
        open_sources = [i for i, have in enumerate(available) if counts[i] < have]
        if not open_sources:
            break
        missing, total = wanted - sum(counts), sum(weights[i] for i in open_sources)
        exact = {i: missing * weights[i] / total for i in open_sources}
        added = {i: min(int(exact[i]), available[i] - counts[i]) for i in open_sources}
        if not any(added.values()):
            added = {max(open_sources, key=exact.__getitem__): 1}
        for i, number in added.items():
            counts[i] += number
    return counts
