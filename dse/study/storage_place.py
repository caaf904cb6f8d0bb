"""Where a study is stored: in a SQLite file of its folder, or in a database that a team shares."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from dse.errors import ConfigError, StudyError
from dse.files import write_json

__all__ = ["DatabasePlace", "database_of", "enter_database"]


@dataclass(frozen=True)
class DatabasePlace:
    """A study in a database.

    Attributes:
        pointer: The file in the study's folder that names database and study.
        url: The database, without a password.
        study: Name of the study in the database, which is unique there.
    """

    pointer: Path
    url: str
    study: str

    def exists(self) -> bool:
        """Whether the folder names a database."""
        return self.pointer.exists()

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Forget the database; a study without evaluated trials stays behind in it."""
        self.pointer.unlink(missing_ok=missing_ok)

    def __str__(self) -> str:
        return f"{self.url} (study {self.study})"


def database_of(pointer: Path) -> DatabasePlace | None:
    """The database that a study's folder names; None if it names none.

    Raises:
        StudyError: The file is damaged.
    """
    if not pointer.exists():
        return None
    try:
        content = json.loads(pointer.read_text(encoding="utf-8"))
        return DatabasePlace(pointer, str(content["url"]), str(content["study"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{pointer} must name a database and a study, but is damaged") from error


def enter_database(pointer: Path, file: Path, url: str, name: str) -> None:
    """Name the database in a study's folder, once.

    Args:
        pointer: The file that names it.
        file: The SQLite file that the folder would hold otherwise.
        url: The database.
        name: Name of the study.

    Raises:
        ConfigError: The folder holds a study that is stored elsewhere.
    """
    known = database_of(pointer)
    if known is None and not file.exists():
        write_json(pointer, {"url": url, "study": f"{name}-{uuid.uuid4().hex[:12]}"})
    elif known is None or known.url != url:
        where = file if known is None else known.url
        raise ConfigError(f"`storage` must stay what it was when the study began ({where}); choose another `--out`")
