"""A persisted study, finished or not: its trials, its front, and its recommendation."""

from __future__ import annotations

import dataclasses
import shlex
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dse.config import StudyConfig
from dse.errors import StudyError
from dse.files import write_bytes, write_text
from dse.pareto import Objective, objectives_named
from dse.report.explanation import Explanation, TrialContext, explain_trial
from dse.report.front_figure import plot_front
from dse.report.front_page import front_html
from dse.report.front_png import front_png
from dse.report.point_maps import PointMap, point_map_of
from dse.report.recommendation import Recommendation, recommend
from dse.report.text_tables import to_records
from dse.report.tied_trials import mark_ties, tied_table
from dse.report.trials_table import front_hypervolume, front_table, mark_front
from dse.search.origins import OriginShare, origin_shares
from dse.study.compare_trials import PairedOutcomes, TrialComparison, compare_records
from dse.study.folder import StudyFolder
from dse.study.healed_front import HEALED, with_healed_values
from dse.study.other_text_front import OTHER_TEXT, other_text_words, with_other_text
from dse.study.serving_front import mark_engine_fronts, mark_front_of, with_engine_values
from dse.study.storage import StudyStorage
from dse.trial_record import EVALUATED_STATES, TrialRecord, trial_row
from dse.workers.final_documents import with_final_values

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["DEFAULT_MAX_ACCURACY_DROP", "Study", "open_study", "started_study"]

DEFAULT_MAX_ACCURACY_DROP = 0.02

_ADVICE_KEYS = (
    "trial",
    "point_id",
    "reason",
    "accuracy_drop",
    "accuracy_drop_high",
    "meets_bound",
    "estimate_trial",
    "more_documents",
    "knee_trial",
)


def open_study(directory: str | Path) -> Study:
    """Open the folder of a study.

    Raises:
        StudyError: The folder holds no study, or a damaged one.
    """
    return Study(Path(directory))


def started_study(directory: Path) -> Study | None:
    """The study in this folder; None if it was stopped before its storage was set up.

    Raises:
        StudyError: The folder's storage is damaged.
    """
    folder = StudyFolder(directory)
    return Study(directory) if folder.storage.exists() and StudyStorage.has_started(folder.storage) else None


