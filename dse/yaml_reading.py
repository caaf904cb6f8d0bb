"""Read YAML into a pydantic schema and report every problem in one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dse.errors import ConfigError, did_you_mean

__all__ = ["read_yaml", "validated"]

_SectionT = TypeVar("_SectionT", bound=BaseModel)

_SHOWN_PROBLEMS = 5
_VALUE_CHARACTERS = 60
_YAML_CHARACTERS = 200

# PyYAML's constructors raise these besides YAMLError: impossible dates, `!!int ""`, unbounded nesting.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def read_yaml(path: Path) -> Any:
    """Safe-load one YAML file.

    Raises:
        ConfigError: The file cannot be read or is not valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text, but {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} must be a readable YAML file, but: {reason}") from error
    try:
        return yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path} must be valid YAML, but: {_yaml_reason(error)}") from error


def validated(schema: type[_SectionT], data: Any, origin: str) -> _SectionT:
    """Validate parsed YAML against a schema.

    Args:
        schema: The section's class.
        data: Parsed YAML.
        origin: Name of the data in error messages, usually the file's path.

    Raises:
        ConfigError: The data are not a mapping or violate the schema. The message names each place and, for an unknown
            key, the known ones.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{origin} must be a mapping of keys to values, but got {type(data).__name__}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        entries = _likeliest(error.errors(include_url=False))
        problems = dict.fromkeys(_explain(schema, entry) for entry in entries)
        shown = "; ".join(list(problems)[:_SHOWN_PROBLEMS])
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ConfigError(f"{origin}: {shown}{more}") from error
    except (RecursionError, UnicodeError) as error:
        raise ConfigError(f"{origin} must be plain nested values, but: {_one_line(str(error), 100)}") from error


def _likeliest(entries: Sequence[Any]) -> list[Any]:
    """Keep only the errors of the union member that matches best.

    Pydantic reports the errors of every member; the one with the deepest error is the one the user meant.
    """
    deepest: dict[tuple[Any, ...], int] = {}
    for entry in entries:
        place = _before_union(entry["loc"])
        deepest[place] = max(len(entry["loc"]), deepest.get(place, 0))
    return [entry for entry in entries if len(entry["loc"]) == deepest[_before_union(entry["loc"])]]


def _before_union(location: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a location before the name of a union member; the whole location if it has none."""
    members = [index for index, part in enumerate(location) if _is_member(part)]
    return tuple(location[: members[0]]) if members else tuple(location)


def _is_member(part: Any) -> bool:
    """Whether a location part is a union member, such as `list[int]` or a section's class, rather than a key."""
    return isinstance(part, str) and (part.endswith("]") or part[:1].isupper())


def _explain(schema: type[BaseModel], entry: Any) -> str:
    """One line for one pydantic error: the place, the problem and the known keys."""
    *parents, last = entry["loc"] or ("file",)
    is_whole = _is_member(last) and entry["type"] != "extra_forbidden"
    parts = [part for part in parents if not _is_member(part)] + ([] if is_whole else [last])
    location = [_one_line(str(part), _VALUE_CHARACTERS) for part in parts]
    where = ".".join(location)
    if entry["type"] == "extra_forbidden":
        known = _keys_at(schema, parents)
        hint = did_you_mean(location[-1], known) or (f"; known keys: {', '.join(known)}" if known else "")
        return f"unknown key '{where}'{hint}"
    if entry["type"] == "missing":
        return f"`{where}` is missing; add it"
    message = entry["msg"].removeprefix("Value error, ")
    shown = "" if entry["type"] == "value_error" else f", but got {_shown(entry.get('input'))}"
    return f"`{where}`: {_one_line(message, _YAML_CHARACTERS)}{shown}"


def _shown(value: Any) -> str:
    """A short repr. Unlike `repr`, `reprlib` stops early on values that YAML aliases repeat many times."""
    try:
        return _one_line(reprlib.repr(value), _VALUE_CHARACTERS)
    except (ValueError, RecursionError):  # an integer with more digits than Python converts to text
        return f"a value of type {type(value).__name__}"


def _yaml_reason(error: BaseException) -> str:
    text = _one_line(str(error), _YAML_CHARACTERS)
    return text if isinstance(error, (yaml.YAMLError, ValueError)) else f"{type(error).__name__}: {text}"


def _one_line(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _keys_at(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Known keys of the section at `location`."""
    sections: list[type[BaseModel]] = [schema]
    for part in map(str, location):
        forms = [section for section in sections if section.__name__ == part]
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if forms:
            sections = forms
        elif fields:
            sections = list(_sections_in(fields[0].annotation))
    return list(sections[0].model_fields) if sections else []


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)
