"""Evaluate one design point: decompose, evaluate on the tasks, measure, undo. Works without Optuna."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from dse.cost import point_cost
from dse.decomposition import FactorBank, apply_point
from dse.design_point import DesignPoint
from dse.errors import DseError, OutOfMemoryError, StudyError, TrialError
from dse.evaluation import EvaluationResult
from dse.measurement import IdlePower, device_in_use
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.search.multi_fidelity import EarlyStopping, Stop
from dse.search.proposal import Proposal
from dse.topology import Topology
from dse.trial.measurements import TrialMeasurer
from dse.trial.rungs import MultiFidelityEvaluator, run_rungs
from dse.trial.trial_run import TrialRun
from dse.trial_record import EvaluatedTrial, TrialRecord

__all__ = ["TrialEvaluator", "TrialPart", "new_record"]

logger = logging.getLogger("dse")

TrialPart = Literal["all", "accuracy", "measurements"]


@dataclass(frozen=True)
class TrialEvaluator:
    """Everything that evaluating a design point needs; built once per study.

    Attributes:
        loaded: The resident model, dense between trials.
        bank: Factors of every tensor that the space can decompose.
        fidelity: Evaluates accuracy, on rungs if the study asks for them.
        measurer: Measures latency, energy and memory.
        on_phase: Progress callback.
    """

    loaded: LoadedModel
    bank: FactorBank
    fidelity: MultiFidelityEvaluator
    measurer: TrialMeasurer
    on_phase: ProgressCallback = field(default=ignore_progress)

    def evaluate(
        self,
        record: TrialRecord,
        baseline: EvaluatedTrial | None,
        early_stopping: EarlyStopping | None = None,
        idle: IdlePower | None = None,
        part: TrialPart = "all",
    ) -> tuple[TrialRecord, EvaluationResult | None]:
        """Evaluate one point on the resident model, which is dense again afterwards in any case.

        Args:
            record: A new record: number, point, origin and cost; for `measurements`, the result of `accuracy`.
            baseline: The dense model's trial; None while it is itself evaluated.
            early_stopping: Stops a trial of too little promise; None evaluates every trial to the end.
            idle: The device's idle power, for net energy.
            part: `accuracy` leaves the measurements to another worker, which takes `measurements`.

        Returns:
            The record, and the evaluation with its per-document outcomes. A failed trial has a record, too, with the
            reason and everything that was measured before the failure.
        """
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        seconds = {phase: seconds for phase, seconds in record.seconds.items() if phase != "total"}
        record = dataclasses.replace(record, started_at=record.started_at or started_at)
        run = TrialRun(record, seconds=seconds)
        try:
            with _trial_errors():
                stop = self._run(run, baseline, early_stopping, idle, part)
        except TrialError as error:
            reason = str(error) if type(error) is TrialError else f"{type(error).__name__}: {error}"
            return run.finished("failed", reason), run.evaluation
        if stop is not None:
            run.update(estimates=stop.estimates)
            return run.finished("stopped", stop.reason), None
        return run.finished("complete"), run.evaluation

    def _run(
        self,
        run: TrialRun,
        baseline: EvaluatedTrial | None,
        early_stopping: EarlyStopping | None,
        idle: IdlePower | None,
        part: TrialPart,
    ) -> Stop | None:
        applied = None
        point = run.record.point
        self.on_phase("decompose", 0, 1)
        try:
            with device_in_use(self.loaded.device), run.timed("decompose"):
                loaded = self.loaded
                applied = apply_point(loaded.model, loaded.topology, point, self.bank, loaded.waiting)
            stop = None
            if part != "measurements":
                factors = self.bank.identity(point)
                stop = run_rungs(self.fidelity, run, factors, early_stopping, baseline, self.on_phase)
            if stop is None and part != "accuracy":
                self.measurer.measure(run, applied, baseline, idle)
            return stop
        finally:
            if applied is not None:
                with run.timed("undo"):
                    applied.undo()

    def check_device(self) -> None:
        """Check that the model's device responds, after a failed trial.

        Raises:
            StudyError: The device is lost, and with it every further trial of this process.
        """
        if self.loaded.device.type == "cpu":
            return
        try:
            torch.ones(1, device=self.loaded.device).add(1).item()
        except RuntimeError as error:
            raise StudyError(
                f"{self.loaded.device} must respond, but is lost ({' '.join(str(error).split())[:200]}); every finished"
                " trial is kept, run the same command again to resume"
            ) from error


def new_record(proposal: Proposal, point: DesignPoint, topology: Topology, *, feasible: bool = True) -> TrialRecord:
    """The record of a trial before anything is measured: its point and its exact cost.

    Args:
        proposal: The proposal, with its trial number.
        point: The design point that the proposal stands for.
        topology: The model's tensors.
        feasible: Whether the point satisfies the limits of the search space.
    """
    if proposal.trial is None:
        raise ValueError("a record needs the number of its trial")
    return TrialRecord(
        trial=proposal.trial,
        state="failed",
        origin=proposal.origin,
        why=proposal.why,
        point=point,
        point_text=_shortest_text(point, topology),
        feasible=feasible,
        cost=point_cost(topology, point).to_json(),
    )


def _shortest_text(point: DesignPoint, topology: Topology) -> str:
    """The shortest JSON text of a point: compact where it is uniform."""
    compact = {} if point.is_dense else point.compact(topology)
    return json.dumps(point.to_json() if compact is None else compact, separators=(", ", ": "))


@contextmanager
def _trial_errors() -> Iterator[None]:
    """Turn out of memory, a failed kernel or a damaged file into the failure of this trial, not of the study."""
    try:
        yield
    except DseError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"the device must have room for this point, but: {' '.join(str(error).split())[:300]}"
        ) from error
    except Exception as error:  # the code of a model can raise anything; the log has the traceback
        logger.info("a trial failed", exc_info=True)
        raise TrialError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
