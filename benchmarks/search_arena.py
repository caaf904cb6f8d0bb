"""Shared by all contestants of `benchmarks/search.py`: the model, the calibration text and the evaluation."""

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

from dse import DesignPoint, FactorBank, calibration_windows, decompose, load_model, point_cost
from dse.config import CalibrationConfig, CalibrationSource, EvaluationConfig, TaskConfig, parse_study
from dse.cost import has_core, largest_rank
from dse.decomposition import CalibrationWindows
from dse.evaluation import Answers, EvaluationCache, ModelEvaluator, evaluator_for
from dse.files import cache_dir, write_json, write_text
from dse.models import LoadedModel
from dse.study import StudyListener, run_study

__all__ = ["Arena", "EvaluatedPoint", "log", "token_perplexity"]

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
SEARCH_WINDOW = 256
"""Half as long, so that even few tokens cover several passages."""
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
class EvaluatedPoint:
    """A point with its result on the search text.

    Attributes:
        point: The point's full JSON.
        reduction: 1 - parameters / dense parameters.
        log_ratio: Logarithm of its perplexity per token relative to dense.
        origin: The proposer.
        study: Folder of its study; None for points from a list.
        trial: Its number in the study.
    """

    point: dict[str, Any]
    reduction: float
    log_ratio: float
    origin: str = ""
    study: str | None = None
    trial: int | None = None


