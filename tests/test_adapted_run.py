"""A run that trains low-rank adapters: killed with -9 and resumed bit for bit, exported merged, continued."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.files import read
from pipeline.data.pack import synthetic as scenes
from pipeline.models.lora import LoRALinear
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.weights.export.networks import read as read_networks
from pipeline.weights.export.networks import settings_of
from pipeline.weights.export.write import write
from pipeline.weights.from_checkpoint import load_trained
from tests.helpers.runs import TOY, command, processes_of, recorded, started_and_held, train, weights

pytestmark = pytest.mark.slow
STEPS = 6
RUN = (
    "train.zero_stage=3",
    f"train.duration={STEPS} steps",
    "checkpoint.every=1 steps",
    "checkpoint.keep_last=9",
    "schedule.lr.warmup=1 steps",
    "model.embed_dim=96",
    "model.num_heads=3",
    "adapt={train: lora, lora: {rank: 2, alpha: 8.0}, freeze_backbone: 2 steps}",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("adapted")
    scenes.write(folder / "scenes", train=60, val=10, size=32, seed=3, samples_per_shard=30)
    torch.manual_seed(4)
    tower = build_tower(ModelSettings(embed_dim=96, depth=1, num_heads=3, patch_size=8), image_size=32)
    torch.save(tower.vit.state_dict(), folder / "start.pth")
    (folder / "toy.yaml").write_text(TOY)
    return folder / "toy.yaml", str(folder / "scenes" / "*train-*.tar"), (*RUN, f"init_from.source={folder / 'start.pth'}")


@pytest.fixture(scope="module")
def undisturbed(words: tuple[Path, str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, shards, settings = words
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(config, shards, directory, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def test_killed_with_minus_nine_it_ends_bitwise_like_the_undisturbed_run(
    words: tuple[Path, str, tuple[str, ...]], undisturbed: Path, tmp_path: Path
) -> None:
    config, shards, settings = words
    directory = tmp_path / "run"
    launcher = started_and_held(command(config, shards, directory, *settings), STEPS - 1)
    end = time.monotonic() + 1500
    while not (directory / "checkpoints" / "step_000000003").exists() and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert launcher.poll() is None, "it ended before it was killed"
    for process in (launcher.pid, *processes_of(directory)):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait(600)
    while processes_of(directory) and time.monotonic() < end:
        time.sleep(0.02)
    assert (directory / "checkpoints" / "step_000000003").exists()
    done = train(config, shards, directory, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    assert weights(directory, STEPS) == weights(undisturbed, STEPS)
    links = [path.stat().st_ino for path in (directory / "checkpoints").glob("step_*/fixed.safetensors")]
    assert len(links) >= STEPS - 1 and len(set(links)) == 1, "one file for all checkpoints, also across the kill"


def test_what_is_trained_of_the_tower_is_a_twentieth_in_checkpoints_too(undisturbed: Path) -> None:
    saved = read(undisturbed / "checkpoints" / f"step_{STEPS:09d}")
    trained = sum(torch.Size(s).numel() for n, s in saved.manifest["shapes"].items() if n.startswith("backbone."))
    tower = build_tower(settings_of(saved).model, image_size=32)
    assert 0 < trained <= 0.05 * sum(p.numel() for p in tower.parameters())


def test_on_one_rank_and_another_stage_it_continues_with_the_same_samples(
    words: tuple[Path, str, tuple[str, ...]], undisturbed: Path, tmp_path: Path
) -> None:
    config, shards, settings = words
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory, ignore=shutil.ignore_patterns("step_00000000[456]", "batches", "catalog*"))
    done = train(config, shards, directory, *settings, "train.zero_stage=1", "launch.num_processes=1")
    assert done.returncode == 0, done.stderr + done.stdout
    before, after = [recorded(undisturbed, rank) for rank in (0, 1)], recorded(directory, 0)
    assert sorted(after) == [3, 4, 5]
    for step, row in after.items():
        both = [half[step] for half in before]
        assert sorted(row["keys"]) == sorted(key for half in both for key in half["keys"])


def test_exports_hold_the_merged_weights(undisturbed: Path, tmp_path: Path) -> None:
    import timm
    from transformers import AutoModel

    saved = read(undisturbed / "checkpoints" / f"step_{STEPS:09d}")
    tower = load_trained(settings_of(saved), saved, torch.device("cpu")).export()["backbone"].eval()
    assert any(isinstance(module, LoRALinear) for module in tower.modules())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    networks = read_networks(saved)
    with torch.inference_mode():
        expected = tower(images).cls
        ours = timm.create_model(f"local-dir:{write(networks, 'timm', tmp_path / 'timm')}", pretrained=True).eval()
        torch.testing.assert_close(ours.forward_features(images)[:, 0], expected, atol=5e-6, rtol=0)
        theirs = AutoModel.from_pretrained(write(networks, "huggingface", tmp_path / "hf")).eval()
        torch.testing.assert_close(theirs(images).last_hidden_state[:, 0], expected, atol=1e-5, rtol=0)


def test_a_new_run_begins_with_the_merged_weights(
    words: tuple[Path, str, tuple[str, ...]], undisturbed: Path, tmp_path: Path
) -> None:
    from pipeline.config.load import load
    from pipeline.methods.registry import build_method
    from pipeline.weights import init_from

    config, shards, settings = words
    plain = [word for word in settings if not word.startswith(("adapt=", "init_from.source="))]
    new = load(config, [*plain, f"data.shards={shards}", f"init_from.source={undisturbed}", f"run.directory={tmp_path / 'new'}"])
    init_from.check(new.config)
    method = build_method(new.config)
    init_from.begin(method, new.config)
    saved = read(undisturbed / "checkpoints" / f"step_{STEPS:09d}")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = load_trained(settings_of(saved), saved, torch.device("cpu")).export()["backbone"].eval()(images).cls
        torch.testing.assert_close(method.export()["backbone"].eval()(images).cls, before, atol=5e-6, rtol=0)
