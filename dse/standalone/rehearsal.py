"""Rehearse the phases of a study on a model of one layer, and scale what they take to the whole model."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from dse.config import StudyConfig
from dse.cost import largest_rank
from dse.decomposition import (
    METHODS,
    CalibrationWindows,
    FactorBank,
    LowRankFactors,
    StoreBudget,
    apply_point,
    calibration_windows,
    held_out_windows,
    longest_window,
)
from dse.decomposition.gradient_grams import GRADIENT_TOKENS
from dse.design_point import PIVOTED, DesignPoint, TensorChoice
from dse.evaluation import evaluator_for
from dse.evaluation.divergence import DenseDivergence
from dse.measurement import LatencySpec, measure_latency, measure_peak_memory
from dse.models import LoadedModel
from dse.models.residency import Residency
from dse.progress import ProgressCallback, ignore_progress
from dse.sensitivity.divergence_meter import DivergenceMeter
from dse.sensitivity.stored_states import layer_modules
from dse.standalone.plan_meters import Peaks, PhaseMeter
from dse.topology import Topology

__all__ = ["PhaseForecast", "Rehearsal"]

_REHEARSED_DOCUMENTS = 24
_FIRST = 0
_COLD_BYTES = 2**28
"""Several times the largest cache of a processor."""


@dataclass(frozen=True)
class PhaseForecast:
    """What one phase of a study takes.

    Attributes:
        phase: load, bank, divergence, profile, trial: evaluate, trial: latency, trial: memory or final evaluation.
        seconds: Each time.
        repeats: How often the phase runs in the study.
        host_bytes: Peak of the process's resident memory.
        gpu_bytes: Peak of GPU memory; 0 on a CPU.
        disk_bytes: Written to disk and kept, or needed for the time of the phase.
        reason: Why there is no forecast of the time; "" otherwise.
    """

    phase: str
    seconds: float
    repeats: int = 1
    host_bytes: int = 0
    gpu_bytes: int = 0
    disk_bytes: int = 0
    reason: str = ""


class Rehearsal:
    """Runs the code of each phase on a model of one layer of the study's model, with the study's settings.

    Time that is spent in the layers is scaled to the depth of the model, the rest is not. Memory is the peak of the
    rehearsal plus the weights, hidden states and factors of the layers that it lacks.

    Args:
        config: The study.
        first_layers: Makes a model of this number of layers.
        topology: The topology of the whole model.
        requests: Method to tensor of the whole model to its largest rank.
        residency: Where the study keeps the weights; see `dse.models.residency`.
    """

    def __init__(
        self,
        config: StudyConfig,
        first_layers: Callable[[int], LoadedModel],
        topology: Topology,
        requests: Mapping[str, Mapping[str, int]],
        residency: Residency = "dense_and_candidate",
    ) -> None:
        self._residency = residency
        small = first_layers(1)
        self.config, self.small, self.topology = config, small, topology
        self._first_layers = first_layers
        self._deep: LoadedModel | None = None
        self._requests = requests
        self._layers: Sequence[nn.Module] = layer_modules(small.model, small.topology)
        self._meter = PhaseMeter(self._layers, small.device)
        self._folder = tempfile.TemporaryDirectory(prefix="dse_plan_")
        self._progress: ProgressCallback = ignore_progress
        decomposed = [topology.part(name).layer for name in self._names(requests)]
        self.decomposed_layers = sorted({layer for layer in decomposed if layer is not None})
        self.small_requests = self._of_one_layer()

    @property
    def depth(self) -> int:
        """Layers of the whole model."""
        return self.topology.layer_count

    @property
    def missing_weight_bytes(self) -> int:
        """Bytes of the weights that the small model lacks."""
        own = sum(p.numel() for p in self.small.model.parameters())
        return (self.topology.parameters_dense - own) * self.small.dtype.itemsize

    def bank(self) -> PhaseForecast:
        """Calibrate and decompose the tensors of one layer."""
        # The first run of every kernel is slow. It must not be multiplied by the number of layers.
        warm_up = Path(self._folder.name) / "warm_up"
        FactorBank.build(self.small, self.small_requests, self._calibration, folder=warm_up)
        in_phase: dict[str, float] = {}
        phase = "decompose" if self._calibration is None else "calibrate"
        since = time.perf_counter()

        def progress(name: str, _done: int, _total: int) -> None:
            nonlocal phase, since
            now = time.perf_counter()
            in_phase[phase] = in_phase.get(phase, 0.0) + now - since
            # The layer is decomposed between the last report of its calibration and the next one.
            phase, since = ("decompose" if name == "decompose" or _done == _total else name), now

        self._progress = progress
        with self._meter.measuring() as peaks:
            count = len(self._bank.folders)
            progress("decompose", count, count)
        layers = len(self.decomposed_layers)
        seconds = peaks.for_layers(layers) - in_phase.get("decompose", 0.0) * (1 - layers)
        on_device, on_disk = self._state_bytes()
        return self._forecast(
            "bank", peaks, seconds, more_device_bytes=on_device, disk_bytes=self.bank_bytes() + on_disk
        )

    def bank_bytes(self) -> int:
        """Size of the factor bank on disk: float32 factors at the largest ranks."""
        total = 0
        for method, ranks in self._requests.items():
            matrices = {name: rank for name, rank in ranks.items() if name not in self.topology.experts_by_name}
            total += FactorBank.stored_bytes(self.topology, method, matrices)
        return total

    def divergence(self, tokens: int) -> tuple[PhaseForecast, PhaseForecast]:
        """The dense side of the KL divergence in set-up, and its measurement in every trial."""
        windows = self._held_out(tokens)
        with self._meter.measuring() as peaks:
            dense = DenseDivergence(self.small.model, windows)
        with self._meter.measuring() as again:
            dense.measure()
        return (
            self._forecast("divergence", peaks, peaks.for_layers(self.depth)),
            self._forecast("trial: divergence", again, again.for_layers(self.depth)),
        )

    def profile(self, options: Mapping[int | None, int]) -> PhaseForecast:
        """The sensitivity profile: one pass for each option, from its layer on.

        Args:
            options: First layer that an option changes to the number of options.
        """
        windows = self._held_out(self.config.search.profile_tokens).to(self.small.device)
        bank = self._bank
        with self._meter.measuring() as peaks:
            meter = DivergenceMeter(self.small, windows, bank)
            with self._meter.measuring() as one:
                meter.measure(self._whole_point(0.5), _FIRST)
        seconds = peaks.for_layers(self.depth) - one.for_layers(self.depth)
        for layer, number in options.items():
            remaining = self.depth if layer is None else self.depth - layer
            seconds += number * one.for_layers(remaining)
        seconds += self.depth * one.layer_seconds  # the dense states before every layer
        return self._forecast("profile", peaks, seconds)

    def evaluation(self, documents_factor: float = 1.0) -> PhaseForecast:
        """A few documents of each task, by the study's evaluator."""
        evaluator = evaluator_for(self.small, self.config.tasks, self.config.evaluation)
        counts = [len(documents) for documents in evaluator.documents.values()]
        share = min(1.0, _REHEARSED_DOCUMENTS * max(1, len(counts)) / max(1, sum(counts)))
        evaluator.evaluate(share=share)  # verifies the ways of sharing, which a study does once
        with self._meter.measuring() as peaks:
            evaluator.evaluate(share=share)
        digests = len(evaluator.digests(share))
        seconds = peaks.for_layers(self.depth) * sum(counts) / max(1, digests) * documents_factor
        return self._forecast("trial: evaluate", peaks, seconds, more_device_bytes=self._candidate_bytes())

    def latency(self, spec: LatencySpec) -> PhaseForecast:
        """Alternating generations of candidate and baseline; the number of blocks follows the study's settings."""
        short = dataclasses.replace(
            spec, blocks=2, warmup_blocks=0, max_warmup_blocks=0, min_duration_s=0.0, precision=None
        )
        model, topology = self._cold.model, self._cold.topology
        meter = PhaseMeter(layer_modules(model, topology), self.small.device)
        depth = topology.layer_count
        of_layer = self._whole_point(0.5)
        point = DesignPoint.of({_in_layer(name, layer): c for layer in range(depth) for name, c in of_layer})
        applied = apply_point(model, topology, point, _EveryLayer(self._bank))
        try:
            measure_latency(model, dataclasses.replace(short, new_tokens=min(2, spec.new_tokens)), applied)
            with meter.measuring() as peaks:
                measure_latency(model, short, applied)
        finally:
            applied.undo()
        block_s = peaks.for_layers(self.depth / depth) / 2
        blocks = max(spec.blocks, math.ceil(spec.min_duration_s / block_s))
        if spec.precision is not None:  # blocks are added until the interval is narrow, at most until max_duration_s
            blocks = max(blocks, math.ceil(0.5 * spec.max_duration_s / block_s))
        return self._forecast(
            "trial: latency",
            peaks,
            (blocks + spec.warmup_blocks + 0.5) * block_s,
            more_device_bytes=self._candidate_bytes(),
        )

    def memory(self, spec: LatencySpec) -> PhaseForecast:
        """The run that reads peak memory."""
        with self._meter.measuring() as peaks:
            measure_peak_memory(self.small.model, spec)
        return self._forecast(
            "trial: memory", peaks, peaks.for_layers(self.depth), more_device_bytes=self._candidate_bytes()
        )

    def close(self) -> None:
        """Delete the factors of the rehearsal."""
        self._folder.cleanup()

    def _forecast(
        self, phase: str, peaks: Peaks, seconds: float, *, more_device_bytes: int = 0, disk_bytes: int = 0
    ) -> PhaseForecast:
        more = self.missing_weight_bytes + more_device_bytes - self._spare_bytes
        on_gpu = self.small.device.type == "cuda"
        waiting = self._waiting_bytes() if phase.startswith("trial") else 0
        return PhaseForecast(
            phase,
            seconds,
            host_bytes=peaks.host_bytes + (waiting if on_gpu else more),
            gpu_bytes=peaks.gpu_bytes + more if on_gpu else 0,
            disk_bytes=disk_bytes + (0 if on_gpu else waiting),
        )

    def _state_bytes(self) -> tuple[int, int]:
        """Hidden states of the calibration text that the rehearsal lacks, in memory, and those that go to disk."""
        if self._calibration is None:
            return 0, 0
        config = self.small.model.config.get_text_config()
        token_bytes = config.hidden_size * self.small.dtype.itemsize
        total = kept = self._calibration.tokens * token_bytes
        if any(METHODS[method].needs_gradients for method in self.small_requests):
            total += self.depth * min(self._calibration.tokens, GRADIENT_TOKENS) * token_bytes
        room = StoreBudget.of(self.small.device).device_bytes
        return max(0, min(total, room) - min(kept, room)), max(0, total - room)

    def _candidate_bytes(self) -> int:
        """Factors of a typical candidate beside the dense weights, in the layers that the rehearsal lacks."""
        if self._residency == "candidate":  # the dense weights that the factors replace wait elsewhere
            return 0
        factors = 0.5 * self.bank_bytes() / max(1, len(self._requests)) / 4 * self.small.dtype.itemsize
        return int(factors * (1 - 1 / max(1, len(self.decomposed_layers))))

    def _waiting_bytes(self) -> int:
        """Dense weights that leave the device during a trial: to host memory from a GPU, to disk from a CPU."""
        if self._residency != "candidate":
            return 0
        tensors = {tensor for name in self._names(self._requests) for tensor in self.topology.tensors_of(name)}
        return sum(self.topology[tensor].parameters for tensor in tensors) * self.small.dtype.itemsize

    def _held_out(self, tokens: int) -> Tensor:
        return held_out_windows(
            self.small.tokenizer, self.config.calibration, tokens, longest_window=longest_window(self.small.model)
        )

    @cached_property
    def _bank(self) -> FactorBank:
        return FactorBank.build(
            self.small, self.small_requests, self._calibration, folder=Path(self._folder.name), progress=self._progress
        )

    @cached_property
    def _calibration(self) -> CalibrationWindows | None:
        if not any(METHODS[method].is_calibrated for method in self.small_requests):
            return None
        return calibration_windows(
            self.small.tokenizer, self.config.calibration, longest_window=longest_window(self.small.model)
        )

    @property
    def _cold(self) -> LoadedModel:
        """A model of so many layers that their weights do not stay in a cache from one token to the next.

        Decoding reads every weight once for each token. From a cache that takes a fraction of the time.
        """
        layer = max(1, self._layer_parameters) * self.small.dtype.itemsize
        layers = min(self.depth, max(1, math.ceil(_COLD_BYTES / layer)))
        if layers == 1:
            return self.small
        self._deep = self._deep or self._first_layers(layers)
        return self._deep

    @property
    def _spare_bytes(self) -> int:
        """Weights of the model for latency, which a study does not hold beside its own."""
        spare = None if self._deep is None else self._deep.model
        return 0 if spare is None else sum(p.numel() for p in spare.parameters()) * self.small.dtype.itemsize

    @property
    def _layer_parameters(self) -> int:
        return sum(p.numel() for layer in self._layers for p in layer.parameters())

    def _whole_point(self, share: float) -> DesignPoint:
        """All tensors of the layer decomposed at this share of their largest rank, by the study's first method."""
        method = next(iter(self.small_requests))
        base = METHODS[method].refit_of or method
        ranks = self.small_requests[method]
        chosen: dict[str, TensorChoice] = {}
        taken: set[str] = set()
        for name, rank in ranks.items():
            members = set(self.small.topology.tensors_of(name))
            if name in self.small.topology.experts_by_name or members & taken:
                continue
            taken |= members
            choice = TensorChoice(base, max(1, int(share * rank)))
            is_single = name in self.small.topology.by_name
            if is_single and rank > largest_rank(self.small.topology.matrix(name), choice):
                choice = dataclasses.replace(choice, form=PIVOTED)  # the only form with such ranks
            chosen[name] = choice
        return DesignPoint.of(chosen)

    def _of_one_layer(self) -> dict[str, dict[str, int]]:
        """The requests of the first decomposed layer, for the names of the small model."""
        if not self.decomposed_layers:
            return {}
        first = self.decomposed_layers[0]
        found: dict[str, dict[str, int]] = {}
        for method, ranks in self._requests.items():
            base = METHODS[method].refit_of or method
            for name, rank in ranks.items():
                if name in self.topology.experts_by_name or self.topology.part(name).layer != first:
                    continue
                own = name.replace(f"layers.{first}.", f"layers.{_FIRST}.")
                of_method = found.setdefault(base, {})
                of_method[own] = max(rank, of_method.get(own, 0))
        return found

    def _names(self, requests: Mapping[str, Mapping[str, int]]) -> list[str]:
        return [name for ranks in requests.values() for name in ranks if name not in self.topology.experts_by_name]


class _EveryLayer:
    """The factors of the first layer for every layer."""

    def __init__(self, bank: FactorBank) -> None:
        self._bank = bank

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        return self._bank.factors(_in_layer(name, _FIRST), choice)


def _in_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return re.sub(r"^layers\.\d+\.", f"layers.{layer}.", name)
