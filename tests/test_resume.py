"""Kill it anywhere, run the same command again: as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.runs import TOY, command, processes_of, recorded, started_and_held, train, wait_for_step, weights

STEPS = 24


MIXED = """  gram_weight: 1.0
  resolutions:
    - {weight: 1}
    - {weight: 2, global_size: 48, local_size: 24, gram_size: 96}
"""


def _assert_same(run: Path, reference: Path) -> None:
    for rank in (0, 1):
        ours, theirs = recorded(run, rank), recorded(reference, rank)
        assert sorted(ours) == sorted(theirs) == list(range(STEPS))
        for step in range(STEPS):
            assert ours[step]["keys"] == theirs[step]["keys"], f"other samples at step {step} on rank {rank}"
            assert ours[step]["pixels"] == theirs[step]["pixels"], f"other crops at step {step} on rank {rank}"
            assert ours[step]["terms"] == theirs[step]["terms"], f"other losses at step {step} on rank {rank}"
    assert weights(run, STEPS) == weights(reference, STEPS)


@pytest.mark.slow
def test_killed_with_minus_nine_and_resumed_is_bitwise_the_undisturbed_run(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    launcher = started_and_held(command(config, shards, directory), 10)
    wait_for_step(directory, 9, launcher)
    victim = random.Random(1).choice(processes_of(directory))
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(timeout=600) != 0
    assert not processes_of(directory), "ranks were left behind"
    done = train(config, shards, directory)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "resuming at step 6" in done.stdout
    _assert_same(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_a_step_boundary_and_the_same_command_goes_on_exactly(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path, name: str
) -> None:
    directory = tmp_path / "run"
    launcher = started_and_held(command(config, shards, directory), 10)
    wait_for_step(directory, 9, launcher)
    launcher.send_signal(getattr(signal, name))
    assert launcher.wait(timeout=600) == 0
    stopped_at = max(recorded(directory, 0)) + 1
    assert stopped_at in (10, 11)  # the other rank may have received it first
    assert (directory / "checkpoints" / f"step_{stopped_at:09d}" / "manifest.json").exists()
    done = train(config, shards, directory)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"resuming at step {stopped_at}" in done.stdout
    _assert_same(directory, undisturbed)


@pytest.mark.slow
def test_a_run_of_several_sizes_taken_up_in_the_middle_is_bitwise_the_undisturbed_one(shards: str, tmp_path: Path) -> None:
    config, whole, run, length = tmp_path / "mixed.yaml", tmp_path / "whole", tmp_path / "run", "train.duration=12 steps"
    config.write_text(TOY.replace("model:", MIXED + "model:"))
    done = train(config, shards, whole, length)
    assert done.returncode == 0, done.stderr + done.stdout
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_000000012")
    again = train(config, shards, run, length)
    assert again.returncode == 0 and "resuming at step 6" in again.stdout, again.stderr + again.stdout
    assert len(list((run / "batches").glob("attempt-*-rank-0.jsonl"))) == 2
    for rank in (0, 1):
        assert recorded(run, rank) == recorded(whole, rank)  # and no step was done otherwise the second time
    assert weights(run, 12) == weights(whole, 12)
    sides = [[tuple(row["sides"]) for row in recorded(run, rank).values()] for rank in (0, 1)]
    assert sides[0] == sides[1] and set(sides[0][:6]) == set(sides[0][6:]) == {(32, 16), (48, 24, 96)}
