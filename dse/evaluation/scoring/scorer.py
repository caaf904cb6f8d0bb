"""Score queries with the fastest strategy that this model is verified to compute correctly."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from dse.evaluation.evaluator_settings import batches
from dse.evaluation.scoring.backbone import Backbone, by_context, row_batches
from dse.evaluation.scoring.packing import Query, Row, pack
from dse.evaluation.scoring.state_queue import Keep, Score, StateQueue
from dse.evaluation.scoring.target_head import TargetHead
from dse.evaluation.scoring.verification import agree, queries_to_check, rows_to_check, tolerance
from dse.out_of_memory import is_out_of_memory

__all__ = ["Scorer", "Strategy"]

Strategy = Literal["packed", "separate", "cached", "plain"]
"""How sequences share work: as a prefix tree; not at all, but in unpadded rows without a mask; through a key-value
cache; or not at all, by the model's own forward pass with all its logits."""

Kind = tuple[bool, bool, int]
"""The kind of a row: (whether it is a tree, whether it is deeper than the model's attention window, the bit length of
its depth)."""

logger = logging.getLogger(__name__)

# Large enough for efficient matrix products, small enough for activations to stay in the processor's caches.
_CPU_BATCH_TOKENS = 768
_GPU_BATCH_TOKENS = 16384
_PLAIN_LOGITS_BYTES = 2**29
_TIMED_SHARE = 0.25
"""Largest share of the rows of a kind that may be timed; with fewer rows, timing costs more than it gains."""
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


