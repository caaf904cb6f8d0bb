"""What is measured and how long: one frozen value, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dse.errors import ConfigError, did_you_mean

__all__ = ["MODES", "LatencySpec"]

MODES = ("eager", "compile", "cuda_graph", "fast")
"""Ways to run a generation; see `dse.measurement.executions`."""

_LOWEST = {"blocks": 2, "warmup_blocks": 0, "max_warmup_blocks": 0, "seed": 0}


@dataclass(frozen=True)
class LatencySpec:
    """How a model is measured.

    Attributes:
        prompt_tokens: Length of the prompt, the same for every sequence of the batch.
        new_tokens: Greedy decode steps after the prompt; encoders have none.
        batch_size: Sequences side by side.
        blocks: Least number of counted ABBA blocks (subject, dense, dense, subject), 2 or more for an interval.
        warmup_blocks: ABBA blocks that are run first and never counted.
        max_warmup_blocks: Blocks discarded at most, those included, until two successive ones agree.
        warmup_tolerance: Two blocks agree where the medians of both sides differ by no more than this fraction.
        min_duration_s: Timed work must add up to this many seconds, beside the least number of blocks.
        max_duration_s: No further block begins after this many seconds of timed work, once `blocks` are there.
        precision: Blocks are added until half the 95 % interval of every ratio is no wider than this fraction of it;
            None asks for no precision.
        mode: How a decode step is run: one of `MODES`.
        seed: Seed of the prompt's tokens and of the bootstrap.

    Raises:
        ConfigError: A number is out of its range, or the mode is unknown.
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
                lowest = _LOWEST.get(field.name, 1)
                if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                    raise ConfigError(
                        f"`{field.name} >= {lowest}` must hold for a measurement, but got {field.name}={value!r}; "
                        f"give an integer of at least {lowest}"
                    )
        if self.mode not in MODES:
            raise ConfigError(
                f"the mode of a measurement must be one of {', '.join(MODES)}, but got '{self.mode}'"
                f"{did_you_mean(self.mode, MODES)}"
            )
        for name in ("warmup_tolerance", "precision"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"`0 < {name} < 1` must hold, but got {name}={value!r}; 0.02 is 2 %")
        if not 0 <= self.min_duration_s <= self.max_duration_s:
            raise ConfigError(
                f"`0 <= min_duration_s <= max_duration_s` must hold, but got {self.min_duration_s!r} and "
                f"{self.max_duration_s!r}"
            )

    def eager(self) -> LatencySpec:
        """The same work, kernel by kernel."""
        return replace(self, mode="eager")

    @property
    def cell(self) -> str:
        """The cell of a grid that this is, as records name it: "batch 1, prompt 128, new 16"."""
        return f"batch {self.batch_size}, prompt {self.prompt_tokens}, new {self.new_tokens}"
