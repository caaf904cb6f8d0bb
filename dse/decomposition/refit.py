"""Refit the factors of a whole point to the inputs that they receive in the decomposed model.

A bank's factors are fitted to the activations of the dense model. In a decomposed model every layer also receives the
errors of the layers before it. So the left factors are refitted, tensor by tensor in forward order, on the inputs that
the part already refitted produces: a linear least-squares problem with a closed-form solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dse.decomposition.activation_grams import StopForward, forward_body
from dse.decomposition.factors import LowRankFactors, as_matrix
from dse.decomposition.mlp_width import ChannelFactors
from dse.decomposition.svd_methods import cholesky_with_damping
from dse.double_precision import in_double
from dse.errors import NonFiniteError
from dse.model_parts import Matrix, TensorStack
from dse.progress import ProgressCallback, ignore_progress
from dse.topology import Topology

__all__ = ["refit_factors"]

_CORRECTION = 0.25
"""Share of the error from earlier layers that a tensor corrects. 0 means no refit. At 1 every tensor also tries to undo
errors that it cannot undo, and overfits the few tokens (docs/research-notes.md).
"""

_SHRINKAGE = 0.05
"""Share of each component's power added to the normal equations, to limit overfitting of the few tokens."""


def refit_factors(
    model: nn.Module,
    topology: Topology,
    factors: Mapping[str, LowRankFactors],
    refitted: frozenset[str],
    removed: tuple[str, ...],
    widths: Mapping[str, tuple[ChannelFactors, int]],
    token_ids: Tensor,
    *,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, LowRankFactors]:
    """Refit left factors in one forward pass that runs the dense and the decomposed model side by side.

    The calibration windows pass through the model twice in one batch: once with the dense weights, once with the
    factors. At a tensor W with dense input x, decomposed input x' and factors A R, the outputs should be W x, but even
    W itself would give W x'. The left factor corrects a share c of this error, by ridge regression of the error on the
    components z = R x':

        A' = A + c W (X - X') Z^T (Z Z^T + mu diag(Z Z^T))^-1

    The pass continues with A' R x'. The error of the truncation itself is left to the bank, which minimised it over
    more tokens and over gradients. The model is never changed.

    Args:
        model: The dense model, in evaluation mode.
        topology: Its topology.
        factors: Factors of each tensor or stack of the point, by name; those to refit have no core.
        refitted: Names of the tensors to refit; the other factors are used unchanged.
        removed: Names of removed blocks.
        widths: MLPs of reduced width: their channels, and the number kept. They are not refitted.
        token_ids: Calibration windows, shape (windows, window). All of them form one batch, so the widest activation
            must fit in memory twice.
        progress: Called as ("refit", done, total) in tensors; members of a stack count separately.

    Returns:
        The factors of the point. Refitted ones are float32 on the CPU; right factors are unchanged.

    Raises:
        NonFiniteError: The decomposed model's activations are not finite.

    Sources: SVD-LLM (Wang et al., arXiv 2403.07378) updates left factors on the decomposed model's activations; GPTAQ
    (Li et al., arXiv 2504.02692) targets the dense model's outputs, as here, in quantisation.
    """
    if not refitted:
        return dict(factors)
    members = {path: own for name in factors for path, own in _by_module(topology.matrix(name), factors[name]).items()}
    narrow = {
        topology.mlp(name).output.module: (channels.kept(width), channels.output_matrix(width))
        for name, (channels, width) in widths.items()
    }
    waiting = {path for name in refitted for path in topology.matrix(name).modules}
    total = len(waiting)
    fitted: dict[str, Tensor] = {}

    def decomposed(path: str, module: nn.Module, inputs: Tensor, dense: Tensor) -> Tensor:
        if path in narrow:
            return _narrow_outputs(module, inputs, *narrow[path])
        outputs, after = _decomposed_outputs(module, inputs, dense, members[path], path in waiting)
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError(f"activations of the decomposed model must be finite, but those of '{path}' are not")
        if path in waiting:
            fitted[path] = after.left
            waiting.discard(path)
            progress("refit", len(fitted), total)
            if not waiting:
                raise StopForward
        return outputs

    blocks = [topology.blocks_by_name[name].module for name in removed]
    with _two_models_in_a_batch(model, (*members, *narrow), blocks, decomposed):
        forward_body(model, torch.cat((token_ids, token_ids)))
    lefts = {name: torch.cat([fitted[path] for path in topology.matrix(name).modules]) for name in refitted}
    return {**factors, **{name: LowRankFactors(left, factors[name].right) for name, left in lefts.items()}}


