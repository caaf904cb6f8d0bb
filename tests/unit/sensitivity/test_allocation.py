"""Allocations against brute force, a Lagrangian bound and dynamic programming."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.design_point import TensorChoice
from dse.errors import AllocationError
from dse.sensitivity.allocation import allocate, allocate_reductions
from dse.sensitivity.allocation_bound import possible_options
from dse.sensitivity.allocation_constraints import AllocationConstraints
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

ROLES = {"attention": ("query", "value"), "mlp": ("gate_up", "down")}


def unit(name: str, sizes: list[tuple[int, float, float]], dense: tuple[int, float] = (1000, 1.0)) -> Unit:
    """A unit with options of these (parameters, divergence, latency_s)."""
    _, layer, kind = name.split(".")
    options = [Option((), dense[0], 0.0, latency_s=dense[1])]
    for rank, (parameters, divergence, latency_s) in enumerate(sizes, 1):
        choices = tuple((f"layers.{layer}.{role}", TensorChoice("svd", rank)) for role in ROLES[kind])
        options.append(Option(choices, parameters, divergence, latency_s=latency_s))
    return Unit(name, int(layer), kind, tuple(options))


def table_of(units: list[Unit], elsewhere: int = 500) -> SensitivityTable:
    return SensitivityTable(
        tuple(units),
        elsewhere + sum(u.dense.parameters for u in units),
        latency_dense_s=0.25 + sum(u.dense.latency_s or 0.0 for u in units),
    )


sizes = st.lists(
    st.tuples(st.integers(0, 999), st.floats(-0.1, 5.0), st.integers(0, 8).map(lambda n: n / 8)), max_size=4
)
tables = st.lists(sizes, min_size=1, max_size=5).map(
    lambda all_sizes: table_of([unit(f"layers.{i}.mlp", s) for i, s in enumerate(all_sizes)])
)


def least_divergence(table: SensitivityTable, parameters: float, latency_s: float = np.inf) -> float | None:
    """The optimum by exhaustive search; None if no combination is within the budgets."""
    best = None
    elsewhere = table.parameters_dense - sum(u.dense.parameters for u in table.units)
    for combination in itertools.product(*(u.options for u in table.units)):
        size = elsewhere + sum(option.parameters for option in combination)
        seconds = 0.25 + sum(option.latency_s or 0.0 for option in combination)
        divergence = sum(option.divergence for option in combination)
        if size <= parameters and seconds <= latency_s + 1e-9 and (best is None or divergence < best):
            best = divergence
    return best


@settings(deadline=None, max_examples=60)
@given(tables, st.floats(0.0, 1.0), st.booleans(), st.integers(2, 30).map(lambda n: n / 8))
def test_allocations_equal_brute_force(
    table: SensitivityTable, share: float, has_latency: bool, latency_s: float
) -> None:
    parameters = round(share * table.parameters_dense)
    limits = {"latency_s": latency_s} if has_latency else {}
    expected = least_divergence(table, parameters, **limits)
    if expected is None:
        with pytest.raises(AllocationError, match="must"):
            allocate(table, parameters=parameters, **limits)
        return
    found = allocate(table, parameters=parameters, **limits)
    assert found.divergence == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found.parameters <= parameters
    assert found.latency_s is not None
    assert found.latency_s <= limits.get("latency_s", np.inf) + 1e-9
    assert table.divergence_of(found.point) == pytest.approx(found.divergence, abs=1e-12)
    assert dict(found.options) == table.options_of(found.point)


def large_table(seed: int, units: int = 40) -> SensitivityTable:
    """Sizes as in a real model: all parameters are multiples of 192, and divergences decrease with size."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(units):
        kept = np.sort(generator.uniform(0.05, 0.9, 6))[::-1]
        divergence = generator.lognormal(-4, 1.5) * np.cumsum(generator.uniform(0.1, 2.0, 6))
        entries = [(int(k * 4608) * 192, float(d), 0.0) for k, d in zip(kept, divergence, strict=True)]
        made.append(unit(f"layers.{i}.mlp", entries, dense=(4608 * 192, 0.0)))
    return table_of(made, elsewhere=4608 * 192 * 10)


