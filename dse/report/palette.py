"""Colours of all plots and pages."""

from __future__ import annotations

__all__ = ["Palette", "colour_of"]


class Palette:
    """Colours that colour-blind readers can distinguish: viridis without its pale end, and Okabe-Ito vermilion."""

    TEXT = "#1f2933"
    MUTED = "#52606d"
    GRID = "#eceef1"
    TRIALS = "#b3bac3"
    TRIAL_BARS = "#e1e4e8"
    FRONT_BARS = "#9aa5b1"
    FRONT = "#2a788e"
    DENSE = "#d55e00"
    RAMP = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151")


def colour_of(share: float) -> str:
    """Colour of a share from 0 (pale) to 1 (dark), interpolated along the ramp."""
    ramp = [tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in ("#f7fbf5", *reversed(Palette.RAMP))]
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
