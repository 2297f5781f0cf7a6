"""``fovea adapt``: an ordinary config with reasons, refusals before anything is written, and a run that begins with its heads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from pipeline.checkpoint.files import read
from pipeline.checkpoint.reader import read_student, read_teacher
from pipeline.config.load import load
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.commands import fovea
from tests.helpers.runs import train

QUICK = ("data.num_workers=0", "tracking.enabled=false", "data.canonical_streams=4", "train.precision=fp32", "train.threads=1")


def pack(path: Path, count: int, mode: str = "RGB") -> Path:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            shape = (24, 24, 3) if mode == "RGB" else (24, 24)
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8), mode).save(stream, "JPEG")
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("shards") / "train-00000.tar", 130)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    tower = build_tower(ModelSettings(embed_dim=64, depth=2, num_heads=1, patch_size=8), image_size=16)
    state = dict(tower.vit.state_dict()) | {"mask_token": torch.randn(1, 64)}
    path = tmp_path_factory.mktemp("weights") / "dinov2_tiny.pth"
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_config_is_an_ordinary_one_and_explains_each_choice(shards: Path, weights: Path, tmp_path: Path) -> None:
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", "train.duration=30 steps"]
    assert fovea(*words, "adapt.freeze_backbone=10 steps", "schedule.lr.warmup=5 steps") == 0
    file = tmp_path / "run" / "adapt.yaml"
    config = load(file).config
    assert config.run.folder == tmp_path / "run" and config.init_from.source == str(weights)
    model = config.model
    assert (model.embed_dim, model.depth, model.patch_size, model.num_heads) == (64, 2, 8, 1)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]

    def explained(key: str) -> bool:
        return any(line.startswith(f"#   {key} = ") for line in header)

    assert all(explained(f"model.{name}") for name in yaml.safe_load(file.read_text())["model"])
    assert explained("train.global_batch_size") and explained("adapt.backbone_lr_mult")
    assert any("train.duration = 30 steps" in line and "given on the command line" in line for line in header)
    assert any("fovea adapt" in line and "--config-only" in line for line in header)


@pytest.mark.parametrize(
    ("settings", "warm", "every"),
    [
        (["train.duration=40 steps"], 4, 8),
        (["train.duration=1300 samples"], 4, 8),  # in batches of 32
        (["train.duration=3 epochs", "train.global_batch_size=13"], 3, 6),
        (["train.duration=1 steps", "adapt.freeze_backbone=0 steps", "schedule.lr.warmup=0"], 1, 1),
    ],
)
def test_what_is_chosen_follows_the_length_of_the_command_line(
    settings: list[str], warm: int, every: int, shards: Path, weights: Path, tmp_path: Path
) -> None:
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", *settings]
    assert fovea(*words, "adapt.lora.rank=4") == 0
    config = load(tmp_path / "run" / "adapt.yaml").config
    assert str(config.checkpoint.every) == f"{every} steps"
    if "steps" in str(config.schedule.lr.warmup):
        assert str(config.schedule.lr.warmup) == str(config.adapt.freeze_backbone) == f"{warm} steps"


def test_what_is_chosen_follows_the_views_of_the_command_line(shards: Path, weights: Path, tmp_path: Path) -> None:
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only"]
    assert fovea(*words, "method.views.global_size=56") == 0
    views = load(tmp_path / "run" / "adapt.yaml").config.method.views
    assert (views.global_size, getattr(views, "local_size")) == (56, 24)  # noqa: B009 - of DINOv2's views only


def test_old_shards_are_shown_along_in_their_share(shards: Path, weights: Path, tmp_path: Path) -> None:
    old = pack(tmp_path / "old-00000.tar", 140)
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", "train.duration=3 epochs"]
    assert fovea(*words, "--replay", str(old), "--replay-share", "0.25") == 0
    config = load(tmp_path / "run" / "adapt.yaml").config
    assert config.data.sources is not None and not config.data.shards
    assert [(source.shards, source.weight) for source in config.data.sources] == [((str(shards),), 0.75), ((str(old),), 0.25)]
    assert str(config.adapt.freeze_backbone) == "1 steps"  # a tenth of 3 / 0.75 epochs of 130 images in batches of 32
    assert any("data.sources = " in line and "25%" in line for line in (tmp_path / "run" / "adapt.yaml").read_text().splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources=[{name: a, shards: x.tar}]"], "data.sources would replace the shards"),
        (["data.shards=x.tar"], "data.shards would replace the shards"),
        (["--replay", "nowhere-*.tar"], "nowhere-*.tar: no shard matches"),
    ],
)
def test_shards_that_cannot_be_meant_are_refused(
    words: list[str], message: str, shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_default_folder_has_the_name_of_the_weights(shards: Path, weights: Path, tmp_path: Path) -> None:
    assert fovea("adapt", str(shards), "--from", str(weights), "--config-only") == 0
    assert load(tmp_path / "runs" / "adapt-dinov2_tiny" / "adapt.yaml").config.run.name == "adapt-dinov2_tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ten.tar", "--from", "WEIGHTS"], "10 images are too few"),
        (["loose", "--from", "WEIGHTS"], "fovea shards pack loose"),
        (["SHARDS", "--from", "https://host/x.pth?token=secret"], "curl -LO"),
        (["SHARDS", "--from", "nothing.pth"], "no such file"),
        (["SHARDS", "--from", "WEIGHTS", "model.depth=3"], "do not match"),
        (["SHARDS", "--from", "WEIGHTS", "adapt.freeze_backbone=1M samples"], "frozen for 1000000"),
        (["SHARDS", "--from", "WEIGHTS", "adapt.freze_backbone=1"], "freeze_backbone"),
        *(
            (["SHARDS", "--from", "WEIGHTS", override], override.partition("=")[0])
            for override in (
                *("data.max_pixels=abc", "data.foo=1", "data.storage.cache=5", "model.num_heads=0", "model.num_heads=abc"),
                *("model.norm_eps=x", "model.activation=foo", "model.timm_name=5", "method=5", "model=3", "data=[]"),
            )
        ),
    ],
)
def test_what_cannot_work_is_refused(
    words: list[str], message: str, shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "ten.tar", 10)
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "loose" / "a.png")
    named = {"SHARDS": str(shards), "WEIGHTS": str(weights)}
    assert fovea("adapt", *(named.get(word, word) for word in words), "--config-only") == 2
    said = capsys.readouterr()
    assert message in said.err and "secret" not in said.err + said.out and "Traceback" not in said.err
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize("part", ["all", "last_blocks", "lora"])
def test_the_part_that_is_trained_is_chosen_by_an_option(part: str, shards: Path, weights: Path, tmp_path: Path) -> None:
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", "--train", part]
    assert fovea(*words, "adapt.lora.rank=2", "adapt.last_blocks=1") == 0
    adapt = load(tmp_path / "run" / "adapt.yaml").config.adapt
    assert adapt.train == part and adapt.freeze_backbone.amount > 0
    assert adapt.backbone_lr_mult == (1.0 if part == "lora" else 0.1)


def test_gray_images_are_recognized(weights: Path, tmp_path: Path) -> None:
    assert fovea("adapt", str(pack(tmp_path / "gray.tar", 130, "L")), "--from", str(weights), "--to", "run", "--config-only") == 0
    augment = load(tmp_path / "run" / "adapt.yaml").config.method.augment
    assert augment.hue_space == "off" and augment.gray_probability == 0


def test_a_run_that_has_begun_is_not_given_other_settings(
    shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only"]
    assert fovea(*words) == 0
    before = (tmp_path / "run" / "adapt.yaml").read_text()
    assert fovea(*words) == 0  # the same command
    (tmp_path / "run" / "checkpoints").mkdir()
    assert fovea(*words, "train.duration=2000 steps") == 2
    assert "Choose another folder with --to" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapt.yaml").read_text() == before


def tensors(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    saved = read(run / "checkpoints" / f"step_{step:09d}")
    return dict(read_student(saved)), dict(read_teacher(saved))


@pytest.mark.slow
def test_heads_are_trained_first_and_the_tower_after_them(shards: Path, weights: Path, tmp_path: Path) -> None:
    settings = ["train.duration=6 steps", "adapt.freeze_backbone=2 steps", "schedule.lr.warmup=2 steps", "checkpoint.keep_last=6"]
    words = ["adapt", str(shards), "--from", str(weights), "--to", "run", "--config-only", *settings, *QUICK]
    assert fovea(*words, "checkpoint.every=1 steps", "schedule.lr.start=1e-3") == 0
    done = train(tmp_path / "run" / "adapt.yaml", str(shards), tmp_path / "run")
    assert done.returncode == 0, done.stderr + done.stdout
    source = torch.load(weights, weights_only=True)
    (early, slow), (late, _) = tensors(tmp_path / "run", 2), tensors(tmp_path / "run", 6)
    for name, tensor in source.items():
        own = f"backbone.{name}" if name == "mask_token" else f"backbone.vit.{name}"
        assert torch.equal(early[own].flatten(), tensor.flatten()) and torch.equal(slow[own].flatten(), tensor.flatten()), name
    trained = [name for name in late if name.startswith("backbone.") and not torch.equal(late[name], early[name])]
    assert len(trained) > len(source) // 2
    first, _ = tensors(tmp_path / "run", 1)
    assert any(not torch.equal(first[name], early[name]) for name in early if name.startswith("dino_head."))
