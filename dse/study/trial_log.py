"""What the log of a study says of each trial."""

from __future__ import annotations

from dse.trial_record import TrialRecord

__all__ = ["proposal_line", "result_line"]


def proposal_line(record: TrialRecord) -> str:
    """`12 tensors decomposed, reduction 8.3 % (allocation)`."""
    point = record.point
    changes = (
        (len(point.decomposed), "tensors decomposed"),
        (len(point.widths), "MLPs narrowed"),
        (len(point.removed), "blocks removed"),
    )
    parts = [f"{count} {what}" for count, what in changes if count]
    what = "dense" if record.is_dense else ", ".join(parts)
    return f"{what}, reduction {100 * record.cost['reduction']:.1f} % ({record.origin})"


def result_line(record: TrialRecord) -> str:
    """State, reason or values of a finished trial."""
    if record.state != "complete":
        return f"{record.state}: {record.reason}"
    return "complete, " + ", ".join(f"{name} {entry.value:.5g}" for name, entry in record.quantities.items())
