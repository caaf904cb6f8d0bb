"""Random weights, Gram matrices and calibration windows for the tests of decomposition."""

from __future__ import annotations

import torch

from dse.decomposition import CalibrationWindows

SHAPES = [(12, 8), (8, 12), (9, 9)]


def gram_of(n: int, seed: int = 1, tokens: int = 200) -> torch.Tensor:
    """A Gram matrix with a spread of three orders of magnitude between directions, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, n)
    activations = torch.randn(tokens, n, generator=generator) * scales
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    activations = activations @ rotation
    return activations.T @ activations / tokens


def gradients_of(m: int, seed: int = 2) -> torch.Tensor:
    """A Gram matrix of output gradients, spread over two orders of magnitude."""
    return gram_of(m, seed, tokens=300)


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows_of(token_ids: torch.Tensor) -> CalibrationWindows:
    return CalibrationWindows(token_ids, "0" * 16, "made")


def some_windows(count: int = 8, length: int = 16) -> CalibrationWindows:
    return windows_of(torch.randint(64, (count, length), generator=torch.Generator().manual_seed(0)))
