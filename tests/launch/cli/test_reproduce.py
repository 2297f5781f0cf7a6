"""``fovea reproduce``, with real runs: killed and continued, compared with its record, listed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.bench.reproduction import ledger
from pipeline.checkpoint import files as saved
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers import small_runs
from tests.helpers.commands import fovea
from tests.helpers.limits import deadline
from tests.helpers.runs import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.make(tmp_path_factory.mktemp("reproduce"))


def words(folder: Path, runs: str, *more: str) -> list[str]:
    options = ["--seeds", "2", "--directory", str(folder / runs), "--ledger", str(folder / "ledger.jsonl")]
    return ["reproduce", *small_runs.words(folder), "tracking.enabled=false", *more, *options]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", *arguments], env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL
    )


def steps(run: Path) -> list[int]:
    return [one.step for one in saved.committed_checkpoints(run / "checkpoints")]


@pytest.mark.slow
def test_a_reproduction_killed_in_its_second_seed_ends_with_the_same_result(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(words(folder, "straight")).wait(timeout=3000) == 0
    process, end = start(words(folder, "killed")), deadline()
    while not steps(folder / "killed" / "seed-1") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=300) == -signal.SIGKILL
    first = (folder / "killed" / "seed-0" / "outcome.json").stat().st_mtime_ns
    capfd.readouterr()
    while fovea(*words(folder, "killed")) and time.monotonic() < end:  # the kernel is still ending the run
        time.sleep(0.1)
    out = capfd.readouterr().out
    assert "reproduced: the difference" in out and "added to" in out
    assert (folder / "killed" / "seed-0" / "outcome.json").stat().st_mtime_ns == first
    assert RunDirectory(folder / "killed" / "seed-1").next_attempt() == 2  # the first died with its parent
    straight, killed = ledger.read(folder / "ledger.jsonl")
    assert (straight.agreement, killed.agreement) == ("recorded", "reproduced")
    assert [result.scores for result in straight.seeds] == [result.scores for result in killed.seeds]
    assert [result.curve for result in straight.seeds] == [result.curve for result in killed.seeds]
    assert all(result.curve[-1] == (result.samples, result.scores[straight.metric]) for result in straight.seeds)
    assert [result.cpu_minutes is None for result in killed.seeds] == [False, True]
    assert straight.seeds[0].scores != straight.seeds[1].scores
    assert straight.data_samples == 48 and straight.ranks == 1 and straight.versions["torch"] != "not installed"

    assert fovea(*words(folder, "killed")) == 0  # nothing is left to do
    assert "already in" in capfd.readouterr().out and len(ledger.read(folder / "ledger.jsonl")) == 2


def refused(*arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert fovea(*arguments) == 2
    return capfd.readouterr().err


def test_what_changes_the_config_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "change what the config computes" in refused(*words(folder, "other", "schedule.lr.peak=1e-3"), capfd=capfd)
    assert "no config is named" in refused("reproduce", capfd=capfd)
    assert "there is no config" in refused("reproduce", "simclr/nothing", capfd=capfd)


def test_the_directory_of_another_reproduction_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "reproduction.json").write_text('{"id": "a", "config": "toy.yaml", "hash": "other"}')
    assert "belongs to a reproduction of 'toy.yaml' with other settings" in refused(*words(folder, "taken"), capfd=capfd)
    (folder / "taken" / "reproduction.json").write_text("[]")
    assert "is not the record of a reproduction" in refused(*words(folder, "taken"), capfd=capfd)


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_the_command_that_continues(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = words(folder, "failing")
    arguments[2] = f"data.shards={folder}/missing-*.tar"
    assert fovea(*arguments) == 1
    err = capfd.readouterr().err
    assert "seed 0 ended with 2; its messages are above. Repeat the same command to continue" in " ".join(err.split())


def test_a_ledger_without_results_lists_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fovea("reproduce", "--list", "--ledger", str(tmp_path / "none.jsonl")) == 0
    assert "has no result of a config" in capfd.readouterr().out
    assert os.listdir(tmp_path) == []
