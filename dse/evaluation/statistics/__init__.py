"""Confidence intervals, paired tests, power and rank correlation: arrays of per-document outcomes in, values out."""

from __future__ import annotations

from dse.evaluation.statistics.intervals import (
    Interval,
    Outcomes,
    PairedDrop,
    PairedInterval,
    PairedRatio,
    mean_interval,
    paired_drop,
    paired_perplexity_ratio,
    perplexity_interval,
    wilson_interval,
)
from dse.evaluation.statistics.paired_tests import (
    BootstrapInterval,
    drop_with_test,
    mcnemar,
    paired_bootstrap,
    perplexity_ratio_with_test,
    stratified_mcnemar,
)
from dse.evaluation.statistics.power import (
    documents_to_settle,
    mcnemar_power,
    smallest_detectable_change,
    smallest_detectable_drop,
)
from dse.evaluation.statistics.rank_correlation import spearman, spearman_outcomes

__all__ = [
    "BootstrapInterval",
    "Interval",
    "Outcomes",
    "PairedDrop",
    "PairedInterval",
    "PairedRatio",
    "documents_to_settle",
    "drop_with_test",
    "mcnemar",
    "mcnemar_power",
    "mean_interval",
    "paired_bootstrap",
    "paired_drop",
    "paired_perplexity_ratio",
    "perplexity_interval",
    "perplexity_ratio_with_test",
    "smallest_detectable_change",
    "smallest_detectable_drop",
    "spearman",
    "spearman_outcomes",
    "stratified_mcnemar",
    "wilson_interval",
]
