"""Score queries with the fastest strategy that this model is verified to compute correctly."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from dse.evaluation.evaluator_settings import batches
from dse.evaluation.scoring.backbone import Backbone, by_context, row_batches
from dse.evaluation.scoring.packing import Query, Row, pack
from dse.evaluation.scoring.state_queue import Keep, Score, StateQueue
from dse.evaluation.scoring.target_head import TargetHead
from dse.out_of_memory import is_out_of_memory

__all__ = ["Scorer", "Strategy"]

Strategy = Literal["packed", "cached", "plain"]
"""How sequences share work: as a prefix tree, through a key-value cache, or not at all."""

Kind = tuple[bool, bool]
"""The kind of a row: (whether it is a tree, whether it is deeper than the model's attention window)."""

logger = logging.getLogger(__name__)

# Large enough for efficient matrix products, small enough for activations to stay in the processor's caches.
_CPU_BATCH_TOKENS = 768
_GPU_BATCH_TOKENS = 16384
_PLAIN_LOGITS_BYTES = 2**29
_CHECKED_QUERIES = 4
# Largest rounding difference of a token's log-probability between two correct computations, by dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


class Scorer:
    """Log-likelihoods of continuations under a loaded model, which may change between calls.

    At the first occurrence of a kind of row, a few of its sequences are also scored by the model's plain forward pass.
    If the results differ by more than rounding, the next strategy is tried: a packed tree, then a key-value cache, then
    the plain pass. An unknown architecture is therefore at worst slower, never wrong.

    Attributes:
        batch_tokens: Upper bound on the tokens in a forward pass, including padding, if below the default of the
            device; a longer sequence forms a batch of its own. May be changed between calls.
        strategies: The verified strategy for each kind of row so far.
    """

    def __init__(self, model: PreTrainedModel, *, batch_tokens: int | None = None) -> None:
        self.batch_tokens = batch_tokens
        self.strategies: dict[Kind, Strategy] = {}
        self._model, self._backbone, self._head = model, Backbone.of(model), TargetHead(model)
        self._pair_cost = _pair_cost(model)

    @torch.inference_mode()
    def score(self, queries: Sequence[Query], finished: Keep | None = None) -> list[Score]:
        """One score per query, in order, with shared prefixes computed once.

        Args:
            queries: In any order.
            finished: Called with (index, score) of finished queries; an exception that it raises ends the call.
        """
        self._backbone = Backbone.of(self._model)
        scores: dict[int, Score] = {}

        def keep(found: Sequence[tuple[int, Score]]) -> None:
            scores.update(found)
            if finished is not None:
                finished(found)

        kinds: dict[Kind, list[Row]] = {}
        for row in pack(queries, pair_cost=self._pair_cost):
            kinds.setdefault(self._kind(row), []).append(row)
        for kind, rows in kinds.items():
            self._run(self._strategy(kind, rows, queries), rows, queries, keep)
        return [scores[index] for index in range(len(queries))]

    def _kind(self, row: Row) -> Kind:
        window = self._backbone.window
        return not row.is_chain, window is not None and max(row.depths) >= window

    def _strategy(self, kind: Kind, rows: Sequence[Row], queries: Sequence[Query]) -> Strategy:
        """The first strategy that agrees with the model's plain forward pass on a small sample of these rows."""
        if kind in self.strategies:
            return self.strategies[kind]
        shortest = [queries[index] for index, _ in rows[-1].queries]
        # The first and last queries of a tree differ most, so they are compared.
        sample = shortest if len(shortest) <= _CHECKED_QUERIES else [*shortest[:2], *shortest[-2:]]
        truth = self._try("plain", sample)
        if truth is None or not all(math.isfinite(value) for value, _ in truth):
            return "plain"  # non-finite scores verify nothing, so this choice holds for the present call only
        candidates: tuple[Strategy, ...] = ("packed", "cached") if kind[0] else ("packed",)
        for strategy in candidates:
            found = self._try(strategy, sample)
            if found is not None and self._agree(found, truth, sample):
                break
        else:
            strategy = "plain"
        if strategy != "packed":
            logger.info("%s does not support packed rows; scoring is %s", type(self._model).__name__, strategy)
        self.strategies[kind] = strategy
        return strategy

    def _try(self, strategy: Strategy, sample: Sequence[Query]) -> list[Score] | None:
        found: dict[int, Score] = {}
        try:
            as_one_tree = pack(sample, pair_cost=0.0, most_nodes=sys.maxsize, least_saved=-math.inf)
            self._run(strategy, as_one_tree, sample, found.update)
        except _REFUSALS as error:
            if strategy == "plain" or is_out_of_memory(error):
                raise
            return None
        return [found[index] for index in range(len(sample))]

    def _agree(self, found: Sequence[Score], truth: Sequence[Score], sample: Sequence[Query]) -> bool:
        tolerance = _TOLERANCE[self._backbone.dtype]
        return all(
            abs(one[0] - other[0]) <= tolerance * query.scored
            for one, other, query in zip(found, truth, sample, strict=True)
        )

    def _run(self, strategy: Strategy, rows: Sequence[Row], queries: Sequence[Query], keep: Keep) -> None:
        queue = StateQueue(self._head, keep, most_states=self._batch_tokens())
        if strategy == "packed":
            for batch in row_batches(rows, self._batch_tokens()):
                hidden = self._backbone.packed(batch)
                for row, states in zip(batch, hidden, strict=True):
                    nodes = sorted({node for _, predicting in row.queries for node in predicting})
                    place = {node: index for index, node in enumerate(nodes)}
                    asked = [(i, [place[n] for n in found], queries[i].targets) for i, found in row.queries]
                    queue.add(states[nodes], asked)
        elif strategy == "cached":
            indices = [index for row in rows for index, _ in row.queries]
            for context, members in by_context(queries, indices).items():
                parts = [queries[i].inputs[len(context) :] for i in members]
                for states, index in zip(self._backbone.cached(context, parts), members, strict=True):
                    count = queries[index].scored
                    queue.add(states[:count], [(index, list(range(count)), queries[index].targets)])
        else:
            self._plain(sorted({index for row in rows for index, _ in row.queries}), queries, queue)
        queue.flush()

    def _plain(self, indices: Sequence[int], queries: Sequence[Query], queue: StateQueue) -> None:
        """The model's own forward pass with all its logits, one sequence per row."""
        vocabulary = self._model.config.get_text_config().vocab_size
        room = max(1, min(self._batch_tokens(), _PLAIN_LOGITS_BYTES // (4 * vocabulary)))
        rows = sorted(((index, queries[index].inputs) for index in indices), key=lambda row: -len(row[1]))
        for batch in batches(rows, lambda row: len(row[1]), room):
            longest = len(batch[0][1])
            padded = [[*part, *[0] * (longest - len(part))] for _, part in batch]
            tokens = torch.tensor(padded, device=self._backbone.device)
            logits = self._model(input_ids=tokens, use_cache=False).logits
            for (index, part), own in zip(batch, logits, strict=True):
                queue.add_logits(index, own[len(part) - queries[index].scored : len(part)], queries[index].targets)

    def _batch_tokens(self) -> int:
        best = _CPU_BATCH_TOKENS if self._backbone.device.type == "cpu" else _GPU_BATCH_TOKENS
        return best if self.batch_tokens is None else min(best, self.batch_tokens)


def _pair_cost(model: PreTrainedModel) -> float:
    """Work of one attention pair relative to one token through all matrices: 4 w / 2 P (see `packing`)."""
    config = model.config.get_text_config()
    width = int(getattr(config, "num_hidden_layers", 1)) * int(getattr(config, "hidden_size", 1))
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(),) if hasattr(module, "weight")}
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() > 1 and id(p) not in embeddings)
    return 2 * width / max(1, matrices)
