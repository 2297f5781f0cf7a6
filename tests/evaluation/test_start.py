"""An adapted network beside the one it began with: points between them, and similarity by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.load import show
from pipeline.evaluation.start import linear_cka
from pipeline.methods.registry import build_seeded_method
from pipeline.models.vision import build_tower
from pipeline.weights.interpolate import between
from tests.helpers.commands import fovea
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint
from tests.helpers.exported import DINO, checkpoint, settings


def test_cka_is_one_for_rotated_and_scaled_features_and_small_for_others() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(200, 6, generator=generator)) < 0.1


def test_cka_of_a_hand_computed_pair() -> None:
    """Centred x = (-1, 1), y = (-1, -1, 2)-like columns: |y.T x|^2 / (|x.T x| |y.T y|)."""
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[-1.0], [-1.0], [2.0]])
    assert linear_cka(x, y) == pytest.approx(9 / (2 * 6))


def test_points_between_are_on_the_straight_line() -> None:
    config = settings(DINO)
    torch.manual_seed(0)
    start, end = (build_tower(config.model, image_size=32) for _ in range(2))
    middle = dict(between(start, end, 0.25).named_parameters())
    for (name, a), (_, b) in zip(start.named_parameters(), end.named_parameters(), strict=True):
        torch.testing.assert_close(middle[name], 0.75 * a + 0.25 * b)
    for share, tower in ((0.0, start), (1.0, end)):
        exact = dict(between(start, end, share).named_parameters())
        assert all(torch.equal(exact[name], parameter) for name, parameter in tower.named_parameters())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that began with the weights of a file."""
    first = toy(tmp_path / "first", "launch.backend=gloo")
    method = build_seeded_method(first.config, CPU)
    vit: dict[str, Tensor] = method.export()["backbone"].vit.state_dict()  # type: ignore[union-attr, operator]
    torch.save({name: tensor + 0.01 for name, tensor in vit.items()}, tmp_path / "start.pth")
    loaded = toy(tmp_path, "launch.backend=gloo", f"init_from.source={tmp_path / 'start.pth'}")
    folder = loaded.config.run.folder
    write_checkpoint(folder, changed(build_seeded_method(loaded.config, CPU), 1))
    (folder / "config.yaml").write_text(show(loaded))
    manifest = next(folder.glob("checkpoints/*/manifest.json"))
    document = json.loads(manifest.read_text()) | {"config": loaded.config.model_dump(mode="json")}
    manifest.write_text(json.dumps(document))
    return folder


def test_eval_prints_and_writes_points_between_and_changes_by_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("eval", str(run), "--between", "0,0.5,1") == 0
    file = next((run / "evaluations").glob("*.json"))
    scores: dict[str, Any] = json.loads(file.read_text())["scores"]
    for k in (1, 5):
        assert scores[f"between/1.00/knn/k{k}"] == pytest.approx(scores[f"knn/k{k}"])
        assert scores[f"between/0.00/knn/k{k}"] == pytest.approx(scores[f"baseline/init_from/knn/k{k}"])
        assert 0 <= scores[f"between/0.50/knn/k{k}"] <= 1
    cka = [value for name, value in scores.items() if name.startswith("cka/block_")]
    assert cka and all(0 <= value <= 1 + 1e-9 for value in cka)
    assert "between/0.50/knn/k1" in capsys.readouterr().out


@pytest.mark.parametrize("shares", ["0.5,x", "2", "-1"])
def test_shares_that_are_none_are_refused(shares: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("eval", str(run), f"--between={shares}") == 2
    assert "must be numbers from 0 to 1" in capsys.readouterr().err


def test_a_run_from_random_weights_has_no_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, _ = checkpoint(tmp_path, settings(DINO))
    assert fovea("export", str(saved.path), "--to", "safetensors", "--interpolate", "0.5") == 2
    assert "began with random weights" in capsys.readouterr().err


def test_the_export_of_a_point_between_loads_as_weights(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert fovea("export", str(run), "--to", "safetensors", "--interpolate", "0.5") == 0
    assert fovea("export", str(run), "--to", "safetensors") == 0
    half = load_file(run / "export" / "safetensors-0.5" / "model.safetensors")
    end = load_file(run / "export" / "safetensors" / "model.safetensors")
    start = torch.load(tmp_path / "start.pth", weights_only=True)
    for name, tensor in start.items():
        own = f"backbone.vit.{name}"
        if tensor.shape == end[own].shape:
            torch.testing.assert_close(half[own], (tensor + end[own]) / 2, atol=1e-6, rtol=1e-6)
