"""What a sampler should hear of a stopped trial, and how sure the ladder should be: many studies of a made-up model.

    python benchmarks/fidelity_telling.py [--trials 30] [--seeds 8] [--confidences 0.8]

The search, the judge and the sampler are the real ones; the model is a formula. Each of 10 groups of tensors costs some
accuracy when it is cut; documents are right or wrong by a difficulty of their own and by chance; the KL divergence
follows the damage with some error. So whole studies take seconds, and the expected accuracy of every point is known.
A table for people; one JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dse.evaluation import EvaluationResult, TaskResult
from dse.pareto import directions_of, non_dominated, normalised_hypervolume, objectives_named
from dse.study.fidelity import TELL, Established, Judge, told
from dse.study.record import Interval, TrialRecord
from dse.study.storage import StudyStorage

OBJECTIVES = objectives_named(["accuracy", "parameters"])
KEPT = (1.0, 0.9, 0.75, 0.5, 0.25)
SHARES = (0.1, 0.3)
PROXY_DOCUMENTS = 35
"""What the proxy costs, in documents: 1,024 tokens against some 30 a document of multiple choice."""
DENSE_ACCURACY, CHANCE = 0.45, 0.25


@dataclass(frozen=True)
class Made:
    """A made-up model and its documents."""

    sizes: NDArray[np.float64]
    sensitivities: NDArray[np.float64]
    difficulties: NDArray[np.float64]
    seed: int

    @classmethod
    def of(cls, seed: int, documents: int, groups: int = 10) -> Made:
        generator = np.random.default_rng(seed)
        sizes = generator.uniform(0.5, 1.5, groups)
        sensitivities = generator.lognormal(-1.0, 0.8, groups)
        return cls(0.8 * sizes / sizes.sum(), sensitivities, generator.normal(size=documents), seed)

    def parameters(self, levels: NDArray[np.int64]) -> float:
        return float(1.0 - (self.sizes * (1.0 - np.asarray(KEPT)[levels])).sum())

    def damage(self, levels: NDArray[np.int64]) -> float:
        cut = 1.0 - np.asarray(KEPT)[levels]
        neighbours = (cut[:-1] * cut[1:]).sum()
        return float((self.sensitivities * cut**1.5).sum() + 0.2 * neighbours)

    def accuracy(self, levels: NDArray[np.int64]) -> float:
        return CHANCE + (DENSE_ACCURACY - CHANCE) * float(np.exp(-0.6 * self.damage(levels)))

    def divergence(self, levels: NDArray[np.int64]) -> float:
        own = np.random.default_rng([self.seed, *levels.tolist(), 1])
        return self.damage(levels) * float(np.exp(0.15 * own.normal()))

    def outcomes(self, levels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Right where difficulty and this point's own chance lie below what its accuracy asks for."""
        own = np.random.default_rng([self.seed, *levels.tolist(), 2])
        latent = 0.8 * self.difficulties + 0.6 * own.normal(size=self.difficulties.size)
        return (latent < statistics.NormalDist().inv_cdf(self.accuracy(levels))).astype(np.float64)


def result_of(outcomes: NDArray[np.float64]) -> EvaluationResult:
    mean = float(outcomes.mean())
    return EvaluationResult((TaskResult("t", "acc", mean, 0.0, outcomes.size, True, outcomes, kind="accuracy"),), 0.0)


