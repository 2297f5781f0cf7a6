"""A run whose views grow: bit for bit after a resume before, in and after each stage, on other ranks, and in a replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.replays import replay
from tests.helpers.runs import TOY, recorded, train, weights
from tests.helpers.shared import made_once

STEPS = 8
STAGES = """
    curriculum:
      - {until: 3 steps, global_size: 16, local_size: 8}
      - {until: 5 steps, global_size: 24}
"""
SIDES = [[16, 8]] * 3 + [[24, 16]] * 2 + [[32, 16]] * 3
SETTINGS = (f"train.duration={STEPS} steps", "checkpoint.every=1 steps", "checkpoint.keep_last=9", "train.log_every=2")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staged") / "toy.yaml"
    views = "  views: {global_size: 32, local_count: 2, local_size: 16}\n"
    assert views in TOY
    path.write_text(TOY.replace(views, "  views:\n    global_size: 32\n    local_count: 2\n    local_size: 16" + STAGES))
    return path


@pytest.fixture(scope="module")
def whole(staged: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        done = train(staged, shards, folder / "run", *SETTINGS)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "views: 16 and 8 px until 3 steps, then 24 and 16 px until 5 steps, then 32 and 16 px" in done.stdout

    return made_once(tmp_path_factory, "staged", make) / "run"


def sides(directory: Path, rank: int) -> list[list[int]]:
    return [row["sides"] for _, row in sorted(recorded(directory, rank).items())]


@pytest.mark.slow
def test_the_student_sees_the_sizes_of_the_stages_and_flops_follow(whole: Path) -> None:
    assert sides(whole, 0) == sides(whole, 1) == SIDES
    rows = [json.loads(line) for line in RunDirectory(whole).journal(0).read_text().splitlines()]
    flops = [
        row["values"]["perf/tflops_per_rank"] * row["values"]["perf/step_seconds"]
        for row in rows
        if "perf/tflops_per_rank" in row.get("values", {})
    ]
    assert len(flops) == STEPS // 2 and flops[0] < flops[1] < flops[3], flops  # steps 0-1, 2-3, 4-5, 6-7
    assert flops[1] < flops[2] < flops[3], flops


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_taken_up_around_the_ends_of_stages_is_bitwise_the_undisturbed_one(
    staged: Path, whole: Path, shards: str, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step_{later:09d}")
    again = train(staged, shards, run, *SETTINGS)
    assert again.returncode == 0 and f"resuming at step {step}" in again.stdout, again.stderr + again.stdout
    for rank in (0, 1):
        assert recorded(run, rank) == recorded(whole, rank)  # which also compares the steps that were done twice
    assert weights(run, STEPS) == weights(whole, STEPS)


@pytest.mark.slow
def test_one_rank_has_the_samples_and_crops_of_two(staged: Path, whole: Path, shards: str, tmp_path: Path) -> None:
    """Resumed on another number of ranks in the first stage."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for later in range(3, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step_{later:09d}")
    for record in (run / "batches").glob("*.jsonl"):
        record.unlink()
    # Its micro-batches are those of the two ranks, so that the digests of pixels can be compared.
    done = train(staged, shards, run, *SETTINGS, "launch.num_processes=1", "train.zero_stage=0")
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr + done.stdout
    single, pair = recorded(run, 0), [recorded(whole, rank) for rank in (0, 1)]
    assert sorted(single) == list(range(2, STEPS))
    for step, row in single.items():
        assert row["sides"] == SIDES[step]
        assert row["keys"] == pair[0][step]["keys"] + pair[1][step]["keys"]
        for name, term in row["terms"].items():
            if name != "koleo":  # compares the samples of a micro-batch
                means = [float.fromhex(one[step]["terms"][name]) for one in pair]
                assert float.fromhex(term) == pytest.approx(sum(means) / 2, rel=1e-2), (step, name)


@pytest.mark.slow
def test_another_curriculum_is_refused_and_a_replay_is_equal(staged: Path, whole: Path, shards: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:09d}")
    done = train(staged, shards, run, *SETTINGS, "method.views.curriculum=[{until: 3 steps, global_size: 16}]")
    assert done.returncode != 0 and "method.views.curriculum" in done.stderr + done.stdout, done.stderr + done.stdout
    done = replay(whole, "--step", "2", "--until", "5")
    assert done.returncode == 0 and "equal: " in done.stdout, done.stdout + done.stderr
