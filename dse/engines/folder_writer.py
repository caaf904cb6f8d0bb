"""The writer of the folders that engines load, looked up by name.

Exports stand above trials in the order of packages, because model cards quote measurements, while a trial that is
measured in an engine needs an export of its point. This is the one place where a lower package calls a higher one, and
it does so by name, so that no module depends on it when it is imported.
"""

from __future__ import annotations

import importlib
from typing import cast

from dse.engines.engine import FolderWriter

__all__ = ["folder_writer"]

_WRITER = ("dse.export.engine_folder", "write_engine_folder")


def folder_writer() -> FolderWriter:
    """The function that writes a design point as a folder for an engine."""
    module, name = _WRITER
    return cast(FolderWriter, getattr(importlib.import_module(module), name))