def study(made: Made, trials: int, way: str | None, confidence: float, sampler: str) -> dict[str, float]:
    """One study; `way` None is without a ladder."""
    documents = made.difficulties.size
    spent, asked = 0.0, 0
    established: list[Established] = []
    expected: list[float] = []
    seen: dict[tuple[int, ...], Any] = {}
    names = [f"g{index}" for index in range(made.sizes.size)]
    with tempfile.TemporaryDirectory() as folder:
        storage = StudyStorage.open(
            Path(folder) / "s.db", directions_of(OBJECTIVES), sampler=sampler, seed=made.seed, trials=trials
        )
        storage.enqueue(dict.fromkeys(names, 0), "dense")
        while len(seen) < trials and asked < 4 * trials:
            proposal, asked = storage.ask(dict.fromkeys(names, len(KEPT))), asked + 1
            levels = np.array([proposal.levels[name] for name in names])
            key = tuple(int(level) for level in levels)
            record = TrialRecord(
                proposal.trial,
                "complete",
                proposal.origin,
                {"tensors": {name: {} for name, level in zip(names, levels, strict=True) if level}},
                str(key),
                "",
                cost={"parameters": made.parameters(levels)},
            )
            if key in seen:
                storage.tell(record, *seen[key])
                continue
            outcomes = made.outcomes(levels)
            if way is not None:
                divergence = made.divergence(levels) if any(key) else 0.0
                record.quantities["kl_divergence"] = Interval(divergence)  # type: ignore[index]
                spent += PROXY_DOCUMENTS
                stop, scored = None, 0
                if established:
                    judge = Judge(OBJECTIVES, established[0], established, confidence)
                    stop = judge.verdict(1, record)
                    for rung, share in enumerate(SHARES, 2):
                        if stop is not None:
                            break
                        scored = round(share * documents)
                        mask = np.arange(documents) < scored
                        stop = judge.verdict(rung, record, result_of(outcomes[mask]), {"t": mask})
                if stop is not None:
                    spent += scored
                    record.estimates.update(stop.estimates)  # type: ignore[attr-defined]
                    heard = told(way, OBJECTIVES, record, {})
                    seen[key] = (heard.values, heard.violations)
                    storage.tell(record, *seen[key])
                    continue
            spent += documents
            record.quantities["accuracy"] = Interval(float(outcomes.mean()))  # type: ignore[index]
            established.append(Established(record, result_of(outcomes)))
            expected.append(made.accuracy(levels))
            seen[key] = ([float(outcomes.mean()), record.cost["parameters"]], {})
            storage.tell(record, *seen[key])
        storage.close()
    parameters = np.array([entry.record.cost["parameters"] for entry in established])
    measured = np.array([entry.record.quantities["accuracy"].value for entry in established], dtype=np.float64)
    front = non_dominated(np.column_stack([measured, parameters]), directions_of(OBJECTIVES))
    corner, ideal = [0.0, 1.1], [1.0, 0.0]

    def volume(accuracy: NDArray[np.float64]) -> float:
        return normalised_hypervolume(np.column_stack([accuracy, parameters])[front], corner, ideal)

    return {
        "documents": spent,
        "measured": volume(measured),
        "expected": volume(np.array(expected)),
        "complete": len(established),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--ways", nargs="+", default=list(TELL))
    parser.add_argument("--confidences", type=float, nargs="+", default=[0.8])
    options = parser.parse_args()
    made = [Made.of(seed, options.documents) for seed in range(options.seeds)]
    base = [study(model, options.trials, None, 0.8, options.sampler) for model in made]
    print(f"{options.seeds} studies of {options.trials} trials and {options.documents} documents, {options.sampler}")
    print("confidence  told          less evaluation   hypervolume, measured   hypervolume, expected   at the top")
    rows = []
    for confidence in options.confidences:
        for way in options.ways:
            found = [study(model, options.trials, way, confidence, options.sampler) for model in made]
            speed = [b["documents"] / f["documents"] for b, f in zip(base, found, strict=True)]
            row: dict[str, Any] = {"confidence": confidence, "told": way, "speed": statistics.geometric_mean(speed)}
            for name in ("measured", "expected"):
                change = np.array([f[name] / b[name] - 1 for b, f in zip(base, found, strict=True)])
                row[name], row[f"{name}_error"] = float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)
            row["complete"] = statistics.mean(f["complete"] for f in found)
            rows.append(row)
            print(
                f"{confidence:>10.2f}  {way:<12} {row['speed']:>13.2f} x"
                f" {100 * row['measured']:>+14.2f} ± {100 * row['measured_error']:.2f} %"
                f" {100 * row['expected']:>+14.2f} ± {100 * row['expected_error']:.2f} %"
                f" {row['complete']:>12.1f}",
                flush=True,
            )
    print(json.dumps({"trials": options.trials, "documents": options.documents, "rows": rows}))


if __name__ == "__main__":
    main()
