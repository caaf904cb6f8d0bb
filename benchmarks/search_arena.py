"""The arena of `benchmarks/search.py`: one model, one calibration text, one way to evaluate for every contestant."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dse import DesignPoint, FactorBank, cost, decompose, load_model
from dse.config import CalibrationConfig, CalibrationSource, EvaluationConfig, TaskConfig, parse_study
from dse.cost import has_core
from dse.decomposition import CalibrationWindows, calibration_windows
from dse.evaluation import Answers, EvaluationCache, ModelEvaluator, evaluator_for
from dse.files import cache_dir, write_json, write_text
from dse.models import LoadedModel
from dse.study import StudyListener, run_study
from dse.topology import DecomposableTensor

__all__ = ["Arena", "Found", "break_even", "prepared", "say", "token_perplexity"]

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
SEARCH_WINDOW = 256  # half as long, so that few tokens still are several passages
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
        self.dense_report = self._measured_for_report(dense, None, with_accuracy=True)

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

    def report(self, found: Found, *, with_accuracy: bool) -> dict[str, Any]:
        """Perplexity ratio and, if asked for, accuracy of a point on what no contestant saw."""
        point = DesignPoint.from_json(found.point, self.loaded.topology)
        measured = self._measured_for_report(point, found.study, with_accuracy=with_accuracy)
        ratio = measured["perplexity"] / self.dense_report["perplexity"]
        return {"report_ratio": round(ratio, 4), **measured}

    def _measured_for_report(self, point: DesignPoint, study: str | None, *, with_accuracy: bool) -> dict[str, Any]:
        """Kept in a file under the point: what the report costs is paid once."""
        kept = self.folder / "report" / f"{point.id}{'' if study is None else '-' + Path(study).name}.json"
        measured: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        with_accuracy = with_accuracy and self.options.task is not None
        if "perplexity" in measured and ("accuracy" in measured or not with_accuracy):
            return measured
        say(f"report on {point.id}")
        if point.is_dense:
            measured |= self._report_now(with_accuracy)
        else:
            bank = FactorBank.build(self.loaded, [point], self.windows)  # there already, by the same calibration text
            with decompose(self.loaded, point, bank):
                measured |= self._report_now(with_accuracy)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, measured)
        return measured

    def _report_now(self, with_accuracy: bool) -> dict[str, Any]:
        measured: dict[str, Any] = {"perplexity": token_perplexity(self.loaded, self._report_windows)}
        if with_accuracy:
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
        passages = self._spread(searched, self.options.search_tokens, SEARCH_WINDOW)
        rows = [self.loaded.tokenizer.decode(passage) for passage in passages]
        write_text(self.folder / "search.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
        write_text(self.folder / "search.yaml", TASK)
        tokens = sum(len(self.loaded.tokenizer(row)["input_ids"]) for row in rows)
        self.words_per_token = sum(len(row.split()) for row in rows) / tokens
        self._report_windows = self._spread(reported, self.options.report_tokens)
        source = CalibrationSource(file=str((self.folder / "calibration.txt").resolve()))
        return CalibrationConfig(sources=[source], tokens=self.options.calibration_tokens, window=WINDOW)

    def _spread(self, text: str, tokens: int, window: int = WINDOW) -> torch.Tensor:
        """Windows of the text, evenly spread; shape (windows, window)."""
        ids = torch.tensor(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        windows = ids[: len(ids) // window * window].reshape(-1, window)
        count = min(len(windows), max(1, tokens // window))
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
def token_perplexity(loaded: LoadedModel, windows: torch.Tensor) -> float:
    total = 0.0
    for window in windows:
        logits = loaded.model(window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
