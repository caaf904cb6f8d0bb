"""`dse recommend`: recommend the cheapest trial within an accuracy tolerance."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from dse.cli.options import EXIT_NOTHING_FITS, add_command

if TYPE_CHECKING:
    from dse.report.recommendation import Recommendation
    from dse.study import Study


def add_parser(commands: Any) -> None:
    """Add `dse recommend`."""
    parser = add_command(
        commands,
        "recommend",
        run,
        summary="recommend the cheapest trial within an accuracy tolerance",
        example="dse recommend runs/quickstart --max-accuracy-drop 0.02",
        details="A trial whose 95 % bound is within the tolerance is preferred. Exits with 3 if no trial fits.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--max-accuracy-drop",
        type=float,
        required=True,
        metavar="DROP",
        help="largest accuracy drop against dense, as a fraction: 0.02 is two points",
    )
    parser.add_argument("--min-reduction", type=float, metavar="R", help="smallest share of the parameters to remove")


def run(options: argparse.Namespace) -> int:
    """Print the recommendation."""
    from dse.cli.printing import as_json, print_result
    from dse.study import open_study

    study = open_study(options.directory)
    advice = study.recommend(options.max_accuracy_drop, options.min_reduction)
    code = print_result(options, advice, partial(print_recommendation, study), as_json)
    return code if advice.trial is not None else EXIT_NOTHING_FITS


def print_recommendation(study: Study, advice: Recommendation) -> None:
    """Print the recommended trial with the reason, or the nearest miss; then the knee of the front."""
    from rich.markup import escape

    from dse.cli.printing import console
    from dse.report.units import points

    out = console()
    if advice.trial is not None:
        certified = "" if advice.meets_bound else ", by point estimate; not certified"
        out.print(f"recommended: [bold]trial {advice.trial}[/bold] (point {advice.point_id}){certified}")
        out.print(f"  {escape(advice.reason)}")
        drop = f"accuracy drop: {points(advice.accuracy_drop or 0.0)} by point estimate"
        if advice.accuracy_drop_high is not None:
            drop += f", at most {points(advice.accuracy_drop_high)} with 95 % confidence"
        out.print(f"  {drop}")
    else:
        out.print(escape(advice.reason))
    if advice.knee_trial is not None and advice.knee_trial != advice.trial:
        out.print(f"  knee of the front: {escape(_knee_text(study, advice.knee_trial))}")


def _knee_text(study: Study, trial: int) -> str:
    from dse.report.units import percent, points

    record = study.record(trial)
    text = f"trial {trial}, {percent(record.cost['reduction'])} of the parameters removed"
    if record.accuracy_drop is not None and record.accuracy_drop.value is not None:
        text += f", accuracy {points(-record.accuracy_drop.value)}"
    return text + "; the best trade-off if no tolerance is given"
