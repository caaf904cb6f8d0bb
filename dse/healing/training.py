"""Train the factors of one point until text of another source stops gaining.

The loss is the KL divergence from the dense model at every position of the training text (knowledge distillation,
Hinton et al. 2015). AdamW steps over shuffled windows, with a linear warm-up, a cosine schedule and clipped gradients.
Windows of another source are evaluated ten times; the best state is kept, and training stops when they get worse.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dse.decomposition import AppliedPoint
from dse.errors import NonFiniteError
from dse.evaluation.divergence import DenseDivergence
from dse.healing.checkpointed_layers import checkpointed_layers
from dse.healing.teacher import Teacher
from dse.healing.trained_weights import TrainedWeights, balance, chosen_indices, trained_modules
from dse.healing.training_state import TrainingState, read_state, write_state
from dse.models import LoadedModel
from dse.out_of_memory import out_of_memory_errors
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["HealedPoint", "HealingReport", "HealingSettings", "heal"]

Result = TypeVar("Result")

FIRST_RATE = 3e-4
_RATE_FACTOR = 3.0
_WARM_UP = 0.05
_LAST_RATE = 0.1
_EVALUATIONS = 10
_EVALUATION_SHARE = 0.2
"""Largest share of a limit of time that evaluations take."""
_SEARCH_SHARE = 0.25
"""Share of a limit of time for the search for a learning rate; the first one is taken if three trials do not fit."""
_LEAST_TRIALS, _LEAST_TRIAL_STEPS = 3, 2
_PATIENCE = 3
_SAVE_EVERY_S = 120.0
_REMEDY = "lower `healing.batch_tokens`, or use `model.dtype: bfloat16`"


@dataclass(frozen=True)
class HealingSettings:
    """How long and how fast to train.

    Attributes:
        tokens: Tokens to train on in all; windows repeat if the text is shorter.
        minutes: Limit of the whole healing; the schedule is fitted to it. None for no limit.
        batch_tokens: Tokens of one step.
        learning_rate: Peak of the schedule; None finds it on the first steps.
        seed: Order of the windows.
        checkpoints_layers: Whether layers are computed again in the backward pass, which saves their activations. None
            does so on a GPU.
    """

    tokens: int = 65_536
    minutes: float | None = None
    batch_tokens: int = 512
    learning_rate: float | None = None
    seed: int = 0
    checkpoints_layers: bool | None = None


@dataclass(frozen=True)
class HealingReport:
    """What healing did.

    Attributes:
        kl_before: KL divergence on the text of another source before, in nats per token.
        kl_after: After.
        history: Tokens trained and that divergence, for every evaluation.
        learning_rate: Peak of the schedule.
        rates_tried: Learning rate to the divergence after the first steps.
        tokens: Tokens trained, without the search for a learning rate.
        best_tokens: Tokens after which the kept state was reached.
        seconds: In all, summed over interruptions.
        parameters: Number of weights that were trained.
        text: The training text.
    """

    kl_before: float
    kl_after: float
    history: tuple[tuple[int, float], ...]
    learning_rate: float
    rates_tried: Mapping[str, float]
    tokens: int
    best_tokens: int
    seconds: float
    parameters: int
    text: str

    def to_json(self) -> dict[str, Any]:
        """The attributes as a JSON mapping."""
        return asdict(self) | {"history": [list(entry) for entry in self.history]}


@dataclass(frozen=True)
class HealedPoint:
    """Trained weights by their name in the decomposed model, in the model's dtype on the CPU, and the report."""

    weights: Mapping[str, Tensor]
    report: HealingReport


