"""What `dse compare` prints for people."""

from __future__ import annotations

from collections.abc import Sequence

from dse.evaluation.comparison import MEAN, Comparison
from dse.pareto import OBJECTIVES
from dse.report.front_table import aligned
from dse.report.units import points, scale_for
from dse.study import CostComparison, TrialComparison

__all__ = ["comparison_text"]


def comparison_text(found: TrialComparison, asked: Sequence[int]) -> str:
    """Two tables: quality paired by document, and costs; ends without a line break.

    Args:
        found: What `Study.compare` returned.
        asked: The trials that were asked for; a duplicate is said to stand for the trial it repeats.
    """
    trials = (found.first, found.second)
    lines = [
        f"trial {number}: point {point}" + ("" if number == wanted else f" (trial {wanted} repeats it)")
        for number, point, wanted in zip(trials, (found.first_point, found.second_point), asked, strict=True)
    ]
    lines += [f"changes are trial {found.second} against trial {found.first}, over the same documents", ""]
    if found.quality:
        head = [
            "task",
            "metric",
            *(f"trial {number}" for number in trials),
            "change",
            "95 % interval",
            "p",
            "could show",
        ]
        rows = [[*head, "documents", "test"], *(_quality_row(row) for row in found.quality)]
        lines += [*aligned(rows, left=(0, 1, 9)), ""]
    head = ["cost", *(f"trial {number}" for number in trials), "ratio", "95 % interval"]
    lines += aligned([head, *(_cost_row(row) for row in found.costs)], left=(0,))
    if found.quality:
        lines += [
            "",
            "in brackets: lm-eval's standard errors, unpaired; could show: the smallest change that so many documents",
            "show with 80 % power; lost, gained: documents that only the first, only the second trial gets right",
        ]
    return "\n".join(lines)


def _quality_row(row: Comparison) -> list[str]:
    return [
        "all" if row.task == MEAN else row.task,
        row.metric,
        _value(row.first, row.first_stderr),
        _value(row.second, row.second_stderr),
        _change(row, row.change),
        "" if row.low is None or row.high is None else f"{_change(row, row.low)} to {_change(row, row.high)}",
        "" if row.p_value is None else _p_value(row.p_value),
        "" if row.detectable is None else _change(row, row.detectable).lstrip("+"),
        _documents(row),
        row.test,
    ]


def _documents(row: Comparison) -> str:
    if row.change is None:
        return ""
    return str(row.documents) + ("" if row.losses is None else f", {row.losses} lost, {row.gains} gained")


def _value(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ({error:.2g})"


def _change(row: Comparison, change: float | None) -> str:
    if change is None:
        return "not paired"
    if row.scale == "ratio":
        return f"x{change:.3f}"
    if 0.0 <= row.first <= 1.0 and 0.0 <= row.second <= 1.0 and row.metric != "target_log_likelihood":
        return points(change, 2)
    return f"{change:+.3f}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cost_row(row: CostComparison) -> list[str]:
    objective = OBJECTIVES[row.name]
    scale = scale_for(objective, (row.first, row.second))
    ends = "exact" if row.low is None or row.high is None else f"x{row.low:.3f} to x{row.high:.3f}"
    is_exact = row.name in ("parameters", "weight_bytes")
    return [
        objective.label.lower(),
        scale.text(row.first),
        scale.text(row.second),
        f"x{row.ratio:.3f}",
        "predicted" if row.is_predicted else ends if is_exact or row.low is not None else "not known",
    ]
