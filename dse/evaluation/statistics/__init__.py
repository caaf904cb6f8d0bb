"""Confidence intervals, paired tests, power and rank correlation: arrays of per-document outcomes in, values out."""

from dse.evaluation.statistics.intervals import Interval as Interval
from dse.evaluation.statistics.intervals import Outcomes as Outcomes
from dse.evaluation.statistics.intervals import PairedDrop as PairedDrop
from dse.evaluation.statistics.intervals import PairedInterval as PairedInterval
from dse.evaluation.statistics.intervals import PairedRatio as PairedRatio
from dse.evaluation.statistics.intervals import mean_interval as mean_interval
from dse.evaluation.statistics.intervals import paired_drop as paired_drop
from dse.evaluation.statistics.intervals import paired_perplexity_ratio as paired_perplexity_ratio
from dse.evaluation.statistics.intervals import perplexity_interval as perplexity_interval
from dse.evaluation.statistics.paired_tests import drop_with_test as drop_with_test
from dse.evaluation.statistics.paired_tests import paired_bootstrap as paired_bootstrap
