"""Point and dense by turns, as finely as their work allows: two prefills, or a few tokens, and the other one's turn.

A noisy machine is slow for seconds or for milliseconds at a time. Two turns side by side share most of that, so their
ratio keeps little of it. Within a turn disturbances only ever add time, so it is told by its fastest sample, which is
also past what the first one after a swap pays (Chen and Revels 2016, "Robust benchmarking in noisy environments").
Turns alternate as subject, dense, dense, subject (ABBA): what drifts linearly within a block falls on both sides alike.
All samples are kept, and the spread that is reported is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dse.measurement.clock import Stopwatch
from dse.measurement.workload import Generation, Workload

__all__ = ["SIDES", "TURN_PREFILLS", "TURN_TOKENS", "Alternation", "Block", "Side", "turns_of"]

Side = Literal["subject", "dense"]
Turn = tuple[float, ...]
SIDES: tuple[Side, Side] = ("subject", "dense")

TURN_TOKENS = 4
"""Tokens one side decodes before the other's turn: enough that one of them is undisturbed, short against what slows a
machine for longer."""

TURN_PREFILLS = 2
"""Prefills one side runs before the other's turn; the second one's generation is decoded."""


@dataclass
class Block:
    """Samples of one ABBA block: two generations a side.

    Attributes:
        prefill: The turns of prefill: side to turns, each a tuple of seconds a prompt.
        decode: The turns of decode, each a tuple of seconds a token.

    The k-th turns of both sides were neighbours in time.
    """

    prefill: dict[Side, list[Turn]] = field(default_factory=lambda: {side: [] for side in SIDES})
    decode: dict[Side, list[Turn]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def phases(self) -> tuple[dict[Side, list[Turn]], dict[Side, list[Turn]]]:
        """Prefill and decode."""
        return self.prefill, self.decode

    @property
    def samples_s(self) -> list[float]:
        """Every timing in it."""
        return [sample for phase in self.phases for turns in phase.values() for turn in turns for sample in turn]

    @property
    def duration_s(self) -> float:
        """Timed work in it."""
        return sum(self.samples_s)


class Alternation:
    """Runs blocks on the one resident model, whose weights are swapped between turns, outside the clock.

    Args:
        workload: What is run.
        stopwatch: Times one call.
        new_tokens: Decode steps of a generation.
        use: Side to what puts its weights in place; called only where the side changes.
        on_generation: Called after every generation of a side.
    """

    def __init__(
        self,
        workload: Workload,
        stopwatch: Stopwatch,
        new_tokens: int,
        use: Mapping[Side, Callable[[], None]],
        on_generation: Callable[[], None] = lambda: None,
    ) -> None:
        self._workload = workload
        self._stopwatch = stopwatch
        self._turns = turns_of(new_tokens)
        self._use = use
        self._on_generation = on_generation
        self._in_use: Side | None = None

    def assume(self, side: Side) -> None:
        """Take it that the weights of `side` are in place already."""
        self._in_use = side

    def switch_to(self, side: Side) -> None:
        """Put the weights of `side` in place."""
        if side != self._in_use:
            self._use[side]()
            self._in_use = side

    def block(self) -> Block:
        """Two generations a side, ABBA."""
        block = Block()
        pair = 0
        for prefill in range(2):
            generations: dict[Side, Generation] = {}
            for side in _order(prefill):
                self.switch_to(side)
                generations[side] = self._prefill(block, side)
            for tokens in self._turns if self._workload.decodes else ():
                for side in _order(pair):
                    self.switch_to(side)
                    block.decode[side].append(self._decode(side, generations[side], tokens))
                pair += 1
            for _ in SIDES:
                self._on_generation()
        return block

    def _prefill(self, block: Block, side: Side) -> Generation:
        samples_s = []
        for _ in range(TURN_PREFILLS):
            generation = self._workload.begin(side)
            samples_s.append(self._stopwatch.time(lambda g=generation: self._workload.prefill(g))[1])  # type: ignore[misc]
        block.prefill[side].append(tuple(samples_s))
        self._workload.get_ready(generation, side)
        return generation

    def _decode(self, side: Side, generation: Generation, tokens: int) -> Turn:
        return tuple(self._stopwatch.time(lambda: self._workload.step(generation, side))[1] for _ in range(tokens))


def turns_of(new_tokens: int) -> tuple[int, ...]:
    """Lengths of the turns of one generation, as even as they can be and none above `TURN_TOKENS`.

    Their number is even where there is more than one token, so that a generation is made of whole ABBA blocks.
    """
    count = 1 if new_tokens == 1 else 2 * -(-new_tokens // (2 * TURN_TOKENS))
    return tuple(new_tokens // count + (index < new_tokens % count) for index in range(count))


def _order(pair: int) -> tuple[Side, Side]:
    return ("subject", "dense") if pair % 2 == 0 else ("dense", "subject")
