"""Where the weights of a study's model are while points are evaluated.

- `dense_and_candidate`: both on the device. Switching between candidate and baseline costs nothing.
- `candidate`: only the side that is in use. The dense weights of decomposed tensors wait in host memory (pinned) or on
  disk while a candidate is evaluated, and come back for baseline measurements; then the candidate's factors wait.
- `sharded`: the layers are spread over several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from dse.errors import ModelError
from dse.models.device_map import device_map, spread_over
from dse.models.load import LoadedModel
from dse.models.waiting_weights import WaitingWeights

__all__ = [
    "Residency",
    "choose_residency",
    "free_bytes",
    "place_weights",
    "required_bytes",
    "visible_devices",
]

Residency = Literal["dense_and_candidate", "candidate", "sharded"]

_RESERVE_SHARE = 0.15
_RESERVE_BYTES = 2**30
"""Room for activations, KV cache and the output head, beside a share of the dense weights."""

_HOST_SHARE = 0.5


def required_bytes(residency: Residency, dense_bytes: int, candidate_bytes: int | None = None) -> int:
    """Bytes that all devices together must have for the weights and for running the model.

    Args:
        dense_bytes: Bytes of the dense model.
        candidate_bytes: Bytes of the largest candidate's factors; None for its upper bound, those of the dense model.
    """
    factors = dense_bytes if candidate_bytes is None else candidate_bytes
    weights = dense_bytes + (factors if residency != "candidate" else 0)
    return weights + round(_RESERVE_SHARE * dense_bytes) + _RESERVE_BYTES


def choose_residency(
    dense_bytes: int, device_bytes: Sequence[int], candidate_bytes: int | None = None
) -> Residency | None:
    """The first of `dense_and_candidate`, `candidate` and `sharded` that fits; None if none does.

    Args:
        dense_bytes: Bytes of the dense model.
        device_bytes: Free bytes of each device; the first one is used alone if possible.
        candidate_bytes: As for `required_bytes`.
    """
    single: tuple[Residency, ...] = ("dense_and_candidate", "candidate")
    for residency in single:
        if required_bytes(residency, dense_bytes, candidate_bytes) <= device_bytes[0]:
            return residency
    if len(device_bytes) > 1 and required_bytes("sharded", dense_bytes, candidate_bytes) <= sum(device_bytes):
        return "sharded"
    return None


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def visible_devices(device: torch.device) -> list[torch.device]:
    """The device, followed by the other GPUs that torch sees; a CPU alone."""
    if device.type != "cuda":
        return [device]
    first = device.index or 0
    others = [index for index in range(torch.cuda.device_count()) if index != first]
    return [torch.device("cuda", index) for index in (first, *others)]


def place_weights(
    loaded: LoadedModel,
    residency: Residency | Literal["auto"],
    devices: Sequence[torch.device],
    folder: Path | None = None,
) -> Residency:
    """Bring the weights of a model to where a study needs them.

    Args:
        loaded: The model, whose weights may still be on disk.
        residency: As in the study file; `auto` chooses by what fits.
        devices: Devices of this study; the first one is the model's.
        folder: Where weights wait that leave the device; None for the user's cache.

    Returns:
        The residency chosen.

    Raises:
        ModelError: The model does not fit, or has too few layers for the devices.
    """
    chosen = _choice(loaded, devices) if residency == "auto" else residency
    if chosen == "sharded":
        _spread(loaded, devices)
    else:
        loaded.read_weights()
    if chosen == "candidate":
        host = free_bytes(torch.device("cpu")) if loaded.device.type != "cpu" else 0
        loaded.waiting = WaitingWeights(round(_HOST_SHARE * (host or 0)), folder)
    return chosen


def _choice(loaded: LoadedModel, devices: Sequence[torch.device]) -> Residency:
    free = [free_bytes(device) for device in devices]
    known = [size for size in free if size is not None]
    if len(known) < len(free) or loaded.checkpoint is None:  # the dense weights are in memory already
        return "dense_and_candidate"
    dense_bytes = round(loaded.topology.parameters_dense * loaded.topology.bytes_per_parameter)
    chosen = choose_residency(dense_bytes, known)
    if chosen is None:
        raise ModelError(
            f"the devices must have {required_bytes('candidate', dense_bytes) / 1e9:.1f} GB for '{loaded.ref}', but"
            f" {', '.join(map(str, devices))} have {sum(known) / 1e9:.1f} GB free; use a smaller dtype or more GPUs"
        )
    return chosen


def _spread(loaded: LoadedModel, devices: Sequence[torch.device]) -> None:
    """Read each layer onto its device."""
    if len(devices) < 2:
        raise ModelError(
            f"`residency: sharded` needs several GPUs, but this study sees {', '.join(map(str, devices))}; use"
            " `residency: auto`, or set CUDA_VISIBLE_DEVICES"
        )
    if loaded.checkpoint is not None:
        places = device_map(loaded.model, devices)
        loaded.read_weights(lambda name: next(d for path, d in places.items() if f"{name}.".startswith(f"{path}.")))
    spread_over(loaded.model, devices)
    loaded.device = devices[0]
