"""Folders of studies of any size in seconds, without a model: written through the study's own storage.

The trade-off between the objectives is made up; costs are exact, and accuracies come from simulated documents, so that
intervals, paired tests and ties are real.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from topologies import topology_of_shapes

from dse.config import parse_study
from dse.cost import point_cost
from dse.design_point import DesignPoint, TensorChoice
from dse.evaluation.result import EvaluationResult, TaskResult
from dse.evaluation.statistics.intervals import Interval, standard_error
from dse.pareto import directions_of, objectives_named, reference_point
from dse.report.worker_lanes import WorkerLane, write_lanes
from dse.search.proposal import Proposal
from dse.study.folder import StudyFolder
from dse.study.storage import StudyStorage
from dse.trial_record import TrialRecord, objective_values

LAYERS = 12
SIZES = {
    "query": (576, 576),
    "key": (192, 576),
    "value": (192, 576),
    "attention_output": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
ORIGINS = ("spread", "sampler", "refined", "allocation")
DENSE_ACCURACY = {"openbook_qa": 0.46, "arc_easy": 0.63}
CHANCE = {"openbook_qa": 0.25, "arc_easy": 0.25}
FOUR = ("accuracy", "parameters", "decode_latency_s", "energy_per_token_j")


@dataclass
class SyntheticStudy:
    """A study folder that grows trial by trial.

    Attributes:
        path: The folder.
        objectives: Names of the objectives.
        documents: Documents of each task.
        tasks: Names of the tasks.
        budget: Number of trials of the study file.
        noise: Spread of the measured costs, as a fraction.
        name: Name of the study.
        model: Reference of the model.
    """

    path: Path
    objectives: Sequence[str] = FOUR
    documents: int = 150
    tasks: Sequence[str] = ("openbook_qa", "arc_easy")
    budget: int = 40
    noise: float = 0.015
    name: str = "synthetic"
    model: str = "demo:smollm2-135m-instruct"
    origins: Sequence[str] = ORIGINS
    records: list[TrialRecord] = field(default_factory=list)
    dense: EvaluationResult | None = None

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.folder = StudyFolder(self.path)
        self.topology = topology_of_shapes([SIZES] * LAYERS, other=28_000_000)
        self.entries = objectives_named(self.objectives)
        self._difficulty = {
            task: np.random.default_rng([7, index]).uniform(size=self.documents)
            for index, task in enumerate(self.tasks)
        }
        self.folder.write_config(parse_study(self._config()))
        directions = directions_of(self.entries)
        metrics = dict(zip((entry.name for entry in self.entries), directions, strict=True))
        self.storage = StudyStorage.open(self.folder.storage, self.name, metrics, trials=self.budget)

    def _config(self) -> dict[str, Any]:
        meter = {"measurement": {"meter": "nvml"}} if "energy_per_token_j" in self.objectives else {}
        return {
            "name": self.name,
            "model": {"ref": self.model, "device": "cpu"},
            "space": {"name": "made_up", "methods": ["svd"], "ranks": {"absolute": [16, 64]}},
            "objectives": list(self.objectives),
            "tasks": list(self.tasks),
            "budget": {"trials": self.budget},
            **meter,
        }

    def start(self) -> None:
        """Store the facts of the study, as its first seconds do."""
        shape = {
            "layers": LAYERS,
            "roles": list(SIZES),
            "blocks": {},
            "stacks": {},
            "sizes": {role: list(size) for role, size in SIZES.items()},
        }
        facts = {
            "model_ref": self.model,
            "device": "cpu",
            "dtype": "float32",
            "shape": shape,
            "parameters_dense": self.topology.parameters_dense,
            "number_of_points": "10^12",
            "environment": {"cpu": {"model": "Example CPU"}},
        }
        self.storage.set_attribute("facts", facts)
        self.storage.set_attribute("objectives", [entry.name for entry in self.entries])

    def fill(self, trials: int) -> SyntheticStudy:
        """Start the study and finish this many trials, some of which fail, stop early, repeat or are infeasible."""
        self.start()
        while len(self.records) < trials:
            number = len(self.records)
            kinds = {11: "failed", 17: "stopped", 23: "infeasible", 29: "duplicate"}
            self.finish(kinds.get(number % 41, "complete"))
        return self

    def finish(self, state: str = "complete", reason: str = "", energy: dict[str, Any] | None = None) -> TrialRecord:
        """Finish one more trial in this state."""
        number = len(self.records)
        generator = random.Random(f"{self.name} {number}")
        origin = "dense" if number == 0 else self.origins[generator.randrange(len(self.origins))]
        self.storage.enqueue(Proposal({"level": number}, origin))
        proposal = self.storage.ask({"level": 1_000_000})
        point = DesignPoint.dense() if number == 0 else _point(generator)
        cost = point_cost(self.topology, point).to_json()
        record = TrialRecord(number, state, origin, point, point_text="{}", cost=cost, started_at="2026-01-01T00:00:00")
        assert proposal.trial == number
        record, evaluation = self._measured(record, state, reason, generator, energy)
        if evaluation is not None:
            self.folder.write_evaluation(number, evaluation)
        values = objective_values(self.entries, record) if state in ("complete", "duplicate") else None
        self.storage.finish(record, values, {"reduction": 1.0} if state == "infeasible" else {})
        if number == 0:
            self.dense = evaluation
            values = objective_values(self.entries, record)
            dense = dict(zip((entry.name for entry in self.entries), values, strict=True))
            self.storage.set_attribute("reference", reference_point(self.entries, dense))
        self.records.append(record)
        return record

    def _measured(
        self, record: TrialRecord, state: str, reason: str, generator: random.Random, energy: dict[str, Any] | None
    ) -> tuple[TrialRecord, EvaluationResult | None]:
        if state == "infeasible":
            return replace(record, feasible=False, reason="reduction must be at most 0.5"), None
        if state == "failed":
            reason = reason or "OutOfMemoryError: the device must have room for this point, but has 1.2 GB"
            return replace(record, reason=reason, seconds={"evaluate": 2.0}), None
        if state == "duplicate":
            first = next(r for r in self.records if r.state == "complete" and not r.is_dense)
            twin = replace(first, trial=record.trial, state="duplicate", duplicate_of=first.trial, seconds={})
            return replace(twin, reason=f"same point as trial {first.trial}"), None
        reduction = float(record.cost["reduction"])
        quality = 1.0 - 1.1 * reduction**1.5 * generator.uniform(0.5, 1.4) if reduction else 1.0
        evaluation = self._evaluation(quality, record.trial)
        quantities: dict[str, Interval] = {}
        ratios: dict[str, Interval] = {}
        if self.tasks:
            found = evaluation.accuracy_interval()
            assert found is not None
            quantities["accuracy"] = found
        for name, dense, slope in (
            ("decode_latency_s", 0.0213, 0.8),
            ("prefill_latency_s", 0.184, 0.7),
            ("energy_per_token_j", 0.071, 0.9),
            ("kl_divergence", 0.0, 0.0),
        ):
            if name not in self.objectives:
                continue
            if name == "kl_divergence":
                quantities[name] = Interval((1.0 - quality) * 0.6, (1.0 - quality) * 0.5, (1.0 - quality) * 0.7)
                continue
            ratio = 1.0 - slope * reduction * generator.uniform(0.6, 1.1) + generator.gauss(0, self.noise)
            ratio = ratio if reduction else 1.0
            low, high = ratio * (1 - 1.5 * self.noise), ratio * (1 + 1.5 * self.noise)
            ratios[name] = Interval(ratio, low, high)
            quantities[name] = Interval(ratio * dense, low * dense, high * dense)
        tasks = {
            task.task: {"metrics": {task.metric: (task.value, task.stderr)}, "documents": task.documents}
            for task in evaluation.tasks
        }
        drop = None if self.dense is None or not self.tasks else evaluation.accuracy_drop(self.dense)
        seconds = {"decompose": 0.4, "evaluate": 6.0, "latency": 3.0, "undo": 0.1}
        record = replace(
            record, quantities=quantities, ratios=ratios, tasks=tasks, accuracy_drop=drop, seconds=seconds, energy=energy
        )
        if state == "stopped":
            estimates = {"accuracy": quantities["accuracy"]} if "accuracy" in quantities else {}
            reason = "cannot reach the front"
            return replace(record, quantities={}, ratios={}, estimates=estimates, rung=1, reason=reason), None
        return record, evaluation if self.tasks else None

    def _evaluation(self, quality: float, trial: int) -> EvaluationResult:
        """Documents of increasing difficulty: a worse model fails the harder ones first, with some scatter."""
        results = []
        for index, task in enumerate(self.tasks):
            chance, dense = CHANCE.get(task, 0.25), DENSE_ACCURACY.get(task, 0.5)
            wanted = chance + (dense - chance) * max(0.0, quality)
            scatter = np.random.default_rng([trial, index]).normal(0, 0.06, self.documents)
            outcomes = (self._difficulty[task] + scatter < wanted).astype(np.float64)
            mean, error = float(outcomes.mean()), standard_error(outcomes)
            metrics = {"acc": (mean, error)}
            results.append(TaskResult(task, "acc", mean, error, self.documents, True, outcomes, metrics, 1.0, "accuracy"))
        return EvaluationResult(tuple(results), 6.0)

    def start_trial(self, *, queue: int = 0, lanes: Sequence[WorkerLane] | None = None) -> None:
        """Leave one trial running, with others behind it in the queue."""
        generator = random.Random(f"{self.name} running")
        points = [_point(generator) for _ in range(queue + 1)]
        for index, point in enumerate(points):
            self.storage.enqueue(Proposal({"level": 500_000 + index}, "refined", "", point))
        proposal = self.storage.ask({"level": 1_000_000})
        cost = point_cost(self.topology, points[0]).to_json()
        lane = WorkerLane(
            "worker 1",
            "working",
            host=socket.gethostname(),
            pid=os.getpid(),
            phase="evaluate",
            done=120,
            total=300,
            trial=proposal.trial,
            origin="refined",
            point_id=points[0].id,
            cost={name: cost[name] for name in ("reduction", "parameters", "weight_bytes")},
            trial_started_s=time.time() - 4,
            started_s=time.time() - 600,
            updated_s=time.time(),
            finished=len(self.records),
            failures=sum(record.state == "failed" for record in self.records),
        )
        write_lanes(self.folder.workers, lanes if lanes is not None else [lane])

    def close(self) -> None:
        """Close the storage."""
        self.storage.close()


def _point(generator: random.Random) -> DesignPoint:
    strength = generator.random() ** 1.5
    choices: dict[str, TensorChoice] = {}
    for layer in range(LAYERS):
        for role, (rows, columns) in SIZES.items():
            if generator.random() < 0.15 + 0.8 * strength:
                most = rows * columns // (rows + columns)
                choices[f"layers.{layer}.{role}"] = TensorChoice("svd", max(1, int(most * generator.uniform(0.25, 0.95))))
    return DesignPoint.of(choices or {"layers.3.up": TensorChoice("svd", 64)})
