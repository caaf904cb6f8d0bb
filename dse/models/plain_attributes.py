"""Copy the plain attributes of a module that is replaced.

Exports copy this file's function into their modelling file (`dse.export.modelling_code`), so it imports torch only.
"""

from __future__ import annotations

from torch import nn

__all__ = ["copy_plain_attributes"]


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the public attributes of `source` that are strings, numbers or booleans to `target`."""
    for name, value in vars(source).items():
        if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
            setattr(target, name, value)
