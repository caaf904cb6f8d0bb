"""The contestants of `benchmarks/search.py`, and the arena: one model, one calibration text, one way to evaluate."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dse import DesignPoint, FactorBank, TensorChoice, cost, decompose, load_model
from dse.config import CalibrationConfig, CalibrationSource, EvaluationConfig, TaskConfig, parse_study
from dse.cost import has_core
from dse.decomposition import CalibrationWindows, calibration_windows, iterate_grams
from dse.decomposition.low_rank import as_matrix
from dse.evaluation import Answers, EvaluationCache, ModelEvaluator, evaluator_for
from dse.files import cache_dir, write_json, write_text
from dse.models import LoadedModel
from dse.study import StudyListener, run_study
from dse.topology import DecomposableTensor

__all__ = ["CONTESTANTS", "Arena", "Contestant", "Found", "prepared"]

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
ASVD_SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
TASK = """task: search_text
dataset_path: json
dataset_kwargs:
  data_files: {test: search.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
metadata: {version: 1.0}
"""


@dataclass(frozen=True)
class Found:
    """An evaluated point.

    Attributes:
        point: Expanded JSON.
        reduction: 1 - parameters / dense parameters.
        log_ratio: Logarithm of the perplexity per token relative to dense, on the search's text.
        origin: Who proposed it.
        study: Folder of the study it came from; None for a list of points.
        trial: Its number there.
    """

    point: dict[str, Any]
    reduction: float
    log_ratio: float
    origin: str = ""
    study: str | None = None
    trial: int | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to choose points.

    Attributes:
        title: For tables and plots.
        run: `(arena, seed, evaluations)` to what was found, in order.
        is_random: Whether the seed matters.
    """

    title: str
    run: Callable[[Arena, int, int], Sequence[Found]]
    is_random: bool = False


class Arena:
    """What all contestants share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.out
        self.options = options
        self.loaded: LoadedModel = load_model(options.model, dtype=options.dtype)
        self.calibration = self._write_texts(options.text.read_text("utf-8"))
        self.evaluator = self._evaluator(self.folder / "search.yaml", None)
        self._banks: dict[str, FactorBank] = {}
        dense = DesignPoint.dense()
        self._dense_log = self.log_perplexity(dense)
        self.dense_report = self._measured_for_report(dense, None)

    @property
    def facts(self) -> dict[str, Any]:
        """What the JSON line says beside the rows."""
        return {
            "search_tokens": self.options.search_tokens,
            "report_tokens": self.options.report_tokens,
            "calibration": self.calibration.model_dump(exclude_defaults=True),
            "dense": {"log_perplexity": self._dense_log * self.words_per_token, **self.dense_report},
        }

    @cached_property
    def windows(self) -> CalibrationWindows:
        """The calibration text's windows."""
        return calibration_windows(self.loaded.tokenizer, self.calibration)

    def bank(self, method: str) -> FactorBank:
        """Factors of every tensor, at every rank that a list of points asks for."""
        if method not in self._banks:
            # The paper's ladder is rank 1; for the others every rank that saves something.
            ranks = {t.name: 1 if has_core(method) else break_even(t) for t in self.loaded.topology.tensors}
            say(f"factors of every tensor by {method}")
            self._banks[method] = FactorBank.build(self.loaded, {method: ranks}, self.windows)
        return self._banks[method]

    def log_perplexity(self, point: DesignPoint) -> float:
        """On the search's text, nats per word; the answers are kept in the user's cache."""
        method = next((choice.method for _, choice in point), None)
        bank = None if method is None else self.bank(method)
        return math.log(_evaluated(self.loaded, self.evaluator, point, bank).perplexity)

    def found(self, point: DesignPoint, origin: str) -> Found:
        """Evaluate a point."""
        ratio = (self.log_perplexity(point) - self._dense_log) * self.words_per_token
        reduction = cost(self.loaded.topology, point).reduction
        say(f"{origin}: {100 * reduction:.1f} %, {math.exp(ratio):.3f} x")
        return Found(point.to_json(), reduction, ratio, origin)

    def log_ratio(self, perplexity: float) -> float:
        """Of a study's word perplexity, nats per token."""
        return (math.log(perplexity) - self._dense_log) * self.words_per_token

    def study(self, name: str, seed: int, evaluations: int, settings: Mapping[str, Any]) -> list[Found]:
        """Run a study of dse, or go on with one; what it evaluated, without the dense model."""
        study = {
            "name": name,
            "model": {"ref": self.options.model, "dtype": self.options.dtype},
            "objectives": ["perplexity", "parameters"],
            "tasks": [{"task": str(self.folder / "search.yaml")}],
            "evaluation": self._settings(seed=0).model_dump(),
            "calibration": self.calibration.model_dump(exclude_none=True),
            "budget": {"trials": evaluations + 1},
            **settings,
        }
        out = self.folder / "studies" / f"{name}-{seed}"
        finished = run_study(parse_study(study), out=out, listener=_Quiet())
        dense = self.loaded.topology.parameters_dense
        return [
            Found(
                record.point,
                1 - record.cost["parameters"] / dense,
                self.log_ratio(record.quantities["perplexity"].value),
                record.origin,
                str(out),
                record.trial,
            )
            for record in finished.records
            if record.state == "complete" and record.point["tensors"]
        ]

    def report(self, found: Found) -> dict[str, Any]:
        """Perplexity ratio and accuracy of a point on what no contestant saw."""
        measured = self._measured_for_report(DesignPoint.from_json(found.point, self.loaded.topology), found.study)
        ratio = measured["perplexity"] / self.dense_report["perplexity"]
        return {"report_ratio": round(ratio, 4), **measured}

    def _measured_for_report(self, point: DesignPoint, study: str | None) -> dict[str, Any]:
        """Kept in a file under the point: what the report costs is paid once."""
        kept = self.folder / "report" / f"{point.id}{'' if study is None else '-' + Path(study).name}.json"
        if kept.exists():
            return dict(json.loads(kept.read_text("utf-8")))
        say(f"report on {point.id}")
        if point.is_dense:
            measured = self._report_now()
        else:
            bank = FactorBank.build(self.loaded, [point], self.windows)  # there already, by the same calibration text
            with decompose(self.loaded, point, bank):
                measured = self._report_now()
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, measured)
        return measured

    def _report_now(self) -> dict[str, Any]:
        measured: dict[str, Any] = {"perplexity": _token_perplexity(self.loaded, self._report_windows)}
        if self.options.task is not None:
            measured["accuracy"] = self._questions.evaluate().accuracy
        return measured

    @cached_property
    def _questions(self) -> ModelEvaluator:
        return self._evaluator(self.options.task, self.options.questions)

    def _settings(self, seed: int = 0) -> EvaluationConfig:
        return EvaluationConfig(batch_size=16, seed=seed, max_length=WINDOW, compare_float32=False)

    def _evaluator(self, task: Path, limit: int | None) -> ModelEvaluator:
        settings = self._settings() if limit is None else EvaluationConfig(batch_size=32, compare_float32=False)
        return evaluator_for(self.loaded, [TaskConfig(task=str(task.resolve()), limit=limit)], settings)

    def _write_texts(self, text: str) -> CalibrationConfig:
        """Cut the text in thirds; the search's evaluates windows spread over its third."""
        self.folder.mkdir(parents=True, exist_ok=True)
        third = len(text) // 3
        calibrated, searched, reported = (text[i * third : (i + 1) * third] for i in range(3))
        write_text(self.folder / "calibration.txt", calibrated)
        rows = [self.loaded.tokenizer.decode(window) for window in self._spread(searched, self.options.search_tokens)]
        write_text(self.folder / "search.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
        write_text(self.folder / "search.yaml", TASK)
        tokens = sum(len(self.loaded.tokenizer(row)["input_ids"]) for row in rows)
        self.words_per_token = sum(len(row.split()) for row in rows) / tokens
        self._report_windows = self._spread(reported, self.options.report_tokens)
        source = CalibrationSource(file=str((self.folder / "calibration.txt").resolve()))
        return CalibrationConfig(sources=[source], tokens=self.options.calibration_tokens, window=WINDOW)

    def _spread(self, text: str, tokens: int) -> torch.Tensor:
        """Windows of the text, evenly spread; shape (windows, WINDOW)."""
        ids = torch.tensor(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
        count = min(len(windows), max(1, tokens // WINDOW))
        return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def prepared(options: argparse.Namespace) -> Arena:
    """Load the model and measure dense."""
    return Arena(options)


class _Quiet(StudyListener):
    """Says which trial ended."""

    def on_trial_end(self, progress: Any, record: Any) -> None:
        quality = record.quantities.get("perplexity")
        say(f"trial {record.trial} {record.origin} {record.state} {None if quality is None else quality.value}")


def say(text: str) -> None:
    """A line for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def break_even(tensor: DecomposableTensor) -> int:
    """The largest rank that saves something."""
    return tensor.parameters // (tensor.out_features + tensor.in_features)


def _evaluated(loaded: LoadedModel, evaluator: ModelEvaluator, point: DesignPoint, bank: FactorBank | None) -> Any:
    cache = EvaluationCache(cache_dir() / "evaluations")
    identity = evaluator.identity(point.id, "" if bank is None else bank.identity(point))
    answers: Answers = cache.read(identity)
    if bank is None:
        result = evaluator.evaluate(answers=answers)
    else:
        with decompose(loaded, point, bank):
            result = evaluator.evaluate(answers=answers)
    cache.write(identity, answers)
    return result


@torch.inference_mode()
def _token_perplexity(loaded: LoadedModel, windows: torch.Tensor) -> float:
    total = 0.0
    for window in windows:
        logits = loaded.model(window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


# --- lists of points ------------------------------------------------------------------------------------------------


def from_list(
    points: Callable[[Arena, int], Iterator[tuple[str, DesignPoint]]],
) -> Callable[[Arena, int, int], list[Found]]:
    """A contestant that evaluates a list, the budget of evaluations spread over it."""

    def run(arena: Arena, seed: int, evaluations: int) -> list[Found]:
        return [arena.found(point, origin) for origin, point in points(arena, evaluations)]

    return run


def paper_ladder(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Rank 1, core kept, on all tensors of ever more layers: evenly spread as in the paper, then as one late block."""
    layers = arena.loaded.topology.layer_count
    inner = list(range(2, layers - 1))  # the paper leaves the outermost layers alone
    sets = []
    for size in range(1, count // 2 + 1):
        spread = sorted({inner[round(i * (len(inner) - 1) / max(1, size - 1))] for i in range(min(size, len(inner)))})
        sets += [("spread", spread), ("late block", inner[-size:])]
    for origin, chosen in _interleaved(sets)[:count]:
        yield origin, DesignPoint.uniform(arena.loaded.topology, "tucker", 1, chosen)


def _interleaved(entries: list[Any]) -> list[Any]:
    """Coarse before fine: the first few already span the whole range."""
    order = sorted(range(len(entries)), key=lambda i: int(f"{i:012b}"[::-1], 2) if i else 0)
    return [entries[i] for i in order]


def uniform(method: str) -> Callable[[Arena, int], Iterator[tuple[str, DesignPoint]]]:
    """Every tensor keeps the same share of its parameters, in even steps of reduction up to 40 %."""

    def points(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
        topology = arena.loaded.topology
        decomposable = sum(t.parameters for t in topology.tensors)
        for step in _interleaved(list(range(1, count + 1))):
            kept = 1 - 0.4 * step / count * topology.parameters_dense / decomposable
            ranks = {t.name: max(1, math.floor(kept * t.parameters / sum(t.shape))) for t in topology.tensors}
            yield "uniform", DesignPoint.of({name: TensorChoice(method, rank) for name, rank in ranks.items()})

    return points


def lagrangian(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Equal marginal loss: ranks where one more parameter buys the same share of each tensor's output energy.

    A tensor's loss at rank r is the energy of the whitened singular values left out, relative to all of it. It is
    convex in r, so every multiplier gives the cheapest point of its budget (Everett 1963); dense is one more choice.
    """
    topology = arena.loaded.topology
    spectra = whitened_spectra(arena)
    for step in _interleaved(list(range(1, count + 1))):
        budget = (1 - 0.4 * step / count) * topology.parameters_dense
        low, high = 1e-16, 1.0
        for _ in range(60):
            multiplier = math.sqrt(low * high)
            point = _at_multiplier(topology.tensors, spectra, multiplier)
            low, high = (multiplier, high) if cost(topology, point).parameters > budget else (low, multiplier)
        yield "lagrangian", _at_multiplier(topology.tensors, spectra, high)


def _at_multiplier(
    tensors: Sequence[DecomposableTensor], spectra: Mapping[str, torch.Tensor], multiplier: float
) -> DesignPoint:
    choices = {}
    for tensor in tensors:
        tail, price = spectra[tensor.name], sum(tensor.shape)  # of one more rank, in parameters
        ranks = torch.arange(1, break_even(tensor) + 1)
        total = tail[ranks] + multiplier * price * ranks
        best = int(total.argmin())
        if float(total[best]) < multiplier * tensor.parameters:
            choices[tensor.name] = TensorChoice("whitened_svd", best + 1)
    return DesignPoint.of(choices)


def whitened_spectra(arena: Arena) -> dict[str, torch.Tensor]:
    """Tensor to the share of its output energy that rank r leaves out, shape (min(shape) + 1,)."""
    loaded, found = arena.loaded, {}
    names = tuple(t.name for t in loaded.topology.tensors)
    for sharing, gram in iterate_grams(loaded.model, loaded.topology, names, arena.windows):
        for name in sharing:
            weight = as_matrix(loaded.model.get_submodule(loaded.topology[name].module)).detach().double()
            energies = torch.linalg.eigvalsh(weight @ gram.double() @ weight.T).flip(0).clamp_min(0)
            energies = energies[: min(loaded.topology[name].shape)]
            left_out = energies.sum() - torch.cat([torch.zeros(1, dtype=torch.float64), energies.cumsum(0)])
            found[name] = (left_out / energies.sum()).clamp_min(0)
    return found


def asvd(arena: Arena, count: int) -> Iterator[tuple[str, DesignPoint]]:
    """Truncation ranks by a common bound on what each tensor alone costs (ASVD, Yuan et al., arXiv 2312.05821).

    Perplexity is measured with one tensor at a time truncated to each of a few shares of its parameters, on one window;
    a point takes for every tensor the smallest share whose perplexity stays below a bound, and the bound is what gives
    the budget. The factors are whitened, as everybody's here: what competes is the choice of ranks.
    """
    topology = arena.loaded.topology
    sensitivities = _sensitivities(arena)
    bounds = sorted({value for shares in sensitivities.values() for value in shares.values()})
    points = [_within_bound(topology.tensors, sensitivities, bound) for bound in bounds]
    parameters = [cost(topology, point).parameters for point in points]  # falls with the bound
    for step in _interleaved(list(range(1, count + 1))):
        budget = (1 - 0.4 * step / count) * topology.parameters_dense
        yield "asvd", next((p for p, n in zip(points, parameters, strict=True) if n <= budget), points[-1])


def _sensitivities(arena: Arena) -> dict[str, dict[float, float]]:
    """Tensor to share of its parameters to perplexity on one window of the calibration text; kept on the disk."""
    kept = arena.folder / "asvd.json"
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    window = arena.windows.token_ids[:1]
    bank = arena.bank("whitened_svd")
    for done, tensor in enumerate(arena.loaded.topology.tensors):
        if tensor.name in known:
            continue
        known[tensor.name] = {}
        for share in ASVD_SHARES:
            point = DesignPoint.of({tensor.name: _kept(tensor, share)})
            with decompose(arena.loaded, point, bank):
                known[tensor.name][str(share)] = _token_perplexity(arena.loaded, window)
        if done % 21 == 0:
            say(f"ASVD: sensitivity of tensor {done} of {len(arena.loaded.topology.tensors)}")
            write_json(kept, known)
    write_json(kept, known)
    return {name: {float(share): value for share, value in found.items()} for name, found in known.items()}


def _kept(tensor: DecomposableTensor, share: float) -> TensorChoice:
    return TensorChoice("whitened_svd", max(1, math.floor(share * tensor.parameters / sum(tensor.shape))))


def _within_bound(
    tensors: Sequence[DecomposableTensor], sensitivities: Mapping[str, Mapping[float, float]], bound: float
) -> DesignPoint:
    chosen = {
        tensor.name: min((share for share, value in sensitivities[tensor.name].items() if value <= bound), default=None)
        for tensor in tensors
    }
    return DesignPoint.of({t.name: _kept(t, share) for t in tensors if (share := chosen[t.name]) is not None})


# --- studies --------------------------------------------------------------------------------------------------------


def plain(sampler: str) -> Callable[[Arena, int, int], list[Found]]:
    """A sampler from scratch on `layer_rank`."""

    def run(arena: Arena, seed: int, evaluations: int) -> list[Found]:
        settings = {
            "space": str(ROOT / "search_spaces" / "layer_rank.yaml"),
            "search": "off",
            "sampler": {"name": sampler, "seed": seed},
        }
        return arena.study(sampler, seed, evaluations, settings)

    return run


def ours(arena: Arena, seed: int, evaluations: int) -> list[Found]:
    """What `dse run` does by default: allocations over a sensitivity profile, and what follows from them."""
    settings = {
        "space": str(ROOT / "search_spaces" / "depth_profile.yaml"),
        "search": "auto",
        "sampler": {"name": "tpe", "seed": seed},
    }
    return arena.study("ours", seed, evaluations, settings)


CONTESTANTS: Mapping[str, Contestant] = {
    "paper": Contestant("rank-1 layers (Moar et al.)", from_list(paper_ladder)),
    "uniform_svd": Contestant("uniform plain SVD", from_list(uniform("svd"))),
    "uniform_whitened": Contestant("uniform whitened (SVD-LLM)", from_list(uniform("whitened_svd"))),
    "lagrangian": Contestant("Lagrangian allocation", from_list(lagrangian)),
    "asvd": Contestant("ASVD's truncation ranks", from_list(asvd)),
    "random": Contestant("random", plain("random"), is_random=True),
    "nsga2": Contestant("NSGA-II", plain("nsga2"), is_random=True),
    "tpe": Contestant("TPE", plain("tpe"), is_random=True),
    "ours": Contestant("dse, search: auto", ours, is_random=True),
}
"""Name on the command line to contestant, in the order of the table."""