def heal(
    loaded: LoadedModel,
    applied: AppliedPoint,
    teacher: Teacher,
    other: DenseDivergence,
    settings: HealingSettings,
    *,
    folder: Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> HealedPoint:
    """Train the weights of an applied point. The model holds the point's own weights again afterwards.

    Args:
        loaded: The model, with the point applied.
        applied: The point.
        teacher: The dense model on the training text.
        other: The dense model on text of another source.
        settings: How long and how fast.
        folder: Where the state is kept, so that a killed healing continues; None to start afresh.
        progress: Called as ("learning rate 3e-04", steps, steps) and ("heal (KL 0.1234)", tokens, tokens), with the
            rate that is tried and the latest divergence.

    Raises:
        NonFiniteError: The loss became NaN or infinite at every learning rate.
        OutOfMemoryError: The device has too little memory for a step.
        StorageFullError: The state cannot be written.
    """
    model = loaded.model
    weights = TrainedWeights(trained_modules(model, loaded.topology, applied.point))
    device_is_gpu = loaded.device.type == "cuda"
    checkpoints = device_is_gpu if settings.checkpoints_layers is None else settings.checkpoints_layers
    try:
        balance(model, loaded.topology, applied.point, weights.masters)
        weights.publish()
        with out_of_memory_errors("healing", _REMEDY), checkpointed_layers(loaded, is_on=checkpoints):
            chosen = chosen_indices(model, loaded.topology, applied.point)
            run = _Run(weights, teacher, other, settings, folder, progress, chosen)
            state = run.train()
        weights.load(state.best)
        report = HealingReport(
            state.kl_before,
            state.best_kl,
            tuple(state.history),
            state.learning_rate,
            state.rates_tried,
            state.step * run.step_tokens,
            state.best_step * run.step_tokens,
            state.seconds,
            weights.count,
            teacher.windows.description,
        )
        return HealedPoint(weights.final() | chosen, report)
    finally:
        weights.restore()


class _Run:
    """One healing: the search for a learning rate, then training with evaluations."""

    def __init__(
        self,
        weights: TrainedWeights,
        teacher: Teacher,
        other: DenseDivergence,
        settings: HealingSettings,
        folder: Path | None,
        progress: ProgressCallback,
        chosen: Mapping[str, Tensor],
    ) -> None:
        indices = [(name, own.tolist()) for name, own in chosen.items()]
        self._chosen = hashlib.sha256(repr(indices).encode()).hexdigest()[:16] if chosen else ""
        self._weights, self._teacher, self._other = weights, teacher, other
        self._settings, self._folder, self._progress = settings, folder, progress
        count, window = teacher.windows.token_ids.shape
        self._rows_per_step = max(1, min(count, settings.batch_tokens // window))
        self.step_tokens = self._rows_per_step * window
        self._started = time.monotonic()
        self._earlier_s = 0.0

    def train(self) -> TrainingState:
        """Train, or continue a training that was killed."""
        identity = f"{self._teacher.windows.fingerprint} {self._other.fingerprint} {self._settings}{self._chosen}"
        state = None if self._folder is None else read_state(self._folder, identity)
        if state is None:
            state = self._start(identity)
        self._earlier_s = state.seconds
        self._weights.load(state.masters)
        optimizer = self._optimizer(state.learning_rate)
        if state.moments:
            state.restore_moments(optimizer, self._weights.masters)
        saved = time.monotonic()
        while state.step < state.steps and not self._is_over(state):
            self._set_rate(optimizer, state.learning_rate * _schedule(state.step, state.steps))
            self._step(optimizer, state.step)
            state.step += 1
            self._report(state)
            if state.step % state.evaluated_every == 0 or state.step == state.steps:
                state.note(self._kl(), self._weights, self.step_tokens)
            if self._folder is not None and time.monotonic() - saved > _SAVE_EVERY_S:
                self._save(state, optimizer)
                saved = time.monotonic()
        if state.step and (not state.history or state.history[-1][0] != state.step * self.step_tokens):
            state.note(self._kl(), self._weights, self.step_tokens)  # the limit of time fell between two evaluations
        state.seconds = self._seconds()
        return state

    def _start(self, identity: str) -> TrainingState:
        """The state before the first step, with a learning rate and a schedule that fits the limit of time."""
        before, kl_s = self._timed(self._kl)
        start = self._weights.state()
        steps = max(1, math.ceil(self._settings.tokens / self.step_tokens))
        step_s = 0.0 if self._settings.minutes is None else self._seconds_of_a_step(start)
        rate, tried = self._settings.learning_rate, dict[str, float]()
        if rate is None:
            rate, tried = self._found_rate(start, max(3, steps // 20), kl_s, step_s)
        evaluations, left_s = _EVALUATIONS, self._seconds_left()
        if math.isfinite(left_s):
            evaluations = min(evaluations, max(2, int(_EVALUATION_SHARE * left_s / kl_s)))
            steps = max(1, min(steps, int((left_s - evaluations * kl_s) / step_s)))
        return TrainingState(identity, steps, math.ceil(steps / evaluations), rate, before, tried, start)

    def _seconds_of_a_step(self, start: Mapping[str, Tensor]) -> float:
        optimizer, step_s = self._optimizer(0.0), 0.0
        for step in range(2):  # the first step is slow
            _, step_s = self._timed(partial(self._step, optimizer, step))
        self._weights.load(start)
        return step_s

    def _found_rate(
        self, start: Mapping[str, Tensor], steps: int, kl_s: float, step_s: float
    ) -> tuple[float, dict[str, float]]:
        """A learning rate and the divergences of those that were tried: none if the limit leaves no time for it."""
        limit_s = _SEARCH_SHARE * self._seconds_left()
        if math.isfinite(limit_s):
            steps = min(steps, int((limit_s / _LEAST_TRIALS - kl_s) / step_s))
        return self._best_rate(start, steps, limit_s) if steps >= _LEAST_TRIAL_STEPS else (FIRST_RATE, {})

    def _seconds_left(self) -> float:
        """Seconds within the limit; infinite without one."""
        return math.inf if self._settings.minutes is None else self._settings.minutes * 60 - self._seconds()

    @staticmethod
    def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
        """The result and its seconds."""
        begin = time.monotonic()
        return work(), time.monotonic() - begin

    def _best_rate(self, start: Mapping[str, Tensor], steps: int, limit_s: float) -> tuple[float, dict[str, float]]:
        """Climb over rates that differ by a factor of three, from the first one in the direction that is better.

        Args:
            start: The weights that every trial starts from.
            steps: Steps of a trial.
            limit_s: No further rate is tried after this time.
        """
        found: dict[float, float] = {}
        begin = time.monotonic()

        def divergence(rate: float) -> float:
            if rate not in found:
                if found and time.monotonic() - begin > limit_s:
                    return math.inf
                found[rate] = self._try(rate, steps)
                self._weights.load(start)
            return found[rate]

        rate = FIRST_RATE
        up = divergence(rate) > divergence(rate * _RATE_FACTOR)
        factor = _RATE_FACTOR if up else 1 / _RATE_FACTOR
        while divergence(rate * factor) < divergence(rate):
            rate *= factor
        if not math.isfinite(found[rate]):
            raise NonFiniteError(
                f"healing must keep a finite loss, but it is not finite at learning rates {sorted(found)};"
                " the point cannot be healed"
            )
        return rate, {f"{key:.1e}": value for key, value in sorted(found.items())}

    def _try(self, rate: float, steps: int) -> float:
        """The divergence after a few steps; infinite if the loss is not finite."""
        optimizer = self._optimizer(rate)
        try:
            for step in range(steps):
                self._progress(f"learning rate {rate:.0e}", step, steps)
                self._set_rate(optimizer, rate * min(1.0, (step + 1) / max(1, steps // 2)))
                self._step(optimizer, step)
            return self._kl()
        except NonFiniteError:
            return math.inf

    def _optimizer(self, rate: float) -> torch.optim.AdamW:
        masters = list(self._weights.masters.values())
        return torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _set_rate(self, optimizer: torch.optim.AdamW, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _step(self, optimizer: torch.optim.AdamW, step: int) -> None:
        loss = self._teacher.backward(self._rows(step))
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of healing must be finite, but it is {loss} in step {step + 1}")
        self._weights.gather_gradients()
        torch.nn.utils.clip_grad_norm_(self._weights.masters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._weights.publish()

    def _rows(self, step: int) -> list[int]:
        """Windows of a step: every epoch visits all windows in an order of its own."""
        count = len(self._teacher.windows.token_ids)
        first = step * self._rows_per_step
        return [self._order(place // count)[place % count] for place in range(first, first + self._rows_per_step)]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self._teacher.windows.token_ids), generator=generator).tolist()

    def _kl(self) -> float:
        return self._other.measure().interval.value

    def _is_over(self, state: TrainingState) -> bool:
        return state.evaluations_without_gain >= _PATIENCE or self._seconds_left() <= 0

    def _seconds(self) -> float:
        return self._earlier_s + time.monotonic() - self._started

    def _report(self, state: TrainingState) -> None:
        kl = state.history[-1][1] if state.history else state.kl_before
        self._progress(f"heal (KL {kl:.4f})", state.step * self.step_tokens, state.steps * self.step_tokens)

    def _save(self, state: TrainingState, optimizer: torch.optim.AdamW) -> None:
        assert self._folder is not None  # noqa: S101 - checked by the caller
        state.seconds = self._seconds()
        state.take(optimizer, self._weights.masters)
        write_state(self._folder, state)


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to a tenth."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
