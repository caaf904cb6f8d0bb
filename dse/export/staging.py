"""Write an export to a hidden folder beside its destination, where it stays until it is verified."""

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

from torch import Tensor
from transformers import PreTrainedModel

from dse.decomposition.surgery import FactorSource, decompose
from dse.design_point import DesignPoint
from dse.errors import ExportError, StorageFullError
from dse.export.engine_expectation import (
    EngineExpectation,
    expected_of,
    weight_file_sizes,
    write_engine_expectation,
)
from dse.export.expectation import Expectation, write_expectation
from dse.export.formats import ExportFormat, export_format
from dse.export.modelling_code import auto_classes
from dse.export.weights import model_bytes, writing_errors
from dse.healing import apply_healed
from dse.models import LoadedModel
from dse.models.transformers_patches import quiet_transformers

__all__ = ["ExportRequest", "StagedExport", "check_target", "stage"]

_OTHER_FILES_BYTES = 64 * 2**20  # upper bound for tokenizer and code


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """One export to write.

    Attributes:
        point: The design point; the dense point exports the dense model.
        folder: The destination, which must not exist or be empty.
        format: Name of the format; see `dse.export.formats`.
        card_details: For the model card, all optional: `study` (name), `trial` (number), `row` and `dense_row` (rows of
            the trials table, as mappings), `environment` (from `dse.measurement.describe_environment`), `versions`
            (name to version), `license` (a hub identifier), `base_model` (a display name).
        trained: Weights of the healed point by name (see `dse.healing`); None for the factors as they were computed.
    """

    point: DesignPoint
    folder: Path
    format: str = "transformers"
    card_details: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    trained: Mapping[str, Tensor] | None = None

    @property
    def form(self) -> ExportFormat:
        """The format.

        Raises:
            ExportError: Its name is unknown.
        """
        return export_format(self.format)

    @property
    def is_dense(self) -> bool:
        """Whether the folder will hold only dense matrices."""
        return self.format == "dense" or self.point.is_dense


@dataclass(frozen=True, eq=False)
class StagedExport:
    """An export that is written but not yet at its destination.

    Attributes:
        request: The request.
        folder: Its temporary folder.
        expectation: What a reload in transformers must reproduce; None if transformers does not load the folder,
            or if it was not asked for.
        engine_expectation: What an engine must reproduce; None if the model does not generate text, or if it was not
            asked for.
        auto_class: The transformers class that loads it.
        dense_weight_bytes: Size of the dense model's weights.
        created: Parent folders created for it, the innermost first.
    """

    request: ExportRequest
    folder: Path
    expectation: Expectation | None
    engine_expectation: EngineExpectation | None
    auto_class: str
    dense_weight_bytes: int
    created: tuple[Path, ...]

    def publish(self) -> None:
        """Move the folder to its destination in one step.

        Raises:
            ExportError: The destination exists by now.
            StorageFullError: The destination cannot be written.
        """
        target = self.request.folder
        check_target(target)
        with writing_errors(target):
            if target.is_dir():
                target.rmdir()  # checked to be empty; not every system can rename onto a folder
            self.folder.rename(target)
        self.discard()

    def discard(self) -> None:
        """Remove its temporary files."""
        _remove(self.folder.parent, self.created)


def check_target(folder: Path) -> None:
    """Check that the destination is free.

    Raises:
        ExportError: It holds something, or it cannot be a folder.
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
            f"an export must go to a folder, but '{blocked}', a parent of '{folder}', is a file; name another"
        )


def _is_taken(folder: Path) -> bool:
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(mode) or any(folder.iterdir())


def stage(loaded: LoadedModel, request: ExportRequest, bank: FactorSource, *, expect: bool = True) -> StagedExport:
    """Write one export, and the expectation of its reload, to a hidden folder beside its destination.

    The point is applied to the resident model meanwhile, and undone afterwards. On failure nothing stays on disk.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        request: The export to write.
        bank: Source of the point's factors.
        expect: Whether to compute the expectations; without them, the export cannot be verified.

    Raises:
        ExportError: The destination is taken, or the architecture cannot be exported.
        PointError: The point does not fit the model, or is not in the bank.
        StorageFullError: The disk has no room or cannot be written.
    """
    check_target(request.folder)
    form = request.form
    form.check(loaded, request.point)
    auto_class = auto_classes(loaded.model)[0]
    dense_bytes = model_bytes(loaded.model)
    expectation = engine_expectation = None
    with _beside(request.folder, dense_bytes) as (place, created):
        folder, expected = place / "export", place / "expected"
        with (
            decompose(loaded, request.point, bank) as applied,
            quiet_transformers(),
            writing_errors(request.folder),
        ):
            if request.trained is not None:
                apply_healed(applied, loaded.model, request.trained)
            state = form.write(loaded, request.point, folder)
            _write_companions(loaded, folder)
            if expect and not form.is_graph:
                needs_code = form.needs_remote_code and not (form.name == "transformers" and request.is_dense)
                expectation = write_expectation(loaded, state, auto_class, expected, is_plain=not needs_code)
            if expect and _generates(loaded.model):
                sizes = weight_file_sizes(folder, form.weight_files)
                engine_expectation = expected_of(loaded.model, loaded.tokenizer, form.name, sizes)
                write_engine_expectation(folder, engine_expectation)
    return StagedExport(request, folder, expectation, engine_expectation, auto_class, dense_bytes, created)


def _generates(model: PreTrainedModel) -> bool:
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


@contextlib.contextmanager
def _beside(target: Path, needed_bytes: int) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Create a hidden folder next to `target` with room for the export; yield it and the parent folders created for it.

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
        with contextlib.suppress(OSError):  # keep a folder that is no longer empty
            folder.rmdir()


def _write_companions(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer, the generation config, and the files of sentence-transformers."""
    loaded.tokenizer.save_pretrained(folder)
    for name, text in loaded.sentence_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    model: PreTrainedModel = loaded.model
    if model.can_generate() and model.generation_config is not None:
        # Not with `save_pretrained`, which refuses settings that are common on the hub, such as an unused temperature.
        model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
