"""What must agree among the workers of a study, so that their trials compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dse.errors import StudyError

if TYPE_CHECKING:
    from dse.workers.outline import StudyOutline
    from dse.workers.study_worker import WorkerFacts

__all__ = ["MUST_STAY", "check_same_devices", "check_same_facts", "check_same_versions", "measured_objectives"]

MUST_STAY = {
    "model_fingerprint": ("model weights", "pin `model.revision`"),
    "evaluation_fingerprint": ("tasks, documents or lm-eval version", "restore them"),
    "divergence_fingerprint": ("held-out text", "restore it"),
    "calibration_fingerprint": ("calibration text", "restore it"),
}
"""Fact to its meaning and the remedy: trials before and after a change would not be comparable."""

_MEASURED = ("latency", "energy", "ttft", "tpot", "throughput")


def check_same_versions(workers: Sequence[WorkerFacts]) -> None:
    """Refuse workers that run other versions than the first one.

    Raises:
        StudyError: Two workers differ.
    """
    first = workers[0]
    for worker in workers[1:]:
        for package, version in first.versions.items():
            if worker.versions[package] != version:
                raise StudyError(
                    f"all workers must run the same versions, but {worker.host} has {package}"
                    f" {worker.versions[package]} and {first.host} has {version}; install the same on every node"
                )


def check_same_facts(expected: Mapping[str, Any], found: Mapping[str, Any], worker: str) -> None:
    """Refuse a worker with another model or other data than the first one.

    Raises:
        StudyError: A fingerprint differs.
    """
    for fact, (what, _) in MUST_STAY.items():
        if expected.get(fact) != found.get(fact):
            raise StudyError(
                f"all workers must see the same model and data, but {worker} has other {what} ({found.get(fact)}, not"
                f" {expected.get(fact)}); use the same files on every node"
            )


def measured_objectives(outline: StudyOutline) -> list[str]:
    """Objectives that depend on the device."""
    return [o.name for o in outline.objectives if any(word in o.name for word in _MEASURED)]


def check_same_devices(outline: StudyOutline, workers: Sequence[WorkerFacts], mixed: str) -> None:
    """Refuse workers on another kind of device than the first one, if latency or energy is measured.

    Raises:
        StudyError: A device differs.
    """
    measured = measured_objectives(outline)
    if not measured or mixed == "accuracy_only":
        return
    for worker in workers[1:]:
        if worker.device != workers[0].device:
            raise StudyError(
                f"a study of {measured[0]} needs one kind of device, but {worker.host} has {worker.device} and"
                f" {workers[0].host} has {workers[0].device}; leave {worker.host} out, or set `workers: {{mixed:"
                " accuracy_only}}`"
            )
