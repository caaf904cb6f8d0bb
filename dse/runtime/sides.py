"""A point and the dense model, each in the form that the device runs fastest, to be measured by turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings
from dse.progress import ProgressCallback, ignore_progress
from dse.runtime.forms import FormChoice, Forms, build_forms
from dse.runtime.packing import LaidOutWeights
from dse.runtime.products import Layout

__all__ = ["FastRuntime", "GenerationShape", "Sides", "fast_runtime", "form_choice", "optimise_for_inference"]


class Sides(Protocol):
    """What puts the one or the other side into the resident model; `dse.decomposition.AppliedPoint` is one."""

    def use_candidate(self) -> None:
        """Put the point in."""
        ...

    def use_baseline(self) -> None:
        """Put the dense model back."""
        ...


class FastRuntime:
    """Makes the fast forms of a model's points; those of the dense model are made once and kept.

    Args:
        model: The resident model; whatever is in it now is put aside while forms are built.
        choice: Which form is fastest.
        progress: Told how far the forms of a side are: timing the products of new shapes takes minutes.
    """

    def __init__(self, model: nn.Module, choice: FormChoice, progress: ProgressCallback = ignore_progress) -> None:
        self._model = model
        self._choice = choice
        self._progress = progress
        self._dense: tuple[Forms, LaidOutWeights] | None = None

    @contextlib.contextmanager
    def sides(self, plain: Sides) -> Iterator[Sides]:
        """Sides that put fast forms in, for the length of a `with` block; the plain point is in the model afterwards.

        Args:
            plain: Swaps the plain point and the dense model.

        Raises:
            InvalidMeasurementError: A side's outputs in the fast form differ by more than rounding.
        """
        plain.use_baseline()
        if self._dense is None:
            self._dense = build_forms(self._model, self._choice, progress=self._progress)
        dense, weights = self._dense
        plain.use_candidate()
        point, _ = build_forms(self._model, self._choice, weights, progress=self._progress)
        sides = _FastSides(plain, point, dense)
        try:
            yield sides
        finally:
            sides.remove()
            plain.use_candidate()


class _FastSides:
    def __init__(self, plain: Sides, point: Forms, dense: Forms) -> None:
        self._plain, self._point, self._dense = plain, point, dense
        self._in_use: Forms | None = None
        self.merged = tuple(point.merged)

    def use_candidate(self) -> None:
        self.remove()
        self._plain.use_candidate()
        self._put(self._point)

    def use_baseline(self) -> None:
        self.remove()
        self._plain.use_baseline()
        self._put(self._dense)

    def remove(self) -> None:
        if self._in_use is not None:
            self._in_use.remove()
            self._in_use = None

    def _put(self, forms: Forms) -> None:
        forms.put()
        self._in_use = forms


@dataclass(frozen=True)
class GenerationShape:
    """The passes of one generation, by which forms are chosen: a weight lies in memory once, for all of them.

    Attributes:
        batch_size: Sequences at a time.
        prompt_tokens: Of the one prefill; 0 where prefill does not count.
        new_tokens: Decode steps; 0 where decode does not count.
    """

    batch_size: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 1

    def passes(self, *, of_head: bool = False) -> dict[int, int]:
        """Rows of a product to how often a generation multiplies so many; the head multiplies last positions alone."""
        prefill_rows = self.batch_size * (1 if of_head else self.prompt_tokens)
        found: dict[int, int] = {}
        for rows, count in ((self.batch_size, self.new_tokens), (prefill_rows, int(self.prompt_tokens > 0))):
            if count:
                found[rows] = found.get(rows, 0) + count
        return found


def form_choice(timings: ProductTimings, generation: GenerationShape) -> FormChoice:
    """What the timings found faster, summed over the passes of a generation."""
    head = _choice(timings, generation.passes(of_head=True), is_alone=True)
    return dataclasses.replace(_choice(timings, generation.passes()), head=head)


def _choice(timings: ProductTimings, passes: Mapping[int, int], *, is_alone: bool = False) -> FormChoice:
    def layouts(shapes: Sequence[tuple[int, int]]) -> list[Layout]:
        counts = [_counted(*shape) for shape in shapes]
        if timings.has_kernel:  # products that lie otherwise would part from the others
            return [timings.best_layout_of(sum(counts, Counter()), is_alone=is_alone)] * len(shapes)
        return [timings.best_layout_of(count, is_alone=is_alone) for count in counts]

    def seconds(out_features: int, in_features: int) -> float:
        shapes = _counted(out_features, in_features)
        return timings.total_seconds(shapes, timings.best_layout_of(shapes, is_alone=is_alone))

    def _counted(out_features: int, in_features: int) -> Counter[ProductShape]:
        return Counter({ProductShape(rows, out_features, in_features): count for rows, count in passes.items()})

    return FormChoice(layouts, seconds)


def fast_runtime(
    model: nn.Module, generation: GenerationShape, progress: ProgressCallback = ignore_progress
) -> FastRuntime:
    """The runtime of a model on its own device, by the device's timings, which are measured where they are missing.

    Args:
        model: The resident model.
        generation: What is to be fast.
        progress: As of `FastRuntime`.
    """
    return FastRuntime(model, form_choice(timings_for(model), generation), progress)


def timings_for(model: nn.Module) -> ProductTimings:
    """The timings of the model's device and dtype; its own weights are the footprint."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    footprint = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ProductTimings(first.device, first.dtype, footprint)


def optimise_for_inference(
    model: nn.Module, batch_size: int = 1, *, prompt_tokens: int = 0, new_tokens: int = 1
) -> nn.Module:
    """Put a model's fast forms in for good, in place; its plain weights are let go where nothing else holds them.

    For deployment: what a study measures in mode `fast` runs so. The model can no longer be decomposed or saved.

    Args:
        model: Dense or decomposed, for example loaded from an exported folder; in eval mode.
        batch_size: Sequences at a time.
        prompt_tokens: Of a typical prompt; 0 looks at decode steps alone.
        new_tokens: Of a typical answer; with `prompt_tokens` it says how much decode weighs against prefill.

    Raises:
        InvalidMeasurementError: Its outputs in the fast form differ by more than rounding.
    """
    generation = GenerationShape(batch_size, prompt_tokens, new_tokens)
    forms, _ = build_forms(model, form_choice(timings_for(model), generation), at_once=False)
    forms.put()
    return model