class Scorer:
    """Log-likelihoods of continuations under a loaded model, which may change between calls.

    At the first occurrence of a kind of row, a few sequences of the longest rows of this kind are also scored by the
    model's plain forward pass. If the results differ by more than the plain pass differs from itself in other batches,
    the next strategy is tried: a packed tree, then a key-value cache, then the plain pass. Kinds distinguish lengths by
    powers of two, so every length that occurs is within a factor of two of a verified one.

    The mask of a tree has four dimensions, which rules out FlashAttention. With a clock, which is the default on CUDA,
    each kind of tree is therefore timed against the strategies without such a mask, and the fastest is used.

    Args:
        model: The model.
        batch_tokens: See below.
        clock: Returns seconds after all work on the device has finished; None measures nothing and prefers what
            computes the fewest tokens.

    Attributes:
        batch_tokens: Upper bound on the tokens in a forward pass, including padding, if below the default of the
            device; a longer sequence forms a batch of its own. May be changed between calls.
        strategies: The strategy for each kind of row so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_tokens: int | None = None,
        clock: Callable[[], float] | Literal["device"] | None = "device",
    ) -> None:
        self.batch_tokens = batch_tokens
        self.strategies: dict[Kind, Strategy] = {}
        self._timed: set[Kind] = set()
        self._model, self._backbone, self._head = model, Backbone.of(model), TargetHead(model)
        self._clock = _device_clock(self._backbone.device) if clock == "device" else clock
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
            strategy = self._faster(kind, rows, queries, self._strategy(kind, rows, queries))
            self._run(strategy, rows, queries, keep)
        return [scores[index] for index in range(len(queries))]

    def _kind(self, row: Row) -> Kind:
        window, depth = self._backbone.window, max(row.depths)
        return not row.is_chain, window is not None and depth >= window, depth.bit_length()

    def _strategy(self, kind: Kind, rows: Sequence[Row], queries: Sequence[Query]) -> Strategy:
        """The first strategy that agrees with the model's plain forward pass on the longest rows of this kind."""
        if kind in self.strategies:
            return self.strategies[kind]
        checked = rows_to_check(rows)
        indices = queries_to_check(checked)
        sample = [queries[index] for index in indices]
        truth = self._plain_scores(sample, most_rows=1)
        if not all(math.isfinite(value) for value, _ in truth):
            return "plain"  # non-finite scores verify nothing, so this choice holds for the present call only
        repeats = [self._plain_scores(sample, extra=extra) for extra in (0, 8)]
        most = tolerance(truth, repeats, sample, self._backbone.dtype)
        candidates: tuple[Strategy, ...] = ("packed", "cached") if kind[0] else ("packed",)
        for strategy in candidates:
            found = self._try(strategy, checked, queries)
            if found is not None and agree([found[index] for index in indices], truth, sample, most):
                break
        else:
            strategy = "plain"
        if strategy != "packed":
            logger.info("%s does not support packed rows; scoring is %s", type(self._model).__name__, strategy)
        self.strategies[kind] = strategy
        return strategy

    def _try(self, strategy: Strategy, rows: Sequence[Row], queries: Sequence[Query]) -> dict[int, Score] | None:
        """Scores of all queries of these rows; None if the model refuses the strategy."""
        found: dict[int, Score] = {}
        try:
            self._run(strategy, rows, queries, found.update)
        except _REFUSALS as error:
            if is_out_of_memory(error):
                raise
            return None
        return found

    def _faster(self, kind: Kind, rows: Sequence[Row], queries: Sequence[Query], verified: Strategy) -> Strategy:
        """The fastest strategy for a kind of tree: the verified one, or one that needs no mask of four dimensions."""
        if self._clock is None or kind in self._timed or not kind[0] or verified not in ("packed", "cached"):
            return verified
        timed = next(batches(rows, len, self._batch_tokens()))
        if len(timed) > _TIMED_SHARE * len(rows):
            return verified
        seconds = {strategy: self._seconds(strategy, timed, queries) for strategy in (verified, "separate", "plain")}
        fastest = min(seconds, key=seconds.__getitem__)
        found = self._try(fastest, timed, queries)
        self._timed.add(kind)
        if fastest == "separate" and not self._separate_agrees(timed, queries, found):
            fastest = min((verified, "plain"), key=seconds.__getitem__)
        if fastest != verified:
            logger.info("scoring is %s: %s take %s s a batch", fastest, ", ".join(seconds), [*seconds.values()])
        self.strategies[kind] = fastest
        return fastest

    def _separate_agrees(self, rows: Sequence[Row], queries: Sequence[Query], found: dict[int, Score] | None) -> bool:
        """Whether rows of single sequences agree with the plain pass, as for every other strategy."""
        indices = queries_to_check(rows)
        sample = [queries[index] for index in indices]
        truth = self._plain_scores(sample, most_rows=1)
        if found is None or not all(math.isfinite(value) for value, _ in truth):
            return False
        most = tolerance(truth, [self._plain_scores(sample)], sample, self._backbone.dtype)
        return agree([found[index] for index in indices], truth, sample, most)

    def _seconds(self, strategy: Strategy, rows: Sequence[Row], queries: Sequence[Query]) -> float:
        """The shorter of two runs after a warm-up; infinite if the model refuses the strategy."""
        if self._clock is None or self._try(strategy, rows, queries) is None:
            return math.inf
        shortest = math.inf
        for _ in range(2):
            start = self._clock()
            self._try(strategy, rows, queries)
            shortest = min(shortest, self._clock() - start)
        return shortest

    def _run(self, strategy: Strategy, rows: Sequence[Row], queries: Sequence[Query], keep: Keep) -> None:
        queue = StateQueue(self._head, keep, most_states=self._batch_tokens())
        if strategy == "separate":
            rows = [Row.of(index, queries[index]) for row in rows for index, _ in row.queries]
            rows = sorted(rows, key=lambda row: -len(row))
        if strategy in ("packed", "separate"):
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

    def _plain_scores(self, sample: Sequence[Query], *, most_rows: int | None = None, extra: int = 0) -> list[Score]:
        """Scores by the plain pass, in batches of at most `most_rows` sequences with `extra` columns of padding."""
        found: dict[int, Score] = {}
        queue = StateQueue(self._head, found.update)
        step = most_rows or len(sample)
        for start in range(0, len(sample), step):
            self._plain(range(start, min(start + step, len(sample))), sample, queue, extra)
        return [found[index] for index in range(len(sample))]

    def _plain(self, indices: Sequence[int], queries: Sequence[Query], queue: StateQueue, extra: int = 0) -> None:
        """The model's own forward pass with all its logits, one sequence per row."""
        config = self._model.config.get_text_config()
        vocabulary, context = config.vocab_size, getattr(config, "max_position_embeddings", None) or sys.maxsize
        room = max(1, min(self._batch_tokens(), _PLAIN_LOGITS_BYTES // (4 * vocabulary)))
        rows = sorted(((index, queries[index].inputs) for index in indices), key=lambda row: -len(row[1]))
        for batch in batches(rows, lambda row: len(row[1]), room):
            longest = max(len(batch[0][1]), min(len(batch[0][1]) + extra, context))
            padded = [[*part, *[0] * (longest - len(part))] for _, part in batch]
            tokens = torch.tensor(padded, device=self._backbone.device)
            logits = self._model(input_ids=tokens, use_cache=False).logits
            for (index, part), own in zip(batch, logits, strict=True):
                queue.add_logits(index, own[len(part) - queries[index].scored : len(part)], queries[index].targets)

    def _batch_tokens(self) -> int:
        best = _CPU_BATCH_TOKENS if self._backbone.device.type == "cpu" else _GPU_BATCH_TOKENS
        return best if self.batch_tokens is None else min(best, self.batch_tokens)


def _device_clock(device: torch.device) -> Callable[[], float] | None:
    """A clock that waits for the device, on CUDA; None elsewhere, where a mask costs little."""
    if device.type != "cuda":
        return None

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _pair_cost(model: PreTrainedModel) -> float:
    """Work of one attention pair relative to one token through all matrices: 4 w / 2 P (see `packing`)."""
    config = model.config.get_text_config()
    width = int(getattr(config, "num_hidden_layers", 1)) * int(getattr(config, "hidden_size", 1))
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(),) if hasattr(module, "weight")}
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() > 1 and id(p) not in embeddings)
    return 2 * width / max(1, matrices)
