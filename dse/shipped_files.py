"""The studies and search spaces that ship with `dse`, found by name.

An installed wheel holds them inside the package (`setup.py` copies them there); a checkout holds them beside it.
"""

from __future__ import annotations

from pathlib import Path

from dse.errors import ConfigError, did_you_mean

__all__ = ["find_yaml", "shipped_names"]

_PACKAGE = Path(__file__).parent


def shipped_names(folder: str) -> tuple[str, ...]:
    """Sorted names of the shipped files of `folder`, which is `studies` or `search_spaces`."""
    return tuple(sorted(path.stem for path in _shipped(folder).glob("*.yaml")))


def find_yaml(path: Path, folder: str, base: Path | None = None) -> Path:
    """Resolve the name of a shipped file; return any other path unchanged.

    Args:
        path: A path, or a bare name such as `quickstart`. An existing file takes precedence over a shipped one.
        folder: Folder of the shipped files: `studies` or `search_spaces`.
        base: Folder that `path` is relative to; None means the current directory.

    Raises:
        ConfigError: `path` is a bare name, but neither a file nor a shipped name.
    """
    is_name = path.name == str(path) and path.suffix not in (".yaml", ".yml")
    if not is_name or _is_file((base or Path()) / path):
        return path
    names = shipped_names(folder)
    if path.name not in names:
        raise ConfigError(
            f"{path.name!r:.80} must be a readable YAML file or one of the shipped {folder.replace('_', ' ')}"
            f" ({', '.join(names)}), but it is neither{did_you_mean(path.name, names)}"
        )
    return _shipped(folder) / f"{path.name}.yaml"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system accepts
        return False


def _shipped(folder: str) -> Path:
    inside, beside = _PACKAGE / folder, _PACKAGE.parent / folder
    return inside if inside.is_dir() else beside
