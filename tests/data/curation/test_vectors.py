"""Products of vectors: computed in bounded pieces, with the same results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.curation import vectors
from pipeline.data.curation.vectors import best_products, unit


@pytest.mark.parametrize("count", [1, 3])
def test_the_largest_products_are_those_of_all_and_few_are_held(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_PRODUCTS", 500)
    monkeypatch.setattr(vectors, "_FEWEST_ROWS", 4)
    draw = np.random.default_rng(0)
    left, right = unit(draw.normal(size=(103, 12))), torch.from_numpy(unit(draw.normal(size=(41, 12))).T.copy())
    held: list[int] = []
    products = vectors.products

    def recorded(rows: np.ndarray, columns: torch.Tensor) -> torch.Tensor:
        result = products(rows, columns)
        held.append(result.numel())
        return result

    monkeypatch.setattr(vectors, "products", recorded)
    values, columns = best_products(left, right, count)
    every = torch.from_numpy(left) @ right
    assert torch.equal(columns, every.topk(count, dim=1).indices) and torch.allclose(values, every.topk(count, dim=1).values)
    assert max(held) <= 500
