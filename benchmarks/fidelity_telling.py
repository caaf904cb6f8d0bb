"""What a sampler should hear of a stopped trial, and what a trial must promise to climb: studies of made-up models.

    python benchmarks/fidelity_telling.py [--trials 60] [--seeds 12] [--gains 0.002 0.005 0.01 0.02]

The judge and the sampler are the real ones; the model is a formula. Each of 10 groups of tensors costs some
accuracy when it is cut; documents are right or wrong by a difficulty of their own and by chance; the KL divergence
follows the divergence with some error. So whole studies take seconds, and the expected accuracy of every point is known.
A table for people; one JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from dse.evaluation import EvaluationResult, TaskResult
from dse.pareto import directions_of, non_dominated, normalised_hypervolume, objectives_named
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.search.multi_fidelity.established import Established
from dse.search.multi_fidelity.stopped_trials import TELL, told
from dse.trial_record import Interval, TrialRecord

OBJECTIVES = objectives_named(["accuracy", "parameters"])
KEPT = (1.0, 0.9, 0.75, 0.5, 0.25)
SHARES = (0.2, 0.5)
PROXY_DOCUMENTS = 9
"""What the proxy costs, in documents: 256 tokens against some 30 a document of multiple choice."""
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

    def divergence(self, levels: NDArray[np.int64]) -> float:
        cut = 1.0 - np.asarray(KEPT)[levels]
        neighbours = (cut[:-1] * cut[1:]).sum()
        return float((self.sensitivities * cut**1.5).sum() + 0.2 * neighbours)

    def accuracy(self, levels: NDArray[np.int64]) -> float:
        return CHANCE + (DENSE_ACCURACY - CHANCE) * float(np.exp(-0.6 * self.divergence(levels)))

    def divergence(self, levels: NDArray[np.int64]) -> float:
        own = np.random.default_rng([self.seed, *levels.tolist(), 1])
        return self.divergence(levels) * float(np.exp(0.15 * own.normal()))

    def outcomes(self, levels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Right where difficulty and this point's own chance lie below what its accuracy asks for."""
        own = np.random.default_rng([self.seed, *levels.tolist(), 2])
        latent = 0.8 * self.difficulties + 0.6 * own.normal(size=self.difficulties.size)
        return (latent < statistics.NormalDist().inv_cdf(self.accuracy(levels))).astype(np.float64)


def result_of(outcomes: NDArray[np.float64]) -> EvaluationResult:
    mean = float(outcomes.mean())
    return EvaluationResult((TaskResult("t", "acc", mean, 0.0, outcomes.size, True, outcomes, kind="accuracy"),), 0.0)


def study(made: Made, trials: int, way: str | None, gain: float) -> dict[str, float]:
    """One study; `way` None is without a ladder."""
    documents = made.difficulties.size
    spent, asked = 0.0, 0
    established: list[Established] = []
    expected: list[float] = []
    seen: dict[tuple[int, ...], list[float] | None] = {}
    names = [f"g{index}" for index in range(made.sizes.size)]
    sampler = optuna.samplers.TPESampler(seed=made.seed, n_startup_trials=10)
    search = optuna.create_study(directions=directions_of(OBJECTIVES), sampler=sampler)
    search.enqueue_trial(dict.fromkeys(names, 0))
    while len(seen) < trials and asked < 4 * trials:
        trial, asked = search.ask(), asked + 1
        levels = np.array([trial.suggest_int(name, 0, len(KEPT) - 1) for name in names])
        key = tuple(int(level) for level in levels)
        if key not in seen:
            tensors = {name: {} for name, level in zip(names, levels, strict=True) if level}
            record = TrialRecord(
                trial.number, "complete", "", {"tensors": tensors}, "", "", cost={"parameters": made.parameters(levels)}
            )
            cost, record, violations = climbed(made, levels, record, established, way, gain)
            spent += cost
            if record.state == "complete":
                spent += documents
                outcomes = made.outcomes(levels)
                record = dataclasses.replace(
                    record, quantities={**record.quantities, "accuracy": Interval(float(outcomes.mean()))}
                )
                established.append(Established(record, result_of(outcomes)))
                expected.append(made.accuracy(levels))
                seen[key] = [float(outcomes.mean()), record.cost["parameters"]]
            else:
                heard = told(way or "nothing", OBJECTIVES, record, violations)
                seen[key] = heard.values
                for name, value in heard.violations.items():
                    trial.set_constraint(name, value)
                if heard.values is None:
                    state = optuna.trial.TrialState.PRUNED if heard.violations else optuna.trial.TrialState.FAIL
                    search.tell(trial, state=state)
                    continue
        values = seen[key]
        search.tell(trial, values, state=None if values is not None else optuna.trial.TrialState.FAIL)
    parameters = np.array([entry.record.cost["parameters"] for entry in established])
    measured = np.array([entry.record.quantities["accuracy"].value for entry in established], dtype=np.float64)
    front = non_dominated(np.column_stack([measured, parameters]), directions_of(OBJECTIVES))

    def volume(accuracy: NDArray[np.float64]) -> float:
        return normalised_hypervolume(np.column_stack([accuracy, parameters])[front], [0.0, 1.1], [1.0, 0.0])

    return {
        "documents": spent,
        "measured": volume(measured),
        "expected": volume(np.array(expected)),
        "complete": len(established),
    }


