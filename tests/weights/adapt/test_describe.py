"""What pretrained weights are, and which are refused: before anything is trained, with a hint, and without running their code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.weights.adapt.describe import describe
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import write
from pipeline.weights.init_from import download_command, find, weights_of
from pipeline.weights.public_layouts import fit, unwrapped
from tests.helpers.exported import CLIP, DINO, checkpoint, settings


def state(**changes: Any) -> dict[str, Tensor]:
    """A file as DINOv2's code writes it, of a width whose heads are known."""
    sizes: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 4} | changes
    tower = build_tower(ModelSettings(**sizes), image_size=16)
    tensors = {name.replace("reg_token", "register_tokens"): t for name, t in tower.vit.state_dict().items()}
    return tensors | {"mask_token": torch.zeros(1, sizes["embed_dim"])}


def test_a_plain_file_is_described(tmp_path: Path) -> None:
    torch.save(state(registers=3, ffn="swiglu"), tmp_path / "weights.pth")
    a = describe(str(tmp_path / "weights.pth"), {}).architecture
    assert a.model["registers"] == 3 and a.model["ffn"] == "swiglu" and a.model["pos_embed_interpolation"] == "antialias"
    assert (a.layout, a.image_size, a.normalize) == ("dinov2", 16, "imagenet")
    assert set(a.reasons) >= {f"model.{key}" for key in a.model}


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "teacher.backbone.", "module.backbone."])
def test_prefixes_are_recognized_and_said(prefix: str, tmp_path: Path) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in state().items()}
    weights |= {"teacher.dino_head.last": torch.zeros(2)} if prefix.startswith("teacher.") else {}
    save_file(weights, tmp_path / "weights.safetensors")
    described = describe(str(tmp_path / "weights.safetensors"), {})
    assert described.architecture.model["depth"] == 2
    said = " ".join(described.notes)
    assert all(f"{part}." in said for part in prefix.rstrip(".").split("."))
    assert ("dino_head" in said) == prefix.startswith("teacher.")


def test_the_teacher_is_preferred_to_the_student(tmp_path: Path) -> None:
    wide = state(embed_dim=128, num_heads=2)
    torch.save({"student": wide, "teacher": state()}, tmp_path / "weights.pth")
    assert describe(str(tmp_path / "weights.pth"), {}).architecture.model["embed_dim"] == 64


def test_a_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    torch.save(state() | {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}, tmp_path / "weights.pth")
    assert "left out: head.bias, head.weight, of a classifier" in describe(str(tmp_path / "weights.pth"), {}).notes


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_and_said(kind: torch.dtype, tmp_path: Path) -> None:
    torch.save({name: tensor.to(kind) for name, tensor in state().items()}, tmp_path / "weights.pth")
    notes = describe(str(tmp_path / "weights.pth"), {}).notes
    assert f"weights in {str(kind).removeprefix('torch.')} are converted to float32" in notes


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"cls_token": _Code()}))
    torch.save(state() | {"extra": _Code()}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(CheckpointError, match=r"cannot be read as tensors"):
            describe(name, {})
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.safetensors")
    torch.save(state(), tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="cannot be read as tensors"):
            describe(str(tmp_path / name), {})


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state().items() if not key.startswith(name)}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "four channels": (state() | {"patch_embed.proj.weight": torch.zeros(64, 4, 4, 4)}, "images of 4 channels"),
    "gray": (state() | {"patch_embed.proj.weight": torch.zeros(64, 1, 4, 4)}, "images of 1 channels"),
    "a ResNet": ({"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}, "not a vision tr"),
    "no tensors": ({"step": torch.zeros(())}, "not a vision transformer"),
    "no class token": (_without("cls_token"), "neither a class token nor attention pooling"),
    "a block is missing": (_without("blocks.0."), "blocks are missing"),
    "an unpublished width": (state(embed_dim=40, num_heads=2), "do not show the number of heads"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_adapted_is_refused_with_a_hint(kind: str, tmp_path: Path) -> None:
    weights, message = REFUSED[kind]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        describe(str(tmp_path / "weights.pth"), {})
    assert caught.value.hint


def test_the_number_of_heads_can_be_given(tmp_path: Path) -> None:
    torch.save(state(embed_dim=40, num_heads=2), tmp_path / "weights.pth")
    a = describe(str(tmp_path / "weights.pth"), {"num_heads": 2}).architecture
    assert a.model["num_heads"] == 2 and a.reasons["model.num_heads"] == "the command line"


@pytest.mark.parametrize(
    ("url", "command"),
    [
        (
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/x.pth",
            "curl -LO https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/x.pth",
        ),
        ("https://huggingface.co/facebook/dinov2-small", "hf download facebook/dinov2-small --local-dir dinov2-small"),
        ("s3://bucket/weights.pth", "aws s3 cp s3://bucket/weights.pth ."),
    ],
)
def test_a_url_is_refused_with_the_command_that_downloads_it(url: str, command: str) -> None:
    assert download_command(url) == command
    with pytest.raises(CheckpointError, match="not downloaded") as caught:
        describe(url, {})
    assert command in caught.value.hint


def test_the_download_command_shows_no_secret() -> None:
    command = download_command("https://user:password@host/x.pth?X-Signature=secret")
    assert "password" not in command and "secret" not in command


def test_a_run_knows_its_own_settings_and_dinov2s_heads(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(DINO, registers=2, layer_scale=None))
    described = describe(str(saved.path), {})
    assert described.architecture.model == {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "registers": 2, "layer_scale": None,
    }  # fmt: skip
    assert described.method is not None and described.method.prototypes == 16


def test_the_heads_of_another_method_are_left_out(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(CLIP))
    described = describe(str(saved.path), {})
    assert described.method is None and described.architecture.normalize == "openai"
    assert any("heads of clip are left out" in note for note in described.notes)


@pytest.mark.parametrize("layout", ["safetensors", "timm", "huggingface"])
def test_what_fovea_exports_can_be_adapted(layout: str, tmp_path: Path) -> None:
    """Also with a convolutional stem, which only fovea's own layout has."""
    stem = {"stem": "conv", "embed_dim": 64, "num_heads": 4} if layout == "safetensors" else {"embed_dim": 64, "num_heads": 4}
    saved, _ = checkpoint(tmp_path, settings(DINO, **stem))
    folder = write(read(saved), layout, tmp_path / "out")
    a = describe(str(folder), {}).architecture
    tower = build_tower(ModelSettings(**a.model), image_size=a.image_size)
    fitted = fit(unwrapped(weights_of(find(str(folder))))[0], tower, where="here")
    assert a.image_size == 32 and a.normalize == "imagenet" and a.model["num_heads"] == 4
    assert "vit.cls_token" in fitted.weights
