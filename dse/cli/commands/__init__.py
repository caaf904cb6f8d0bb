"""The commands, one file each: `add(commands)` adds its parser, whose `command` default runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dse.cli.commands import (
    compare,
    cost,
    doctor,
    evaluate,
    export,
    front,
    measure,
    profile_device,
    recommend,
    run,
    sensitivity,
    space,
)

__all__ = ["COMMANDS"]

COMMANDS: tuple[Callable[[Any], None], ...] = (
    run.add,
    front.add,
    recommend.add,
    compare.add,
    export.add,
    cost.add,
    space.add,
    sensitivity.add,
    sensitivity.add_allocate,
    evaluate.add,
    measure.add,
    profile_device.add,
    doctor.add,
)
"""In the order of `dse --help`."""
