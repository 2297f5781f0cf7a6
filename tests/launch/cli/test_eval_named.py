"""Weights from elsewhere: what is loaded gives its own features, and what does not fit is refused by name."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.cli import eval_named as judge
from launch.cli.eval_named import _kept, _steps, settings_for_weights
from pipeline.checkpoint.files import Saved
from pipeline.errors import CheckpointError, ConfigError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import write
from pipeline.weights.pretrained import load
from tests.helpers.exported import CLIP, DINO, checkpoint, settings

CPU = torch.device("cpu")


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layout", ["timm", "open_clip"])
def test_a_folder_is_judged_as_the_network_it_came_from(layout: str, tmp_path: Path) -> None:
    saved, method = checkpoint(tmp_path / "run", settings(CLIP))
    peer = load(str(write(read(saved), layout, tmp_path / layout)), model=None, device=CPU)
    tower = method.export()["backbone"]
    assert peer.size == 32 and peer.subject.tower.patch == tower.patch
    with torch.inference_mode():
        expected = method.encode_images(images()) if layout == "open_clip" else tower(images()).cls
        torch.testing.assert_close(peer.subject.embedded(images()), expected, atol=1e-5, rtol=0)
        assert peer.subject.tokens(images()).patches.shape == (2, 16, 32)
        assert peer.subject.layers(images(), 2).shape == (2, 2, 2, 32)
    assert (peer.subject.texts is not None) == (layout == "open_clip")


def test_a_file_needs_the_name_of_its_architecture_and_has_to_fit_it(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(4)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    peer = load(str(file), model="vit_tiny_patch16_224", device=CPU)
    pictures = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(peer.subject.cls(pictures), model.forward_features(pictures)[:, 0])
    with pytest.raises(ConfigError, match="does not name its architecture"):
        load(str(file), model=None, device=CPU)
    for other, told in (("vit_small_patch16_224", "of another shape"), ("resnet18", "not a plain vision transformer")):
        with pytest.raises((CheckpointError, ConfigError), match=told):
            load(str(file), model=other, device=CPU)
    with pytest.raises(CheckpointError, match="neither a run nor weights"):
        load(str(tmp_path), model=None, device=CPU)


def test_a_folder_whose_weights_are_of_another_architecture_is_refused(tmp_path: Path) -> None:
    for name, width in (("narrow", 32), ("wide", 48)):
        write(read(checkpoint(tmp_path / f"run-{name}", settings(DINO, embed_dim=width))[0]), "timm", tmp_path / name)
    (tmp_path / "wide" / "model.safetensors").replace(tmp_path / "narrow" / "model.safetensors")
    with pytest.raises(CheckpointError, match="timm cannot load it"):
        load(str(tmp_path / "narrow"), model=None, device=CPU)


def test_weights_have_settings_of_which_the_data_count() -> None:
    config = settings_for_weights(["data.shards=/d/train-*.tar", "evaluation.linear.epochs=3"])
    assert config.validation_shards == ("/d/*val-*.tar",)
    assert config.evaluation.linear.epochs == 3


def test_evaluations_of_one_checkpoint_that_end_at_once_keep_each_others_scores(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(DINO))
    run = RunDirectory(tmp_path / "run")
    file = judge._kept(run, saved, {}, {"trained": {"knn/k10": 0.5}})
    other = threading.Thread(target=judge._kept, args=(run, saved, {}, {"trained": {"linear/top1": 0.7}}), daemon=True)
    with (run.path / "evaluations" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other.start()
        other.join(1.0)
        assert other.is_alive(), "it reads what the first is about to exchange"
    other.join(60.0)
    assert json.loads(file.read_text())["scores"] == {"trained": {"knn/k10": 0.5, "linear/top1": 0.7}}


BROKEN = ["[]", "null", "1e999", '{"scores": []}', '{"scores": {"trained": 1}}', "[" * 200_000, "fifo"]


@pytest.mark.parametrize("content", BROKEN)
def test_foreign_records_of_a_run_neither_block_nor_end_an_evaluation(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    for name in ("evaluations/step_000000003.json", "plan.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content == "fifo":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    assert _steps(run) is None
    saved = Saved(tmp_path / "checkpoints" / "step_000000003", {"step": 3})
    file = _kept(run, saved, {}, {"trained": {"knn/k1": 0.5}})
    assert json.loads(file.read_text())["scores"] == {"trained": {"knn/k1": 0.5}}