class Arena:
    """The model, texts, factors and evaluators that all contestants share."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the model, write the texts and measure the dense model."""
        self.folder: Path = options.out
        self.options = options
        self.loaded: LoadedModel = load_model(options.model, dtype=options.dtype)
        self.calibration = self._write_texts(options.text.read_text("utf-8"))
        self.evaluator = self._evaluator(self.folder / "search.yaml", None)
        self._banks: dict[str, FactorBank] = {}
        dense = DesignPoint.dense()
        self._dense_log = self.log_perplexity(dense)
        self.dense_report = self._stored_report(dense, None, with_accuracy=True)

    @property
    def facts(self) -> dict[str, Any]:
        """Settings and dense results, for the JSON document."""
        return {
            "search_tokens": self.options.search_tokens,
            "report_tokens": self.options.report_tokens,
            "calibration": self.calibration.model_dump(exclude_defaults=True),
            "dense": {"log_perplexity": self._dense_log * self.words_per_token, **self.dense_report},
        }

    @cached_property
    def windows(self) -> CalibrationWindows:
        """Windows of the calibration text."""
        return calibration_windows(self.loaded.tokenizer, self.calibration)

    def bank(self, method: str) -> FactorBank:
        """Factors of every tensor, at every rank that a list of points may use."""
        if method not in self._banks:
            # The paper's points have rank 1 only; the other lists use every rank up to the break-even rank.
            ranks = {t.name: 1 if has_core(method) else largest_rank(t, method) for t in self.loaded.topology.tensors}
            log(f"factors of every tensor by {method}")
            self._banks[method] = FactorBank.build(self.loaded, {method: ranks}, self.windows)
        return self._banks[method]

    def log_perplexity(self, point: DesignPoint) -> float:
        """Log-perplexity on the search text, in nats per word; answers are kept in the user's cache."""
        method = next((choice.method for _, choice in point), None)
        bank = None if method is None else self.bank(method)
        cache = EvaluationCache(cache_dir() / "evaluations")
        identity = self.evaluator.identity(point.id, "" if bank is None else bank.identity(point))
        answers: Answers = cache.read(identity)
        if bank is None:
            result = self.evaluator.evaluate(answers=answers)
        else:
            with decompose(self.loaded, point, bank):
                result = self.evaluator.evaluate(answers=answers)
        cache.write(identity, answers)
        return math.log(result.perplexity)

    def evaluate(self, point: DesignPoint, origin: str) -> EvaluatedPoint:
        """Evaluate a point on the search text."""
        ratio = (self.log_perplexity(point) - self._dense_log) * self.words_per_token
        reduction = point_cost(self.loaded.topology, point).reduction
        log(f"{origin}: {100 * reduction:.1f} %, {math.exp(ratio):.3f} x")
        return EvaluatedPoint(point.to_json(), reduction, ratio, origin)

    def study(self, name: str, seed: int, evaluations: int, settings: Mapping[str, Any]) -> list[EvaluatedPoint]:
        """Run or resume a study of dse; returns its complete trials without the dense model."""
        document = {
            "name": name,
            "model": {"ref": self.options.model, "dtype": self.options.dtype},
            "objectives": ["perplexity", "parameters"],
            "tasks": [{"task": str(self.folder / "search.yaml")}],
            "evaluation": self._settings().model_dump(),
            "calibration": self.calibration.model_dump(exclude_none=True),
            "budget": {"trials": evaluations + 1},
            **settings,
        }
        out = self.folder / "studies" / f"{name}-{seed}"
        study = run_study(parse_study(document), out=out, listener=_TrialLog())
        dense = self.loaded.topology.parameters_dense
        return [
            EvaluatedPoint(
                record.point.to_json(),
                1 - record.cost["parameters"] / dense,
                (math.log(record.quantities["perplexity"].value) - self._dense_log) * self.words_per_token,
                record.origin,
                str(out),
                record.trial,
            )
            for record in study.records
            if record.state == "complete" and not record.is_dense
        ]

    def report(self, found: EvaluatedPoint, *, with_accuracy: bool) -> dict[str, Any]:
        """Perplexity ratio of a point on text that no contestant saw, and its accuracy on request."""
        point = DesignPoint.from_json(found.point, self.loaded.topology)
        measured = self._stored_report(point, found.study, with_accuracy=with_accuracy)
        ratio = measured["perplexity"] / self.dense_report["perplexity"]
        return {"report_ratio": round(ratio, 4), **measured}

    def _stored_report(self, point: DesignPoint, study: str | None, *, with_accuracy: bool) -> dict[str, Any]:
        """The report of a point, measured once and then read from its file."""
        path = self.folder / "report" / f"{point.id}{'' if study is None else '-' + Path(study).name}.json"
        measured: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        with_accuracy = with_accuracy and self.options.task is not None
        if "perplexity" in measured and ("accuracy" in measured or not with_accuracy):
            return measured
        log(f"report on {point.id}")
        if point.is_dense:
            measured |= self._measure_report(with_accuracy)
        else:
            bank = FactorBank.build(self.loaded, [point], self.windows)  # cached: same calibration text
            with decompose(self.loaded, point, bank):
                measured |= self._measure_report(with_accuracy)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measured)
        return measured

    def _measure_report(self, with_accuracy: bool) -> dict[str, Any]:
        measured: dict[str, Any] = {"perplexity": token_perplexity(self.loaded, self._report_windows)}
        if with_accuracy:
            measured["accuracy"] = self._questions.evaluate().accuracy
        return measured

    @cached_property
    def _questions(self) -> ModelEvaluator:
        return self._evaluator(self.options.task, self.options.questions)

    def _settings(self) -> EvaluationConfig:
        return EvaluationConfig(batch_size=16, seed=0, max_length=WINDOW, compare_float32=False)

    def _evaluator(self, task: Path, limit: int | None) -> ModelEvaluator:
        settings = self._settings() if limit is None else EvaluationConfig(batch_size=32, compare_float32=False)
        return evaluator_for(self.loaded, [TaskConfig(task=str(task.resolve()), limit=limit)], settings)

    def _write_texts(self, text: str) -> CalibrationConfig:
        """Cut the text in thirds; the search text is made of windows spread over the second one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        third = len(text) // 3
        calibration, search, report = (text[i * third : (i + 1) * third] for i in range(3))
        write_text(self.folder / "calibration.txt", calibration)
        passages = self._spread_windows(search, self.options.search_tokens, SEARCH_WINDOW)
        rows = [self.loaded.tokenizer.decode(passage) for passage in passages]
        write_text(self.folder / "search.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
        write_text(self.folder / "search.yaml", TASK)
        tokens = sum(len(self.loaded.tokenizer(row)["input_ids"]) for row in rows)
        self.words_per_token = sum(len(row.split()) for row in rows) / tokens
        self._report_windows = self._spread_windows(report, self.options.report_tokens)
        source = CalibrationSource(file=str((self.folder / "calibration.txt").resolve()))
        return CalibrationConfig(sources=[source], tokens=self.options.calibration_tokens, window=WINDOW)

    def _spread_windows(self, text: str, tokens: int, window: int = WINDOW) -> torch.Tensor:
        """Evenly spaced windows of the text, shape (windows, window)."""
        ids = torch.tensor(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        windows = ids[: len(ids) // window * window].reshape(-1, window)
        count = min(len(windows), max(1, tokens // window))
        return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


class _TrialLog(StudyListener):
    """Logs every finished trial."""

    def on_trial_end(self, progress: Any, record: Any) -> None:
        log(f"trial {record.trial} {record.origin} {record.state} {record.value('perplexity')}")


def log(text: str) -> None:
    """Print a line with the time of day on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@torch.inference_mode()
def token_perplexity(loaded: LoadedModel, windows: torch.Tensor) -> float:
    """Perplexity per token over windows of shape (windows, tokens)."""
    total = 0.0
    for window in windows:
        logits = loaded.model(window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
