"""The YAML schema of study files and search spaces: unknown keys are refused, with the nearest known one."""

from __future__ import annotations

from dse.config.calibration import CalibrationConfig, CalibrationSource
from dse.config.evaluation import EvaluationConfig, TaskConfig
from dse.config.measurement import MeasurementConfig
from dse.config.reading import load_search_space, load_study, parse_search_space, parse_study
from dse.config.search_space import GroupConfig, LayerRange, LimitsConfig, Range, RankConfig, SearchSpaceConfig
from dse.config.study import BudgetConfig, ModelConfig, ObjectiveConfig, SamplerConfig, StudyConfig

__all__ = [
    "BudgetConfig",
    "CalibrationConfig",
    "CalibrationSource",
    "EvaluationConfig",
    "GroupConfig",
    "LayerRange",
    "LimitsConfig",
    "MeasurementConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Range",
    "RankConfig",
    "SamplerConfig",
    "SearchSpaceConfig",
    "StudyConfig",
    "TaskConfig",
    "load_search_space",
    "load_study",
    "parse_search_space",
    "parse_study",
]
