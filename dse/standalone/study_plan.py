"""Forecast what a study needs before anything runs: memory, disk and seconds by phase, documents, what to change."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dse.config import StudyConfig
from dse.errors import ModelError
from dse.evaluation.statistics.power import smallest_detectable_drop
from dse.files import cache_dir
from dse.models import load_topology
from dse.models.checkpoint import open_checkpoint
from dse.models.load import default_dtype
from dse.models.miniature import first_layers
from dse.models.model_source import resolve
from dse.models.residency import Residency, choose_residency, free_bytes, visible_devices
from dse.pareto import Objective
from dse.search.space_sensitivity import profile_options
from dse.search.spaces.base import SearchSpace
from dse.search.user_points import checked_user_points
from dse.standalone.plan_meters import available_bytes, resident_bytes
from dse.standalone.rehearsal import PhaseForecast, Rehearsal
from dse.study import StudyListener
from dse.topology import Topology
from dse.trial.measurement_plan import MeasurementPlan, open_study_meter
from dse.trial.objectives import RequiredMeasurements, required_measurements, resolve_objectives
from dse.workers.setup import bank_requests, resolve_device

__all__ = ["plan_study"]

_READ_BYTES = 2**28
_DISCORDANCE = 0.1
"""Share of documents on which a point and the dense model disagree, for the number of documents that a study needs."""


@dataclass(frozen=True)
class _Place:
    """A kind of memory: what is there, and what each phase needs of it."""

    name: str
    available: int | None
    needed: int
    phase: str


def plan_study(
    config: StudyConfig, *, tolerance: float = 0.02, out: Path | None = None, listener: StudyListener | None = None
) -> dict[str, Any]:
    """What a study needs and whether this machine has it, from the model's config and timings of one layer.

    Args:
        config: The study.
        tolerance: Drop in accuracy that the study should tell apart from none, as a fraction.
        out: The study's folder; None for the present folder.
        listener: Receives messages.

    Returns:
        JSON document: `fits`, `phases`, `resources`, `documents`, `advice`, `total_s` and what the forecast is for.

    Raises:
        UserError: The study file, its model, tasks or calibration text are not valid.
    """
    watcher = listener or StudyListener()
    device = resolve_device(config.model.device)
    config = _with_dtype(config, device)
    meter, problem = open_study_meter(config, device)
    objectives, _ = resolve_objectives(config, problem)
    topology = load_topology(
        config.model.ref,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        role_names=config.space.role_names,
        dtype=config.model.dtype,
    )
    settled = _with_settled_multiple(config)
    space = SearchSpace.from_config(settled.constrained_space, topology)
    watcher.on_message(f"rehearsing the study on one layer of {config.model.ref} with random weights")
    first = partial(
        first_layers,
        config.model.ref,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=str(device),
        trust_remote_code=config.model.trust_remote_code,
        role_names=config.space.role_names,
        head=config.head,
    )
    requests = bank_requests(space, checked_user_points(settled, space))
    residency = _residency(settled, topology, device)
    rehearsal = Rehearsal(settled, first, topology, requests, residency)
    plan = MeasurementPlan.of(settled, meter)
    try:
        phases = [_load(settled, topology, device), *_phases(settled, rehearsal, plan, objectives, space, watcher)]
    finally:
        rehearsal.close()
    documents = _documents(settled, tolerance)
    places = _places(phases, device, out or Path())
    advice = [*_memory_advice(settled, places), *_documents_advice(settled, documents, tolerance)]
    return {
        "study": config.name,
        "model": config.model.ref,
        "parameters": topology.parameters_dense,
        "layers": topology.layer_count,
        "device": str(device),
        "dtype": config.model.dtype,
        "residency": residency,
        "trials": config.budget.trials,
        "fits": all(place.available is None or place.needed <= place.available for place in places),
        "total_s": sum(phase.seconds * phase.repeats for phase in phases),
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "resources": [dataclasses.asdict(place) for place in places],
        "documents": documents,
        "advice": advice,
    }


def _with_dtype(config: StudyConfig, device: torch.device) -> StudyConfig:
    """The study with the dtype that `auto` means on this device."""
    model = config.model
    if model.dtype != "auto":
        return config
    dtype = default_dtype(model.ref, device, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return config.model_copy(update={"model": model.model_copy(update={"dtype": dtype})})


def _phases(
    config: StudyConfig,
    rehearsal: Rehearsal,
    plan: MeasurementPlan,
    objectives: Sequence[Objective],
    space: SearchSpace,
    listener: StudyListener,
) -> Iterator[PhaseForecast]:
    """The phases after loading, in the order of a study."""
    required = required_measurements(
        objectives, bool(config.tasks), has_grid=len(plan.cells) > 1, has_meter=config.measurement.meter is not None
    )
    trials = config.budget.trials

    def reported(phase: PhaseForecast) -> PhaseForecast:
        listener.on_message(f"  {phase.phase}: {phase.seconds:.1f} s")
        return phase

    if rehearsal.small_requests:
        yield reported(rehearsal.bank())
    if tokens := _divergence_tokens(config, required):
        once, every = rehearsal.divergence(tokens)
        yield reported(once)
        yield reported(dataclasses.replace(every, repeats=trials - 1))
    if rehearsal.small_requests and (options := profile_options(config, rehearsal.topology, space)):
        yield reported(rehearsal.profile(options))
    if config.tasks:
        yield reported(dataclasses.replace(rehearsal.evaluation(), repeats=trials))
    if config.measurement.is_external:
        reason = "a serving engine measures this study; its start and its speed are not rehearsed"
        yield PhaseForecast("trial: engine", 0.0, trials, reason=reason)
    elif rehearsal.small_requests and required.latency:
        yield reported(_all_cells(rehearsal, plan, trials))
    if required.memory:
        yield reported(dataclasses.replace(rehearsal.memory(plan.cells[0]), repeats=trials))
    if required.energy and plan.meter is not None:
        seconds = 2.0 * plan.energy_windows * (1 if plan.energy_precision is None else 4)
        yield PhaseForecast("trial: energy", seconds, trials)
    if config.fidelity is not None and config.fidelity.final_documents and config.tasks:
        limit = sum(_limits(config))
        factor = config.fidelity.final_documents * len(config.tasks) / max(1, limit)
        front = max(1, trials // 4)
        yield reported(dataclasses.replace(rehearsal.evaluation(factor), phase="final evaluation", repeats=front + 1))


def _all_cells(rehearsal: Rehearsal, plan: MeasurementPlan, trials: int) -> PhaseForecast:
    cells = [rehearsal.latency(spec) for spec in plan.cells]
    largest = max(cells, key=lambda cell: cell.host_bytes + cell.gpu_bytes)
    return dataclasses.replace(largest, seconds=sum(cell.seconds for cell in cells), repeats=trials)


def _load(config: StudyConfig, topology: Topology, device: torch.device) -> PhaseForecast:
    """Read a part of the weights as loading does, or count them as a download if they are not here."""
    weights = topology.parameters_dense * getattr(torch, config.model.dtype).itemsize
    on_gpu = device.type == "cuda"
    host, gpu = resident_bytes() + (0 if on_gpu else weights), weights if on_gpu else 0
    source = resolve(config.model.ref, config.model.revision)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    if not source.has_weights:
        return PhaseForecast("load", 0.0, 1, host, gpu, weights, "the weights are not on this machine")
    try:
        seconds = _load_seconds(config, source, dtype, device, topology)
    except (ModelError, OSError):
        seconds = None
    if seconds is None:
        return PhaseForecast("load", 0.0, 1, host, gpu, 0, "the weights cannot be read one by one")
    return PhaseForecast("load", seconds, 1, host, gpu)


def _load_seconds(
    config: StudyConfig, source: Any, dtype: torch.dtype, device: torch.device, topology: Topology
) -> float | None:
    from dse.models.checkpoint import model_without_weights
    from dse.models.heads import model_factory
    from dse.models.load import read_config

    if source.gguf_file is not None:
        return _gguf_seconds(Path(source.location) / source.gguf_file, topology)
    description = read_config(config.model.ref, source, config.model.trust_remote_code)
    model = model_without_weights(model_factory(description, config.model.trust_remote_code), description, dtype)
    checkpoint = open_checkpoint(source, model, dtype)
    if checkpoint is None:
        return None
    names, chosen, total = list(checkpoint.places), [], 0
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    for name in names:
        if total * dtype.itemsize >= _READ_BYTES:
            break
        chosen.append(name)
        total += sizes.get(name, 0)
    start = time.perf_counter()
    for _ in checkpoint.read(chosen, device):
        pass
    return (time.perf_counter() - start) * topology.parameters_dense / max(1, total)


def _gguf_seconds(path: Path, topology: Topology) -> float | None:
    """Seconds to read and dequantise a GGUF file, from some of its tensors."""
    from gguf import GGUFReader, dequantize

    start = time.perf_counter()
    tensors = GGUFReader(path).tensors  # reads the vocabulary, once
    opened, total = time.perf_counter(), 0
    for tensor in tensors:
        total += dequantize(tensor.data, tensor.tensor_type).size
        if total >= _READ_BYTES // 8:
            break
    return opened - start + (time.perf_counter() - opened) * topology.parameters_dense / max(1, total)


def _residency(config: StudyConfig, topology: Topology, device: torch.device) -> Residency:
    """Where the study keeps its weights: as in the file, or what `auto` chooses with the memory that is free now."""
    if config.residency != "auto":
        return config.residency
    if device.type != "cuda":
        return "dense_and_candidate"
    free = [free_bytes(one) or 0 for one in visible_devices(device)]
    weights = topology.parameters_dense * getattr(torch, config.model.dtype).itemsize
    return choose_residency(weights, free) or "candidate"


def _with_settled_multiple(config: StudyConfig) -> StudyConfig:
    """The study with a rank multiple of 8 if it leaves the multiple to the device, which is timed when it runs."""
    if config.space.ranks.multiple != "device":
        return config
    return config.model_copy(update={"space": config.space.at_multiple(8)})


def _divergence_tokens(config: StudyConfig, required: RequiredMeasurements) -> int:
    if required.divergence:
        return config.evaluation.divergence_tokens
    return 0 if config.fidelity is None else config.fidelity.proxy_tokens


def _limits(config: StudyConfig) -> list[int]:
    """Documents of each task as far as the study file limits them; 0 for all of a task."""
    return [task.limit or config.evaluation.limit or 0 for task in config.tasks]


def _documents(config: StudyConfig, tolerance: float) -> dict[str, Any]:
    """Documents of the study, the drop that they tell apart, and the documents that the tolerance needs."""
    limits = _limits(config)
    total = None if not limits or 0 in limits else sum(limits)
    needed = 8
    while (found := smallest_detectable_drop(round(needed * _DISCORDANCE), needed)) is None or found > tolerance:
        needed = max(needed + 1, int(needed * 1.05))
    smallest = None if total is None else smallest_detectable_drop(round(total * _DISCORDANCE), total)
    return {
        "total": total,
        "tolerance": tolerance,
        "needed": needed,
        "smallest_detectable_drop": smallest,
        "assumed_disagreement": _DISCORDANCE,
    }


def _places(phases: Sequence[PhaseForecast], device: torch.device, out: Path) -> list[_Place]:
    """Each kind of memory with the phase that needs most of it."""
    host = max(phases, key=lambda phase: phase.host_bytes)
    found = [_Place("cpu memory", available_bytes(), host.host_bytes, host.phase)]
    if device.type == "cuda":
        gpu = max(phases, key=lambda phase: phase.gpu_bytes)
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
        found.append(_Place("gpu memory", free + own, gpu.gpu_bytes, gpu.phase))
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    disk = max(phases, key=lambda phase: phase.disk_bytes)
    total = sum(phase.disk_bytes for phase in phases if not phase.phase.startswith("trial"))
    total += max((phase.disk_bytes for phase in phases if phase.phase.startswith("trial")), default=0)
    return [*found, _Place("disk", shutil.disk_usage(folder).free, total, disk.phase)]


def _memory_advice(config: StudyConfig, places: Sequence[_Place]) -> Iterator[str]:
    """What to change in the study file for each kind of memory that does not suffice."""
    for place in places:
        if place.available is None or place.needed <= place.available:
            continue
        if place.name == "disk":
            yield "set the environment variable DSE_CACHE to a folder on a larger disk"
            yield "lower the ranks: `space: {ranks: {kept_fractions: [...]}}` or `space: {ranks: {absolute: [...]}}`"
            continue
        if config.model.dtype == "float32":
            yield "halve the weights: `model: {dtype: bfloat16}`"
        if place.name == "gpu memory":
            if config.residency != "candidate":
                yield "keep one side of a trial on the device: `residency: candidate`"
            if torch.cuda.device_count() > 1 and config.residency != "sharded":
                yield "spread the layers over all GPUs: `residency: sharded`"
            yield "use the CPU's memory: `model: {device: cpu}`"
        if place.phase == "bank":
            yield "lower the memory of the bank: leave wide tensors out of `space: {roles: [...]}`"
        elif place.phase == "profile":
            yield "lower the memory of the profile: `search: {profile_tokens: 256}`, or `search: off` to omit it"
        elif "divergence" in place.phase:
            yield "lower the memory of the divergence: `evaluation: {divergence_tokens: 1024}`"
        elif place.phase in ("trial: evaluate", "final evaluation"):
            yield "lower the memory of a batch: `evaluation: {batch_size: 4}` or `evaluation: {max_length: 1024}`"
        elif place.phase in ("trial: latency", "trial: memory"):
            yield "lower the KV cache: `measurement: {batch_size: 1, prompt_tokens: 64}`"
        yield f"use a model of at most {place.available / place.needed:.0%} of this size: `model: {{ref: ...}}`"


def _documents_advice(config: StudyConfig, documents: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    total, needed = documents["total"], documents["needed"]
    if config.tasks and total is not None and total < needed:
        each = -(-needed // len(config.tasks))
        yield (
            f"to tell a drop of {100 * tolerance:g} points apart from none: `evaluation: {{limit: {each}}}` for each"
            " task, or `fidelity: {final_documents: ...}` for the front alone"
        )
