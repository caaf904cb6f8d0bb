"""Files that hold a sensitivity profile: reading one, and what is said of a file that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dse.errors import DseError, ProfileError

__all__ = ["MALFORMED", "not_a_profile", "read_profile_file"]

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, DseError)
"""What taking a document apart raises where it is not what was written."""


def not_a_profile(where: str, error: Exception) -> ProfileError:
    """The error of a document that `dse sensitivity` did not write."""
    return ProfileError(
        f"a sensitivity profile must be a file that `dse sensitivity` wrote, but {where} is none"
        f" ({type(error).__name__}: {error}); measure it anew"
    )


def read_profile_file(path: Path) -> Any:
    """The JSON document in a file.

    Raises:
        ProfileError: It cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"a sensitivity profile must be a readable JSON file, but {path} is not"
            f" ({getattr(error, 'strerror', None) or error}); measure it with `dse sensitivity`"
        ) from error
