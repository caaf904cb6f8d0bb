"""Sums of x x^T over tokens, taken by hooks on the matrices of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradientSums", "GramSum", "InputSums"]

_BLOCKS = 8
"""Rows of a sum that are computed together. Only the upper triangle of blocks is: 9/16 of the products."""

_MIN_BLOCK = 128


class GramSum:
    """A sum of x x^T, shape (width, width), float32; `total` completes the lower triangle."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device, dtype=torch.float32)
        step = max(_MIN_BLOCK, -(-width // _BLOCKS))
        self._bounds = [(start, min(start + step, width)) for start in range(0, width, step)]

    def add(self, rows: Tensor) -> None:
        """Add the sum over `rows`, shape (tokens, width).

        float32 sums are enough: the rounding error is relative to each pair of channels, which whitening rescales.
        """
        rows = rows.to(torch.float32)
        for start, end in self._bounds:
            self._sum[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])

    def merge(self, other: GramSum) -> None:
        """Add the sum of another device."""
        self._sum += other._sum.to(self._sum.device)

    def mean(self, tokens: int) -> Tensor:
        """The whole sum divided by `tokens`, in place."""
        for start, end in self._bounds:
            self._sum[end:, start:end] = self._sum[start:end, end:].T
        return self._sum.div_(tokens)


class InputSums:
    """Sums over the inputs of one layer's matrices. Matrices that receive the very same tensor share one sum.

    Args:
        layer: The layer.
        paths: Name of a matrix to the path, inside the layer, of a module that reads its input.
    """

    def __init__(self, layer: nn.Module, paths: Mapping[str, str]) -> None:
        self._layer = layer
        self._paths = paths
        self._first: list[tuple[Tensor, list[str]]] | None = []
        self.names = tuple(paths)
        self.sharing: list[tuple[str, ...]] = []
        self.sums: dict[str, GramSum] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the inputs of one forward pass of the layer."""
        with ExitStack() as hooks:
            for name, path in self._paths.items():
                module = self._layer.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(partial(self._see, name)))
            yield
        if self._first is not None:
            self.sharing = [tuple(names) for _, names in self._first]
            self._first = None

    def _see(self, name: str, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        value = arguments[0]
        if self._first is not None:
            for seen, names in reversed(self._first):
                if seen is value:
                    names.append(name)
                    return
            self._first.append((value, [name]))  # keeps it alive, so that no object id is reused
            self.sums[name] = GramSum(value.shape[-1], value.device)
        if name in self.sums:
            self.sums[name].add(_rows(value.detach()))

    def merge(self, other: InputSums) -> None:
        """Add the sums of another device."""
        for name, own in self.sums.items():
            own.merge(other.sums[name])


class GradientSums:
    """Sums over the gradients with respect to the outputs of one layer's matrices.

    Args:
        layer: The layer.
        paths: Name of a matrix to the paths of its modules inside the layer; a stack has several.
        widths: Name to the number of outputs.
        device: Device of the sums.
    """

    def __init__(
        self, layer: nn.Module, paths: Mapping[str, Sequence[str]], widths: Mapping[str, int], device: torch.device
    ) -> None:
        self._layer = layer
        self._paths = paths
        self.sums = {name: GramSum(width, device) for name, width in widths.items()}
        self.seen: set[str] = set()
        # The gradients of a stack's members arrive one by one; they are concatenated into the gradient of the stack.
        self._parts: dict[str, dict[int, Tensor]] = {name: {} for name in paths}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the gradients of a forward and backward pass."""
        with ExitStack() as hooks:
            for name, paths in self._paths.items():
                for member, path in enumerate(paths):
                    hook = partial(self._see, name, member)
                    hooks.enter_context(self._layer.get_submodule(path).register_forward_hook(hook))
            yield

    def _see(self, name: str, member: int, _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        self.seen.add(name)
        if output.requires_grad:
            output.register_hook(partial(self._add, name, member))  # type: ignore[no-untyped-call]

    def _add(self, name: str, member: int, gradient: Tensor) -> None:
        parts = self._parts[name]
        parts[member] = _rows(gradient.detach())
        if len(parts) == len(self._paths[name]):
            self.sums[name].add(torch.cat([parts.pop(i) for i in range(len(self._paths[name]))], dim=1))

    def merge(self, other: GradientSums) -> None:
        """Add the sums of another device."""
        self.seen |= other.seen
        for name, own in self.sums.items():
            own.merge(other.sums[name])


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
