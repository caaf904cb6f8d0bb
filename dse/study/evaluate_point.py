"""One point in, one record out: decompose, evaluate, measure. Knows nothing of Optuna."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dse.cost import cost
from dse.decomposition import FactorBank, apply_point
from dse.design_point import DesignPoint
from dse.errors import DseError, OutOfMemoryError, StudyError, TrialError
from dse.evaluation import EvaluationResult, ModelEvaluator
from dse.models import LoadedModel
from dse.search.multi_fidelity.early_stopping import EarlyStopping, Stop
from dse.study.evaluation_quantities import with_evaluation
from dse.study.measure_point import PhaseListener, PointMeasurer
from dse.study.measurement_plan import MeasurementPlan
from dse.study.objectives import RequiredMeasurements
from dse.study.point_run import PointRun, Reference
from dse.study.rungs import MultiFidelityEvaluator
from dse.topology import Topology
from dse.trial_record import TrialRecord

__all__ = ["PointEvaluator", "Reference", "point_text"]

logger = logging.getLogger("dse")


@dataclass
class PointEvaluator:
    """Everything that evaluating a point needs, built once per study."""

    loaded: LoadedModel
    bank: FactorBank
    required: RequiredMeasurements
    climber: MultiFidelityEvaluator
    plan: MeasurementPlan
    on_phase: PhaseListener = field(default=lambda phase, done, total: None)

    @property
    def evaluator(self) -> ModelEvaluator | None:
        """Of the study's tasks; None without tasks."""
        return self.climber.evaluator

    def evaluate(
        self, blank: TrialRecord, point: DesignPoint, reference: Reference | None, judge: EarlyStopping | None = None
    ) -> tuple[TrialRecord, EvaluationResult | None]:
        """Evaluate one point on the resident model, which is dense again afterwards whatever happens.

        Args:
            blank: The record so far: number, point, origin, cost.
            point: What to decompose.
            reference: The dense model's figures; None while it is itself being measured.
            judge: Stops a trial that can no longer join the front; None evaluates everything.

        Returns:
            The record, and the evaluation with its per-document outcomes. A trial that failed is a record too: its
            reason is in it, and what was measured before it failed.
        """
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run = PointRun(dataclasses.replace(blank, started_at=started_at))
        try:
            with _failures_of_a_trial():
                stop = self._run(run, point, reference, judge)
        except TrialError as error:
            reason = str(error) if type(error) is TrialError else f"{type(error).__name__}: {error}"
            return run.finished("failed", reason), run.evaluation
        if stop is not None:
            run.record = dataclasses.replace(run.record, estimates=stop.estimates)
            return run.finished("stopped", stop.reason), None
        return run.finished("complete"), run.evaluation

    def _run(
        self, run: PointRun, point: DesignPoint, reference: Reference | None, judge: EarlyStopping | None
    ) -> Stop | None:
        applied = None
        self.on_phase("decompose", 0, 1)
        try:
            with run.timed("decompose"):
                applied = apply_point(self.loaded.model, self.loaded.topology, point, self.bank)
            dense = None if reference is None else reference.evaluation
            stop = run_rungs(
                self.climber,
                run,
                self.bank.identity(point),
                judge,
                lambda record, found: with_evaluation(record, found, dense),
                self.on_phase,
            )
            if stop is None:
                PointMeasurer(self.loaded, self.required, self.plan, self.on_phase).measure(run, applied, reference)
            return stop
        finally:
            if applied is not None:
                with run.timed("undo"):
                    applied.undo()

    def check_device(self) -> None:
        """Ask the model's device for a sign of life, after a trial that failed.

        Raises:
            StudyError: It is lost, and with it every further trial of this process.
        """
        import torch

        if self.loaded.device.type == "cpu":
            return
        try:
            torch.ones(1, device=self.loaded.device).add(1).item()
        except RuntimeError as error:
            raise StudyError(
                f"{self.loaded.device} must answer, but is lost ({' '.join(str(error).split())[:200]}); every finished"
                " trial is kept, run the same command again to go on"
            ) from error


def blank_record(
    trial: int, point: DesignPoint, topology: Topology, origin: str, feasible: bool = True, why: str = ""
) -> TrialRecord:
    """The record of a point before anything is measured: its cost is known already."""
    return TrialRecord(
        trial=trial,
        state="failed",
        origin=origin,
        point=point.to_json(),
        point_id=point.id,
        point_text=point_text(point, topology),
        why=why,
        feasible=feasible,
        cost=cost(topology, point).to_json(),
    )


def point_text(point: DesignPoint, topology: Topology) -> str:
    """The shortest JSON text of a point: compact where it is uniform."""
    compact = {} if point.is_dense else point.compact(topology)
    return json.dumps(point.to_json() if compact is None else compact, separators=(", ", ": "))


@contextmanager
def _failures_of_a_trial() -> Iterator[None]:
    """A lack of memory, a failed kernel or a damaged file ends this trial, not the study."""
    import torch

    try:
        yield
    except DseError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"the device must have room for this point, but: {' '.join(str(error).split())[:300]}"
        ) from error
    except Exception as error:  # a model's own code raises anything; where it did stands in the log
        logger.info("a trial failed", exc_info=True)
        raise TrialError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
