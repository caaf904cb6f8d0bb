"""Old names of YAML keys and values. They are accepted for one release, with a `DeprecatedNameWarning`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["DeprecatedNameWarning", "renamed", "warn_deprecated"]


class DeprecatedNameWarning(DeprecationWarning):
    """A study file uses an old name. The command line prints it as one notice line."""


def warn_deprecated(message: str) -> None:
    """Issue a `DeprecatedNameWarning`."""
    warnings.warn(message, DeprecatedNameWarning, stacklevel=3)


def renamed(data: Mapping[str, Any], names: Mapping[str, str], section: str) -> dict[str, Any]:
    """Copy a section with its old keys replaced by the new ones.

    Args:
        data: The section as read from YAML.
        names: Old key -> new key.
        section: Name of the section, for messages.

    Raises:
        ValueError: The section has both names of a key.
    """
    result = dict(data)
    for old, new in names.items():
        if old not in result:
            continue
        if new in result:
            raise ValueError(f"`{old}` is the old name of `{new}`; remove `{old}`")
        result[new] = result.pop(old)
        warn_deprecated(f"`{section}.{old}` is now `{section}.{new}`; the old name will be removed in the next release")
    return result