def _by_module(matrix: Matrix, factors: LowRankFactors) -> dict[str, LowRankFactors]:
    """Module path to the factors of its replacement; for a stack, each member's rows with the shared right factor."""
    rows = matrix.rows if isinstance(matrix, TensorStack) else (slice(None),)
    return {
        path: LowRankFactors(factors.left[own], factors.right, factors.core)
        for path, own in zip(matrix.modules, rows, strict=True)
    }


@contextmanager
def _two_models_in_a_batch(
    model: nn.Module, paths: Sequence[str], removed: Sequence[str], decomposed: Callable[..., Tensor]
) -> Iterator[None]:
    """Install hooks that run the dense model on the first half of a batch and the decomposed one on the second half."""
    kept: dict[str, Tensor] = {}

    def before(path: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dense, kept[path] = arguments[0].tensor_split(2)
        return (dense, *arguments[1:])

    def after(path: str, module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return torch.cat((output, decomposed(path, module, kept.pop(path), output)))

    def zero_block(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        first[len(first) // 2 :] = 0  # removing a removable block is the same as setting its output to zero
        return output

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_pre_hook(partial(before, path)))
            hooks.enter_context(module.register_forward_hook(partial(after, path)))
        for path in removed:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(zero_block))
        yield


def _decomposed_outputs(
    module: nn.Module, inputs: Tensor, dense: Tensor, factors: LowRankFactors, refit: bool
) -> tuple[Tensor, LowRankFactors]:
    """Outputs of the decomposed tensor for its own inputs, and the factors that gave them.

    `inputs` (..., in_features) are those in the decomposed model; `dense` (..., out_features) are the outputs of the
    dense model.
    """
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101 - narrows the type
    right = factors.right.to(dense)
    components = inputs @ right.T
    if refit:
        target = dense if bias is None else dense - bias
        left = _refitted_left(as_matrix(module), _rows(inputs), _rows(components), _rows(target), factors.left)
        factors = LowRankFactors(left.cpu(), factors.right)
    left = factors.left if factors.core is None else factors.left @ factors.core
    outputs = components @ left.to(dense).T
    return outputs if bias is None else outputs + bias, factors


def _narrow_outputs(module: nn.Module, inputs: Tensor, kept: Tensor, matrix: Tensor) -> Tensor:
    """Outputs of an MLP's refitted output matrix; the channels are those of the dense input matrices."""
    outputs = inputs[..., kept.to(inputs.device)] @ matrix.to(inputs).T
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101 - narrows the type
    return outputs if bias is None else outputs + bias


def _refitted_left(weight: Tensor, inputs: Tensor, components: Tensor, dense: Tensor, left: Tensor) -> Tensor:
    """The left factor (out_features, rank) with a share of the received error corrected, float32.

    Tokens are the rows of `inputs` (in the decomposed model), of `components` (`inputs` times the right factor), and of
    `dense` (the dense model's outputs without bias).
    """
    # W (X' Z^T) rather than (W X') Z^T, which would cost as much as the dense forward pass.
    error = dense.T @ components - weight.to(torch.float32) @ (inputs.T @ components)
    power = in_double(components.T @ components)
    root = cholesky_with_damping(power + torch.diag(_SHRINKAGE * power.diagonal()))
    step = torch.cholesky_solve(in_double(error.T), root).T
    return (left.to(error) + _CORRECTION * step.to(torch.float32).to(error.device)).contiguous()


def _rows(activations: Tensor) -> Tensor:
    return activations.reshape(-1, activations.shape[-1]).to(torch.float32)