def climbed(
    made: Made,
    levels: NDArray[np.int64],
    record: TrialRecord,
    established: list[Established],
    way: str | None,
    gain: float,
) -> tuple[float, TrialRecord, dict[str, float]]:
    """A trial below the top rung: what it cost in documents, and its record, stopped or not."""
    if way is None:
        return 0.0, record, {}
    documents, outcomes = made.difficulties.size, made.outcomes(levels)
    divergence = made.divergence(levels) if levels.any() else 0.0
    record = dataclasses.replace(record, quantities={"kl_divergence": Interval(divergence)})
    if not established:
        return PROXY_DOCUMENTS, record, {}
    judge = EarlyStopping(OBJECTIVES, established[0], established, gain)
    stop, scored = judge.verdict(1, record), 0
    for rung, share in enumerate(SHARES, 2):
        if stop is None:
            scored = round(share * documents)
            mask = np.arange(documents) < scored
            stop = judge.verdict(rung, record, result_of(outcomes[mask]), {"t": mask})
    if stop is None:
        return PROXY_DOCUMENTS, record, {}
    return PROXY_DOCUMENTS + scored, dataclasses.replace(record, state="stopped", estimates=stop.estimates), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--ways", nargs="+", default=list(TELL))
    parser.add_argument("--gains", type=float, nargs="+", default=[0.002, 0.005, 0.01, 0.02])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = [Made.of(seed, options.documents) for seed in range(options.seeds)]
    base = [study(model, options.trials, None, 0.0) for model in made]
    print(f"{options.seeds} studies of {options.trials} trials and {options.documents} documents")
    print("least gain    told          less evaluation   hypervolume, measured   hypervolume, expected   at the top")
    rows = []
    settings = [(gain, "estimate") for gain in options.gains]
    settings += [(options.gains[-1], way) for way in options.ways if way != "estimate"]
    for gain, way in settings:
        found = [study(model, options.trials, way, gain) for model in made]
        speed = [b["documents"] / f["documents"] for b, f in zip(base, found, strict=True)]
        row: dict[str, Any] = {"min_gain": gain, "told": way, "speed": statistics.geometric_mean(speed)}
        for name in ("measured", "expected"):
            change = np.array([f[name] / b[name] - 1 for b, f in zip(base, found, strict=True)])
            row[name], row[f"{name}_error"] = float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)
        row["complete"] = statistics.mean(f["complete"] for f in found)
        rows.append(row)
        print(
            f"{gain:>12.3f}  {way:<12} {row['speed']:>13.2f} x"
            f" {100 * row['measured']:>+14.2f} ± {100 * row['measured_error']:.2f} %"
            f" {100 * row['expected']:>+14.2f} ± {100 * row['expected_error']:.2f} %"
            f" {row['complete']:>12.1f}",
            flush=True,
        )
    print(json.dumps({"trials": options.trials, "documents": options.documents, "rows": rows}))


if __name__ == "__main__":
    main()
