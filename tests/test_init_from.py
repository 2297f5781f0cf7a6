"""Stages as runs: the second begins with the first's weights, once, whatever the ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.files import read
from pipeline.data.pack import synthetic as scenes
from tests.helpers.runs import TOY, train

# Nothing moves: what the first checkpoint of the second stage holds is what it began with.
STILL = (
    "schedule.lr.warmup=1 steps",
    "schedule.lr.peak=1e-30",
    "schedule.lr.end=0",
    "schedule.teacher_momentum={start: 1.0, end: 1.0}",
    "schedule.weight_decay={start: 0.0, end: 0.0}",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=60, val=10, size=32, seed=3, samples_per_shard=30)
    return str(folder / "*train-*.tar")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, shards: str, config: Path) -> Path:
    directory = tmp_path_factory.mktemp("first") / "run"
    done = train(config, shards, directory, "train.duration=4 steps", "schedule.lr.warmup=1 steps")
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def whole(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind, flat, put together from the ranks' pieces."""
    found = read(run / "checkpoints" / f"step_{step:09d}")
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for rank, table in enumerate(found.manifest["fragments"]):
        with safe_open(found.path / f"rank_{rank:05d}.safetensors", framework="pt") as file:
            for name, (start, _) in table.items():
                parts.setdefault(name, []).append((start, file.get_tensor(f"{kind}/{name}")))
    return {name: torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])]) for name, pieces in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_the_second_stage_begins_with_the_first_ones_teacher(
    first: Path, shards: str, config: Path, tmp_path: Path, zero: int
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    stage = [
        f"init_from.source={source}",
        "init_from.heads=true",
        "method.views.global_size=48",
        f"train.zero_stage={zero}",
        *STILL,
    ]
    done = train(config, shards, tmp_path / "run", *stage, "train.duration=2 steps", "checkpoint.every=1 steps")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "starting from the teacher of" in done.stdout and "resampled from 4 x 4 to 6 x 6" in done.stdout
    taught = whole(first, 4, "teacher")
    for kind in ("master", "teacher"):
        begun = whole(tmp_path / "run", 1, kind)
        assert begun.keys() == taught.keys()
        for name, tensor in begun.items():
            if "pos_embed" not in name:
                assert torch.equal(tensor, taught[name]), (kind, name)
    manifest = read(tmp_path / "run" / "checkpoints" / "step_000000002").manifest
    assert manifest["init"]["step"] == 4 and manifest["init"]["kind"] == "checkpoint"

    shutil.rmtree(source)  # the run has its own checkpoints now
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000002")
    again = train(config, shards, tmp_path / "run", *stage, "train.duration=2 steps", "checkpoint.every=1 steps")
    assert again.returncode == 0, again.stderr + again.stdout
    assert read(tmp_path / "run" / "checkpoints" / "step_000000002").manifest["init"] == manifest["init"]


@pytest.mark.slow
def test_a_small_student_learns_from_a_frozen_run_and_resumes_without_it(first: Path, shards: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    tower = "{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}"
    judge = f"name: distill\n  teacher_model: {tower}\n  teacher_weights: nowhere\n  gram_weight: 1.0"
    config = tmp_path / "distill.yaml"
    config.write_text(TOY.replace("name: dinov2", judge).replace("\nmodel: {embed_dim: 32", "\nmodel: {embed_dim: 16"))
    stage = ["train.zero_stage=3", "checkpoint.every=2 steps", "schedule.lr.warmup=1 steps", "train.duration=4 steps"]
    away = train(config, shards, tmp_path / "run", *stage)
    assert away.returncode == 2 and "no such file" in away.stderr and not (tmp_path / "run" / "logs").exists()
    stage.append(f"method.teacher_weights={source}")
    done = train(config, shards, tmp_path / "run", *stage)
    assert done.returncode == 0, done.stderr + done.stdout
    taught = whole(first, 4, "teacher")
    with safe_open(tmp_path / "run" / "checkpoints" / "step_000000004" / "whole.safetensors", framework="pt") as file:
        frozen = {k.removeprefix("frozen/judge."): file.get_tensor(k) for k in file.keys() if k.startswith("frozen/judge.")}  # noqa: SIM118
    assert frozen.keys() == taught.keys() and all(torch.equal(frozen[name].flatten(), taught[name]) for name in taught)

    shutil.rmtree(source)
    last = (tmp_path / "run" / "checkpoints" / "step_000000004").rename(tmp_path / "before")
    again = train(config, shards, tmp_path / "run", *stage)
    assert again.returncode == 0, again.stderr + again.stdout
    for path in last.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / "checkpoints" / "step_000000004" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_a_rank_is_started(config: Path, shards: str, tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "weights.pth")
    done = train(config, shards, tmp_path / "run", f"init_from.source={tmp_path / 'weights.pth'}")
    assert done.returncode == 2 and "missing: vit." in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "logs").exists() and not list((tmp_path / "run").glob("attempts*"))
    assert json.dumps(str(tmp_path / "weights.pth"))[1:-1] in done.stderr
