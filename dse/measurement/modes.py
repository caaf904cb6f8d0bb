"""Which execution modes a model can be measured in. Determined by trying, not by version numbers or names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement.execution import EagerExecution, Execution
from dse.measurement.static_execution import CompiledExecution, CudaGraphExecution, StaticExecution

__all__ = ["EXECUTIONS", "mode_problem", "require_mode", "require_static_decode"]

EXECUTIONS: Mapping[str, type[Execution]] = {
    kind.mode: kind for kind in (EagerExecution, CompiledExecution, CudaGraphExecution)
}
"""Execution of each mode. A new mode is a class, a line here, and its name in `dse.measurement.latency_spec.MODES`."""

_CHECKED_STEPS = 3
_ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Differences below this share of the largest logit are rounding."""
_NOISE_FACTOR = 4.0
"""Nor is a difference an error that is at most this many times that between two eager ways to the same logits."""


def mode_problem(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> str:
    """Why `mode` cannot run a model on `devices`; "" if it can.

    Args:
        mode: One of `MODES`.
        devices: Every device that holds a parameter.
        decodes: Whether the model generates with a cache.
    """
    if mode == "eager":
        return ""
    if not decodes:
        return "it changes how decode steps run, and this model has none; use eager"
    if len(devices) != 1:
        return f"it needs a model on one device, but this one is on {len(devices)}; use eager"
    if mode == "cuda_graph":
        if devices[0].type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, but the model is on {devices[0]}; use eager or compile"
        return ""
    return _compile_problem(devices[0])


def require_mode(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> None:
    """Check that `mode` is available; see `mode_problem`.

    Raises:
        ConfigError: It is not; the message gives the reason.
    """
    _require(mode, mode_problem(mode, devices, decodes=decodes))


def require_static_decode(
    mode: str, model: nn.Module, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]
) -> None:
    """Check that decoding with a static cache gives the logits of eager decoding, on the first sequence.

    Architectures differ in how they read positions and masks, so no list of names could tell.

    Args:
        mode: The mode that needs it, for the message.
        model: The model on its device.
        prompt: Token ids, (batch, prompt).
        new_tokens: Decode steps of a generation.
        options: Keyword arguments of every forward pass.

    Raises:
        ConfigError: The logits differ by more than rounding, or the model cannot use such a cache.
    """
    _require(mode, _static_decode_problem(model, prompt[:1], min(new_tokens, _CHECKED_STEPS), options))


def _require(mode: str, problem: str) -> None:
    if problem:
        raise ConfigError(f"measurement mode '{mode}' must be available, but {problem}")


@torch.inference_mode()
def _static_decode_problem(model: nn.Module, prompt: Tensor, steps: int, options: Mapping[str, Any]) -> str:
    name = type(model).__name__
    eager = EagerExecution(model, prompt, steps, options)
    generation = eager.begin("baseline")
    eager.prefill(generation)
    if generation.next_tokens is None:
        return f"{name} returned no cache; use eager"
    tokens, expected = [generation.next_tokens], []
    for _ in range(steps):
        output = model(input_ids=tokens[-1], past_key_values=generation.cache, **options)
        generation.cache = output.past_key_values
        expected.append(output.logits[:, -1].float())
        tokens.append(output.logits[:, -1:].argmax(dim=-1))
    static = StaticExecution(model, prompt, steps, options)
    try:
        begun = static.begin("baseline")
        static.prefill(begun)
        found = [static.fixed_logits(token, begun.cache).float() for token in tokens[:-1]]
    except InvalidMeasurementError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the code of a model can raise anything
        reason = " ".join(str(error).split())[:200]
        return f"{name} does not run with a static cache ({type(error).__name__}: {reason}); use eager"
    decoded = torch.stack(expected, dim=1)
    # The same logits in one pass without a cache: how far they differ is rounding.
    whole_options = {**options, "use_cache": False}
    if "logits_to_keep" in whole_options:
        whole_options["logits_to_keep"] = steps
    whole = model(input_ids=torch.cat([prompt, *tokens[:-1]], dim=1), **whole_options).logits[:, -steps:].float()
    noise, difference = ((other - decoded).abs().max().item() for other in (whole, torch.stack(found, dim=1)))
    limit = max(_NOISE_FACTOR * noise, _ROUNDING.get(_dtype(model), 1e-5) * decoded.abs().max().item())
    if difference <= limit:
        return ""
    return (
        f"{name} decodes other logits with a static cache than eagerly (they differ by {difference:.3g}, and rounding"
        f" by at most {limit:.3g}); use eager"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _compile_problem(device: torch.device) -> str:
    """Compile and run one addition: it needs a compiler, its headers and a writable cache folder."""
    try:
        compiled = torch.compile(lambda x: x + 1, dynamic=False)
        answer = compiled(torch.ones(8, device=device))
        return "" if bool((answer == 2).all()) else "a compiled addition gave a wrong sum; use eager"
    except Exception as error:  # noqa: BLE001 - any error of the compiler stack is the reason
        first = " ".join(str(error).split())[:200]
        need = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        return f"torch.compile does not work here ({type(error).__name__}: {first}); install {need}, or use eager"
