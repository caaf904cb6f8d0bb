"""`dse front`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, command, plain, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse front`."""
    parser = command(commands, "front", _front, "show the Pareto front of a study", "dse front runs/quickstart")
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--explain", type=int, metavar="TRIAL", help="what a trial's point does and why it was proposed"
    )


def _front(options: argparse.Namespace) -> int:
    from dse.cli.report import print_front, study_json
    from dse.report.rank_map import rank_map_text
    from dse.study import open_study

    study = open_study(options.directory)
    if options.explain is not None:
        explanation = study.explain(options.explain)
        if options.json:
            print_json(plain(explanation))
        else:
            print("\n".join([*explanation.lines, "", *rank_map_text(explanation.rank_map)]))
        return EXIT_OK
    if options.json:
        print_json(study_json(study))
    else:
        print_front(study)
    return EXIT_OK
