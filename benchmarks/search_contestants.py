"""The contestants of `benchmarks/search.py`: lists of points by rule, plain samplers, and dse's own search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from search_arena import Arena, EvaluatedPoint, log

from dse import DesignPoint, TensorChoice, point_cost
from dse.cost import largest_rank
from dse.decomposition import iterate_grams
from dse.decomposition.factors import as_matrix
from dse.files import write_json
from dse.model_parts import DecomposableTensor
from dse.sensitivity import DivergenceMeter

__all__ = ["CONTESTANTS", "Contestant"]

ROOT = Path(__file__).resolve().parent.parent
ASVD_FRACTIONS = (0.9, 0.7, 0.5, 0.3, 0.1)


@dataclass(frozen=True)
class Contestant:
    """One way to choose points.

    Attributes:
        title: For tables and plots.
        run: Maps `(arena, seed, evaluations)` to the evaluated points, in order.
        is_random: Whether the result depends on the seed.
    """

    title: str
    run: Callable[[Arena, int, int], Sequence[EvaluatedPoint]]
    is_random: bool = False


# --- lists of points ------------------------------------------------------------------------------------------------


def from_list(
    points: Callable[[Arena, int], Iterator[tuple[str, DesignPoint]]],
) -> Callable[[Arena, int, int], list[EvaluatedPoint]]:
    """A contestant that evaluates a list of points; `points` maps arena and budget to origins and points."""

    def run(arena: Arena, seed: int, evaluations: int) -> list[EvaluatedPoint]:
        return [arena.evaluate(point, origin) for origin, point in points(arena, evaluations)]

    return run


def paper_points(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Rank 1, core kept, on all tensors of a growing set of layers: evenly spread as in the paper, or the last ones."""
    layers = arena.loaded.topology.layer_count
    inner = list(range(2, layers - 1))  # the paper leaves the outermost layers alone
    sets = []
    for size in range(1, count // 2 + 1):
        spread = sorted({inner[round(i * (len(inner) - 1) / max(1, size - 1))] for i in range(min(size, len(inner)))})
        sets += [("spread", spread), ("last layers", inner[-size:])]
    for origin, chosen in _interleaved(sets)[:count]:
        yield origin, DesignPoint.uniform(arena.loaded.topology, "tucker", 1, chosen)


def _interleaved(entries: list[Any]) -> list[Any]:
    """Coarse before fine (bit-reversed order), so that the first few entries already span the whole range."""
    order = sorted(range(len(entries)), key=lambda i: int(f"{i:012b}"[::-1], 2) if i else 0)
    return [entries[i] for i in order]


def uniform(method: str) -> Callable[[Arena, int], Iterator[tuple[str, DesignPoint]]]:
    """Every tensor keeps the same fraction of its parameters, in equal steps of reduction up to 40 %."""

    def points(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
        topology = arena.loaded.topology
        decomposable = sum(t.parameters for t in topology.tensors)
        for step in _interleaved(list(range(1, count + 1))):
            kept = 1 - 0.4 * step / count * topology.parameters_dense / decomposable
            ranks = {t.name: max(1, math.floor(kept * t.parameters / sum(t.shape))) for t in topology.tensors}
            yield "uniform", DesignPoint.of({name: TensorChoice(method, rank) for name, rank in ranks.items()})

    return points


def lagrangian(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Equal marginal loss: ranks at which one more parameter saves the same share of each tensor's output energy.

    A tensor's loss at rank r is the relative energy of the dropped whitened singular values. It is convex in r, so
    every Lagrange multiplier gives the optimal point for its budget (Everett 1963). Leaving the tensor dense is one
    more choice.
    """
    topology = arena.loaded.topology
    spectra = whitened_spectra(arena)
    for step in _interleaved(list(range(1, count + 1))):
        budget = (1 - 0.4 * step / count) * topology.parameters_dense
        low, high = 1e-16, 1.0
        for _ in range(60):
            multiplier = math.sqrt(low * high)
            point = _at_multiplier(topology.tensors, spectra, multiplier)
            low, high = (multiplier, high) if point_cost(topology, point).parameters > budget else (low, multiplier)
        yield "lagrangian", _at_multiplier(topology.tensors, spectra, high)


def _at_multiplier(
    tensors: Sequence[DecomposableTensor], spectra: Mapping[str, torch.Tensor], multiplier: float
) -> DesignPoint:
    choices = {}
    for tensor in tensors:
        tail, price = spectra[tensor.name], sum(tensor.shape)  # parameters of one more rank
        ranks = torch.arange(1, largest_rank(tensor, "whitened_svd") + 1)
        total = tail[ranks] + multiplier * price * ranks
        best = int(total.argmin())
        if float(total[best]) < multiplier * tensor.parameters:
            choices[tensor.name] = TensorChoice("whitened_svd", best + 1)
    return DesignPoint.of(choices)


def whitened_spectra(arena: Arena) -> dict[str, torch.Tensor]:
    """Tensor to the share of its output energy that rank r drops, shape (min(shape) + 1,)."""
    loaded, found = arena.loaded, {}
    names = tuple(t.name for t in loaded.topology.tensors)
    for sharing, gram in iterate_grams(loaded.model, loaded.topology, names, arena.windows):
        for name in sharing:
            weight = as_matrix(loaded.model.get_submodule(loaded.topology[name].module)).detach().double()
            energies = torch.linalg.eigvalsh(weight @ gram.double() @ weight.T).flip(0).clamp_min(0)
            energies = energies[: min(loaded.topology[name].shape)]
            dropped = energies.sum() - torch.cat([torch.zeros(1, dtype=torch.float64), energies.cumsum(0)])
            found[name] = (dropped / energies.sum()).clamp_min(0)
    return found


def asvd(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Truncation ranks from a common bound on the loss of each tensor alone (ASVD, Yuan et al., arXiv 2312.05821).

    The log-likelihood of one window is measured with one tensor at a time truncated to each of a few fractions of its
    parameters. A point takes, for every tensor, the smallest fraction whose loss stays below a bound; the bound follows
    from the budget. The factors are whitened like those of every contestant, so only the choice of ranks competes.
    Layers before the changed one are not recomputed; ASVD's own code does so, at twice the cost.
    """
    topology = arena.loaded.topology
    sensitivities = _sensitivities(arena)
    bounds = sorted({value for shares in sensitivities.values() for value in shares.values()})
    points = [_within_bound(topology.tensors, sensitivities, bound) for bound in bounds]
    parameters = [point_cost(topology, point).parameters for point in points]  # falls with the bound
    for step in _interleaved(list(range(1, count + 1))):
        budget = (1 - 0.4 * step / count) * topology.parameters_dense
        yield "asvd", next((p for p, n in zip(points, parameters, strict=True) if n <= budget), points[-1])


def _sensitivities(arena: Arena) -> dict[str, dict[float, float]]:
    """Tensor to kept fraction of its parameters to the log-likelihood drop on one window (nats per token); stored."""
    path = arena.folder / "asvd.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    tensors = sorted(arena.loaded.topology.tensors, key=lambda tensor: tensor.layer)  # the fastest order for the meter
    missing = [tensor for tensor in tensors if tensor.name not in known]
    if missing:
        meter = DivergenceMeter(arena.loaded, arena.windows.token_ids[:1], arena.bank("whitened_svd"))
    for done, tensor in enumerate(missing):
        points = {
            fraction: DesignPoint.of({tensor.name: _at_fraction(tensor, fraction)}) for fraction in ASVD_FRACTIONS
        }
        known[tensor.name] = {
            str(fraction): meter.measure(point, tensor.layer).log_likelihood_drop for fraction, point in points.items()
        }
        if done % 21 == 0:
            log(f"ASVD: sensitivity of tensor {done} of {len(missing)}")
            write_json(path, known)
    write_json(path, known)
    return {name: {float(share): value for share, value in found.items()} for name, found in known.items()}


def _at_fraction(tensor: DecomposableTensor, fraction: float) -> TensorChoice:
    return TensorChoice("whitened_svd", max(1, math.floor(fraction * tensor.parameters / sum(tensor.shape))))


def _within_bound(
    tensors: Sequence[DecomposableTensor], sensitivities: Mapping[str, Mapping[float, float]], bound: float
) -> DesignPoint:
    chosen = {
        tensor.name: min((share for share, value in sensitivities[tensor.name].items() if value <= bound), default=None)
        for tensor in tensors
    }
    return DesignPoint.of({t.name: _at_fraction(t, share) for t in tensors if (share := chosen[t.name]) is not None})


# --- studies --------------------------------------------------------------------------------------------------------


def plain(sampler: str) -> Callable[[Arena, int, int], list[EvaluatedPoint]]:
    """A sampler alone, on `layer_rank.yaml`."""

    def run(arena: Arena, seed: int, evaluations: int) -> list[EvaluatedPoint]:
        settings = {
            "space": str(ROOT / "search_spaces" / "layer_rank.yaml"),
            "search": "off",
            "sampler": {"name": sampler, "seed": seed},
        }
        return arena.study(sampler, seed, evaluations, settings)

    return run


def ours(arena: Arena, seed: int, evaluations: int) -> list[EvaluatedPoint]:
    """The default of `dse run`: allocations over a sensitivity profile, then refinement and the sampler."""
    settings = {
        "space": str(ROOT / "search_spaces" / "depth_profile.yaml"),
        "search": "auto",
        "sampler": {"name": "tpe", "seed": seed},
    }
    return arena.study("ours", seed, evaluations, settings)


CONTESTANTS: Mapping[str, Contestant] = {
    "paper": Contestant("rank-1 layers (Moar et al.)", from_list(paper_points)),
    "uniform_svd": Contestant("uniform plain SVD", from_list(uniform("svd"))),
    "uniform_whitened": Contestant("uniform whitened (SVD-LLM)", from_list(uniform("whitened_svd"))),
    "lagrangian": Contestant("Lagrangian allocation", from_list(lagrangian)),
    "asvd": Contestant("ASVD's truncation ranks", from_list(asvd)),
    "random": Contestant("random", plain("random"), is_random=True),
    "nsga2": Contestant("NSGA-II", plain("nsga2"), is_random=True),
    "tpe": Contestant("TPE", plain("tpe"), is_random=True),
    "ours": Contestant("dse, search: auto", ours, is_random=True),
}
"""Command-line name to contestant, in the order of the table."""
