"""Attention and MLP blocks that can be removed, found by structure and verified by running the layer.

A block can be removed if the layer adds its output to the residual stream, so that a block that returns zero changes
nothing. This is verified, not looked up by family: each layer is run once with every block that holds matrices replaced
by one that returns zero. The blocks are removable if and only if the layer then returns its input bit for bit. A layer
without its matrices is only a few norms, so this takes a millisecond for a model of any size, and works from a config
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dse.expert_tensor import ExpertTensor
from dse.model_parts import DecomposableTensor, RemovableBlock
from dse.models.layer_skeleton import run_skeleton, skeleton_of
from dse.models.removed_modules import RemovedBlock
from dse.models.roles import block_role_of
from dse.models.sizes import layer_attention_widths, matmul_entries, persistent_buffer_bytes

__all__ = ["find_blocks"]

_RETURNED_ITEMS = (2, 1, 3)
"""Return forms to try. A 0-dimensional zero cannot be unpacked and a tuple cannot be added, so at most one form runs.
"""
_PROBE_TOKENS = 3
_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class _Verified:
    """A layer whose blocks can be removed: the return form of each block, and the norms that belong to it alone.

    `input_norms` holds the norm before each block, if exactly one module feeds only this block.
    """

    returned_items: Mapping[str, int]
    norms: Mapping[str, tuple[str, ...]]
    input_norms: Mapping[str, str]
    layer_returned_items: int


class _Unverified(Exception):  # noqa: N818 - internal control flow, not an error
    """The layer does not demonstrably skip its blocks; the message is the reason."""


def find_blocks(
    model: PreTrainedModel,
    block_path: str,
    layers: nn.ModuleList,
    tensors: Iterable[DecomposableTensor],
    tied: set[int],
    *,
    is_decoder: bool,
    experts: Iterable[ExpertTensor] = (),
) -> tuple[tuple[RemovableBlock, ...], dict[str, str]]:
    """The removable blocks of every layer, and the reasons why others are not removable.

    Args:
        model: The model, on any device, including meta.
        block_path: Path of the list of layers.
        layers: The layers.
        tensors: The decomposable tensors inside them.
        tied: Ids of parameters that have more than one name.
        is_decoder: Whether attention keeps a KV cache.
        experts: The fused expert tensors inside the layers.

    Returns:
        The blocks in order of layers, attention before MLP; and block name to the reason why it cannot be removed.
    """
    by_layer: dict[int, list[DecomposableTensor]] = {i: [] for i in range(len(layers))}
    for tensor in tensors:
        if tensor.layer is not None:
            by_layer[tensor.layer].append(tensor)
    blocks: list[RemovableBlock] = []
    refused: dict[str, str] = {}
    cannot_cache = _cache_problem(model) if is_decoder else ""
    for i, layer in enumerate(layers):
        path = f"{block_path}.{i}"
        try:
            found = _layer_blocks(model, path, i, layer, by_layer[i], tied, is_decoder=is_decoder)
        except _Unverified as reason:
            refused |= {f"layers.{i}.{role}": str(reason) for role in ("attention", "mlp")}
            continue
        for role in ("attention", "mlp"):
            if role not in found:
                refused[f"layers.{i}.{role}"] = f"layer {i} holds no module that is exactly its {role} block"
            elif role == "attention" and (problem := cannot_cache or found[role][1]):
                refused[f"layers.{i}.{role}"] = problem
            else:
                block = found[role][0]
                inside = tuple(t.name for t in experts if t.module.startswith(f"{block.module}."))
                blocks.append(replace(block, experts=inside))
    return _all_attention_or_none(blocks, refused, len(layers), {t.name for ts in by_layer.values() for t in ts})


def _all_attention_or_none(
    blocks: list[RemovableBlock], refused: dict[str, str], layers: int, taken: set[str]
) -> tuple[tuple[RemovableBlock, ...], dict[str, str]]:
    """Allow attention removal only if every attention block is known, because all of them share the KV-cache slots."""
    attention = [block for block in blocks if block.role == "attention"]
    if attention and attention[0].cache_module and len(attention) < layers:
        blocks = [block for block in blocks if block.role != "attention"]
        reason = "some other layer's attention is not removable, and they share a KV cache"
        refused |= dict.fromkeys((block.name for block in attention), reason)
    # A user-defined role may be called `mlp`; the name then means that tensor.
    kept = tuple(block for block in blocks if block.name not in taken)
    return kept, {name: reason for name, reason in refused.items() if name not in taken}


def _cache_problem(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "is_encoder_decoder", False):
        return "its layers read the keys and values of other layers"
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= set(_ATTENTION_KINDS):
        return f"its layers use unsupported cache kinds ({', '.join(sorted(kinds - set(_ATTENTION_KINDS)))})"
    return ""


def _layer_blocks(
    model: PreTrainedModel,
    path: str,
    index: int,
    layer: nn.Module,
    tensors: list[DecomposableTensor],
    tied: set[int],
    *,
    is_decoder: bool,
) -> dict[str, tuple[RemovableBlock, str]]:
    """Role to the layer's block and the reason that forbids its removal ("" if there is none).

    Raises:
        _Unverified: The layer does not skip its blocks.
    """
    heavy = {name: child for name, child in layer.named_children() if any(p.ndim >= 2 for p in child.parameters())}
    roles = {role: names for role in ("attention", "mlp") if (names := _children_of(role, path, heavy, tensors))}
    if any(id(parameter) in tied for child in heavy.values() for parameter in child.parameters()):
        raise _Unverified(f"layer {index} shares weights with another part of the model")
    if not roles or set(heavy) != {name for names in roles.values() for name in names}:
        raise _Unverified(f"layer {index} holds parts with matrices that are neither attention nor MLP")
    verified = _verify(layer, tuple(heavy), model.config.get_text_config().hidden_size)
    found = {}
    single = {role: names[0] for role, names in roles.items() if len(names) == 1 and list(heavy[names[0]].children())}
    for role, name in single.items():
        inside = [t for t in tensors if t.module.startswith(f"{path}.{name}.")]
        parts = [heavy[name], *(layer.get_submodule(norm) for norm in verified.norms[name])]
        cache_module, problem = _cache_module(heavy[name], f"{path}.{name}", index, is_decoder, role)
        widths = layer_attention_widths(model, tensors) if role == "attention" else (0, 0)
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        block = RemovableBlock(
            name=f"layers.{index}.{role}",
            module=f"{path}.{name}",
            layer=index,
            role=role,
            layer_module=path,
            tensors=tuple(tensor.name for tensor in inside),
            norms=tuple(f"{path}.{norm}" for norm in verified.norms[name]),
            input_norm=f"{path}.{verified.input_norms[name]}" if name in verified.input_norms else "",
            parameters=sum(p.numel() for part in parts for p in part.parameters()),
            matmul_parameters=sum(t.parameters for t in inside)
            + sum(n for _, n in matmul_entries(model, f"{path}.{name}", heavy[name], {t.module for t in inside})),
            buffers_bytes=sum(persistent_buffer_bytes(part) for part in parts),
            returned_items=verified.returned_items[name],
            layer_returned_items=verified.layer_returned_items,
            attention_width=widths[0],
            key_value_width=widths[1],
            cache_module=cache_module,
            cache_kind=(kinds[index] if kinds else _ATTENTION_KINDS[0]) if cache_module else "",
        )
        found[role] = (block, problem)
    # The layer's parameters that are in none of its blocks.
    rest = sum(p.numel() for p in layer.parameters()) - sum(block.parameters for block, _ in found.values())
    return {role: (replace(block, rest_parameters=rest), problem) for role, (block, problem) in found.items()}


def _children_of(
    role: str, path: str, heavy: Mapping[str, nn.Module], tensors: list[DecomposableTensor]
) -> tuple[str, ...]:
    """The layer's own children that form this block."""
    roles = {tensor.module: tensor.role for tensor in tensors}
    chosen = []
    for name, child in heavy.items():
        prefix = f"{path}.{name}"
        inside = [r for module, r in roles.items() if module == prefix or module.startswith(f"{prefix}.")]
        if block_role_of(inside, (n for n, _ in child.named_modules())) == role:
            chosen.append(name)
    return tuple(chosen)


