"""The effect of half precision on the baseline's metrics, reported once per study."""

from __future__ import annotations

from typing import Any

import torch

from dse.config import StudyConfig
from dse.evaluation import EvaluationResult, ModelEvaluator, evaluator_for
from dse.measurement import device_in_use
from dse.models import LoadedModel, load_model
from dse.out_of_memory import is_out_of_memory
from dse.workers.listener import StudyListener

__all__ = ["compare_with_float32", "half_precision_notice"]

_SMALL_PARAMETERS = 2_000_000_000
"""Up to this size a second copy in float32 (8 GB) is made without asking."""


def half_precision_notice(loaded: LoadedModel) -> str | None:
    """A notice if this CPU emulates the model's dtype; None otherwise."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if loaded.device.type != "cpu" or loaded.dtype not in supported or supported[loaded.dtype]():
        return None
    name = str(loaded.dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name}, which is slower here than float32"


def compare_with_float32(
    config: StudyConfig, loaded: LoadedModel, result: EvaluationResult | None, listener: StudyListener
) -> dict[str, Any] | None:
    """Evaluate the dense model in float32 on the same documents.

    Args:
        config: The study.
        loaded: Its model, in the study's dtype.
        result: The dense model's evaluation in that dtype.
        listener: Receives the differences.

    Returns:
        JSON-safe: task to metric, both values, documents and how many of them changed. None if the model is in float32,
        the study file disables the comparison, the model is large and the study file does not enable it, or memory
        does not suffice.
    """
    wanted = config.evaluation.compare_float32
    if wanted is None:
        wanted = loaded.topology.parameters_dense <= _SMALL_PARAMETERS
    if result is None or loaded.dtype == torch.float32 or not wanted:
        return None
    listener.on_message(f"evaluating the dense model in float32 to measure the effect of {config.model.dtype}")
    try:
        with device_in_use(loaded.device):
            full = _evaluator_in_float32(config, loaded).evaluate(lambda n, of: listener.on_phase("float32", n, of))
    except Exception as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        listener.on_message("out of memory for the model in float32: the effect of its dtype is not known")
        return None
    differences = {}
    for half, whole in zip(result.tasks, full.tasks, strict=True):
        changed = int((half.outcomes != whole.outcomes).reshape(half.documents, -1).any(axis=1).sum())
        differences[half.task] = {
            "metric": half.metric,
            "value": half.value,
            "float32": whole.value,
            "documents": half.documents,
            "documents_changed": changed,
        }
        listener.on_message(
            f"  {half.task} {half.metric}: {half.value:.4f} in {config.model.dtype}, {whole.value:.4f} in float32"
            f" ({changed} of {half.documents} documents differ)"
        )
    return differences


def _evaluator_in_float32(config: StudyConfig, loaded: LoadedModel) -> ModelEvaluator:
    model = load_model(
        config.model.ref,
        revision=config.model.revision,
        dtype="float32",
        device=str(loaded.device),
        trust_remote_code=config.model.trust_remote_code,
        role_names=config.space.role_names,
        head=config.head,
    )
    return evaluator_for(model, config.tasks, config.evaluation)
