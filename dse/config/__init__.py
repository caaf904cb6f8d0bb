"""The YAML schema of study and search-space files. An unknown key is an error that names the closest known key."""

from __future__ import annotations

from dse.config.calibration import CalibrationConfig, CalibrationSource
from dse.config.dataset_task import HEAD_COLUMNS, HEAD_METRICS, LOCAL_SUFFIXES, DatasetTaskConfig, Head
from dse.config.evaluation import AnyTaskConfig, EvaluationConfig, TaskConfig
from dse.config.fidelity import FidelityConfig
from dse.config.healing import HealingConfig
from dse.config.measurement import MeasurementConfig
from dse.config.old_names import DeprecatedNameWarning
from dse.config.reading import load_search_space, load_study, parse_search_space, parse_study
from dse.config.search import SearchConfig, SearchParts
from dse.config.search_space import (
    ConstraintsConfig,
    GroupConfig,
    LayerRange,
    LimitsConfig,
    Range,
    RankConfig,
    SearchSpaceConfig,
)
from dse.config.study import BudgetConfig, ModelConfig, ObjectiveConfig, SamplerConfig, StudyConfig
from dse.config.task_file import load_dataset_task
from dse.config.workers import WorkersConfig

__all__ = [
    "HEAD_COLUMNS",
    "HEAD_METRICS",
    "LOCAL_SUFFIXES",
    "AnyTaskConfig",
    "BudgetConfig",
    "CalibrationConfig",
    "CalibrationSource",
    "ConstraintsConfig",
    "DatasetTaskConfig",
    "DeprecatedNameWarning",
    "EvaluationConfig",
    "FidelityConfig",
    "GroupConfig",
    "Head",
    "HealingConfig",
    "LayerRange",
    "LimitsConfig",
    "MeasurementConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Range",
    "RankConfig",
    "SamplerConfig",
    "SearchConfig",
    "SearchParts",
    "SearchSpaceConfig",
    "StudyConfig",
    "TaskConfig",
    "WorkersConfig",
    "load_dataset_task",
    "load_search_space",
    "load_study",
    "parse_search_space",
    "parse_study",
]
