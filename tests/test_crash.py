"""Killed with -9 at random moments, again and again, with checkpoints written beside the training: nothing is lost or changed.

``FOVEA_CRASHES`` says how often, 6 by default; 50 is the full test.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import files as saved
from pipeline.data.pack import synthetic as scenes
from tests.helpers.runs import (
    ROOT,
    TOY,
    command,
    environment,
    processes_of,
    recorded,
    started_and_held,
    train,
    wait_for_step,
    weights,
)

CRASHES = int(os.environ.get("FOVEA_CRASHES", "6"))
STEPS = max(30, 5 * CRASHES)


def _gone(directory: Path) -> bool:
    end = time.monotonic() + 900
    while processes_of(directory) and time.monotonic() < end:
        time.sleep(0.02)
    return not processes_of(directory)


def _last(directory: Path) -> int:
    return max(recorded(directory, 0), default=-1)


def _crash(launcher: subprocess.Popen[bytes], directory: Path, chance: random.Random) -> bool:
    """Kill one rank, or everything, at a random moment; whether the run was still there."""
    begin, now = _last(directory), time.monotonic()
    if chance.random() < 0.2:  # while it starts
        target, longest = begin + 10_000, chance.uniform(0.5, 8.0)
    else:
        target, longest = begin + chance.randint(1, 6), 120.0
    while launcher.poll() is None and _last(directory) < target and time.monotonic() - now < longest:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.15))
    if launcher.poll() is not None:
        return False
    ranks = processes_of(directory)
    victims = [chance.choice(ranks)] if ranks and chance.random() < 0.5 else [launcher.pid, *ranks]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait(timeout=600)
    assert _gone(directory), "ranks were left behind"
    return True


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bitwise_like_one_that_never_was(tmp_path: Path) -> None:
    scenes.write(tmp_path / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    shards = str(tmp_path / "scenes" / "*train-*.tar")
    config = tmp_path / "toy.yaml"
    config.write_text(TOY)
    words = (f"train.duration={STEPS} steps", "checkpoint.every=3 steps")
    reference, directory = tmp_path / "undisturbed", tmp_path / "run"
    done = train(config, shards, reference, *words, "checkpoint.async_save=false")
    assert done.returncode == 0, done.stderr + done.stdout

    chance, crashes = random.Random(5), 0
    while crashes < CRASHES:
        launcher = subprocess.Popen(
            command(config, shards, directory, *words, "checkpoint.async_save=true"),
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if not _crash(launcher, directory, chance):
            assert launcher.returncode == 0, "it ended by itself, and badly"
            break
        crashes += 1
        for one in saved.committed_checkpoints(directory / "checkpoints"):
            saved.verify(one)
    assert crashes >= CRASHES // 2, "it was too fast to be killed"
    done = train(config, shards, directory, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    for rank in (0, 1):
        ours, theirs = recorded(directory, rank), recorded(reference, rank)
        assert sorted(ours) == sorted(theirs) == list(range(STEPS))
        assert ours == theirs
    assert weights(directory, STEPS) == weights(reference, STEPS)


@pytest.mark.slow
def test_a_node_that_lost_its_disk_goes_on_from_the_copy_as_if_nothing_had_happened(tmp_path: Path) -> None:
    scenes.write(tmp_path / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    shards = str(tmp_path / "scenes" / "*train-*.tar")
    config = tmp_path / "toy.yaml"
    config.write_text(TOY)
    reference, first, second = tmp_path / "undisturbed", tmp_path / "first", tmp_path / "second"
    words = ("train.duration=12 steps", "checkpoint.every=3 steps")
    copied = (*words, f"checkpoint.mirror={tmp_path / 'bucket'}")
    assert train(config, shards, reference, *words).returncode == 0
    launcher = started_and_held(command(config, shards, first, *copied), 5)
    wait_for_step(first, 4, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=600) == 0
    reached = max(one.step for one in saved.committed_checkpoints(first / "checkpoints"))
    assert reached in (5, 6)
    done = train(config, shards, second, *copied)  # another directory: nothing of the first is there
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"resuming at step {reached}" in done.stdout
    assert "was fetched from" in done.stderr
    assert weights(second, 12) == weights(reference, 12)
    assert (tmp_path / "bucket" / "toy" / "step_000000012" / "manifest.json").exists()


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_is_told_and_stops_the_run_only_after_several(tmp_path: Path) -> None:
    scenes.write(tmp_path / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    config = tmp_path / "toy.yaml"
    config.write_text(TOY)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "checkpoints").write_text("a file where a folder should be")
    words = ("checkpoint.every=3 steps", "checkpoint.max_failures=2")
    done = train(config, str(tmp_path / "scenes" / "*train-*.tar"), directory, *words)
    assert done.returncode == 2, done.stderr + done.stdout
    assert "no checkpoint of step 3" in done.stdout
    assert "training continues" in done.stdout
    assert "could not be written (rank 0" in done.stderr + done.stdout
    assert 5 <= _last(directory) < 24