def _cache_module(block: nn.Module, path: str, index: int, is_decoder: bool, role: str) -> tuple[str, str]:
    """Path of the module that stores its KV-cache slot, and the problem if it cannot be determined."""
    if not is_decoder or role != "attention":
        return "", ""
    holders = [n for n, module in block.named_modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if len(holders) != 1 or block.get_submodule(holders[0]).layer_idx != index:
        return "", f"layer {index}'s attention does not state its slot in the KV cache"
    return f"{path}.{holders[0]}".rstrip("."), ""


def _verify(layer: nn.Module, heavy: tuple[str, ...], width: int) -> _Verified:
    """Run the layer without its matrices.

    Raises:
        _Unverified: It does not return its input.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, width, generator=generator)
    for forms in itertools.product(_RETURNED_ITEMS, repeat=len(heavy)):
        stubs = {name: _Recorder(items) for name, items in zip(heavy, forms, strict=True)}
        skeleton = skeleton_of(layer, stubs, generator)
        around = _norms_by_block(skeleton, stubs, hidden)
        if around is None:
            continue
        norms = {block: (*before, *behind) for block, (before, behind) in around.items()}
        for name in itertools.chain.from_iterable(norms.values()):
            skeleton._modules[name] = nn.Identity()
        output = run_skeleton(skeleton, hidden)
        items = len(output) if isinstance(output, tuple) else 1
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, Tensor) and value.shape == hidden.shape and torch.equal(value, hidden):
            inputs = {block: before[0] for block, (before, _) in around.items() if len(before) == 1}
            return _Verified(dict(zip(heavy, forms, strict=True)), norms, inputs, items)
    raise _Unverified(
        f"a layer of {type(layer).__name__} does not return its input when its blocks return zero (it normalises or"
        " scales the sum, or adds the residual inside a block)"
    )


class _Recorder(RemovedBlock):
    """A removed block that records its input tensors and the zeros it returned."""

    def __init__(self, returned_items: int) -> None:
        super().__init__(returned_items)
        self.seen: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, *arguments: object, **keywords: object) -> Tensor | tuple[Tensor | None, ...]:
        output = super().forward(*arguments, **keywords)
        self.seen += [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)][:1]
        self.given.append(output if isinstance(output, Tensor) else output[0])  # type: ignore[arg-type]
        return output


def _norms_by_block(
    skeleton: nn.Module, stubs: Mapping[str, _Recorder], hidden: Tensor
) -> dict[str, tuple[list[str], list[str]]] | None:
    """Block to the sibling modules that feed only it, and those that read its output; None if the layer cannot run."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def remember(name: str, _module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
            read[name], written[name] = arguments[0], output

    with ExitStack() as hooks:
        for name, child in skeleton.named_children():
            if name not in stubs:
                hooks.enter_context(child.register_forward_hook(partial(remember, name)))
        if run_skeleton(skeleton, hidden) is None:
            return None
    norms = {}
    for block, stub in stubs.items():
        others = [tensor for name, other in stubs.items() if name != block for tensor in other.seen]
        before = [
            name
            for name, output in written.items()
            if any(output is seen for seen in stub.seen) and not any(output is seen for seen in others)
        ]
        behind = [name for name, value in read.items() if any(value is given for given in stub.given)]
        norms[block] = (before, behind)
    return norms
