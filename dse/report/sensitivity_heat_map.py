"""A profile as a heat map: layers down, roles across, then the blocks as one."""

from __future__ import annotations

from dse.design_point import REMOVED
from dse.report.heat_map import HeatMap
from dse.sensitivity.profile import MeasuredPart, SensitivityProfile

__all__ = ["heat_map_of"]


def heat_map_of(profile: SensitivityProfile) -> HeatMap:
    """Damage of each tensor alone at the kept fraction where all were measured, and of each block when removed.

    Where several methods were measured, a cell is the least of theirs.
    """
    layers = sorted({part.layer for part in profile.parts})
    cells: dict[tuple[str, int], float] = {}
    for part in profile.parts:
        if (column := _column(part)) is not None:
            at = (column, part.layer)
            cells[at] = min(part.divergence, cells.get(at, part.divergence))
    columns = tuple(dict.fromkeys(column for column, _ in cells))
    kept = [part.parameter_ratio for part in profile.parts if part.role not in ("attention", "mlp")]
    about = f"about {100 * sorted(kept)[len(kept) // 2]:.0f} %" if kept else "a share"
    return HeatMap(
        title=f"Sensitivity of {profile.model}",
        rows=tuple(str(layer) for layer in layers),
        columns=columns,
        values=tuple(tuple(cells.get((column, layer)) for column in columns) for layer in layers),
        label="KL divergence to dense, nats per token",
        note=(
            f"Each tensor alone, factors keeping {about} of its parameters, by"
            f" {' or '.join(profile.origin.methods)} (the better); on {profile.origin.tokens} tokens of {profile.text},"
            f" in {profile.origin.dtype}."
            + (
                " Columns that end in 'removed' are whole blocks passed by."
                if any("removed" in c for c in columns)
                else ""
            )
        ),
    )


def _column(part: MeasuredPart) -> str | None:
    if part.method == REMOVED:
        return f"{part.role} removed"
    return None if part.role in ("attention", "mlp") else part.role
