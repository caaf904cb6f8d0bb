"""Eigenvectors and symmetric products against full decompositions."""

from __future__ import annotations

import pytest
import torch

from dse.decomposition.leading_eigenvectors import leading_eigenvectors, product_in_float64, symmetric_product


@pytest.mark.parametrize("rank", [1, 12, 150])
def test_some_eigenvectors_are_those_of_a_full_decomposition(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(200, 200, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 200)
    matrix = symmetric_product(root, root.T.contiguous())
    torch.testing.assert_close(matrix, root @ root.T)
    assert torch.equal(matrix, matrix.T)
    found = leading_eigenvectors(matrix, rank)
    values, expected = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found @ found.T, expected[:, -rank:] @ expected[:, -rank:].T, atol=1e-8, rtol=0)
    torch.testing.assert_close((found.T @ matrix @ found).diagonal(), values[-rank:].flip(0))


def test_a_product_in_slices_is_a_product_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dse.decomposition.leading_eigenvectors._SLICE_BYTES", 8 * 30 * 7)
    matrix, columns = torch.randn(50, 30), torch.randn(30, 4, dtype=torch.float64)
    torch.testing.assert_close(product_in_float64(matrix, columns), matrix.double() @ columns)
