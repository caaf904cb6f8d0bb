"""Alternate candidate and baseline at the granularity of two prefills or a few decoded tokens.

A noisy machine is slow for milliseconds or for seconds at a time. Two adjacent turns share most of that, so their ratio
keeps little of it. Within a turn disturbances only ever add time, so its fastest sample stands for the turn; the
fastest sample also excludes the first call after a swap (Chen and Revels 2016, "Robust benchmarking in noisy
environments"). Turns follow the order candidate, baseline, baseline, candidate (ABBA), so linear drift within a block
affects both equally. All samples are kept for the reported spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from dse.measurement.clock import Stopwatch
from dse.measurement.execution import VARIANTS, Generation, Variant
from dse.measurement.workload import Workload

__all__ = ["TURN_PREFILLS", "TURN_TOKENS", "Alternation", "Block", "ModelSwap", "Turn", "turn_lengths"]

Turn = tuple[float, ...]

TURN_TOKENS = 4
"""Maximum number of tokens in one turn: enough for an undisturbed one, short compared with longer disturbances."""

TURN_PREFILLS = 2
"""Prefills in one turn; the generation of the second one is decoded."""


class ModelSwap(Protocol):
    """Swaps the weights of the one resident model; `dse.decomposition.AppliedPoint` is one."""

    def use_candidate(self) -> None:
        """Put the design point's modules in place."""

    def use_baseline(self) -> None:
        """Put the dense modules back."""


@dataclass
class Block:
    """Samples of one ABBA block: two generations of each variant.

    The k-th turns of both variants are adjacent in time.

    Attributes:
        prefill: Turns of prefill by variant; each turn holds seconds per prompt.
        decode: Turns of decode by variant; each turn holds seconds per token.
    """

    prefill: dict[Variant, list[Turn]] = field(default_factory=lambda: {variant: [] for variant in VARIANTS})
    decode: dict[Variant, list[Turn]] = field(default_factory=lambda: {variant: [] for variant in VARIANTS})

    @property
    def phases(self) -> dict[str, dict[Variant, list[Turn]]]:
        """`prefill` and `decode` by name."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def samples_s(self) -> list[float]:
        """Every timing in the block."""
        turns = [turn for phase in (self.prefill, self.decode) for turns in phase.values() for turn in turns]
        return [sample for turn in turns for sample in turn]

    @property
    def duration_s(self) -> float:
        """Timed work in the block."""
        return sum(self.samples_s)


class Alternation:
    """Runs ABBA blocks on the one resident model, whose weights are swapped between turns, outside the clock.

    Args:
        workload: The measured work.
        stopwatch: Times one call.
        new_tokens: Decode steps of a generation.
        swap: Swaps the weights; called only when the variant changes.
        on_generation: Called after every generation.
    """

    def __init__(
        self,
        workload: Workload,
        stopwatch: Stopwatch,
        new_tokens: int,
        swap: ModelSwap,
        on_generation: Callable[[], None] = lambda: None,
    ) -> None:
        self._workload = workload
        self._stopwatch = stopwatch
        self._turns = turn_lengths(new_tokens)
        self._swap = swap
        self._on_generation = on_generation
        self._in_use: Variant | None = None

    def assume(self, variant: Variant) -> None:
        """State that the weights of `variant` are already in place."""
        self._in_use = variant

    def switch_to(self, variant: Variant) -> None:
        """Put the weights of `variant` in place."""
        if variant != self._in_use:
            (self._swap.use_candidate if variant == "candidate" else self._swap.use_baseline)()
            self._in_use = variant

    def block(self) -> Block:
        """Run two generations of each variant in ABBA order."""
        block = Block()
        pair = 0
        for prefill in range(2):
            generations: dict[Variant, Generation] = {}
            for variant in _order(prefill):
                self.switch_to(variant)
                generations[variant] = self._prefill(block, variant)
            for tokens in self._turns if self._workload.decodes else ():
                for variant in _order(pair):
                    self.switch_to(variant)
                    block.decode[variant].append(self._decode(variant, generations[variant], tokens))
                pair += 1
            for _ in VARIANTS:
                self._on_generation()
        return block

    def _prefill(self, block: Block, variant: Variant) -> Generation:
        samples_s = []
        for _ in range(TURN_PREFILLS):
            generation = self._workload.begin(variant)
            samples_s.append(self._stopwatch.time(lambda g=generation: self._workload.prefill(g))[1])  # type: ignore[misc]
        block.prefill[variant].append(tuple(samples_s))
        self._workload.prepare(generation, variant)
        return generation

    def _decode(self, variant: Variant, generation: Generation, tokens: int) -> Turn:
        return tuple(self._stopwatch.time(lambda: self._workload.step(generation, variant))[1] for _ in range(tokens))


def turn_lengths(new_tokens: int) -> tuple[int, ...]:
    """Tokens in each turn of one generation, as even as possible and at most `TURN_TOKENS`.

    The number of turns is even for more than one token, so that a generation consists of whole ABBA blocks.
    """
    count = 1 if new_tokens == 1 else 2 * -(-new_tokens // (2 * TURN_TOKENS))
    return tuple(new_tokens // count + (index < new_tokens % count) for index in range(count))


def _order(pair: int) -> tuple[Variant, Variant]:
    return ("candidate", "baseline") if pair % 2 == 0 else ("baseline", "candidate")
