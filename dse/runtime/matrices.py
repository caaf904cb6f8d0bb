"""Which modules of a model are products by fixed matrices, and which of them are given the very same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MatrixModule", "matrix_of", "modules_by_input"]


@dataclass(frozen=True, eq=False)
class MatrixModule:
    """A module that maps x to x A1^T A2^T ... + b.

    Attributes:
        path: Its place in the model.
        chain: The matrices in the order they are applied, each (out, in) as a view of the module's own memory.
        bias: Added at the end, or None.
    """

    path: str
    chain: tuple[Tensor, ...]
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.chain[-1].shape[0]

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.chain[0].shape[1]


def matrix_of(path: str, module: nn.Module) -> MatrixModule | None:
    """The matrices of `module`; None where it is not known to be such a product.

    Low-rank modules are known by their factors `left`, `right` and `core`, so that those of exported models, whose
    code travels with them, are served like this package's own. Members of a stack name the very same right factor.
    """
    weight, left, right = (_tensor(module, name) for name in ("weight", "left", "right"))
    bias, core = _tensor(module, "bias"), _tensor(module, "core")
    if type(module) is nn.Linear and weight is not None:
        return MatrixModule(path, (weight,), bias)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return MatrixModule(path, (weight.T,), bias)  # GPT-2 holds (in, out)
    if type(module).__name__ == "StackedLinear":
        (shared,) = getattr(module, "_shared", (None,))  # exported modules have no other name for it
        right, core = (_tensor(shared, name) for name in ("right", "core"))
    if type(module).__name__ in ("LowRankLinear", "StackedLinear") and left is not None and right is not None:
        return MatrixModule(path, (right, left) if core is None else (right, core, left), bias)
    return None


@torch.inference_mode()
def modules_by_input(model: nn.Module, tokens: Tensor) -> list[list[MatrixModule]]:
    """Modules that are products by matrices, those given the very same tensor together, in the order of calls.

    Found by watching one pass, so that it holds for any architecture. A module that is called twice is left out: what
    it shares may change from call to call.

    Args:
        model: In eval mode.
        tokens: Token ids of the pass, (batch, tokens).
    """
    calls: list[tuple[str, Tensor]] = []  # holds the inputs, so that no address is used twice
    modules = {path: matrix for path, module in model.named_modules() if (matrix := matrix_of(path, module))}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, given, kept=path: calls.append((kept, given[0])) if given else None
        )
        for path in modules
    ]
    try:
        model(input_ids=tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return _grouped(calls, modules)


def _grouped(calls: list[tuple[str, Tensor]], modules: Mapping[str, MatrixModule]) -> list[list[MatrixModule]]:
    counts: dict[str, int] = {}
    for path, _ in calls:
        counts[path] = counts.get(path, 0) + 1
    groups: dict[tuple[int, torch.dtype, torch.device], list[MatrixModule]] = {}
    for path, given in calls:
        if counts[path] == 1:
            first = modules[path].chain[0]
            groups.setdefault((id(given), first.dtype, first.device), []).append(modules[path])
    return list(groups.values())


def _tensor(module: object, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None
