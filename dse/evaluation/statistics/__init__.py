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
from dse.evaluation.statistics.intervals import wilson_interval as wilson_interval
from dse.evaluation.statistics.paired_tests import BootstrapInterval as BootstrapInterval
from dse.evaluation.statistics.paired_tests import drop_with_test as drop_with_test
from dse.evaluation.statistics.paired_tests import mcnemar as mcnemar
from dse.evaluation.statistics.paired_tests import paired_bootstrap as paired_bootstrap
from dse.evaluation.statistics.paired_tests import perplexity_ratio_with_test as perplexity_ratio_with_test
from dse.evaluation.statistics.paired_tests import stratified_mcnemar as stratified_mcnemar
from dse.evaluation.statistics.power import documents_to_settle as documents_to_settle
from dse.evaluation.statistics.power import mcnemar_power as mcnemar_power
from dse.evaluation.statistics.power import smallest_detectable_change as smallest_detectable_change
from dse.evaluation.statistics.power import smallest_detectable_drop as smallest_detectable_drop
from dse.evaluation.statistics.rank_correlation import spearman as spearman
from dse.evaluation.statistics.rank_correlation import spearman_outcomes as spearman_outcomes
