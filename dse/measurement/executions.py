"""Mode to what runs it."""

from __future__ import annotations

from collections.abc import Mapping

from dse.measurement.execution import CompiledExecution, CudaGraphExecution, EagerExecution, Execution
from dse.measurement.fast import FastExecution

__all__ = ["EXECUTIONS"]

EXECUTIONS: Mapping[str, type[Execution]] = {
    kind.mode: kind for kind in (EagerExecution, CompiledExecution, CudaGraphExecution, FastExecution)
}
"""A new mode is one class and one line here, and its name in `dse.measurement.spec.MODES`."""
