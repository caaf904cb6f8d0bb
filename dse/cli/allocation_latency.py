"""Latencies in `dse allocate`: the table filled from the device profile, and what of it is told."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from dse.errors import AllocationError
from dse.measurement.device_profile import model_profile
from dse.measurement.device_profile.model_profile import Phase
from dse.models import LoadedModel
from dse.runtime import timings_for
from dse.sensitivity.allocation import Allocation
from dse.sensitivity.option_latency import option_shapes, with_latencies
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["latency_figures", "timed_table"]


def timed_table(table: SensitivityTable, loaded: LoadedModel, options: argparse.Namespace) -> SensitivityTable:
    """The table with latencies predicted from products that were timed on this device.

    Raises:
        AllocationError: Some are not timed; the message holds the command that does it.
    """
    if options.phase == "decode" and not loaded.topology.is_decoder:
        raise AllocationError(
            f"a decode latency needs a model that generates, but {loaded.topology.architecture} does not; give"
            " `--phase prefill`"
        )
    profile = model_profile(loaded, timings_for(loaded.model))
    phase = Phase.of(options.phase, options.batch, options.prompt)
    shapes = option_shapes(table, profile, phase)
    missing, where = profile.missing(shapes), profile.timings.conditions
    if missing:
        raise AllocationError(
            f"a latency budget needs the {len(shapes)} products of the profile's options timed on this device"
            f" ({where.device}, {where.dtype}, {where.threads} threads), but {len(missing)} are not; first run"
            f" `{_remedy(options)}`"
        )
    return with_latencies(table, profile, phase, dense_s=options.dense_latency)


def latency_figures(table: SensitivityTable, found: Allocation, options: argparse.Namespace) -> dict[str, Any]:
    """What is told of an allocation's latency; nothing where the table has none."""
    if found.latency_s is None or not table.latency_dense_s:
        return {}
    of = "the products' timings on this device"
    whole = "the dense model as measured" if options.dense_latency else "its products alone"
    return {
        "phase": options.phase,
        "batch_size": options.batch,
        "prompt_tokens": options.prompt,
        "latency_s": found.latency_s,
        "latency_dense_s": table.latency_dense_s,
        "latency_reduction": 1.0 - found.latency_s / table.latency_dense_s,
        "latency_is_predicted": True,
        "latency_dense_is_predicted": options.dense_latency is None,
        "latency_of": f"{of}, dense being {whole}",
    }


def _remedy(options: argparse.Namespace) -> str:
    """The command that times what is missing; it needs the sensitivity profile as a file."""
    model = ["--model", options.model]
    model += ["--revision", options.revision] if options.revision else []
    model += ["--trust-remote-code"] if options.trust_remote_code else []
    held = ["--device", options.device, "--dtype", options.dtype]
    file, first = options.profile, ""
    if file is None:
        file = "sensitivity/profile.json"
        given = [*model, *held, "--calibration", options.calibration]
        given += ["--calibration-tokens", str(options.calibration_tokens)]
        given += [part for method in options.method or () for part in ("--method", method)]
        given += ["--stacks"] if options.stacks else []
        for name in ("space", "tokens", "text"):
            value = getattr(options, name)
            given += [] if value is None else [f"--{name}", str(value)]
        first = shlex.join(["dse", "sensitivity", *given, "--out", "sensitivity"]) + " && "
    asked = ["--profile", file, "--batch", str(options.batch), "--prompt", str(options.prompt)]
    return first + shlex.join(["dse", "profile-device", *model, *held, *asked])
