"""Hidden states of sequences with shared prefixes, from packed prefix trees or a key-value cache.

`packed` passes a whole prefix tree to the model, with a custom attention mask and each node's depth as its position.
For models that accept no custom mask (ALiBi), `cached` computes the context once into a key-value cache and continues
all continuations from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dse.evaluation.evaluator_settings import batches
from dse.evaluation.scoring.packing import Query, Row, balanced

__all__ = ["Backbone", "by_context", "row_batches"]

_JOINED_NODES = 192
"""Trees are joined into rows of about this length: rows of equal length need no padding, and attention is cheap."""


@dataclass(frozen=True)
class Backbone:
    """The model without its output head.

    Attributes:
        model: The whole model.
        device: Device of its weights.
        dtype: Of its weights. The model's own properties search all parameters at every call, so both are stored here.
    """

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> Backbone:
        """The backbone of a model in its present state."""
        parameter = next(model.parameters())
        return cls(model, parameter.device, parameter.dtype)

    @property
    def window(self) -> int | None:
        """Smallest attention window of all layers, in tokens; None if every layer has full attention."""
        config = self.model.config.get_text_config()
        widths = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        known = [int(width) for width in widths if isinstance(width, int) and width > 0]
        return min(known) if known and getattr(config, "use_sliding_window", True) else None

    def packed(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all nodes, shape (rows, longest row, width); the values at padding are meaningless."""
        longest, device = len(rows[0]), self.device
        padded = [longest - len(row) for row in rows]
        tokens = torch.tensor([row.tokens + [0] * pad for row, pad in zip(rows, padded, strict=True)], device=device)
        if all(row.is_chain for row in rows):
            return self._hidden(input_ids=tokens)
        index = torch.arange(longest, device=device)
        depths = torch.tensor([row.depths + [0] * pad for row, pad in zip(rows, padded, strict=True)], device=device)
        # A padding node is its own last descendant: it attends only to itself, and nothing attends to it.
        last = torch.tensor([row.last + list(range(len(row), longest)) for row in rows], device=device)
        allowed = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] <= last[:, None, :])
        return self._hidden(input_ids=tokens, position_ids=depths, attention_mask=self._mask(allowed, depths))

    def cached(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of continuations of one context, which is computed once.

        Returns:
            Shape (continuations, 1 + longest continuation, width): the context's last token, then the continuation.
        """
        device, count = self.device, len(continuations)
        ids = torch.tensor([list(context)], device=device)
        cache = DynamicCache()
        first = self._hidden(input_ids=ids, use_cache=True, past_key_values=cache)[:, -1:].expand(count, -1, -1)
        longest = max(map(len, continuations))
        if not longest:
            return first
        cache.batch_repeat_interleave(count)
        tokens = torch.tensor([[*part, *[0] * (longest - len(part))] for part in continuations], device=device)
        mask = torch.ones(count, len(context) + longest, dtype=torch.long, device=device)
        for row, part in enumerate(continuations):
            mask[row, len(context) + len(part) :] = 0
        rest = self._hidden(input_ids=tokens, attention_mask=mask, use_cache=True, past_key_values=cache)
        return torch.cat([first, rest], dim=1)

    def _hidden(self, **inputs: Any) -> Tensor:
        inputs.setdefault("use_cache", False)
        hidden: Tensor = self.model.base_model(**inputs)[0]
        return hidden

    def _mask(self, allowed: Tensor, depths: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks, shape (rows, 1, nodes, nodes); one per attention type if they differ."""
        everything = self._additive(allowed)
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if self.window is None or window is None or int(depths.max()) < window:
            return everything
        near = self._additive(allowed & (depths[:, :, None] - depths[:, None, :] < window))
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        masks = {kind: near if kind == "sliding_attention" else everything for kind in kinds}
        return near if list(masks) == ["sliding_attention"] else masks

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[:, None]


def row_batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Rows of one kind in batches of at most `most_tokens` tokens, including padding.

    Args:
        rows: Longest first. Either all chains, which need no mask and stay separate, or all trees, which are joined.
        most_tokens: A longer row forms a batch of its own.
    """
    joined = rows if rows[0].is_chain else balanced(rows, min(_JOINED_NODES, most_tokens))
    return batches(joined, len, most_tokens)


def by_context(queries: Sequence[Query], indices: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """These indices, grouped by the context of their queries."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        query = queries[index]
        groups.setdefault(query.tokens[: len(query.tokens) - query.scored], []).append(index)
    return groups
