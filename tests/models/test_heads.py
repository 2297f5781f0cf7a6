"""Heads: sizes of the paper, normalisation, prototypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.heads import PrototypeHead, Prototypes


@pytest.mark.parametrize(
    ("width", "prototypes", "bottleneck", "parameters"),
    [
        (1024, 65536, 256, 23_662_848),
        (1024, 131072, 384, 57_545_088),
        (1024, 131072, 256, 40_505_600),
        (1536, 131072, 384, 58_593_664),
    ],
)
def test_sizes_are_those_of_the_paper(width: int, prototypes: int, bottleneck: int, parameters: int) -> None:
    with torch.device("meta"):
        head = PrototypeHead(width, prototypes=prototypes, bottleneck=bottleneck)
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_first_logits_are_cosines() -> None:
    head = PrototypeHead(16, hidden=32, bottleneck=8, prototypes=50)
    x = torch.randn(6, 16)
    expected = F.normalize(head.mlp(x), dim=-1) @ F.normalize(head.last.direction, dim=-1).T
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(x * 1e-3 + 0.0).abs().amax().clamp(min=1.0), torch.tensor(1.0))


def test_gain_is_trained_and_scales_its_prototype() -> None:
    last = Prototypes(8, 5)
    x = F.normalize(torch.randn(3, 8), dim=-1)
    before = last(x)
    with torch.no_grad():
        assert last.gain is not None
        last.gain[2] = 3.0
    torch.testing.assert_close(last(x)[:, 2], before[:, 2] * 3)
    last(x).sum().backward()
    assert all(p.grad is not None for p in last.parameters())


def test_plain_prototypes_are_one_matrix() -> None:
    last = Prototypes(8, 5, weight_norm=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(last(x), x @ last.direction.T)
    assert [tuple(p.shape) for p in last.parameters()] == [(5, 8)]


def test_an_empty_batch_passes_with_a_graph() -> None:
    head = PrototypeHead(16, hidden=32, bottleneck=8, prototypes=50)
    head(torch.zeros(0, 16)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert all(p.ndim > 0 for p in head.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_depth_is_a_choice(layers: int) -> None:
    head = PrototypeHead(16, hidden=32, bottleneck=8, prototypes=50, layers=layers)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.mlp) == layers
    assert head(torch.randn(2, 16)).shape == (2, 50)


def test_batch_norm_follows_the_hidden_layers_alone_and_tells_apart_what_is_nearly_alike() -> None:
    torch.manual_seed(0)
    plain, normed = (PrototypeHead(16, hidden=32, bottleneck=8, prototypes=50, batch_norm=norm) for norm in (False, True))
    assert [type(layer).__name__ for layer in normed.mlp].count("GlobalBatchNorm") == 2
    assert isinstance(normed.mlp[-1], torch.nn.Linear)
    alike = torch.randn(1, 16) + 0.01 * torch.randn(64, 16)
    assert plain.units(alike).mean(0).norm() > 0.99
    assert normed.units(alike).mean(0).norm() < 0.9
