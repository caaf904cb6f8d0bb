"""Let `dse.cost(...)` and `dse.export(...)` be calls although `dse.cost` and `dse.export` are modules, too.

Python binds a submodule to its parent's attribute on import, over any function of that name; so where a module and its
one main function share the name, the module itself answers the call.
"""

from __future__ import annotations

import sys
import types
from typing import Any

__all__ = ["make_callable"]


class _CallableModule(types.ModuleType):
    """A module that passes calls on to its function of the same name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function that bears the module's name."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(module: str) -> None:
    """Make the module of this name callable; it must define a function named like itself."""
    sys.modules[module].__class__ = _CallableModule
