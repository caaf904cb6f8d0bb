"""Exact allocation: a multiple-choice knapsack as an integer program, solved by HiGHS.

    minimise    sum_u sum_o divergence[u, o] x[u, o]
    subject to  sum_o x[u, o] = 1                            for every unit u
                sum_u sum_o parameters[u, o] x[u, o] <= budget     (and the same for latency and energy)
                x[u, o] in {0, 1}

Rank multiples and break-even ranks are properties of the options. The table of a small model is solved in milliseconds.

Source: Sinha and Zoltners (1979) for the problem; HiGHS (Huangfu and Hall 2018), through scipy, for the solver.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dse.design_point import DesignPoint
from dse.errors import AllocationError
from dse.sensitivity.allocation_bound import possible_options
from dse.sensitivity.allocation_constraints import AllocationConstraints
from dse.sensitivity.option import Option
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["Allocation", "allocate", "allocate_reductions"]

_OBJECTIVE_SCALE = 1e4
"""Largest divergence passed to the solver, so that its absolute tolerances (1e-6) are far below any difference."""
_RELATIVE_GAP = 1e-5
"""Between the divergence found and the optimum: far below the precision of any measured divergence."""
_LARGEST_COEFFICIENT = 100.0
_TIGHTENINGS = 8
_OF_DENSE = {"parameters": "parameters_dense", "latency_s": "latency_dense_s", "energy_j": "energy_dense_j"}
"""Quantities with a budget: attribute of an option to the attribute of the table with the dense model's value."""


@dataclass(frozen=True)
class Allocation:
    """The best combination of options under a budget.

    Attributes:
        point: All choices as one design point.
        divergence: Sum of the options' divergences, nats per token; the prediction of an additive model.
        parameters: Parameters of the whole model.
        reduction: 1 - parameters / dense parameters.
        latency_s: Predicted latency of the whole model; None if the table predicts none.
        energy_j: Predicted energy of the whole model; None if the table predicts none.
        options: (unit name, option) in the order of the table's units.
    """

    point: DesignPoint
    divergence: float
    parameters: int
    reduction: float
    latency_s: float | None
    energy_j: float | None
    options: tuple[tuple[str, Option], ...]


def allocate(
    table: SensitivityTable,
    *,
    parameters: int | None = None,
    reduction: float | None = None,
    latency_s: float | None = None,
    energy_j: float | None = None,
    constraints: AllocationConstraints | None = None,
) -> Allocation:
    """The combination of options with the least divergence within all budgets.

    Args:
        parameters: Largest number of parameters of the whole model.
        reduction: Smallest reduction, 0 <= reduction < 1; an alternative to `parameters`.
        latency_s: Largest predicted latency of the whole model.
        energy_j: Largest predicted energy of the whole model.

    Raises:
        AllocationError: There is no budget, no allocation meets the budgets, or the constraints contradict each other.
    """
    if parameters is not None and reduction is not None:
        raise AllocationError("give a budget as `parameters` or as `reduction`, not both")
    budgets: dict[str, float] = {}
    if reduction is not None:
        parameters = parameters_of_reduction(table, reduction)
    for name, value in (("parameters", parameters), ("latency_s", latency_s), ("energy_j", energy_j)):
        if value is not None:
            if not math.isfinite(value):
                raise AllocationError(f"a budget must be a finite number, but got {name}={value}")
            budgets[name] = value
    if not budgets:
        raise AllocationError("an allocation needs a budget: give parameters, reduction, latency_s or energy_j")
    return _IntegerProgram(table, constraints or AllocationConstraints()).solve(budgets)


def allocate_reductions(
    table: SensitivityTable, reductions: Iterable[float], *, constraints: AllocationConstraints | None = None
) -> tuple[Allocation, ...]:
    """One allocation for each reduction, in the same order.

    Raises:
        AllocationError: As `allocate`.
    """
    program = _IntegerProgram(table, constraints or AllocationConstraints())
    return tuple(program.solve({"parameters": parameters_of_reduction(table, r)}) for r in reductions)


def parameters_of_reduction(table: SensitivityTable, reduction: float) -> int:
    """Largest number of parameters at which the reduction is reached.

    Raises:
        AllocationError: The reduction is outside [0, 1).
    """
    if not 0 <= reduction < 1:
        raise AllocationError(f"`0 <= reduction < 1` must hold, but got reduction={reduction}")
    # Rounding must not turn a reduction of 0.2 of 100 parameters into 79.
    return math.floor(table.parameters_dense * (1 - reduction) + 1e-6)


