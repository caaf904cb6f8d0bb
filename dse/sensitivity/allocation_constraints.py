"""Constraints of an allocation: parts that stay dense, fixed units, and the number of removed blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dse.errors import AllocationError, did_you_mean
from dse.sensitivity.option import Choices, Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["STACK_ROLES", "AllocationConstraints"]

STACK_ROLES: Mapping[str, tuple[str, ...]] = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Name of a stack, or of a fused projection, to the roles that it contains."""


@dataclass(frozen=True)
class AllocationConstraints:
    """Limits that hold in addition to the budget.

    Attributes:
        untouched_layers: Layers that stay dense.
        dense_roles: Roles that stay dense in every layer, for example value or down. Stacks that contain such a role,
            and the removal and the widths of blocks that contain it, are excluded too.
        dense_parts: Names of tensors, stacks and blocks that stay dense.
        fixed: Unit name to the choices that the unit must take; empty choices mean dense.
        removals_only: Whether removing blocks is the only change allowed.
        max_removed_blocks: Largest number of removed blocks; None for no limit.
    """

    untouched_layers: frozenset[int] = frozenset()
    dense_roles: frozenset[str] = frozenset()
    dense_parts: frozenset[str] = frozenset()
    fixed: Mapping[str, Choices] = field(default_factory=dict)
    removals_only: bool = False
    max_removed_blocks: int | None = None

    def allowed_options(self, table: SensitivityTable) -> list[tuple[Option, ...]]:
        """The options that each unit may take, in the order of the table's units; at least one per unit.

        Raises:
            AllocationError: A constraint names something that is not in the table, or the constraints contradict
                each other.
        """
        self._check_names(table)
        return [self._allowed(unit) for unit in table.units]

    def _allowed(self, unit: Unit) -> tuple[Option, ...]:
        kept = tuple(option for option in unit.options if option.is_dense or self._allows(unit, option))
        fixed_text = ""
        if unit.name in self.fixed:
            wanted = tuple(sorted(self.fixed[unit.name]))
            if wanted not in unit.by_choices:
                raise AllocationError(
                    f"`fixed` must name an option of '{unit.name}', but got"
                    f" {Option(wanted, 0, 0.0).describe()}; its options are"
                    f" {' | '.join(option.describe() for option in unit.options[:6])}"
                )
            kept = tuple(option for option in kept if option.choices == wanted)
            fixed_text = f" and fixing it to {unit.by_choices[wanted].describe()}"
        if not kept:
            raise AllocationError(
                f"constraints must leave every unit an option, but those on '{unit.name}' contradict each other: no"
                f" option remains after{self._causes(unit)}{fixed_text}; drop one of them"
            )
        return kept

    def _allows(self, unit: Unit, option: Option) -> bool:
        """Whether the constraints allow an option that is not dense."""
        if self.removals_only and not option.removes_block:
            return False
        if unit.layer in self.untouched_layers or any(name in self.dense_parts for name, _ in option.choices):
            return False
        if option.removes_block or option.narrows_mlp:
            changed = set().union(*(roles_of(name) for name in unit.names)) | {unit.kind}
        else:
            changed = set().union(*(roles_of(name) for name, _ in option.choices))
        return not changed & self.dense_roles

    def _causes(self, unit: Unit) -> str:
        causes = []
        if unit.layer in self.untouched_layers:
            causes.append(f" leaving layer {unit.layer} untouched")
        if self.dense_roles:
            causes.append(f" keeping {', '.join(sorted(self.dense_roles))} dense")
        if parts := sorted(self.dense_parts & unit.names):
            causes.append(f" keeping {', '.join(parts)} dense")
        if self.removals_only:
            causes.append(" allowing removals only")
        return ",".join(causes)

    def _check_names(self, table: SensitivityTable) -> None:
        layers = {unit.layer for unit in table.units if unit.layer is not None}
        span = f"{min(layers)} to {max(layers)}" if layers else "none"
        for layer in sorted(self.untouched_layers - layers):
            raise AllocationError(f"an untouched layer must be one of the profile's ({span}), but got layer {layer}")
        roles = {role for unit in table.units for name in unit.names for role in roles_of(name)}
        roles |= {unit.kind for unit in table.units}
        for role in sorted(self.dense_roles - roles):
            raise AllocationError(
                f"a role to keep dense must be one of {', '.join(sorted(roles))}, but got '{role}'"
                f"{did_you_mean(role, roles)}"
            )
        for name in self.fixed:
            if name not in table.by_name:
                raise AllocationError(
                    f"`fixed` must name a unit of the profile, but got '{name}'{did_you_mean(name, table.by_name)}"
                )
        if self.max_removed_blocks is not None and self.max_removed_blocks < 0:
            raise AllocationError(f"`max_removed_blocks >= 0` must hold, but got {self.max_removed_blocks}")


def roles_of(name: str) -> frozenset[str]:
    """The role in a part's name, and the roles of the members if the part is a stack."""
    role = name.rpartition(".")[2]
    return frozenset((role, *STACK_ROLES.get(role, ())))
