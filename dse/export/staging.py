"""Write an export beside its destination, where it stays until it has proved itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from dse.decomposition.surgery import FactorSource, decompose
from dse.design_point import DesignPoint
from dse.errors import ExportError, StorageFullError
from dse.export.architecture import auto_classes
from dse.export.dense_form import merged_state, write_dense_form
from dse.export.expectation import Expectation, write_expectation
from dse.export.low_rank_form import write_low_rank_form
from dse.export.weights import model_bytes, writing_errors
from dse.models import LoadedModel
from dse.models.quiet import quiet_transformers

__all__ = ["ExportRequest", "StagedExport", "check_target", "stage"]

_OTHER_FILES_BYTES = 64 * 2**20  # room for a tokenizer, at its largest


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """One export to write.

    Attributes:
        point: What to decompose; the dense point gives the dense model itself.
        folder: Where it goes: nothing may be there yet, or an empty folder.
        dense: Whether to multiply the factors out.
        facts: For the model card, all optional: `study` (name), `trial` (number), `row` and `dense_row` (rows of the
            trials table, as mappings), `environment` (as `dse.measurement.describe_environment` gives it), `versions`
            (name to version), `license` (an identifier of the hub), `base_model` (a name to show).
    """

    point: DesignPoint
    folder: Path
    dense: bool = False
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_dense(self) -> bool:
        """Whether the folder will hold dense matrices alone."""
        return self.dense or self.point.is_dense


@dataclass(frozen=True, eq=False)
class StagedExport:
    """An export that is written but not yet in its place.

    Attributes:
        request: What was asked for.
        folder: Where it lies for now.
        expectation: What it must give back when it is reloaded.
        auto_class: The transformers class that loads it.
        dense_weight_bytes: What the dense model's weights take.
        created: Folders above it that were made for it, the innermost first.
    """

    request: ExportRequest
    folder: Path
    expectation: Expectation
    auto_class: str
    dense_weight_bytes: int
    created: tuple[Path, ...]

    def publish(self) -> None:
        """Move the folder into its place in one step.

        Raises:
            ExportError: Something has appeared there meanwhile.
            StorageFullError: The place cannot be written.
        """
        target = self.request.folder
        check_target(target)
        with writing_errors(target):
            if target.is_dir():
                target.rmdir()  # empty, as was checked; renaming onto it is not possible everywhere
            self.folder.rename(target)
        self.discard()

    def discard(self) -> None:
        """Remove all that is left of it beside its place."""
        _remove(self.folder.parent, self.created)


def check_target(folder: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        ExportError: It does, or it cannot be a folder.
    """
    try:
        blocked = next((path for path in folder.absolute().parents if path.exists() and not path.is_dir()), None)
        taken = blocked is None and _is_taken(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"an export must go to a folder, but '{str(folder)[:80]}' cannot be one: {reason}") from error
    if taken:
        raise ExportError(
            f"an export must go to a new or empty folder, but '{folder}' is taken; remove it or name another"
        )
    if blocked is not None:
        raise ExportError(
            f"an export must go to a folder, but '{blocked}' on the way to '{folder}' is a file; name another"
        )


def _is_taken(folder: Path) -> bool:
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(mode) or any(folder.iterdir())


def stage(loaded: LoadedModel, request: ExportRequest, bank: FactorSource) -> StagedExport:
    """Write one export to a hidden folder beside its destination, with what it must give back when it is reloaded.

    The point is applied to the resident model meanwhile, and undone; if anything goes wrong, nothing is left on disk.

    Raises:
        ExportError: The destination is taken, or the architecture cannot be exported.
        PointError: The point does not fit the model, or the bank does not hold it.
        StorageFullError: The disk has no room or cannot be written.
    """
    check_target(request.folder)
    auto = auto_classes(loaded.model)
    dense_bytes = model_bytes(loaded.model)
    with _beside(request.folder, dense_bytes) as (place, created):
        folder, expected = place / "export", place / "expected"
        with decompose(loaded, request.point, bank), quiet_transformers(), writing_errors(request.folder):
            if request.is_dense:
                state = merged_state(loaded.model, loaded.topology, request.point)
                write_dense_form(loaded.model, state, folder)
            else:
                state = dict(loaded.model.state_dict())
                write_low_rank_form(loaded.model, loaded.topology, request.point, auto, folder)
            _write_companions(loaded, folder)
            expectation = write_expectation(loaded, state, auto[0], expected, is_plain=request.is_dense)
    return StagedExport(request, folder, expectation, auto[0], dense_bytes, created)


@contextlib.contextmanager
def _beside(target: Path, needed_bytes: int) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """A hidden folder next to `target` with room for the export, and the folders made above it.

    All of them are removed if the block raises.
    """
    parent = target.absolute().parent
    created = tuple(path for path in (parent, *parent.parents) if not path.exists())
    place = None
    try:
        with writing_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            _check_room(parent, needed_bytes + _OTHER_FILES_BYTES)
            place = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name[:100]}.", suffix=".partial"))
            (place / "export").mkdir()
            (place / "expected").mkdir()
        yield place, created
    except BaseException:
        _remove(place, created)
        raise


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageFullError(
            f"the export needs up to {needed_bytes / 1e6:.0f} MB in {folder}, but the disk has"
            f" {free_bytes / 1e6:.0f} MB free; free some, or name a folder on another disk"
        )


def _remove(place: Path | None, created: tuple[Path, ...]) -> None:
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)
    for folder in created:
        with contextlib.suppress(OSError):  # something lies in it by now, so it stays
            folder.rmdir()


def _write_companions(loaded: LoadedModel, folder: Path) -> None:
    """Tokenizer, generation config, and what sentence-transformers reads."""
    loaded.tokenizer.save_pretrained(folder)
    for name, text in loaded.sentence_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    model: PreTrainedModel = loaded.model
    if model.can_generate() and model.generation_config is not None:
        # Not by its `save_pretrained`, which refuses settings that the hub is full of, such as a temperature unused.
        model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
