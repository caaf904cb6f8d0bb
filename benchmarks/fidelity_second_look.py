"""What the ladder saves and loses on one and the same sequence of trials, with and without a second look at the end.

    python benchmarks/fidelity_second_look.py [--models 12] [--documents 250] [--trials 60]

Made-up models, whose truth is known (`fidelity_telling.py`), and the real judge. Trials are drawn at random before
anything is judged, so that all settings see the same ones. "Measured" is the hypervolume by the study's own documents,
on which the study without a ladder is lucky more often; "expected" is that of the same front by the true accuracies.
A table for people; one JSON document as the last line for machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fidelity_telling import KEPT, OBJECTIVES, PROXY_DOCUMENTS, SHARES, Made, result_of
from numpy.typing import NDArray

from dse.pareto import directions_of, non_dominated, normalised_hypervolume
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.search.multi_fidelity.established import Established
from dse.search.multi_fidelity.resume_stopped import resume_stopped_trials
from dse.trial_record import Interval, TrialRecord

SETTINGS = (
    (0.002, None),
    (0.003, None),
    (0.005, None),
    (0.005, 0.001),
    (0.005, 0.0015),
    (0.005, 0.002),
    (0.005, 0.003),
)
REDUCTIONS = (0.03, 0.3)

Levels = NDArray[np.int64]


def drawn(made: Made, trials: int) -> list[Levels]:
    """The dense model, then random points of 3 to 30 % reduction."""
    generator = np.random.default_rng([made.seed, 7])
    found = [np.zeros(made.sizes.size, dtype=np.int64)]
    while len(found) < trials:
        levels = generator.integers(0, len(KEPT), made.sizes.size)
        levels[generator.random(made.sizes.size) < generator.random()] = 0
        if REDUCTIONS[0] < 1 - made.parameters(levels) < REDUCTIONS[1]:
            found.append(levels)
    return found


@dataclass
class Play:
    """One sequence of trials under one setting.

    Attributes:
        made: The model.
        spent: Documents evaluated, the proxy's included.
        top: Trials that were evaluated on all documents.
    """

    made: Made
    spent: float = 0.0
    top: list[Established] = dataclasses.field(default_factory=list)

    def run(self, sequence: Sequence[Levels], min_gain: float | None, resume_stopped: float | None) -> None:
        """EarlyStopping each trial in its turn, then the stopped ones again."""
        stopped: dict[int, tuple[float, TrialRecord]] = {}
        for trial, levels in enumerate(sequence):
            record = TrialRecord(
                trial, "complete", "", point_of(levels), "", "", cost={"parameters": self.made.parameters(levels)}
            )
            if min_gain is None:
                self.spent += self.made.difficulties.size
                self._establish(levels, record)
                continue
            self.spent += PROXY_DOCUMENTS
            judge = EarlyStopping(OBJECTIVES, self.top[0], self.top, min_gain) if self.top else None
            cost, still = self._climb(levels, record, judge)
            self.spent += cost
            if still is not None:
                stopped[trial] = cost, still

        def climb_on(record: TrialRecord, judge: EarlyStopping) -> None:
            levels = sequence[record.trial]
            cost, _ = self._climb(levels, record, judge)
            self.spent += max(0.0, cost - stopped[record.trial][0])

        if resume_stopped is not None:
            waiting = [record for _, record in stopped.values()]
            resume_stopped_trials(
                waiting,
                lambda: EarlyStopping(OBJECTIVES, self.top[0], self.top, resume_stopped),
                climb_on,
                resume_stopped,
            )

    def _climb(
        self, levels: Levels, record: TrialRecord, judge: EarlyStopping | None
    ) -> tuple[float, TrialRecord | None]:
        """Documents that the trial sees, and its record if it is stopped."""
        documents, outcomes = self.made.difficulties.size, self.made.outcomes(levels)
        record = dataclasses.replace(record, quantities={"kl_divergence": self._proxy(levels)}, estimates={})
        stop, seen = None if judge is None else judge.verdict(1, record), 0
        for rung, share in enumerate(SHARES, 2):
            if judge is not None and stop is None:
                seen = round(share * documents)
                mask = np.arange(documents) < seen
                stop = judge.verdict(rung, record, result_of(outcomes[mask]), {"t": mask})
        if stop is not None:
            return seen, dataclasses.replace(record, state="stopped", rung=stop.rung, estimates=stop.estimates)
        self._establish(levels, record)
        return documents, None

    def _establish(self, levels: Levels, record: TrialRecord) -> None:
        outcomes = self.made.outcomes(levels)
        quantities = {"kl_divergence": self._proxy(levels), "accuracy": Interval(float(outcomes.mean()))}
        self.top.append(Established(dataclasses.replace(record, quantities=quantities), result_of(outcomes)))

    def _proxy(self, levels: Levels) -> Interval:
        return Interval(self.made.divergence(levels) if levels.any() else 0.0)

    def hypervolumes(self, sequence: Sequence[Levels]) -> tuple[float, float]:
        """Of the front by measured accuracies: by these, and by the true ones."""
        parameters = np.array([entry.record.cost["parameters"] for entry in self.top])
        measured = np.array([float(entry.record.quantities["accuracy"].value or 0.0) for entry in self.top])
        true = np.array([self.made.accuracy(sequence[entry.record.trial]) for entry in self.top])
        front = non_dominated(np.column_stack([measured, parameters]), directions_of(OBJECTIVES))
        tables = [np.column_stack([accuracy, parameters])[front] for accuracy in (measured, true)]
        first, second = (normalised_hypervolume(table, [0.0, 1.1], [1.0, 0.0]) for table in tables)
        return first, second


def point_of(levels: Levels) -> dict[str, dict[str, dict[str, int]]]:
    return {"tensors": {f"g{index}": {} for index in np.flatnonzero(levels)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--documents", type=int, default=250)
    parser.add_argument("--trials", type=int, default=60)
    options = parser.parse_args()
    models = [Made.of(seed, options.documents) for seed in range(options.models)]
    sequences = [drawn(made, options.trials) for made in models]

    def played(min_gain: float | None, resume_stopped: float | None) -> list[Play]:
        plays = [Play(made) for made in models]
        for play, sequence in zip(plays, sequences, strict=True):
            play.run(sequence, min_gain, resume_stopped)
        return plays

    def volumes(plays: list[Play]) -> NDArray[np.float64]:
        return np.array([play.hypervolumes(sequence) for play, sequence in zip(plays, sequences, strict=True)])

    base = played(None, None)
    rows = []
    print("least gain   second look   less evaluation   hypervolume: measured          expected   at the top")
    for min_gain, resume_stopped in SETTINGS:
        plays = played(min_gain, resume_stopped)
        changes = 100 * (volumes(plays) / volumes(base) - 1)
        means, errors = changes.mean(axis=0), changes.std(axis=0, ddof=1) / len(models) ** 0.5
        saved = sum(play.spent for play in base) / sum(play.spent for play in plays)
        top = float(np.mean([len(play.top) for play in plays]))
        print(
            f"{min_gain:>10} {resume_stopped or '-':>13} {saved:>15.2f} x   {means[0]:>+8.2f} ± {errors[0]:.2f} %"
            f"   {means[1]:>+8.2f} ± {errors[1]:.2f} %   {top:>10.1f}",
            flush=True,
        )
        row = {"min_gain": min_gain, "resume_stopped": resume_stopped, "saved": saved, "top": top}
        rows.append({**row, "measured": means[0], "expected": means[1], "errors": list(errors)})
    print(json.dumps({"models": options.models, "documents": options.documents, "rows": rows}))


if __name__ == "__main__":
    main()
