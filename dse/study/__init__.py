"""Studies: run, resume, store and open them. The only package that imports optuna."""

from dse.search.spaces.base import SearchSpace as SearchSpace
from dse.study.compare_trials import CostComparison as CostComparison
from dse.study.compare_trials import TrialComparison as TrialComparison
from dse.study.run import run_study as run_study
from dse.study.samplers import SAMPLERS as SAMPLERS
from dse.study.study import DEFAULT_MAX_ACCURACY_DROP as DEFAULT_MAX_ACCURACY_DROP
from dse.study.study import Study as Study
from dse.study.study import open_study as open_study
from dse.workers.listener import StudyListener as StudyListener
from dse.workers.listener import StudyProgress as StudyProgress
from dse.workers.setup import load_study_model as load_study_model
from dse.workers.setup import resolve_device as resolve_device
from dse.workers.setup import study_bank as study_bank
