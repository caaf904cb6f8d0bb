"""`dse compare`: compare two trials of a study, paired by document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dse.cli.options import add_command

if TYPE_CHECKING:
    from dse.evaluation.paired_comparison import Comparison
    from dse.study import CostComparison, TrialComparison

_EXACT = ("parameters", "weight_bytes")


def add_parser(commands: Any) -> None:
    """Add `dse compare`."""
    parser = add_command(
        commands,
        "compare",
        run,
        summary="compare two trials, paired by document",
        example="dse compare runs/quickstart --trials 3 17",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--trials",
        type=int,
        nargs=2,
        required=True,
        metavar=("A", "B"),
        help="the two trials; changes are B relative to A (0 is the dense model)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the comparison."""
    from dse.cli.printing import as_json, print_result
    from dse.study import open_study

    found = open_study(options.directory).compare(*options.trials)
    return print_result(options, found, partial(_print_comparison, options.trials), as_json)


def _print_comparison(requested: Sequence[int], found: TrialComparison) -> None:
    """Print two tables: quality paired by document, and costs; a requested duplicate stands for its original."""
    from dse.report.text_tables import aligned

    trials = (found.first, found.second)
    lines = [
        f"trial {number}: point {point}" + ("" if number == wanted else f" (repeated by trial {wanted})")
        for number, point, wanted in zip(trials, (found.first_point, found.second_point), requested, strict=True)
    ]
    lines += [f"changes are trial {found.second} relative to trial {found.first}, on the same documents", ""]
    values = [f"trial {number}" for number in trials]
    if found.quality:
        head = ["task", "metric", *values, "change", "95 % interval", "p", "detectable", "documents", "test"]
        lines += [*aligned([head, *map(_quality_row, found.quality)], left=(0, 1, 9)), ""]
    lines += aligned([["cost", *values, "ratio", "95 % interval"], *map(_cost_row, found.costs)], left=(0,))
    if found.quality:
        lines += [
            "",
            "in brackets: unpaired standard errors; detectable: smallest change that this many documents detect with",
            "80 % power; lost, gained: documents that only the first or only the second trial answers correctly",
        ]
    print("\n".join(lines))


def _quality_row(row: Comparison) -> list[str]:
    from dse.evaluation.paired_comparison import MEAN

    return [
        "all" if row.task == MEAN else row.task,
        row.metric,
        _value_text(row.first, row.first_stderr),
        _value_text(row.second, row.second_stderr),
        _change_text(row, row.change),
        "" if row.low is None or row.high is None else f"{_change_text(row, row.low)} to {_change_text(row, row.high)}",
        "" if row.p_value is None else _p_value_text(row.p_value),
        "" if row.detectable is None else _change_text(row, row.detectable).lstrip("+"),
        _documents_text(row),
        row.test,
    ]


def _documents_text(row: Comparison) -> str:
    if row.change is None:
        return ""
    return str(row.documents) + ("" if row.losses is None else f", {row.losses} lost, {row.gains} gained")


def _value_text(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ({error:.2g})"


def _change_text(row: Comparison, change: float | None) -> str:
    from dse.report.units import points

    if change is None:
        return "not paired"
    if row.scale == "ratio":
        return f"x{change:.3f}"
    if 0.0 <= row.first <= 1.0 and 0.0 <= row.second <= 1.0 and row.metric != "target_log_likelihood":
        return points(change, 2)
    return f"{change:+.3f}"


def _p_value_text(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cost_row(row: CostComparison) -> list[str]:
    from dse.pareto import OBJECTIVES
    from dse.report.units import scale_for

    objective = OBJECTIVES[row.name]
    scale = scale_for(objective, (row.first, row.second))
    if row.is_predicted:
        interval = "predicted"
    elif row.low is not None and row.high is not None:
        interval = f"x{row.low:.3f} to x{row.high:.3f}"
    else:
        interval = "exact" if row.name in _EXACT else "unknown"
    return [objective.label.lower(), scale.text(row.first), scale.text(row.second), f"x{row.ratio:.3f}", interval]
