"""The trained weights of a healed point: their file, and how they take the place of the point's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor, nn

from dse.decomposition import AppliedPoint, PivotedLinear
from dse.decomposition.swaps import Swap
from dse.design_point import DesignPoint
from dse.errors import StudyError
from dse.files import disk_errors, write_json
from dse.healing.trained_weights import CHOSEN

__all__ = ["apply_healed", "read_healed", "write_healed"]

_WEIGHTS, _REPORT = "weights.safetensors", "healing.json"


def write_healed(folder: Path, point: DesignPoint, weights: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Write the weights, then the report, which marks the folder as complete.

    Raises:
        StorageFullError: The disk is full or the folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_WEIGHTS}.{os.getpid()}"
        try:
            content = {name: tensor.contiguous() for name, tensor in weights.items()}
            safetensors.torch.save_file(content, temporary, metadata={"point": point.id})
            temporary.replace(folder / _WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
    write_json(folder / _REPORT, dict(report))


def read_healed(folder: Path, point: DesignPoint) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The weights and the report of a healed point; None if there is none.

    Raises:
        StudyError: The files are damaged or belong to another point.
    """
    if not (folder / _REPORT).exists():
        return None
    try:
        report: dict[str, Any] = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        with safe_open(folder / _WEIGHTS, "pt") as file:
            found = (file.metadata() or {}).get("point")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise StudyError(f"healed weights in {folder} must be readable, but: {error}; delete the folder") from error
    if found != point.id:
        raise StudyError(
            f"healed weights in {folder} must belong to point {point.id}, but belong to {found}; delete the folder"
        )
    return weights, report


def apply_healed(applied: AppliedPoint, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let an applied point use these weights; undoing the point undoes this as well.

    Args:
        applied: The applied point.
        model: Its model.
        weights: Name in the decomposed model to weight, as `read_healed` returns them.

    Raises:
        StudyError: A weight does not fit the model.
    """
    swaps = []
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        if attribute == CHOSEN:
            swaps += _index_swaps(model, path, weight)
            continue
        try:
            module = model.get_submodule(path)
            own = getattr(module, attribute)
        except AttributeError:
            own = None
        if not isinstance(own, Tensor) or own.shape != weight.shape:
            shape = None if own is None else tuple(own.shape)
            raise StudyError(
                f"healed weight '{name}' of shape {tuple(weight.shape)} must fit the model, but it has {shape} there;"
                " heal the trial again"
            )
        healed = nn.Parameter(weight.to(own.device, own.dtype, copy=True), requires_grad=False)
        swaps.append(Swap(module, attribute, own, healed))
    applied.add(swaps)


def _index_swaps(model: nn.Module, path: str, chosen: Tensor) -> list[Swap]:
    """Let pivoted factors use the indices that their trained weights belong to."""
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, PivotedLinear) or len(chosen) != module.rank:
        raise StudyError(
            f"healed weights of '{path}' must belong to pivoted factors of rank {len(chosen)}, but the model has others"
            " there; heal the trial again"
        )
    own, order = module.chosen, module.order
    module.set_order(chosen.tolist())
    swaps = [Swap(module, CHOSEN, own, module.chosen), Swap(module, "order", order, module.order)]
    module.chosen, module.order = own, order
    return swaps
