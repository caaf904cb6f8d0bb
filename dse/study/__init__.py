"""Studies: search spaces, proposals, trials and their storage; the only importer of optuna."""

from dse.search.spaces.base import SearchSpace as SearchSpace
from dse.study.compare import CostComparison as CostComparison
from dse.study.compare import TrialComparison as TrialComparison
from dse.study.device_rank_multiple import settled_space as settled_space
from dse.study.evaluate_point import PointEvaluator as PointEvaluator
from dse.study.evaluate_point import Reference as Reference
from dse.study.events import StudyListener as StudyListener
from dse.study.events import StudyProgress as StudyProgress
from dse.study.runner import run_study as run_study
from dse.study.sampler import SAMPLERS as SAMPLERS
from dse.study.setup import load_study_model as load_study_model
from dse.study.setup import resolve_device as resolve_device
from dse.study.setup import study_bank as study_bank
from dse.study.study import DEFAULT_MAX_ACCURACY_DROP as DEFAULT_MAX_ACCURACY_DROP
from dse.study.study import Study as Study
from dse.study.study import open_study as open_study
from dse.trial_record import Interval as Interval
from dse.trial_record import TrialRecord as TrialRecord
from dse.trial_record import finite as finite
