"""Hidden states of packed rows: three ways to compute what sequences share only once, or not at all.

`packed` hands the model a whole prefix tree with a mask of its own and each node's depth as its position. Models that
take no custom mask (ALiBi) get `cached`: the context once into a key-value cache, then all its continuations from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dse.evaluation.scoring.packing import Query, Row, balanced

__all__ = ["Backbone", "by_context", "row_batches"]

_JOINED_NODES = 192
"""Trees are joined to rows of about this length: equal rows need no padding, and their pairs cost little yet."""


@dataclass(frozen=True)
class Backbone:
    """The model without its output head.

    Attributes:
        model: The whole model.
        device: Where it lies now.
        dtype: Of its weights; both are walked for at every call of the model's own properties, so they stand here.
    """

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> Backbone:
        """The backbone of a model as it lies now."""
        parameter = next(model.parameters())
        return cls(model, parameter.device, parameter.dtype)

    @property
    def window(self) -> int | None:
        """Tokens that the narrowest attention layer looks back over; None where every layer sees everything."""
        config = self.model.config.get_text_config()
        widths = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        known = [int(width) for width in widths if isinstance(width, int) and width > 0]
        return min(known) if known and getattr(config, "use_sliding_window", True) else None

    def packed(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all nodes, shape (rows, longest row, width); what pads a shorter row is meaningless."""
        longest, device = len(rows[0]), self.device
        if all(row.is_chain for row in rows):
            tokens = torch.tensor([row.tokens + [0] * (longest - len(row)) for row in rows], device=device)
            return self._hidden(input_ids=tokens)
        index = torch.arange(longest, device=device)
        padded = [longest - len(row) for row in rows]
        tokens = torch.tensor([row.tokens + [0] * pad for row, pad in zip(rows, padded, strict=True)], device=device)
        depths = torch.tensor([row.depths + [0] * pad for row, pad in zip(rows, padded, strict=True)], device=device)
        # A pad is its own last descendant: it attends to itself alone, and nothing attends to it.
        last = torch.tensor([row.last + list(range(len(row), longest)) for row in rows], device=device)
        allowed = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] <= last[:, None, :])
        return self._hidden(input_ids=tokens, position_ids=depths, attention_mask=self._mask(allowed, depths))

    def cached(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of continuations after one context, the context computed once.

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
        """Additive masks, shape (rows, 1, nodes, nodes); one for each kind of attention where they differ."""
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
    """Rows of one kind in batches of at most `most_tokens` tokens, padding included.

    Args:
        rows: All chains, which need no mask and stay apart, or all trees, which are joined; longest first.
        most_tokens: A longer row goes alone.
    """
    batch: list[Row] = []
    for row in rows if rows[0].is_chain else balanced(rows, min(_JOINED_NODES, most_tokens)):
        if batch and (len(batch) + 1) * len(batch[0]) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def by_context(queries: Sequence[Query], indices: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """These indices by the context of their queries."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        query = queries[index]
        groups.setdefault(query.tokens[: len(query.tokens) - query.scored], []).append(index)
    return groups