class Study:
    """A snapshot of a persisted study; open it again to see later trials.

    Raises:
        StudyError: The folder holds no study, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.folder = StudyFolder(directory)
        self.config: StudyConfig = self.folder.read_config()
        storage = StudyStorage.open_existing(self.folder.storage)
        try:
            self.attributes: dict[str, Any] = storage.attributes
            self.records: list[TrialRecord] = _with_final_values(self.attributes, storage.records())
        finally:
            storage.close()
        if "objectives" not in self.attributes:
            raise StudyError(f"{directory} holds a study that never started; run `dse run` again")

    @classmethod
    def running(
        cls, folder: StudyFolder, config: StudyConfig, attributes: dict[str, Any], records: list[TrialRecord]
    ) -> Study:
        """The study as the running process knows it, without reading the storage again after every trial."""
        study = cls.__new__(cls)
        study.folder, study.config, study.attributes, study.records = (
            folder,
            config,
            attributes,
            _with_final_values(attributes, records),
        )
        return study

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the study."""
        return objectives_named(self.attributes["objectives"])

    @property
    def evaluated_trials(self) -> int:
        """Number of trials that count against the budget: complete, failed or stopped."""
        return sum(record.state in EVALUATED_STATES for record in self.records)

    @property
    def is_exhausted(self) -> bool:
        """Whether the search space has no further point within the limits."""
        return bool(self.attributes.get("exhausted", False))

    def trials(self) -> pd.DataFrame:
        """One flat row per trial; the reference in the documentation lists the columns."""
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = [trial_row(record) for record in self.records]
        table = pd.DataFrame(rows) if rows else pd.DataFrame({"trial": [], "state": [], "feasible": []})
        for entry in self.objectives:
            if entry.name not in table.columns:
                table[entry.name] = float("nan")
        if not rows:
            return table.assign(on_front=False, tied_with=None, reduction=float("nan"), decomposed_tensors=0)
        for name in [column for column in table.columns if str(column).endswith("_is_predicted")]:
            table[name] = table[name].eq(True)
        table["duplicate_of"] = table["duplicate_of"].astype("Int64")
        marked = mark_engine_fronts(mark_front(table, self.objectives), self.objectives, self.attributes)
        marked = mark_front_of(marked, self.objectives, HEALED)
        return mark_ties(marked, self.objectives, PairedOutcomes(self.folder).differs)

    def front(self) -> pd.DataFrame:
        """The Pareto front, sorted by reduction, with the dense model as its reference.

        Raises:
            StudyError: No trial is complete yet.
        """
        return front_table(self._some_trials(), self.objectives)

    def tied(self) -> pd.DataFrame:
        """Trials that the front dominates within noise only; `tied_with` is the trial on the front.

        Raises:
            StudyError: No trial is complete yet.
        """
        return tied_table(self._some_trials())

    def compare(self, first: int, second: int) -> TrialComparison:
        """Compare two trials, paired over the same documents; every change is `second` relative to `first`.

        Args:
            first: A trial; a duplicate stands for the trial whose values it repeats.
            second: Another trial.

        Raises:
            StudyError: A trial does not exist or is not complete, both are the same, or outcomes are missing.
            TaskError: The two were evaluated on different documents.
        """
        before, after = (self._evaluated_record(trial) for trial in (first, second))
        return compare_records(self.folder, before, after)

    def _evaluated_record(self, trial: int) -> TrialRecord:
        found = self.record(trial)
        return found if found.duplicate_of is None else self.record(found.duplicate_of)

    def plot_front(self, x: str | None = None, y: str | None = None) -> Figure:
        """The front as a Plotly figure; `x` and `y` are objectives or `reduction`, by default all costs.

        Raises:
            StudyError: No trial is complete yet.
        """
        return plot_front(self._some_trials(), self.objectives, x=x, y=y)

    def recommend(
        self, max_accuracy_drop: float = DEFAULT_MAX_ACCURACY_DROP, min_reduction: float | None = None
    ) -> Recommendation:
        """The cheapest point whose accuracy drop from the baseline is within tolerance.

        Raises:
            ConfigError: A limit is out of range, or accuracy was not measured.
            StudyError: The baseline has not been measured.
        """
        return recommend(
            self._some_trials(), self.objectives, max_accuracy_drop=max_accuracy_drop, min_reduction=min_reduction
        )

    def _some_trials(self) -> pd.DataFrame:
        if not self.records:
            raise StudyError(f"a front needs a finished trial, but {self.folder.path} has none; run `dse run` again")
        return self.trials()

    def record(self, trial: int) -> TrialRecord:
        """The record of a complete trial.

        Raises:
            StudyError: The trial does not exist or is not complete.
        """
        found = next((record for record in self.records if record.trial == trial), None)
        if found is None:
            numbers = ", ".join(str(r.trial) for r in self.records if r.state == "complete")
            raise StudyError(f"a trial must be one of this study's ({numbers}), but got {trial}")
        if found.state == "duplicate" and found.duplicate_of is not None:
            self.record(found.duplicate_of)  # refuses the duplicate of a failed trial
        elif found.state != "complete":
            raise StudyError(f"trial {trial} must be complete, but is {found.state}: {found.reason}")
        return found

    def check_model(self, fingerprint: str) -> None:
        """Check that the model is still the study's.

        Args:
            fingerprint: The model's present one.

        Raises:
            StudyError: It is another model, or has other weights.
        """
        recorded = self.attributes.get("facts", {}).get("model_fingerprint")
        if recorded is not None and recorded != fingerprint:
            raise StudyError(
                f"the study used the model with fingerprint {recorded}, but '{self.config.model.ref}' now has"
                f" {fingerprint}; pin `model.revision` or restore the model"
            )

    @property
    def hypervolume(self) -> float | None:
        """Normalised hypervolume; None before the baseline is measured, which fixes the reference point."""
        reference = self.attributes.get("reference")
        return None if reference is None else front_hypervolume(self.trials(), self.objectives, reference)

    @property
    def front_records(self) -> list[TrialRecord]:
        """Records of the trials on the front."""
        table = self.trials()
        numbers = set(table.loc[table["on_front"].to_numpy(dtype=bool), "trial"])
        return [record for record in self.records if record.trial in numbers]

    @property
    def front_size(self) -> int:
        """Number of trials on the front."""
        return int(self.trials()["on_front"].sum())

    @property
    def origin_shares(self) -> tuple[OriginShare, ...]:
        """Evaluations and contribution to the front of each proposer."""
        front = {record.trial for record in self.front_records}
        return origin_shares(self.records, self.objectives, self.attributes.get("reference"), front)

    def explain(self, trial: int) -> Explanation:
        """Explain a trial: what its point changes, why it was proposed, and its map of ranks.

        Raises:
            StudyError: The trial does not exist or is not complete.
        """
        return explain_trial(self.record(trial), self._explanation_context)

    @property
    def point_maps(self) -> tuple[PointMap, ...]:
        """Maps of the front points that decompose something, in the order of the front's table."""
        records, context = {record.trial: record for record in self.records}, self._explanation_context
        front = [records[trial] for trial in context.front]
        return tuple(point_map_of(record, context) for record in front if not record.is_dense)

    @cached_property
    def _explanation_context(self) -> TrialContext:
        front = self.front()
        trials = [int(trial) for trial in front.loc[front["on_front"].to_numpy(dtype=bool), "trial"]]
        return TrialContext.of(self.records, self.objectives, self.attributes.get("facts", {}), trials)

    def write_tables(self) -> None:
        """Write `trials.csv` and `front.csv`, which can be made again from the storage."""
        write_text(self.folder.trials_csv, self.trials().to_csv(index=False), is_durable=False)
        write_text(self.folder.front_csv, self.front().to_csv(index=False), is_durable=False)

    def write_reports(self) -> None:
        """Write the tables, the page and the picture of the front."""
        self.write_tables()
        trials, title = self.trials(), f"dse study {self.config.name}"
        page = front_html(
            trials,
            self.objectives,
            title=title,
            study_facts=self.facts(),
            next_commands=self.next_commands(),
            point_maps=self.point_maps,
        )
        write_text(self.folder.front_html, page)
        write_bytes(self.folder.front_png, front_png(trials, self.objectives, title=title))

    def to_document(self) -> dict[str, Any]:
        """The document that `dse run --json` and `dse front --json` print: progress, front, recommendation, files."""
        folder = self.folder
        advice = self.recommend() if self.has_accuracy else None
        return {
            "study": self.config.name,
            "directory": str(folder.path),
            "trials_evaluated": self.evaluated_trials,
            "trials_budget": self.config.budget.trials,
            "is_complete": self.evaluated_trials >= self.config.budget.trials or self.is_exhausted,
            "objectives": [
                {"name": entry.name, "unit": entry.unit, "direction": entry.direction} for entry in self.objectives
            ],
            "hypervolume": self.hypervolume,
            "reference": self.attributes.get("reference"),
            "origins": [dataclasses.asdict(share) for share in self.origin_shares],
            "front": to_records(self.front()),
            "tied": to_records(self.tied()),
            "recommendation": None if advice is None else {key: getattr(advice, key) for key in _ADVICE_KEYS},
            "files": {
                "study": str(folder.study_yaml),
                "trials": str(folder.trials_csv),
                "front": str(folder.front_csv),
                "page": str(folder.front_html),
                "picture": str(folder.front_png),
                "log": str(folder.log),
            },
        }

    def next_commands(self) -> list[str]:
        """Commands to run next."""
        named = shlex.quote(str(self.folder.path))
        commands = [f"dse front {named}"]
        if self.has_accuracy:
            commands.append(f"dse recommend {named} --max-accuracy-drop {DEFAULT_MAX_ACCURACY_DROP:g}")
        trial = self._trial_to_export()
        if trial is not None:
            commands.append(f"dse export {named} --trial {trial} --out exports/{self.config.name}-{trial}")
        return commands

    @property
    def has_accuracy(self) -> bool:
        """Whether any accuracy is known, as drops need."""
        table = self.trials()
        return "accuracy" in table.columns and bool(table["accuracy"].notna().any())

    def _trial_to_export(self) -> int | None:
        if self.has_accuracy:
            advice = self.recommend()
            return next((t for t in (advice.trial, advice.knee_trial) if t is not None), None)
        front = self.front()
        candidates = front[~front["is_dense"]]
        return None if candidates.empty else int(candidates["trial"].iloc[0])

    def _float32_words(self) -> str:
        """The baseline's metrics in float32, if they were compared."""
        found = self.attributes.get("float32", {})
        return ", ".join(
            f"{task} {entry['metric']} {entry['float32']:.4f} (here {entry['value']:.4f})"
            for task, entry in found.items()
        )

    def facts(self) -> dict[str, str]:
        """Facts about the study for its report."""
        facts = self.attributes.get("facts", {})
        environment = facts.get("environment", {})
        hypervolume, reference = self.hypervolume, self.attributes.get("reference") or {}
        shown = {
            "Model": facts.get("model_ref"),
            "Model fingerprint": facts.get("model_fingerprint"),
            "Search space": f"{self.config.space.name} ({facts.get('number_of_points', '?')} points)",
            "Device and dtype": f"{facts.get('device')}, {facts.get('dtype')}",
            "In float32 instead": self._float32_words(),
            "Calibration text": facts.get("calibration"),
            "Text of another source": other_text_words(self.attributes.get(OTHER_TEXT, {})),
            "Energy meter": facts.get("energy_meter") or "none",
            "Hypervolume": None if hypervolume is None else f"{hypervolume:.4f} (share of the box to the ideal point)",
            "Proposers": "; ".join(share.describe() for share in self.origin_shares),
            "Reference point": ", ".join(f"{name} = {value:.6g}" for name, value in reference.items()),
            "Processor": environment.get("cpu", {}).get("model"),
            "Platform": environment.get("platform"),
            "Versions": ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items() if v),
        }
        return {key: str(value) for key, value in shown.items() if value}


def _with_final_values(attributes: dict[str, Any], records: list[TrialRecord]) -> list[TrialRecord]:
    """The records with the results on final documents, in serving engines and after healing, if there are any."""
    final, healed, other = (attributes.get(name, {}) for name in ("final", HEALED, OTHER_TEXT))
    measured = [with_engine_values(with_final_values(record, final), attributes) for record in records]
    return [with_healed_values(with_other_text(record, other), healed) for record in measured]
