"""Each export is loaded by the library it is for, and gives the features that the run's own networks give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from launch.cli.main import main
from pipeline.errors import CheckpointError, ConfigError
from pipeline.weights.export.formats import huggingface
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import FORMATS, write
from tests.helpers.exported import CLIP, DINO, MODEL, checkpoint, settings

EXACT = 2e-6  # what differs in the order of fp32 sums
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 2},
    "position apart": {"registers": 2, "cls_pos_embed": True},
    "swiglu": {"ffn": "swiglu", "embed_dim": 48, "layer_scale": None},
    "rotary": {"pos_embed": "rope", "registers": 2},
    "rotary swiglu": {"pos_embed": "rope", "ffn": "swiglu", "embed_dim": 48},
}


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def tokens_of(tower: torch.nn.Module, pictures: Tensor) -> Tensor:
    found = tower(pictures)
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


@pytest.mark.parametrize("kind", TOWERS)
def test_timm_loads_it_and_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    import timm

    saved, method = checkpoint(tmp_path, settings(DINO, **TOWERS[kind]))
    folder = write(read(saved), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        found = model.forward_features(images())
    torch.testing.assert_close(found, tokens_of(method.export()["backbone"], images()), atol=EXACT, rtol=0)
    data = timm.data.resolve_data_config(model=model)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert data["interpolation"] == "bicubic"
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert data["crop_pct"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_transformers_loads_it_and_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    saved, method = checkpoint(tmp_path, settings(DINO, **TOWERS[kind]))
    folder = write(read(saved), "huggingface", tmp_path / "out")
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.inference_mode():
        found = model.eval()(images()).last_hidden_state
    torch.testing.assert_close(found, tokens_of(method.export()["backbone"], images()), atol=EXACT * 5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(folder)
    picture = np.full((64, 48, 3), 255, dtype=np.uint8)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert float(pixels[0, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229, abs=1e-4)


_BLOCK = {f"{norm}.{end}" for norm in ("norm1", "norm2") for end in ("weight", "bias")}
_BLOCK |= {"layer_scale1.lambda1", "layer_scale2.lambda1"}
_DINOV2 = {f"attention.{part}" for part in ("attention.query", "attention.key", "attention.value", "output.dense")}
_DINOV3 = {f"attention.{part}_proj" for part in "qkvo"} | {"mlp.up_proj", "mlp.down_proj"}
RELEASED: dict[str, tuple[str, set[str]]] = {  # names in the files of facebook/dinov2-small, dinov2-giant and dinov3-vits16
    "plain": ("encoder.layer.", _DINOV2 | {"mlp.fc1", "mlp.fc2"}),
    "swiglu": ("encoder.layer.", _DINOV2 | {"mlp.weights_in", "mlp.weights_out"}),
    "rotary": ("layer.", _DINOV3),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_weights_for_transformers_have_the_names_of_released_checkpoints(kind: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    saved, _ = checkpoint(tmp_path, settings(DINO, **TOWERS[kind]))
    folder = write(read(saved), "huggingface", tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layers, linear = RELEASED[kind]
    block = _BLOCK | {f"{name}.{end}" for name in linear for end in ("weight", "bias")}
    block -= {"attention.k_proj.bias"}
    assert {name for name in names if "layer." in name} == {f"{layers}{n}.{name}" for n in range(2) for name in block}


def test_weights_that_transformers_cannot_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(DINO))
    network, name = read(saved), "embeddings.cls_token"
    weights = huggingface.converted(network.tower, 32)
    without = {key: tensor for key, tensor in weights.items() if key != name}
    for wrong, shown in (
        (without, name),
        (without | {name: torch.zeros(1, 1, 7)}, name),
        (weights | {"encoder.layer.9.norm1.bias": torch.zeros(32)}, "encoder.layer.9.norm1.bias"),
    ):
        monkeypatch.setattr(huggingface, "converted", lambda *_, wrong=wrong: wrong)
        with pytest.raises(ConfigError, match=f"1 tensors of transformers' Dinov2Model .* the first is {shown}"):
            write(network, "huggingface", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_open_clip_loads_it_and_gives_the_same_features(tmp_path: Path) -> None:
    import open_clip

    from pipeline.data.loader.text import tokenizer

    config = settings(CLIP, layer_scale=1e-5)
    saved, method = checkpoint(tmp_path, config)
    folder = write(read(saved), "open_clip", tmp_path / "out")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    texts = ["a photo of a dog", "", "two black cats on a very long wall that does not end before the sixteenth token"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    assert method.text is not None
    assert np.array_equal(tokens.numpy(), tokenizer(method.text)(texts))
    with torch.inference_mode():
        pictures, captions = model.encode_image(images()), model.encode_text(tokens)
        torch.testing.assert_close(pictures, method.encode_images(images()), atol=EXACT * 5, rtol=0)
        torch.testing.assert_close(captions, method.encode_texts(tokens), atol=EXACT * 5, rtol=0)
        scale, _ = method.logits()
    assert float(model.logit_scale.exp()) == pytest.approx(float(scale), rel=1e-6)


def test_open_clip_gets_the_bias_of_a_sigmoid(tmp_path: Path) -> None:
    import open_clip

    saved, method = checkpoint(tmp_path, settings({**CLIP, "loss": "sigmoid"}, layer_scale=None))
    folder = write(read(saved), "open_clip", tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{folder}")
    assert float(model.logit_bias) == pytest.approx(float(method.logits()[1]), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", pytest.param("rotary", marks=pytest.mark.slow)])
def test_onnx_runtime_runs_it_on_any_number_of_pictures(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    saved, method = checkpoint(tmp_path, settings(CLIP, **TOWERS[kind]))
    folder = write(read(saved), "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        cls, patches, feature = session.run(None, {"images": images(count).numpy()})
        with torch.inference_mode():
            tokens = method.export()["backbone"](images(count))
            expected = method.encode_images(images(count))
        np.testing.assert_allclose(cls, tokens.cls.numpy(), atol=1e-5)
        np.testing.assert_allclose(patches, tokens.patches.numpy(), atol=1e-5)
        np.testing.assert_allclose(feature, expected.numpy(), atol=1e-5)


def test_the_students_weights_are_not_the_teachers(tmp_path: Path) -> None:
    saved, method = checkpoint(tmp_path, settings(DINO))
    teacher, student = read(saved), read(saved, network="student")
    assert (teacher.network, student.network) == ("teacher", "student")
    assert torch.equal(teacher.tower.vit.cls_token, method.export()["backbone"].vit.cls_token)
    assert torch.equal(student.tower.vit.cls_token, method.get_submodule("backbone").vit.cls_token)
    assert not torch.equal(teacher.tower.vit.cls_token, student.tower.vit.cls_token)


def test_another_size_is_the_same_tower_with_resampled_positions(tmp_path: Path) -> None:
    import timm

    saved, method = checkpoint(tmp_path, settings(DINO))
    folder = write(read(saved, size=48), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        found = model.forward_features(images(size=48))
    torch.testing.assert_close(found, tokens_of(method.export()["backbone"], images(size=48)), atol=EXACT, rtol=0)


def test_our_own_file_begins_another_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from pipeline.models.vision import build_tower
    from pipeline.weights.public_layouts import fit, unwrapped

    config = settings(CLIP)
    saved, method = checkpoint(tmp_path, config)
    folder = write(read(saved), "safetensors", tmp_path / "out")
    state, _ = unwrapped(load_file(folder / "model.safetensors"))
    tower = build_tower(config.model, image_size=32)
    assert torch.equal(fit(state, tower, where="file").weights["vit.cls_token"], method.backbone.vit.cls_token)


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(DINO))
    folder = write(read(saved), "timm", tmp_path / "out", license_="cc-by-4.0")
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["library_name"] == "timm"
    for told in ("f00d", "| samples seen | 48 |", "| knn/k20 | 0.5000 |", "bicubic", '"prototypes": 16', "the teacher's"):
        assert told in text


REFUSED = [
    ("open_clip", DINO, {}, "has no text tower"),
    ("open_clip", CLIP, {"registers": 2}, "registers"),
    ("open_clip", CLIP, {"pos_embed": "rope"}, "rotary positions"),
    ("open_clip", {**CLIP, "image_pool": "attention"}, {}, "attention pooling"),
    ("open_clip", {**CLIP, "text": {**CLIP["text"], "activation": "quick_gelu"}}, {}, "quick GELU"),
    ("timm", DINO, {"stem": "conv"}, "Python objects"),
    ("huggingface", DINO, {"stem": "conv"}, "convolutional stem"),
    ("pickle", DINO, {}, "is not an export format"),
]


@pytest.mark.parametrize(("target", "method", "model", "told"), REFUSED, ids=[f"{r[0]}-{r[3]}" for r in REFUSED])
def test_what_a_layout_cannot_hold_is_refused_and_leaves_nothing(
    target: str, method: dict[str, Any], model: dict[str, Any], told: str, tmp_path: Path
) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(method, **model))
    with pytest.raises(ConfigError, match=told):
        write(read(saved), target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_is_no_export_of_this_checkpoint_is_refused(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(DINO))
    with pytest.raises(ConfigError, match="are not divisible into patches of 8"):
        read(saved, size=36)
    wide = settings(DINO, embed_dim=48)
    with pytest.raises(CheckpointError, match=r"backbone\..*\[.*32.*in the checkpoint"):
        read(saved, config=wide)
    clip, _ = checkpoint(tmp_path / "clip", settings(CLIP))
    with pytest.raises(ConfigError, match="has no teacher"):
        read(clip, network="teacher")
    folder = write(read(saved), "timm", tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        write(read(saved), "timm", folder)
    write(read(saved), "safetensors", folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["fovea"]["method"]["name"] == "dinov2"
    part = saved.path / "rank_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        read(saved)


def test_the_command_exports_the_newest_checkpoint_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "run", settings(DINO))
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "run"), "--to", "timm"])
    assert left.value.code == 0
    assert {path.name for path in (tmp_path / "run/export/timm").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "step_000000003 for timm" in capsys.readouterr().out
    assert set(FORMATS) == {"timm", "huggingface", "open_clip", "onnx", "safetensors"}


def test_one_of_several_students_is_exported_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {**MODEL, "embed_dim": 16}
    several = {
        **DINO,
        "name": "distill",
        "teacher_model": judge,
        "teacher_weights": "x",
        "students": [{**judge, "name": "small", "depth": 1}],
    }
    saved, method = checkpoint(tmp_path / "run", settings(several))
    for network, towers in (("auto", method.students()), ("student", method.students(slow=False))):
        found = read(saved, student="small", network=network)  # type: ignore[arg-type]
        assert found.tower.width == 16 and not found.others
        expected = towers["small"].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.tower.state_dict().items())
    assert read(saved).tower.width == 32
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "run"), "--to", "timm", "--student", "small"])
    assert left.value.code == 0 and (tmp_path / "run/export/timm-small/model.safetensors").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--to", "timm", "--student", "smal"])
    assert "Choose one of small" in capsys.readouterr().err
