from __future__ import annotations

import subprocess
import sys

import pytest

from dse import evaluation


def test_every_public_name_is_there() -> None:
    assert [name for name in evaluation.__all__ if not hasattr(evaluation, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Evaluater'"):
        _ = evaluation.Evaluater


def test_reading_results_does_not_import_lm_eval() -> None:
    program = "import sys, dse.evaluation; sys.exit('lm_eval' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
