"""Optuna's storage in one SQLite file, with several writes as one: all of them are kept, or none."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
from sqlalchemy.pool import StaticPool

__all__ = ["SqliteStorage"]

_BUSY_TIMEOUT_S = 30.0


class _Connection(sqlite3.Connection):
    """Puts commits off while `is_held`."""

    is_held = False

    def commit(self) -> None:
        if not self.is_held:
            super().commit()


class SqliteStorage:
    """An Optuna storage over one connection.

    Optuna commits every parameter and attribute on its own, and every commit waits for the disk: a proposal of 200
    dimensions would take seconds, and a kill could leave half of it. `at_once` makes one transaction of many writes.
    """

    def __init__(self, path: Path) -> None:
        # Handed over as a connection rather than a URL, in which `?`, `#` and braces of a path would have a meaning.
        # It is opened here, so that a folder that cannot be written fails now.
        self._connection = sqlite3.connect(path, factory=_Connection, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            self.optuna = optuna.storages.RDBStorage(
                "sqlite://",
                engine_kwargs={
                    "creator": lambda: self._connection,
                    "poolclass": StaticPool,
                    "pool_reset_on_return": None,  # it would roll back what `at_once` holds
                },
            )
        except BaseException:
            self._connection.close()
            raise

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Commit at the end of the block, or nothing of it if it raises; blocks may be nested."""
        if self._connection.is_held:
            yield
            return
        self._connection.is_held = True
        try:
            yield
            self._connection.is_held = False
            self._connection.commit()
        except BaseException:
            self._connection.is_held = False
            self._connection.rollback()
            raise

    def close(self) -> None:
        """Close the file; the storage cannot be used after."""
        self.optuna.remove_session()
        self.optuna.engine.dispose()
        self._connection.close()
