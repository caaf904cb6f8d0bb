"""`dse compare`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, command, plain, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse compare`."""
    parser = command(
        commands,
        "compare",
        _compare,
        "two trials side by side, paired by document",
        "dse compare runs/quickstart --trials 3 17",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--trials",
        type=int,
        nargs=2,
        required=True,
        metavar=("A", "B"),
        help="two trials; every change is B against A (0 is the dense model)",
    )


def _compare(options: argparse.Namespace) -> int:
    from dse.cli.comparison import comparison_text
    from dse.study import open_study

    found = open_study(options.directory).compare(*options.trials)
    if options.json:
        print_json(plain(found))
    else:
        print(comparison_text(found, options.trials))
    return EXIT_OK
