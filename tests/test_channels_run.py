"""A run on images of several channels: killed with -9 and resumed bit for bit, on other numbers of ranks with the same samples;
files of one image; evaluated, exported and continued from RGB weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.channel_images import npy_file, random_image, tiff_file, write_tar
from tests.helpers.runs import ROOT, TOY, command, environment, recorded, train, weights

STEPS = 6
CHANNELS = {
    "count": 5,
    "dtype": "uint16",
    "members": ["b1.tif", "b2.npy"],
    "rgb": ["c3", "c2", "c1"],
    "groups": [["c1", "c2", "c3"]],
    "mean": [0.5] * 5,
    "std": [0.3] * 5,
}
SETTINGS = (
    f"train.duration={STEPS} steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep_last=9",
    "schedule.lr.warmup=1 steps",
    "method.augment={gain: 0.2, offset: 0.3, noise: 0.3, channel_dropout: 0.2, hue_space: hsv}",
    f"data.channels={yaml.safe_dump(CHANNELS, default_flow_style=True, width=1000).strip()}",
    "data.max_bad_fraction=0.5",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A config and shards, of which one image in sixteen is damaged behind its header, and some differ."""
    folder = tmp_path_factory.mktemp("channels")
    (folder / "toy.yaml").write_text(TOY)
    for part, count in (("train", 130), ("val", 12)):
        samples = []
        for n in range(count):
            image = random_image("uint16", 5, 40, 48, seed=n + 1000 * (part == "val"))
            first = tiff_file(image[:, :, :3], "interleaved", compression="zlib")
            if n % 16 == 5 and part == "train":
                at = len(first) // 2
                first = first[:at] + bytes(200) + first[at + 200 :]
            members = {"b1.tif": first, "b2.npy": npy_file(image[:, :, 3:]), "cls": str(n % 4).encode()}
            samples.append((f"{part}{n:03d}", members))
        samples.append(("other", {"b1.tif": tiff_file(random_image("uint16", 2, 40, 48)), "b2.npy": npy_file(image[:, :, 3:])}))
        write_tar(folder / "shards" / f"s-{part}-0.tar", samples)
    return folder / "toy.yaml", str(folder / "shards" / "*train-*.tar")


@pytest.fixture(scope="module")
def reference(data: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference") / "run"
    done = train(*data, directory, *SETTINGS)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def test_a_resume_is_exact_bit_for_bit(data: tuple[Path, str], reference: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(reference, directory)
    shutil.rmtree(directory / "checkpoints" / f"step_{STEPS:09d}")
    done = train(*data, directory, *SETTINGS)
    assert done.returncode == 0 and "resuming at step 4" in done.stdout, done.stderr + done.stdout
    assert weights(directory, STEPS) == weights(reference, STEPS)
    for rank in range(2):
        assert recorded(directory, rank) == recorded(reference, rank)


def test_substitutes_of_damaged_images_are_recorded(reference: Path) -> None:
    text = "".join(path.read_text() for path in (reference / "bad_samples").rglob("*") if path.is_file())
    assert "undecodable" in text and "train005" in text


@pytest.mark.slow
def test_a_run_that_is_killed_continues_as_if_nothing_had_happened(
    data: tuple[Path, str], reference: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    process = subprocess.Popen(
        command(*data, directory, *SETTINGS),
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 1200
    while not recorded(directory, 0) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = train(*data, directory, *SETTINGS)
    assert done.returncode == 0, done.stderr + done.stdout
    assert weights(directory, STEPS) == weights(reference, STEPS)


@pytest.mark.slow
def test_one_rank_sees_the_samples_of_two(data: tuple[Path, str], reference: Path, tmp_path: Path) -> None:
    done = train(*data, tmp_path / "run", *SETTINGS, "launch.num_processes=1")
    assert done.returncode == 0, done.stderr + done.stdout
    both = [recorded(reference, rank) for rank in range(2)]
    for step, row in recorded(tmp_path / "run", 0).items():
        assert row["keys"] == both[0][step]["keys"] + both[1][step]["keys"]


@pytest.mark.slow
def test_rgb_weights_are_adapted_and_the_result_is_evaluated(data: tuple[Path, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(embed_dim=96, depth=1, num_heads=3, patch_size=8), image_size=32)
    torch.save(tower.vit.state_dict(), tmp_path / "rgb.pth")
    common = {"capture_output": True, "text": True, "env": environment(), "cwd": ROOT, "stdin": subprocess.DEVNULL}
    main = [sys.executable, "-m", "launch.cli.main"]
    channels = [one for one in SETTINGS if one.startswith("data.channels")]
    words = ["adapt", data[1], "--from", str(tmp_path / "rgb.pth"), "--to", str(tmp_path / "run"), *channels]
    more = ["model.num_heads=3", "train.duration=4 steps", "train.global_batch_size=16", "launch.num_processes=1"]
    more += ["tracking.enabled=false", "train.precision=fp32", "schedule.lr.warmup=1 steps", "adapt.freeze_backbone=1 steps"]
    more += ["data.max_bad_fraction=0.5", f"data.index={tmp_path / 'index'}"]
    done = subprocess.run([*main, *words, *more], **common)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr + done.stdout
    assert "5 channels instead of RGB" in done.stdout + done.stderr + (tmp_path / "run" / "adapt.yaml").read_text()
    scored = subprocess.run([*main, "eval", str(tmp_path / "run"), "evaluation.knn.k=[3]"], **common)  # type: ignore[call-overload]
    assert scored.returncode == 0 and "knn/k3" in scored.stdout, scored.stderr + scored.stdout
