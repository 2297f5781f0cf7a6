"""Ways to run that change memory and speed, and must not change what is computed: a whole run each, held against the plainest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from tests.helpers.runs import recorded, train

STEPS = 6
KNN = ("evaluation.knn.enabled=true", "evaluation.knn.every=6 steps", "evaluation.knn.batch_size=7")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=90, val=25, size=32, seed=3, samples_per_shard=30)
    return str(folder / "*train-*.tar")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shards: str, config: Path) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "run"
    done = train(config, shards, directory, f"train.duration={STEPS} steps", *KNN)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("train.zero_stage=0",),
        ("train.zero_stage=2", "train.micro_batch_size=4"),
        ("train.zero_stage=3", "train.activation_checkpointing=true"),
    ],
    ids=" ".join,
)
def test_the_losses_are_those_of_the_plain_run(
    plain: Path, shards: str, config: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    directory = tmp_path / "run"
    done = train(config, shards, directory, f"train.duration={STEPS} steps", *KNN, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    for rank in (0, 1):
        ours, theirs = recorded(directory, rank), recorded(plain, rank)
        assert sorted(ours) == sorted(theirs) == list(range(STEPS))
        for step in range(STEPS):
            assert ours[step]["keys"] == theirs[step]["keys"]
            if any("micro_batch" in setting for setting in settings):
                continue  # stochastic depth and KoLeo see a micro-batch; without them see tests/training/test_accumulation.py
            assert ours[step]["pixels"] == theirs[step]["pixels"]
            for name, value in ours[step]["terms"].items():
                assert float.fromhex(value) == pytest.approx(float.fromhex(theirs[step]["terms"][name]), abs=1e-4), (step, name)
