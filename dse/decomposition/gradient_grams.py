"""Gram matrices of output gradients on calibration text: how much the model's predictions depend on each output.

One backward pass gives the gradient of the loss with respect to every output of every token. The labels are sampled
from the model's own predictions, so the mean of g g^T is the Fisher matrix of these predictions, whatever the text says
and however well the model knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dse.decomposition.activation_grams import DEFAULT_GRAM_BUDGET_BYTES, check_all_seen
from dse.decomposition.calibration_text import CalibrationWindows
from dse.progress import ProgressCallback, ignore_progress
from dse.topology import Topology

__all__ = ["GRADIENT_BATCH_TOKENS", "GRADIENT_TOKENS", "LABEL_SEED", "GradientGrams", "backpropagate"]

GRADIENT_TOKENS = 8192
"""Calibration tokens of a backward pass. A pass costs three forward passes, and more tokens did not improve results."""

GRADIENT_BATCH_TOKENS = 1024
LABEL_SEED = 0


class GradientGrams:
    """Gram matrices of the gradients with respect to the outputs of tensors, computed on demand in groups.

    Args:
        model: The dense model, in evaluation mode.
        topology: Its topology.
        names: Tensors and stacks, in the order in which they will be requested.
        windows: Calibration windows.
        budget_bytes: Memory for the matrices of one group; each group costs one pass over the windows.
        progress: Called per batch as ("gradients", done, total) in tokens of the group's pass.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        names: tuple[str, ...],
        windows: CalibrationWindows,
        *,
        budget_bytes: int = DEFAULT_GRAM_BUDGET_BYTES,
        progress: ProgressCallback = ignore_progress,
    ) -> None:
        self._model = model
        self._topology = topology
        self._waiting = list(names)
        self._budget_bytes = budget_bytes
        self._progress = progress
        self._ready: dict[str, Tensor] = {}
        self._token_ids = windows.spread(GRADIENT_TOKENS)

    def take(self, name: str) -> Tensor:
        """The mean of g g^T over tokens and sampled labels, shape (out_features, out_features), float32; can be taken
        once.

        Raises:
            CalibrationError: The tensor takes no part in a forward pass.
        """
        if name not in self._ready:
            group = self._next_group(name)
            self._ready |= _accumulate(self._model, self._topology, group, self._token_ids, self._progress)
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
        return self._ready.pop(name)

    def _next_group(self, name: str) -> list[str]:
        """This tensor and those after it, up to the memory budget."""
        group, used = [name], 4 * self._topology.matrix(name).out_features ** 2
        for other in self._waiting[self._waiting.index(name) + 1 :]:
            used += 4 * self._topology.matrix(other).out_features ** 2
            if used > self._budget_bytes:
                break
            group.append(other)
        return group


def _accumulate(
    model: nn.Module, topology: Topology, names: list[str], token_ids: Tensor, progress: ProgressCallback
) -> dict[str, Tensor]:
    """One forward and backward pass over the windows, with hooks on the outputs of these tensors."""
    device = next(model.parameters()).device
    sizes = {name: topology.matrix(name).out_features for name in names}
    grams = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()}
    seen: set[str] = set()
    generator = torch.Generator().manual_seed(LABEL_SEED)
    # The gradients of a stack's members arrive one by one; they are concatenated into the gradient of the stack.
    parts: dict[str, dict[int, Tensor]] = {name: {} for name in names}

    def add(name: str, member: int, members: int, gradient: Tensor) -> None:
        parts[name][member] = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
        if len(parts[name]) == members:
            rows = torch.cat([parts[name].pop(i) for i in range(members)], dim=1)
            grams[name].addmm_(rows.T, rows)

    def after_forward(name: str, member: tuple[int, int], _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        seen.add(name)
        if output.requires_grad:  # False if the output does not depend on the embeddings
            output.register_hook(partial(add, name, *member))  # type: ignore[no-untyped-call]

    done = 0
    with ExitStack() as hooks:
        for name in names:
            paths = topology.matrix(name).modules
            for i, path in enumerate(paths):
                hook = partial(after_forward, name, (i, len(paths)))
                hooks.enter_context(model.get_submodule(path).register_forward_hook(hook))
        hooks.enter_context(_gradients_from_the_embeddings(model))
        for batch in torch.split(token_ids, max(1, GRADIENT_BATCH_TOKENS // token_ids.shape[1])):
            progress("gradients", done, token_ids.numel())
            backpropagate(model(input_ids=batch.to(device)), generator)
            done += batch.numel()
        progress("gradients", done, token_ids.numel())
    check_all_seen(names, seen)
    return {name: gram / token_ids.numel() for name, gram in grams.items()}


@contextmanager
def _gradients_from_the_embeddings(model: nn.Module) -> Iterator[None]:
    """Start the autograd graph at the embedded tokens; the parameters stay frozen."""

    def begin(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # not a leaf, so that models may scale it in place

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    with embeddings.register_forward_hook(begin), torch.enable_grad():
        yield


def backpropagate(outputs: Any, generator: torch.Generator) -> None:
    """Backpropagate the gradients of -log p(label), with labels sampled from p, for every distribution that the head
    predicts.

    The gradient with respect to the logits is softmax - one-hot, so the loss itself needs no graph. A model without a
    head is treated as predicting its hidden states with unit variance, whose sampled gradient is white noise.
    """
    predicted = [value for key in ("logits", "start_logits", "end_logits") if (value := outputs.get(key)) is not None]
    if predicted:
        gradients = [_gradient_of_sampled_labels(logits, generator) for logits in predicted]
    else:
        predicted = [outputs.last_hidden_state]
        noise = torch.randn(predicted[0].shape, generator=generator)
        gradients = [noise.to(predicted[0].device, predicted[0].dtype)]
    torch.autograd.backward(predicted, gradients)


def _gradient_of_sampled_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = torch.softmax(logits.detach().reshape(-1, logits.shape[-1]).to(torch.float32), dim=-1)
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
    return gradient.reshape(logits.shape).to(logits.dtype)
