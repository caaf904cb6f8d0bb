"""`dse doctor`: check the GPU, energy meters and library versions."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from dse.cli.options import EXIT_OK, add_command

__all__ = ["add_parser", "run"]

_MARKS = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]note[/yellow]"}


def add_parser(commands: Any) -> None:
    """Add `dse doctor`."""
    add_command(
        commands,
        "doctor",
        run,
        summary="check the GPU, energy meters and library versions, and print remedies",
        example="dse doctor",
    )


def run(options: argparse.Namespace) -> int:
    """Run the checks and print them."""
    from rich.console import Console
    from rich.markup import escape

    from dse.cli.printing import console, print_json
    from dse.measurement import run_checks

    with Console(stderr=True).status("checking"):
        checks = run_checks()
    if options.json:
        print_json([dataclasses.asdict(check) for check in checks])
        return EXIT_OK
    out = console()
    for check in checks:
        out.print(f"{_MARKS[check.status]:<22} {escape(check.name)}: {escape(check.detail)}")
        if check.remedy:
            out.print(f"        remedy: {escape(check.remedy)}")
    return EXIT_OK
