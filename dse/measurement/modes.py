"""Whether a mode can be had here: found by trying it, not by guessing from versions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dse.errors import ConfigError

__all__ = ["mode_problem", "refuse_unavailable_mode"]


def mode_problem(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> str:
    """Why `mode` cannot run a model on `devices`; "" where it can.

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
        return f"it needs a model on one device, but this one lies on {len(devices)}; use eager"
    if mode == "cuda_graph":
        if devices[0].type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, but the model lies on {devices[0]}; use eager or compile"
        return ""
    return _compile_problem(devices[0])


def refuse_unavailable_mode(mode: str, devices: Sequence[torch.device], *, decodes: bool) -> None:
    """Check that `mode` can be had.

    Raises:
        ConfigError: It cannot; the message holds the reason.
    """
    problem = mode_problem(mode, devices, decodes=decodes)
    if problem:
        raise ConfigError(f"measurement mode '{mode}' must be available, but {problem}")


def _compile_problem(device: torch.device) -> str:
    """Compile and run one addition: a compiler, its headers and a writable cache folder must all be there."""
    try:
        compiled = torch.compile(lambda x: x + 1, dynamic=False)
        answer = compiled(torch.ones(8, device=device))
        return "" if bool((answer == 2).all()) else "a compiled addition gave a wrong sum; use eager"
    except Exception as error:  # noqa: BLE001 - whatever the compiler stack raises is the reason
        first = " ".join(str(error).split())[:200]
        need = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        return f"torch.compile does not work here ({type(error).__name__}: {first}); install {need}, or use eager"
