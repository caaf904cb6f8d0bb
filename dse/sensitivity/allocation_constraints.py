"""What an allocation must leave alone, whatever the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dse.design_point import TensorChoice
from dse.errors import AllocationError, did_you_mean
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["STACK_ROLES", "Constraints"]

STACK_ROLES: Mapping[str, tuple[str, ...]] = {
    "query_key_value": ("query", "key", "value"),
    "gate_up": ("gate", "up"),
}
"""A stack, or the fused projection of the same name, to the roles it holds."""

Choices = tuple[tuple[str, TensorChoice], ...]


@dataclass(frozen=True)
class Constraints:
    """Limits that hold beside the budget.

    Attributes:
        untouched_layers: Layers of which nothing is decomposed.
        dense_roles: Roles that stay dense in every layer, such as value or down; a stack that holds the role, and
            the removal of a block that has it, are excluded too.
        fixed: Unit name to the choices that it must take (none: dense).
        forbidden: Whether an option may not be taken.
        most_removed_blocks: Upper limit of blocks that are removed; None for no limit.
    """

    untouched_layers: frozenset[int] = frozenset()
    dense_roles: frozenset[str] = frozenset()
    fixed: Mapping[str, Choices] = field(default_factory=dict)
    forbidden: Callable[[Unit, Option], bool] | None = None
    most_removed_blocks: int | None = None

    def allowed_options(self, table: SensitivityTable) -> list[tuple[Option, ...]]:
        """The options of each unit that the constraints leave, in order of the table's units; never none.

        Raises:
            AllocationError: A constraint names what the table does not have, or they exclude each other.
        """
        self._check_names(table)
        return [self._allowed(unit) for unit in table.units]

    def _allowed(self, unit: Unit) -> tuple[Option, ...]:
        kept = tuple(option for option in unit.options if self._admits(unit, option))
        if unit.name in self.fixed:
            wanted = tuple(sorted(self.fixed[unit.name]))
            if wanted not in unit.by_choices:
                raise AllocationError(
                    f"`fixed` must name an option of '{unit.name}', but got"
                    f" {Option(wanted, 0, 0.0).describe()}; its options are"
                    f" {' | '.join(option.describe() for option in unit.options[:6])}"
                )
            kept = tuple(option for option in kept if option.choices == wanted)
        if not kept:
            fixed = f" and fixing it to {unit.by_choices[wanted].describe()}" if unit.name in self.fixed else ""
            raise AllocationError(
                f"constraints must leave every unit an option, but those on '{unit.name}' exclude each other: nothing"
                f" is left after{self._on(unit)}{fixed}; drop one of them"
            )
        return kept

    def _admits(self, unit: Unit, option: Option) -> bool:
        if self.forbidden is not None and self.forbidden(unit, option):
            return False
        if option.is_dense:
            return True
        if unit.layer in self.untouched_layers:
            return False
        if option.removes_block:
            touched = set().union(*(roles_of(name) for name in unit.names)) | {unit.kind}
        else:
            touched = set().union(*(roles_of(name) for name, _ in option.choices))
        return not touched & self.dense_roles

    def _on(self, unit: Unit) -> str:
        causes = []
        if unit.layer in self.untouched_layers:
            causes.append(f" leaving layer {unit.layer} untouched")
        if self.dense_roles:
            causes.append(f" keeping {', '.join(sorted(self.dense_roles))} dense")
        if self.forbidden is not None:
            causes.append(" leaving out forbidden options")
        return ",".join(causes)

    def _check_names(self, table: SensitivityTable) -> None:
        layers = {unit.layer for unit in table.units if unit.layer is not None}
        for layer in sorted(self.untouched_layers - layers):
            raise AllocationError(
                f"an untouched layer must be one of the profile's ({_span(layers)}), but got layer {layer}"
            )
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
        if self.most_removed_blocks is not None and self.most_removed_blocks < 0:
            raise AllocationError(f"`most_removed_blocks >= 0` must hold, but got {self.most_removed_blocks}")


def roles_of(name: str) -> frozenset[str]:
    """The role of a tensor by its name, and the roles of its members where it is a stack."""
    role = name.rpartition(".")[2]
    return frozenset((role, *STACK_ROLES.get(role, ())))


def _span(layers: set[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "none"
