"""Gram matrices of calibration activations, in memory that does not grow with the number of layers.

The Gram matrix of an input of width n holds n^2 numbers, however many tokens there are. But one matrix for every input
of every layer would need as much memory as the model. So layers are processed in groups that fit a budget. Each group
costs one pass over the calibration windows, which stops after the group's last layer. Tensors that read the same input
(query, key and value; gate and up; their stack) share one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from dse.decomposition.calibration_text import CalibrationWindows
from dse.errors import CalibrationError, NonFiniteError
from dse.progress import ProgressCallback, ignore_progress
from dse.topology import Topology

__all__ = [
    "ACTIVATION_BATCH_TOKENS",
    "DEFAULT_GRAM_BUDGET_BYTES",
    "StopForward",
    "check_all_seen",
    "forward_body",
    "iterate_grams",
]

DEFAULT_GRAM_BUDGET_BYTES = 512 * 2**20
ACTIVATION_BATCH_TOKENS = 2048


class StopForward(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    """Raised by a hook to end a forward pass early."""


def iterate_grams(
    model: nn.Module,
    topology: Topology,
    names: tuple[str, ...],
    windows: CalibrationWindows,
    *,
    budget_bytes: int = DEFAULT_GRAM_BUDGET_BYTES,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (tensor names, Gram matrix of the input they share) in forward order.

    Args:
        model: The dense model, in evaluation mode.
        topology: Its topology.
        names: Tensors and stacks whose inputs are needed.
        windows: Calibration windows.
        budget_bytes: Memory for the matrices of one group; a group holds at least one matrix.
        progress: Called per batch as ("calibrate", done, total) in tokens.

    Yields:
        Names and their Gram matrix X X^T / tokens, shape (in_features, in_features), float32 on the model's device.

    Raises:
        CalibrationError: A tensor received no input.
        NonFiniteError: An activation is NaN or infinite.
    """
    inputs = _find_shared_inputs(model, topology, names, windows.token_ids[:1, :8])
    groups = _group_by_budget(inputs, budget_bytes)
    for index, group in enumerate(groups):
        grams = _accumulate(model, topology, group, windows, progress, (index, len(groups)))
        for sharing in group:
            gram = grams.pop(sharing[0])
            if not bool(torch.isfinite(gram).all()):
                raise NonFiniteError(f"calibration activations must be finite, but the input of '{sharing[0]}' is not")
            yield sharing, gram / windows.tokens


def _find_shared_inputs(
    model: nn.Module, topology: Topology, names: tuple[str, ...], probe: Tensor
) -> dict[tuple[str, ...], int]:
    """Run a few tokens; names of tensors that receive the same tensor object, in forward order, to its width."""
    readers: list[tuple[Tensor, list[str]]] = []  # keeps inputs alive, so that no object id is reused

    def remember(name: str, value: Tensor) -> None:
        for seen, sharing in reversed(readers):
            if seen is value:
                sharing.append(name)
                return
        readers.append((value, [name]))

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(_hook(model, topology, name, partial(remember, name)))
        forward_body(model, probe)
    check_all_seen(names, {name for _, sharing in readers for name in sharing})
    return {tuple(sharing): value.shape[-1] for value, sharing in readers}


def check_all_seen(names: Iterable[str], seen: set[str]) -> None:
    """Check that every tensor took part in a forward pass.

    Raises:
        CalibrationError: Some of `names` are not in `seen`.
    """
    if missed := sorted(set(names) - seen):
        raise CalibrationError(
            f"every tensor to be calibrated must take part in a forward pass, but {missed[0]} (and {len(missed) - 1}"
            " more) did not; remove it from the space"
        )


def _group_by_budget(inputs: dict[tuple[str, ...], int], budget_bytes: int) -> list[dict[tuple[str, ...], int]]:
    groups: list[dict[tuple[str, ...], int]] = []
    used = 0
    for sharing, width in inputs.items():
        if not groups or used + 4 * width**2 > budget_bytes:
            groups.append({})
            used = 0
        groups[-1][sharing] = width
        used += 4 * width**2
    return groups


def _accumulate(
    model: nn.Module,
    topology: Topology,
    group: dict[tuple[str, ...], int],
    windows: CalibrationWindows,
    progress: ProgressCallback,
    part: tuple[int, int],
) -> dict[str, Tensor]:
    """One pass over the windows; returns the unscaled sums, by the first name that reads each input."""
    device = next(model.parameters()).device
    # float32 sums are enough: the rounding error is relative to each pair of channels, which whitening rescales.
    grams = {names[0]: torch.zeros(n, n, device=device, dtype=torch.float32) for names, n in group.items()}
    last = list(grams)[-1]

    def add(name: str, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).to(torch.float32)
        grams[name].addmm_(rows.T, rows)
        if name == last:
            raise StopForward

    batches = torch.split(windows.token_ids, max(1, ACTIVATION_BATCH_TOKENS // windows.token_ids.shape[1]))
    done, total = part[0] * windows.tokens, part[1] * windows.tokens
    with ExitStack() as hooks:
        for name in grams:
            hooks.enter_context(_hook(model, topology, name, partial(add, name)))
        for batch in batches:
            progress("calibrate", done, total)
            forward_body(model, batch.to(device))
            done += batch.numel()
        progress("calibrate", done, total)
    return grams


def _hook(
    model: nn.Module, topology: Topology, name: str, see: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    module = model.get_submodule(topology.matrix(name).modules[0])
    return module.register_forward_pre_hook(lambda _module, arguments: see(arguments[0]))


def forward_body(model: nn.Module, token_ids: Tensor) -> None:
    """Run the model without its output head, until it ends or a hook raises `StopForward`."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    with torch.inference_mode():
        try:
            body(token_ids.to(next(model.parameters()).device))
        except StopForward:
            return
