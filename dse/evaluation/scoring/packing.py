"""Pack token sequences with common prefixes into trees, so that every shared token is computed once.

A row has the nodes of one or more prefix trees in depth-first order. A node represents one token after all its
ancestors; it attends to them and to itself, and its position is its depth. The cost of a row of n nodes: each matrix of
the model multiplies each node once, 2 P n operations for P parameters, and attention compares all pairs, 4 n^2 w
operations for the total attention width w of all layers. For SmolLM2-135M (P = 106 M, w = 30 x 576), a row of 256 nodes
spends 8 % of its time on pairs, and sharing eight tokens between two documents of forty saves 10 %.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Query", "Row", "balanced", "pack"]

_MOST_NODES = 256
"""Maximum size of a tree; in larger trees attention pairs cost more than shared tokens save."""

_LEAST_SAVED = 0.05
"""Share of a sequence's own work that joining a tree must save, since a custom mask has a cost."""


@dataclass(frozen=True)
class Query:
    """Asks for the log-likelihood of the last `scored` tokens, each given all tokens before it.

    Attributes:
        tokens: Context and continuation, shape (tokens,).
        scored: Number of scored tokens at the end, 1 <= scored < len(tokens).
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the last, which is only predicted."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens, shape (scored,)."""
        return self.tokens[len(self.tokens) - self.scored :]


@dataclass(eq=False)
class Row:
    """The nodes of one or several prefix trees, in depth-first order.

    Attributes:
        tokens: Token of each node.
        depths: Position of each node: 0 for the first token of a sequence.
        last: Index of each node's last descendant, or its own. Subtrees are contiguous, so node i attends to node j
            exactly if j <= i <= last[j].
        queries: (index of the query, nodes that predict its scored tokens in order).
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    queries: list[tuple[int, list[int]]] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether the row is a single sequence, which needs no custom mask."""
        return self.depths[-1] == len(self) - 1

    def add(self, inputs: Sequence[int], shared: int) -> None:
        """Add a sequence that follows the previous one in lexicographic order.

        Args:
            inputs: Tokens of the sequence.
            shared: Length of the prefix that it shares with the previous sequence.
        """
        for ended in self._path[shared:]:
            self.last[ended] = len(self) - 1
        del self._path[shared:]
        for token in inputs[shared:]:
            self._path.append(len(self))
            self.tokens.append(token)
            self.depths.append(len(self._path) - 1)
            self.last.append(-1)

    def ask(self, index: int, query: Query) -> None:
        """Record the nodes of the sequence just added that predict this query's scored tokens."""
        self.queries.append((index, self._path[len(self._path) - query.scored :]))

    def close(self) -> None:
        """End the last sequence."""
        self.add((), shared=0)

    @classmethod
    def of(cls, index: int, query: Query) -> Row:
        """A row of a single sequence."""
        row = cls()
        row.add(query.inputs, shared=0)
        row.ask(index, query)
        row.close()
        return row

    @classmethod
    def joined(cls, rows: Sequence[Row]) -> Row:
        """Several rows as one; their trees do not attend to each other."""
        whole = cls()
        for row in rows:
            offset = len(whole)
            whole.tokens += row.tokens
            whole.depths += row.depths
            whole.last += [offset + node for node in row.last]
            whole.queries += [(index, [offset + node for node in nodes]) for index, nodes in row.queries]
        return whole


def pack(
    queries: Sequence[Query], *, pair_cost: float, most_nodes: int = _MOST_NODES, least_saved: float = _LEAST_SAVED
) -> list[Row]:
    """Pack queries into rows so that the estimated work is small.

    In lexicographic order, the longest prefix that a sequence shares with any earlier one is the prefix that it shares
    with its predecessor, so one pass finds all sharing. A sequence joins the row of its predecessor if that is less
    work than a row of its own.

    Args:
        pair_cost: Work of one attention pair relative to one node through all matrices: 2 w / P.
        most_nodes: Maximum size of a tree of more than one sequence.
        least_saved: Share of a sequence's own work that joining a row must save; -inf joins all common prefixes.

    Returns:
        Rows, longest first; every query is in exactly one.
    """

    def work(nodes: int) -> float:
        return nodes + pair_cost * nodes * nodes

    rows: list[Row] = []
    before: tuple[int, ...] = ()
    for index in sorted(range(len(queries)), key=lambda i: queries[i].inputs):
        inputs = queries[index].inputs
        shared = _shared(before, inputs)
        joins = False
        if rows:
            grown = len(rows[-1]) + len(inputs) - shared
            saved = work(len(rows[-1])) + work(len(inputs)) - work(grown)
            is_worthwhile = shared > 0 and saved > least_saved * work(len(inputs))
            joins = grown == len(rows[-1]) or (is_worthwhile and grown <= most_nodes)
            if not joins:
                rows[-1].close()
        if not joins:
            rows.append(Row())
        rows[-1].add(inputs, shared if joins else 0)
        rows[-1].ask(index, queries[index])
        before = inputs
    if rows:
        rows[-1].close()
    return sorted(rows, key=lambda row: -len(row))


def balanced(rows: Sequence[Row], most_nodes: int) -> list[Row]:
    """Join trees into rows of nearly equal length, longest first, so that a batch of them needs little padding.

    Trees are assigned in order of size, each to the row that is shortest so far (Graham 1969). If a row becomes too
    long, the assignment is repeated with one more row.

    Args:
        rows: Longest first.
        most_nodes: Maximum length of a row of more than one tree.
    """
    longest = max(most_nodes, len(rows[0]))
    for count in range(-(-sum(map(len, rows)) // longest), len(rows) + 1):
        parts: list[list[Row]] = [[] for _ in range(count)]
        heap = [(0, index) for index in range(count)]
        for row in rows:
            length, index = heapq.heappop(heap)
            parts[index].append(row)
            heapq.heappush(heap, (length + len(row), index))
        if max(heap)[0] <= longest:
            break
    return sorted((Row.joined(part) for part in parts), key=lambda row: -len(row))


def _shared(before: Sequence[int], after: Sequence[int]) -> int:
    most = min(len(before), len(after))
    return next((i for i in range(most) if before[i] != after[i]), most)
