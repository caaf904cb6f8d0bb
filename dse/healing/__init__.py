"""Healing: train the factors of a design point for minutes, so that its outputs come closer to the dense model's."""

from dse.healing.healed_weights import apply_healed, read_healed, write_healed
from dse.healing.teacher import Teacher
from dse.healing.text import healing_windows, windows_of_other_text
from dse.healing.training import HealedPoint, HealingReport, HealingSettings, heal

__all__ = [
    "HealedPoint",
    "HealingReport",
    "HealingSettings",
    "Teacher",
    "apply_healed",
    "heal",
    "healing_windows",
    "read_healed",
    "windows_of_other_text",
    "write_healed",
]
