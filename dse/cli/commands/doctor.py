"""`dse doctor`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from dse.cli.commands._base import EXIT_OK, command, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse doctor`."""
    command(commands, "doctor", _doctor, "what is here, what is missing, and the remedy", "dse doctor")


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from dse.cli.report import print_checks
    from dse.measurement import run_checks

    with Console(stderr=True).status("checking; the first time the CPU kernel is built, in some twenty seconds"):
        checks = run_checks()
    if options.json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        print_checks(checks)
    return EXIT_OK
