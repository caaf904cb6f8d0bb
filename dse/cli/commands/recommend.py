"""`dse recommend`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from dse.cli.commands._base import EXIT_NOTHING_FITS, EXIT_OK, command, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse recommend`."""
    parser = command(
        commands,
        "recommend",
        _recommend,
        "name the cheapest point within a tolerance, by its confidence bound where one fits (exit 3 where none does)",
        "dse recommend runs/quickstart --max-accuracy-drop 0.02",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--max-accuracy-drop",
        type=float,
        required=True,
        metavar="DROP",
        help="largest accuracy drop against dense, as a fraction: 0.02 is two points",
    )
    parser.add_argument("--min-reduction", type=float, metavar="R", help="least share of parameters to be removed")


def _recommend(options: argparse.Namespace) -> int:
    from dse.cli.report import print_recommendation
    from dse.study import open_study

    study = open_study(options.directory)
    advice = study.recommend(options.max_accuracy_drop, options.min_reduction)
    if options.json:
        print_json(dataclasses.asdict(advice))
    else:
        print_recommendation(study, advice)
    return EXIT_OK if advice.trial is not None else EXIT_NOTHING_FITS
