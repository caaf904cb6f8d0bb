"""`dse doctor`: check the GPU, energy meters, serving engines and library versions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse.cli.options import add_command

if TYPE_CHECKING:
    from dse.measurement import Check

_MARKS = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]note[/yellow]"}


def add_parser(commands: Any) -> None:
    """Add `dse doctor`."""
    add_command(
        commands,
        "doctor",
        run,
        summary="check the GPU, energy meters, serving engines and library versions, and print remedies",
        example="dse doctor",
    )


def run(options: argparse.Namespace) -> int:
    """Run the checks and print them."""
    from rich.console import Console

    from dse.cli.printing import as_json, print_result
    from dse.engines import engine_checks
    from dse.measurement import run_checks

    with Console(stderr=True).status("checking"):
        checks = [*run_checks(), *engine_checks()]
    return print_result(options, checks, _print_checks, as_json)


def _print_checks(checks: Sequence[Check]) -> None:
    from rich.markup import escape

    from dse.cli.printing import console

    out = console()
    for check in checks:
        out.print(f"{_MARKS[check.status]:<22} {escape(check.name)}: {escape(check.detail)}")
        if check.remedy:
            out.print(f"        remedy: {escape(check.remedy)}")
