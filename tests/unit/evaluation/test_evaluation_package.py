from __future__ import annotations

import subprocess
import sys

import pytest

from dse import evaluation


def test_all_public_names_exist() -> None:
    exported = [name for name in vars(evaluation) if not name.startswith("_")]
    assert "EvaluationResult" in exported
    assert [name for name in (*exported, *evaluation._ON_FIRST_USE) if not hasattr(evaluation, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Evaluater'"):
        _ = evaluation.Evaluater


def test_reading_results_imports_neither_lm_eval_nor_torch() -> None:
    heavy = ("lm_eval", "datasets", "torch", "transformers", "scipy.stats")
    program = f"import sys, dse.evaluation; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