class _IntegerProgram:
    """The arrays of one table under constraints, for any number of budgets."""

    def __init__(self, table: SensitivityTable, constraints: AllocationConstraints) -> None:
        self._table = table
        self._constraints = constraints
        self._options = constraints.allowed_options(table)
        flat = [option for options in self._options for option in options]
        self._unit_of = np.repeat(np.arange(len(self._options)), [len(options) for options in self._options])
        self._divergence = np.array([option.divergence for option in flat], dtype=np.float64)
        self._removes = np.array([option.removes_block for option in flat], dtype=np.float64)
        self._flat = flat

    def solve(self, budgets: dict[str, float]) -> Allocation:
        """See `allocate`."""
        rows = [
            _Row.of(self._use(name), self._unit_of, value - self._base(name), whole=value)
            for name, value in budgets.items()
        ]
        rows += self._removal_rows()
        scale = _OBJECTIVE_SCALE / max(float(np.abs(self._divergence).max(initial=0.0)), 1e-300)
        among = self._possible(rows)
        for _ in range(_TIGHTENINGS):
            chosen = self._milp(self._divergence * scale, rows, among)
            if chosen is None:
                raise self._unreachable(budgets)
            broken = [row for row in rows if row.excess(chosen) > 0]
            if not broken:
                return self._allocation(chosen)
            # The solver satisfies a limit up to its tolerance, which is several parameters of a large model.
            rows = [replace(row, limit=row.limit - row.excess(chosen)) for row in rows]
        raise self._unreachable(budgets)

    def _possible(self, rows: Sequence[_Row]) -> NDArray[np.int64]:
        """Options that an optimal allocation may contain, found by relaxing the first budget."""
        if not self._flat or rows[0].limit < 0:
            return np.arange(len(self._flat))

        def is_feasible(chosen: NDArray[np.int64]) -> bool:
            return all(row.excess(chosen) <= 0 for row in rows)

        return possible_options(self._divergence, rows[0].use, rows[0].limit, self._unit_of, is_feasible)

    def _milp(
        self, objective: NDArray[np.float64], rows: Sequence[_Row], among: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """Choose one of the options `among` for each unit; None if the limits cannot be met."""
        # Importing scipy.optimize takes a third of a second, which `dse --help` should not pay for.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        count, unit_of = len(among), self._unit_of[among]
        if not count:
            return among if all(row.limit >= -row.slack for row in rows) else None
        one_each = csr_array((np.ones(count), (unit_of, np.arange(count))))
        limits: list[Any] = [LinearConstraint(one_each, 1.0, 1.0)]
        limits += [LinearConstraint(row.use[None, among] / row.divisor, -np.inf, row.bound) for row in rows]
        with _solver_output_discarded():
            bounds, gap = Bounds(0.0, 1.0), {"mip_rel_gap": _RELATIVE_GAP}
            found = milp(objective[among], integrality=np.ones(count), bounds=bounds, constraints=limits, options=gap)
        if found.x is None:
            return None
        starts = np.flatnonzero(np.diff(unit_of, prepend=-1))
        ends = np.append(starts[1:], count)
        best = [s + int(np.argmax(found.x[s:e])) for s, e in zip(starts, ends, strict=True)]
        return among[np.array(best, dtype=np.int64)]

    def _removal_rows(self) -> list[_Row]:
        """Limits on removals: their number, and that one unit of each `one_remains` group stays."""
        limits = [] if (most := self._constraints.max_removed_blocks) is None else [(self._removes, most)]
        for group in self._table.one_remains:
            inside = np.array([unit.name in group for unit in self._table.units])
            limits.append((self._removes * inside[self._unit_of], len(group) - 1))
        return [_Row.of(use, self._unit_of, limit) for use, limit in limits]

    def _use(self, name: str) -> NDArray[np.float64]:
        values = [getattr(option, name) for option in self._flat]
        if any(value is None for value in values):
            raise AllocationError(
                f"a budget of {name} needs a profile that predicts it for every option, but this one does not; use"
                " a budget of parameters"
            )
        return np.array(values, dtype=np.float64)

    def _base(self, name: str) -> float:
        """The part of a budgeted quantity outside the units."""
        whole = getattr(self._table, _OF_DENSE[name])
        if whole is None:
            raise AllocationError(
                f"a budget of {name} needs a profile with the dense model's value, but this one has none; use a budget"
                " of parameters"
            )
        dense = [getattr(unit.dense, name) for unit in self._table.units]
        return float(whole) - float(sum(value for value in dense if value is not None))

    def _allocation(self, chosen: NDArray[np.int64]) -> Allocation:
        options = [self._flat[index] for index in chosen]
        parameters = int(self._base("parameters")) + sum(option.parameters for option in options)
        return Allocation(
            DesignPoint(tuple(choice for option in options for choice in option.choices)),
            sum(option.divergence for option in options),
            parameters,
            self._table.reduction_of(parameters),
            self._total("latency_s", options),
            self._total("energy_j", options),
            tuple((unit.name, option) for unit, option in zip(self._table.units, options, strict=True)),
        )

    def _total(self, name: str, options: Sequence[Option]) -> float | None:
        values = [getattr(option, name) for option in options]
        if getattr(self._table, _OF_DENSE[name]) is None or any(value is None for value in values):
            return None
        return self._base(name) + float(sum(values))

    def _unreachable(self, budgets: dict[str, float]) -> AllocationError:
        """The error that names a budget that is out of reach alone, or all of them if only the combination is."""
        everything = np.arange(len(self._flat))
        for name, budget in budgets.items():
            use = self._use(name)
            chosen = self._milp(
                use / max(float(use.max(initial=0.0)), 1e-300) * _OBJECTIVE_SCALE, self._removal_rows(), everything
            )
            if chosen is None:
                return AllocationError(
                    "constraints must allow an allocation, but the fixed options remove more blocks than may be"
                    f" removed (at most {self._constraints.max_removed_blocks}; one attention block must always"
                    " remain); drop one of them"
                )
            least = self._base(name) + float(use[chosen].sum())
            if least > budget:
                return AllocationError(_unreachable_text(self._table, name, budget, least))
        listed = " and ".join(f"{name}={value:.6g}" for name, value in budgets.items())
        return AllocationError(
            f"budgets must be reachable together, but no allocation meets {listed}, although each can be met alone;"
            " loosen one of them"
        )


@dataclass(frozen=True, eq=False)
class _Row:
    """One limit: the sum of `use` over the chosen options is at most `limit`.

    Attributes:
        use: Use of each option minus the smallest use of its unit, shape (options,), at least 0.
        limit: In the same unit; below 0 if even the smallest uses exceed it.
        divisor: Scale for the solver: it sees `use / divisor`.
        unit: Greatest common divisor of `use` if all entries are integers, else 0.
        slack: Allowance for rounding of sums; 0 for integers.
    """

    use: NDArray[np.float64]
    limit: float
    divisor: float
    unit: int
    slack: float

    @classmethod
    def of(cls, use: NDArray[np.float64], unit_of: NDArray[np.int64], limit: float, *, whole: float = 0.0) -> _Row:
        """Scale the coefficients to at most 100, so that the solver's tolerance (1e-6) is below a single unit.

        `whole` is the number that `limit` was subtracted from; the rounding error of the limit is relative to it.
        """
        least = np.full(int(unit_of.max(initial=-1)) + 1, np.inf)
        np.minimum.at(least, unit_of, use)
        above, room = use - least[unit_of], limit - float(least.sum())
        divisor = max(float(above.max(initial=0.0)) / _LARGEST_COEFFICIENT, 1e-300)
        if bool((use == np.floor(use)).all()):
            unit = max(1, int(np.gcd.reduce(above.astype(np.int64), initial=0)))
            return cls(above, room, divisor, unit, 0.0)
        return cls(above, room, divisor, 0, 1e-12 * max(float(use.sum()), whole))

    @property
    def bound(self) -> float:
        """The limit as passed to the solver."""
        if self.limit < -self.slack:
            return -1.0
        if self.unit:  # half a unit of room admits no further sum, and keeps the solver's tolerance from excluding one
            return (math.floor(self.limit / self.unit) + 0.5) * self.unit / self.divisor
        return (self.limit + self.slack) / self.divisor

    def excess(self, chosen: NDArray[np.int64]) -> float:
        """By how much the chosen options exceed the limit."""
        return max(0.0, float(self.use[chosen].sum()) - self.limit - self.slack)


@contextlib.contextmanager
def _solver_output_discarded() -> Iterator[None]:
    """Discard what HiGHS prints to the standard output of the process, which is reserved for results.

    HiGHS prints through the buffers of the C library. They are flushed before the descriptor is restored; otherwise the
    rest would be printed at the end of the process.
    """
    if sys.platform == "win32":  # `CDLL(None)` does not load the C library there
        yield
        return
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _unreachable_text(table: SensitivityTable, name: str, budget: float, least: float) -> str:
    remedy = "raise the budget, loosen a constraint, or profile smaller ranks and removals"
    if name == "parameters":
        return (
            f"`parameters >= {least:,.0f}` (reduction <= {table.reduction_of(int(least)):.4f}) must hold for this"
            f" profile and its constraints, but the budget is parameters={budget:,.0f} (reduction"
            f" {table.reduction_of(int(budget)):.4f}); {remedy}"
        )
    return f"`{name} >= {least:.6g}` must hold for this profile and its constraints, but got {budget:.6g}; {remedy}"
