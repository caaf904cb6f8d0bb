"""Queue hidden states for the output head, which is applied to many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dse.double_precision import in_double
from dse.evaluation.scoring.target_head import TargetHead

__all__ = ["Keep", "Score", "StateQueue"]

Score = tuple[float, bool]
"""(log-likelihood, whether every scored token has the largest logit)."""

Keep = Callable[[Sequence[tuple[int, Score]]], None]
"""Called with (index of the query, score) of finished queries."""

# The product of few states with the wide head is bound by reading the head's weights, so states are collected first.
# 512 states of 4,096 floats take 8 MB.
_STATES_AT_ONCE = 512


class StateQueue:
    """Collects states until a product with the head is worthwhile, then reports finished scores.

    Args:
        keep: Called with (index of the query, score) of finished queries.
        most_states: Maximum number of states in one product with the head.
    """

    def __init__(self, head: TargetHead, keep: Keep, *, most_states: int = _STATES_AT_ONCE) -> None:
        self._head, self._keep = head, keep
        self._most_states = min(most_states, _STATES_AT_ONCE)
        self._states: list[Tensor] = []
        self._asked: list[tuple[int, list[int], tuple[int, ...]]] = []
        self._count = 0

    def add(self, states: Tensor, asked: Sequence[tuple[int, list[int], tuple[int, ...]]]) -> None:
        """Queue states.

        Args:
            states: Shape (states, width).
            asked: (index of the query, its states in order, the target of each state).
        """
        self._asked += [(index, [self._count + place for place in places], targets) for index, places, targets in asked]
        self._states.append(states)
        self._count += states.shape[0]
        if self._count >= self._most_states:
            self.flush()

    def add_logits(self, index: int, logits: Tensor, targets: tuple[int, ...]) -> None:
        """Score a query from its logits, shape (targets, vocabulary)."""
        rows = torch.arange(len(targets), device=logits.device)
        tokens = torch.tensor(targets, device=logits.device)
        own = torch.log_softmax(logits, dim=-1, dtype=torch.float32)[rows, tokens]
        is_greedy = bool((logits[rows, tokens] >= logits.amax(dim=-1)).all())
        self._keep([(index, (float(in_double(own).sum()), is_greedy))])

    def flush(self) -> None:
        """Apply the head to all queued states."""
        if not self._asked:
            return
        positions = [place for _, places, _ in self._asked for place in places]
        targets = [token for _, _, tokens in self._asked for token in tokens]
        found = self._head.score(torch.cat(self._states), positions, targets, most_states=self._most_states)
        scores, begin = [], 0
        for index, places, _ in self._asked:
            part = slice(begin, begin + len(places))
            begin = part.stop
            score = float(found.log_probabilities[part].sum()), bool(found.is_largest[part].all())
            scores.append((index, score))
        self._states, self._asked, self._count = [], [], 0
        self._keep(scores)
