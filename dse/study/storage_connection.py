"""Open the SQLite file or the database of a study, and turn its errors into one clear line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy.exc

from dse.errors import ConfigError, StorageFullError, StudyError
from dse.study.storage_place import DatabasePlace

__all__ = [
    "DatabaseLostError",
    "close",
    "connected",
    "existing_study",
    "one_transaction",
    "storage_errors",
    "without_experimental_warnings",
]

_BUSY_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10
_NO_ROOM = ("full", "readonly", "unable to open", "disk I/O")
_REFUSALS = ("authentication failed", "no password supplied", "does not exist", "permission denied", "no pg_hba.conf")
_LOST = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.InternalError,
    sqlalchemy.exc.PendingRollbackError,
)
"""Errors of a connection that broke, in any of its states."""


class _HeldSqliteConnection(sqlite3.Connection):
    """A connection whose commits can be held back, so that several of them become one transaction."""

    is_held = False

    def commit(self) -> None:
        if not self.is_held:
            super().commit()

    def rollback(self) -> None:
        if not self.is_held:
            super().rollback()


class DatabaseLostError(StudyError):
    """The database does not answer, for now."""


@contextlib.contextmanager
def connected(path: Path | DatabasePlace) -> Iterator[optuna.storages.RDBStorage]:
    """The storage of this file or database, closed again if the block raises."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage_errors(path):
        storage = _database(path) if isinstance(path, DatabasePlace) else _file(path)
        try:
            yield storage
        except (KeyError, RuntimeError) as error:  # tables or a version that this Optuna does not know
            close(storage)
            raise StudyError(f"{path} must be a study storage of dse, but: {error}") from error
        except BaseException:
            close(storage)
            raise


def _file(path: Path) -> optuna.storages.RDBStorage:
    def connect() -> sqlite3.Connection:
        # A creator instead of a URL, in which `?`, `#` and braces of a path would have a meaning.
        return sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, factory=_HeldSqliteConnection)

    connect().close()  # a folder that cannot be written fails here
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect})


def _database(place: DatabasePlace) -> optuna.storages.RDBStorage:
    """The database of this place; libpq reads the password from PGPASSWORD or ~/.pgpass."""
    if importlib.util.find_spec("psycopg") is None:
        raise ConfigError(
            "`storage` in PostgreSQL needs psycopg, which is not installed; pip install 'lowrank-dse[postgresql]'"
        )
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_TIMEOUT_S}}
    return optuna.storages.RDBStorage(place.url, engine_kwargs=options)


def close(storage: optuna.storages.RDBStorage) -> None:
    """Close all connections."""
    storage.remove_session()
    storage.engine.dispose()


def existing_study(storage: optuna.storages.RDBStorage, path: Path | DatabasePlace) -> optuna.Study | None:
    """The study that this file or database holds; None if it was not created yet."""
    names = optuna.get_all_study_names(storage)
    if isinstance(path, DatabasePlace):
        return optuna.load_study(storage=storage, study_name=path.study) if path.study in names else None
    return optuna.load_study(storage=storage, study_name=names[0]) if names else None


@contextlib.contextmanager
def one_transaction(storage: optuna.storages.RDBStorage) -> Iterator[None]:
    """Make one transaction of all writes of a block to a SQLite file; Optuna commits every attribute on its own.

    Each commit waits for the disk, which would take most of the driver's time. A block that raises changes nothing.
    """
    if storage.engine.dialect.name != "sqlite":
        yield
        return
    pooled = storage.engine.raw_connection()
    connection = pooled.dbapi_connection
    pooled.close()
    if not isinstance(connection, _HeldSqliteConnection) or connection.is_held:
        yield
        return
    connection.is_held = True
    try:
        yield
        connection.is_held = False
        connection.commit()
    except BaseException:
        connection.is_held = False
        connection.rollback()
        raise


@contextlib.contextmanager
def without_experimental_warnings() -> Iterator[None]:
    """Ignore Optuna's warnings about experimental functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def storage_errors(path: Path | DatabasePlace) -> Iterator[None]:
    """Turn the errors of SQLite, SQLAlchemy and Optuna on a bad file, disk or database into one clear line.

    Raises:
        DatabaseLostError: The database does not answer.
        StorageFullError: The file cannot be written.
        StudyError: The database refuses, or the storage is damaged.
    """
    try:
        yield
    except (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        sqlite3.Error,
        json.JSONDecodeError,  # a damaged attribute
    ) as error:
        reason = " ".join(str(error.__cause__ or error).split()).split(" [SQL")[0]
        if isinstance(path, DatabasePlace) and (isinstance(error, _LOST) or isinstance(error.__cause__, _LOST)):
            raise _database_error(path, reason.split(" (Background on this error")[0]) from None
        if any(word in reason for word in _NO_ROOM):
            raise StorageFullError(
                f"{path} must be writable and the disk have room, but: {reason}; nothing measured is lost,"
                " free some space and run the same command again"
            ) from error
        raise StudyError(f"{path} must be a study storage of dse, but: {reason}") from error


def _database_error(place: DatabasePlace, reason: str) -> StudyError:
    if any(words in reason for words in _REFUSALS):  # waiting does not help
        return StudyError(
            f"the database of {place} must accept this user, but: {reason}; set PGUSER and PGPASSWORD, or correct"
            " ~/.pgpass"
        )
    return DatabaseLostError(f"{place} must answer, but: {reason}; start the database, or correct `storage`")
