"""Comparing trials of a study: what is stored of each, duplicates, ratios of costs, and ties from real outcomes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_support import SMALL_SPACE, evaluated
from tiny_study import save_choice_task, tiny_study

from dse.errors import StudyError
from dse.evaluation.statistics.intervals import Interval
from dse.evaluation.statistics.paired_tests import mcnemar
from dse.study import Study, open_study, run_study
from dse.study.compare_trials import PairedOutcomes, _ratio_bounds


@pytest.fixture(scope="module")
def study(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A space of nine points sampled at random until repetitions occur, on two tasks."""
    import datasets.config

    folder = tmp_path_factory.mktemp("compared")
    second = save_choice_task(folder, documents=40, name="second_choice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
        tasks = [str(tiny_folder / "tiny_choice.yaml"), str(second)]
        config = tiny_study(tiny_folder, space=SMALL_SPACE, tasks=tasks, budget={"trials": 9})
        return run_study(config, out=folder / "run")


def test_outcomes_of_every_task_are_kept_compressed(study: Study) -> None:
    for record in evaluated(study):
        path = study.folder.outcomes(record.trial)
        with zipfile.ZipFile(path) as archive:
            assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
        stored = study.folder.read_evaluation(record.trial)
        assert [task.task for task in stored.tasks] == ["tiny_choice", "second_choice"]
        for task, documents in zip(stored.tasks, (24, 40), strict=True):
            assert task.outcomes.shape == (documents,)
            assert not np.isnan(task.outcomes).any()
            assert {name: outcomes.shape for name, outcomes in task.graded.items()} == {
                "choice_probability": (documents,),
                "target_log_likelihood": (documents,),
            }
            assert task.all_metrics["acc"] == (task.value, task.stderr)


def test_any_two_trials_are_compared_by_their_own_outcomes(study: Study) -> None:
    first, second = (record.trial for record in evaluated(study)[1:3])
    found = study.compare(first, second)
    outcomes = [study.folder.read_evaluation(trial).tasks[1].outcomes for trial in (first, second)]
    row = next(row for row in found.quality if (row.task, row.metric) == ("second_choice", "acc"))
    losses, gains = (int((sign * (outcomes[0] - outcomes[1]) > 0).sum()) for sign in (1, -1))
    assert (row.losses, row.gains, row.p_value) == (losses, gains, mcnemar(losses, gains))
    assert row.change == pytest.approx((gains - losses) / 40)
    costs = {cost.name: cost for cost in found.costs}
    records = study.record(first), study.record(second)
    assert costs["parameters"].ratio == records[1].cost["parameters"] / records[0].cost["parameters"]
    assert (costs["parameters"].low, costs["parameters"].high) == (None, None)


def test_a_duplicate_stands_for_the_trial_it_repeats(study: Study) -> None:
    repeated = next((record for record in study.records if record.state == "duplicate"), None)
    assert repeated is not None
    assert repeated.duplicate_of is not None
    other = next(r.trial for r in evaluated(study) if r.trial != repeated.duplicate_of)
    assert study.compare(other, repeated.trial) == study.compare(other, repeated.duplicate_of)
    with pytest.raises(StudyError, match=f"both are trial {repeated.duplicate_of}"):
        study.compare(repeated.trial, repeated.duplicate_of)


def test_the_interval_of_a_ratio_of_ratios() -> None:
    # One without noise leaves the other's interval.
    assert _ratio_bounds(Interval(1.0, 1.0, 1.0), Interval(0.8, 0.7, 0.9)) == pytest.approx((0.7, 0.9))
    assert _ratio_bounds(Interval(0.8, 0.7, 0.9), Interval(1.0, 1.0, 1.0)) == pytest.approx((1 / 0.9, 1 / 0.7))
    assert _ratio_bounds(Interval(0.8), Interval(1.0, 1.0, 1.0)) == (None, None)
    # Log-normal noise of both: the standard errors add in squares.
    random = np.random.default_rng(0)
    first, second = 0.02, 0.03
    z = 1.959964
    low, high = _ratio_bounds(
        Interval(0.8, 0.8 * np.exp(-z * first), 0.8 * np.exp(z * first)),
        Interval(0.9, 0.9 * np.exp(-z * second), 0.9 * np.exp(z * second)),
    )
    drawn = 0.9 / 0.8 * np.exp(random.normal(0, second, 200_000) - random.normal(0, first, 200_000))
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), rel=2e-3)


def test_ties_follow_from_the_paired_tests(study: Study) -> None:
    table, paired = study.trials(), PairedOutcomes(study.folder)
    front = set(table.loc[table["on_front"], "trial"])
    assert "tied_with" in pd.read_csv(study.folder.trials_csv).columns
    for _, row in table[table["tied_with"].notna()].iterrows():
        assert row["tied_with"] in front
        assert paired.differs("accuracy", int(row["tied_with"]), int(row["trial"])) is not True
    for first in evaluated(study):
        for second in evaluated(study):
            if first.trial < second.trial:
                rows = study.compare(first.trial, second.trial).quality
                mean = next(row for row in rows if row.metric == "accuracy")
                assert mean.p_value is not None
                assert paired.differs("accuracy", first.trial, second.trial) == (mean.p_value < 0.05)
    assert paired.differs("parameters", 0, 1) is None
    assert paired.differs("perplexity", 0, 1) is None
    assert paired.differs("accuracy", 0, 12345) is None


def test_a_study_is_read_anew_with_its_ties(study: Study) -> None:
    pd.testing.assert_frame_equal(open_study(study.folder.path).trials(), study.trials())
    tied = study.trials().dropna(subset="tied_with")
    assert set(study.tied()["trial"]) == set(tied["trial"])
