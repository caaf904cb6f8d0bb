"""Settings of a measurement: one frozen value, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dse.errors import ConfigError, did_you_mean

__all__ = ["MODES", "LatencySpec"]

MODES = ("eager", "compile", "cuda_graph")
"""How a decode step is executed; see `dse.measurement.modes`."""

_MINIMUM = {"blocks": 2, "warmup_blocks": 0, "max_warmup_blocks": 0, "seed": 0}


@dataclass(frozen=True)
class LatencySpec:
    """How a model is measured.

    Attributes:
        prompt_tokens: Prompt length, the same for every sequence of the batch.
        new_tokens: Greedy decode steps after the prompt; encoders have none.
        batch_size: Number of sequences.
        blocks: Minimum number of counted ABBA blocks (candidate, baseline, baseline, candidate); an interval needs 2.
        warmup_blocks: ABBA blocks that run first and never count.
        max_warmup_blocks: Maximum number of discarded blocks, `warmup_blocks` included, until two successive blocks
            agree.
        warmup_tolerance: Two blocks agree if the medians of both models differ by at most this fraction.
        min_duration_s: Minimum timed work in seconds, in addition to the minimum number of blocks.
        max_duration_s: No further block starts after this many seconds of timed work, once there are `blocks`.
        precision: Blocks are added until half the 95 % interval of every ratio is within this fraction of it; None adds
            no blocks for precision.
        mode: How a decode step is executed: one of `MODES`.
        seed: Seed of the prompt tokens and of the bootstrap.

    Raises:
        ConfigError: A number is out of range, or the mode is unknown.
    """

    prompt_tokens: int = 128
    new_tokens: int = 16
    batch_size: int = 1
    blocks: int = 4
    warmup_blocks: int = 1
    max_warmup_blocks: int = 6
    warmup_tolerance: float = 0.1
    min_duration_s: float = 0.0
    max_duration_s: float = 60.0
    precision: float | None = None
    mode: str = "eager"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                minimum = _MINIMUM.get(field.name, 1)
                if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                    raise ConfigError(
                        f"`{field.name} >= {minimum}` must hold for a measurement, but got {field.name}={value!r}; "
                        f"use an integer of at least {minimum}"
                    )
        if self.mode not in MODES:
            raise ConfigError(
                f"the mode of a measurement must be one of {', '.join(MODES)}, but got '{self.mode}'"
                f"{did_you_mean(self.mode, MODES)}"
            )
        for name in ("warmup_tolerance", "precision"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"`0 < {name} < 1` must hold, but got {name}={value!r}; 0.02 means 2 %")
        if not 0 <= self.min_duration_s <= self.max_duration_s:
            raise ConfigError(
                f"`0 <= min_duration_s <= max_duration_s` must hold, but got {self.min_duration_s!r} and "
                f"{self.max_duration_s!r}"
            )

    def eager(self) -> LatencySpec:
        """The same work in mode eager."""
        return replace(self, mode="eager")

    @property
    def cell(self) -> str:
        """Name of this grid cell in records: "batch 1, prompt 128, new 16"."""
        return f"batch {self.batch_size}, prompt {self.prompt_tokens}, new {self.new_tokens}"