def dynamic_program(table: SensitivityTable, parameters: int) -> float:
    """The optimum by dynamic programming over the parameters saved: another exact algorithm."""
    need = -(-(table.parameters_dense - parameters) // 192)
    best = np.full(need + 1, np.inf)
    best[0] = 0.0
    for u in table.units:
        following = np.full(need + 1, np.inf)
        for option in u.options:
            saved = (u.dense.parameters - option.parameters) // 192
            reached = np.minimum(np.arange(need + 1) + saved, need)
            np.minimum.at(following, reached, best + option.divergence)
        best = following
    return float(best[need])


def lagrangian_bound(table: SensitivityTable, parameters: int) -> tuple[float, float]:
    """(lower bound, divergence of the best feasible point) over Lagrange multipliers."""
    elsewhere = table.parameters_dense - sum(u.dense.parameters for u in table.units)
    bound, feasible = -np.inf, np.inf
    for rate in np.geomspace(1e-12, 1e-2, 400):
        chosen = [min(u.options, key=lambda o: o.divergence + rate * o.parameters) for u in table.units]
        size, divergence = elsewhere + sum(o.parameters for o in chosen), sum(o.divergence for o in chosen)
        bound = max(bound, divergence + rate * (size - parameters))
        feasible = min(feasible, divergence if size <= parameters else np.inf)
    return bound, feasible


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("reduction", [0.05, 0.2, 0.4])
def test_tables_of_realistic_size_are_solved_exactly(seed: int, reduction: float) -> None:
    table = large_table(seed)
    found = allocate(table, reduction=reduction)
    assert found.reduction >= reduction
    assert found.divergence == pytest.approx(dynamic_program(table, found.parameters), rel=1e-5)
    budget = round(table.parameters_dense * (1 - reduction))
    lower, feasible = lagrangian_bound(table, budget)
    assert lower - 1e-9 <= found.divergence <= feasible * (1 + 1e-5)


def test_one_allocation_per_reduction_with_increasing_divergence() -> None:
    table = large_table(5)
    reductions = [0.0, 0.05, 0.1, 0.2, 0.3]
    allocations = allocate_reductions(table, reductions)
    assert [entry.divergence for entry in allocations] == sorted(entry.divergence for entry in allocations)
    assert allocations[0].point.is_dense
    for entry, reduction in zip(allocations, reductions, strict=True):
        assert entry.divergence == pytest.approx(allocate(table, reduction=reduction).divergence)
        assert entry.reduction >= reduction


def test_budgets_of_huge_models_are_exact_to_one_parameter() -> None:
    # 70 billion parameters: a tolerance of 1e-6 of them would be 70,000.
    dense = 7 * 10**9
    units = [unit(f"layers.{i}.mlp", [(dense // 2 + i, 1.0 + i / 100, 0.0)], dense=(dense, 0.0)) for i in range(10)]
    table = table_of(units, elsewhere=1)
    budget = table.parameters_dense - (dense - dense // 2 - 3)
    found = allocate(table, parameters=budget)
    assert found.parameters <= budget
    # Options 0, 1 and 2 have less divergence, but keep too many parameters with the first budget.
    assert found.divergence == pytest.approx(1.0)
    tight = allocate(table, parameters=budget - 3)
    assert tight.divergence == pytest.approx(1.0)
    assert tight.parameters == budget - 3


def two_layers() -> SensitivityTable:
    units = []
    for layer in range(2):
        for kind in ("attention", "mlp"):
            units.append(unit(f"layers.{layer}.{kind}", [(600, 0.1, 0.5), (200, 0.4 + layer, 0.2)]))
    return table_of(units)


def test_constraints_hold() -> None:
    table = two_layers()
    free = allocate(table, reduction=0.4)
    assert {name for name, _ in free.point} & {"layers.0.query", "layers.0.down"}
    untouched = allocate(table, reduction=0.3, constraints=AllocationConstraints(untouched_layers=frozenset({0})))
    assert untouched.point
    assert all(name.startswith("layers.1.") for name, _ in untouched.point)
    for role in ("up", "gate_up", "down", "mlp"):  # the stack of gate and up contains up
        kept = allocate(table, reduction=0.3, constraints=AllocationConstraints(dense_roles=frozenset({role})))
        if role != "mlp":
            assert all(not name.endswith(("gate_up", "down")) for name, _ in kept.point)
    mine = table.by_name["layers.0.mlp"].options[2].choices
    fixed = allocate(
        table, reduction=0.1, constraints=AllocationConstraints(fixed={"layers.0.mlp": mine, "layers.1.mlp": ()})
    )
    assert fixed.point.by_name["layers.0.down"].rank == 2
    assert "layers.1.down" not in fixed.point.by_name
    dense = AllocationConstraints(dense_parts=frozenset({"layers.0.query", "layers.1.down"}))
    names = {name for name, _ in allocate(table, reduction=0.3, constraints=dense).point}
    assert names == {"layers.0.gate_up", "layers.0.down", "layers.1.query", "layers.1.value"}
    # This table has no removals, so that every unit stays dense.
    nothing = allocate(table, reduction=0.0, constraints=AllocationConstraints(removals_only=True))
    assert nothing.point.is_dense


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            AllocationConstraints(untouched_layers=frozenset({2})),
            r"must be one of the profile's \(0 to 1\), but got layer 2",
        ),
        (AllocationConstraints(dense_roles=frozenset({"quary"})), "but got 'quary'; did you mean 'query'"),
        (
            AllocationConstraints(fixed={"layers.0.mpl": ()}),
            "must name a unit of the profile, but got 'layers.0.mpl'; did you",
        ),
        (
            AllocationConstraints(fixed={"layers.0.mlp": (("layers.0.down", TensorChoice("svd", 9)),)}),
            "must name an option of 'layers.0.mlp', but got layers.0.down svd 9; its options are dense | ",
        ),
        (AllocationConstraints(max_removed_blocks=-1), "`max_removed_blocks >= 0` must hold, but got -1"),
        (
            AllocationConstraints(
                fixed={"layers.0.mlp": two_layers().by_name["layers.0.mlp"].options[1].choices},
                untouched_layers=frozenset({0}),
            ),
            "contradict each other: no option remains after leaving layer 0 untouched and fixing it to "
            "layers.0.down svd 1",
        ),
        (
            AllocationConstraints(untouched_layers=frozenset({0, 1})),
            r"reduction <= 0\.0000\) must hold for this profile",
        ),
    ],
)
def test_contradictory_constraints_are_refused(constraints: AllocationConstraints, message: str) -> None:
    with pytest.raises(AllocationError, match=message.replace("|", r"\|")):
        allocate(two_layers(), reduction=0.1, constraints=constraints)


def test_unreachable_budgets_are_refused() -> None:
    table = two_layers()
    with pytest.raises(
        AllocationError, match=r"`parameters >= 1,300` \(reduction <= 0\.7111\) must hold .* \(reduction 0"
    ):
        allocate(table, reduction=0.8)
    with pytest.raises(AllocationError, match=r"`latency_s >= 1\.05` must hold .* but got 0\.5"):
        allocate(table, latency_s=0.5)
    with pytest.raises(AllocationError, match="needs a budget"):
        allocate(table)
    with pytest.raises(AllocationError, match="not both"):
        allocate(table, reduction=0.1, parameters=3)
    for reduction in (-0.1, 1.0, float("nan")):
        with pytest.raises(AllocationError, match="`0 <= reduction < 1` must hold"):
            allocate(table, reduction=reduction)
    with pytest.raises(AllocationError, match="finite"):
        allocate(table, latency_s=float("inf"))
    with pytest.raises(AllocationError, match="energy_j needs a profile that predicts it"):
        allocate(table, energy_j=1.0)
    # The small option is slow and the fast one is large: either budget is reachable, but not both.
    both = table_of([unit("layers.0.mlp", [(100, 0.1, 1.5), (900, 0.1, 0.1)])])
    assert allocate(both, parameters=600).divergence == allocate(both, latency_s=0.4).divergence == pytest.approx(0.1)
    with pytest.raises(AllocationError, match="reachable together"):
        allocate(both, parameters=600, latency_s=0.4)


def removable(layers: int = 3) -> SensitivityTable:
    """Attention blocks that are removed completely unless a constraint prevents it."""
    units = []
    for layer in range(layers):
        name = f"layers.{layer}.attention"
        gone = Option(((name, TensorChoice.removal()),), 0, 0.1 * (layer + 1))
        units.append(Unit(name, layer, "attention", (Option((), 100, 0.0), gone)))
    return SensitivityTable(tuple(units), 100 * layers, one_remains=(tuple(u.name for u in units),))


def test_removals_are_limited() -> None:
    table = removable()
    assert allocate(table, reduction=0.6).point.removed == ("layers.0.attention", "layers.1.attention")
    with pytest.raises(AllocationError, match=r"reduction <= 0\.6667\) must hold"):
        allocate(table, reduction=0.7)
    assert (
        len(allocate(table, reduction=0.3, constraints=AllocationConstraints(max_removed_blocks=1)).point.removed) == 1
    )
    with pytest.raises(AllocationError, match=r"reduction <= 0\.3333\) must hold"):
        allocate(table, reduction=0.6, constraints=AllocationConstraints(max_removed_blocks=1))
    gone = {f"layers.{i}.attention": table.units[i].options[1].choices for i in range(2)}
    with pytest.raises(AllocationError, match="fixed options remove more blocks than may be removed"):
        allocate(table, reduction=0.1, constraints=AllocationConstraints(fixed=gone, max_removed_blocks=1))
    query = AllocationConstraints(dense_roles=frozenset({"attention"}))
    assert allocate(table, reduction=0.0, constraints=query).point.is_dense


@pytest.mark.parametrize("seed", range(3))
def test_no_optimal_allocation_contains_an_option_that_is_ruled_out(seed: int) -> None:
    table = large_table(seed, units=6)
    divergence = np.array([o.divergence for u in table.units for o in u.options])
    use = np.array([o.parameters for u in table.units for o in u.options], dtype=float)
    unit_of = np.repeat(np.arange(6), [len(u.options) for u in table.units])
    starts = np.flatnonzero(np.diff(unit_of, prepend=-1))
    limit = 0.7 * use[starts].sum()
    kept = possible_options(divergence, use, limit, unit_of, lambda chosen: use[chosen].sum() <= limit)
    assert 6 <= len(kept) < len(divergence)
    ways = itertools.product(*(np.flatnonzero(unit_of == u) for u in range(6)))
    best = min((w for w in ways if use[list(w)].sum() <= limit), key=lambda w: divergence[list(w)].sum())
    assert set(best) <= set(kept.tolist())
    assert len(possible_options(divergence, use, limit, unit_of, lambda _chosen: False)) == len(divergence)


@pytest.mark.skipif(sys.platform == "win32", reason="`CDLL(None)` does not load the C library there")
def test_output_of_the_solver_through_c_is_discarded() -> None:
    program = """
import ctypes
from dse.sensitivity.allocation import _solver_output_discarded
c = ctypes.CDLL(None)
print("before")
with _solver_output_discarded():
    c.puts(b"a line of the solver")
c.puts(b"a line after the solver")
c.fflush(None)
print("after", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split("\n")) == ["", "a line after the solver", "after", "before"]
    assert done.stderr == ""
