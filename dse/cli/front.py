"""`dse front`: show the Pareto front of a study, or explain one trial."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dse.cli.options import add_command

if TYPE_CHECKING:
    import pandas as pd

    from dse.report.explanation import Explanation
    from dse.study import Study


def add_parser(commands: Any) -> None:
    """Add `dse front`."""
    parser = add_command(
        commands,
        "front",
        run,
        summary="show the Pareto front of a study",
        example="dse front runs/quickstart\n  dse front runs/quickstart --explain 12",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--explain", type=int, metavar="TRIAL", help="show what a trial changes and why it was proposed"
    )


def run(options: argparse.Namespace) -> int:
    """Print the front, or the explanation of a trial."""
    from dse.cli.printing import as_json, print_result
    from dse.study import Study, open_study

    study = open_study(options.directory)
    if options.explain is None:
        return print_result(options, study, print_front, Study.to_document)
    return print_result(options, study.explain(options.explain), _print_explanation, as_json)


def _print_explanation(explanation: Explanation) -> None:
    from dse.report.rank_map import rank_map_text

    print("\n".join([*explanation.lines, "", *rank_map_text(explanation.rank_map)]))


def print_front(study: Study) -> None:
    """Print the front as a table, and the progress of the study."""
    from rich.console import Console

    from dse.report.text_tables import format_front, format_tied, front_text, tied_text

    front = study.front()
    if sys.stdout.isatty():
        console = Console()
        console.print(format_front(front, study.objectives, width=console.width))
        if (tied := format_tied(study.trials(), study.objectives)) is not None:
            console.print(tied)
    else:
        print(front_text(front, study.objectives))
        if tied_lines := tied_text(study.trials(), study.objectives):
            print(tied_lines)
    if (detectable := _detectable_drops(front)) is not None:
        print(detectable)
    volume = "" if study.hypervolume is None else f"; hypervolume {study.hypervolume:.4f} of 1"
    print(
        f"{study.evaluated_trials} of {study.config.budget.trials} trials evaluated,"
        f" {study.front_size} on the front{volume}"
    )
    if shares := study.origin_shares:
        print("origins: " + "; ".join(share.describe() for share in shares))


def _detectable_drops(front: pd.DataFrame) -> str | None:
    """The smallest accuracy drops that the documents of this study can detect; None without accuracy."""
    from dse.report.units import points

    if "accuracy_drop_detectable" not in front.columns:
        return None
    sizes, documents = front["accuracy_drop_detectable"].dropna(), front["accuracy_drop_documents"].dropna()
    if sizes.empty:
        return None
    low, high = (points(float(size)).removesuffix(" pts").lstrip("+") for size in (sizes.min(), sizes.max()))
    size = low if low == high else f"{low} to {high}"
    return f"smallest accuracy drop that {int(documents.max())} documents detect: {size} pts"
