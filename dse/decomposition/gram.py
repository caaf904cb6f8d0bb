"""Gram matrices of calibration activations, in memory that does not grow with the number of layers.

A Gram matrix of an input of width n holds n^2 numbers whatever the number of tokens, but one for every input of every
layer at once would take as much room as the model. So layers are taken in groups that fit a budget; each group costs
one pass over the calibration windows, which stops behind the group's last layer. Tensors that read the very same input
(query, key and value; gate and up; the stack of them) share one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dse.decomposition.calibration_text import CalibrationWindows
from dse.errors import CalibrationError, NonFiniteError
from dse.progress import ProgressCallback, ignore_progress
from dse.topology import Topology

__all__ = ["DEFAULT_GRAM_BUDGET_BYTES", "StopForward", "forward_body", "iterate_grams"]

DEFAULT_GRAM_BUDGET_BYTES = 512 * 2**20
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class _SharedInput:
    """One input and the tensors that read it, in forward order."""

    names: tuple[str, ...]
    width: int

    @property
    def gram_bytes(self) -> int:
        return 4 * self.width**2


class StopForward(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    """A hook has seen all it wanted: the rest of the model need not run."""


def iterate_grams(
    model: nn.Module,
    topology: Topology,
    names: tuple[str, ...],
    windows: CalibrationWindows,
    *,
    budget_bytes: int = DEFAULT_GRAM_BUDGET_BYTES,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (tensor names, Gram matrix of the input they share), in forward order.

    Args:
        model: The dense model, in evaluation mode.
        topology: Its topology.
        names: Tensors and stacks whose inputs are wanted.
        windows: Calibration windows.
        budget_bytes: Room for the matrices of one group; one layer's are always taken together.
        progress: Called per batch as ("calibrate", done, total) in tokens.

    Yields:
        Names and their Gram matrix X X^T / tokens, shape (in_features, in_features), float32 on the model's device.

    Raises:
        CalibrationError: A tensor never received an input.
        NonFiniteError: An activation is NaN or infinite.
    """
    inputs = _find_shared_inputs(model, topology, names, windows.token_ids[:1, :8])
    groups = _group_by_budget(inputs, budget_bytes)
    for index, group in enumerate(groups):
        grams = _accumulate(model, topology, group, windows, progress, (index, len(groups)))
        for shared in group:
            gram = grams.pop(shared.names[0])
            if not bool(torch.isfinite(gram).all()):
                raise NonFiniteError(
                    f"calibration activations must be finite, but the input of '{shared.names[0]}' is not"
                )
            yield shared.names, gram / windows.tokens


def _find_shared_inputs(
    model: nn.Module, topology: Topology, names: tuple[str, ...], probe: Tensor
) -> list[_SharedInput]:
    """Run a few tokens and see which tensors are handed the same tensor object."""
    readers: list[tuple[Tensor, list[str]]] = []  # inputs are kept alive, so `is` cannot be fooled by reused memory

    def remember(name: str, value: Tensor) -> None:
        for seen, sharing in reversed(readers):
            if seen is value:
                sharing.append(name)
                return
        readers.append((value, [name]))

    handles = [_hook(model, topology.matrix(name).modules[0], partial(remember, name)) for name in names]
    try:
        forward_body(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    missed = set(names) - {name for _, sharing in readers for name in sharing}
    if missed:
        raise CalibrationError(
            f"every tensor to be calibrated must take part in a forward pass, but {sorted(missed)[0]} (and"
            f" {len(missed) - 1} more) did not; leave it out of the space"
        )
    return [_SharedInput(tuple(sharing), value.shape[-1]) for value, sharing in readers]


def _group_by_budget(inputs: list[_SharedInput], budget_bytes: int) -> list[list[_SharedInput]]:
    groups: list[list[_SharedInput]] = []
    used = 0
    for shared in inputs:
        if not groups or used + shared.gram_bytes > budget_bytes:
            groups.append([])
            used = 0
        groups[-1].append(shared)
        used += shared.gram_bytes
    return groups


def _accumulate(
    model: nn.Module,
    topology: Topology,
    group: list[_SharedInput],
    windows: CalibrationWindows,
    progress: ProgressCallback,
    part: tuple[int, int],
) -> dict[str, Tensor]:
    """One pass over the windows; returns the unscaled sums by the first name that reads each input."""
    device = next(model.parameters()).device
    # float32 sums are enough: rounding is relative to each pair of channels, which whitening scales out again.
    grams = {s.names[0]: torch.zeros(s.width, s.width, device=device, dtype=torch.float32) for s in group}
    last = group[-1].names[0]

    def add(name: str, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).to(torch.float32)
        grams[name].addmm_(rows.T, rows)
        if name == last:
            raise StopForward

    handles = [_hook(model, topology.matrix(name).modules[0], partial(add, name)) for name in grams]
    batches = torch.split(windows.token_ids, max(1, _BATCH_TOKENS // windows.token_ids.shape[1]))
    done, total = part[0] * windows.tokens, part[1] * windows.tokens
    try:
        for batch in batches:
            progress("calibrate", done, total)
            forward_body(model, batch.to(device))
            done += batch.numel()
        progress("calibrate", done, total)
    finally:
        for handle in handles:
            handle.remove()
    return grams


def _hook(model: nn.Module, module: str, see: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    def before_forward(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        see(arguments[0])

    return model.get_submodule(module).register_forward_pre_hook(before_forward)


def forward_body(model: nn.Module, token_ids: Tensor) -> None:
    """Run the body of the model, without its output head, until it ends or a hook raises `StopForward`."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    with torch.inference_mode():
        try:
            body(token_ids.to(next(model.parameters()).device))
        except StopForward:
            return
