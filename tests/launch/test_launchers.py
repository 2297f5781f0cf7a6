"""Whoever starts the ranks, it is the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.runs import ROOT, command, environment, recorded, started_and_held, train, wait_for_step, weights
from tests.helpers.s3 import free_port

STEPS = 8
LENGTH = f"train.duration={STEPS} steps"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shards: str, config: Path) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "run"
    done = train(config, shards, directory, LENGTH)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def _torchrun(words: list[str]) -> list[list[str]]:
    module = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [[sys.executable, "-m", *module, "-m", *words[2:]]]


def _torchrun_standalone(words: list[str]) -> list[list[str]]:
    return [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *words[2:]]]


def _accelerate(words: list[str]) -> list[list[str]]:
    module = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    return [[sys.executable, "-m", *module, "--dynamo_backend=no", f"--main_process_port={free_port()}", "-m", *words[2:]]]


def _deepspeed(words: list[str]) -> list[list[str]]:
    module = ["deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={free_port()}", "--module"]
    return [["env", "DS_ACCELERATOR=cpu", sys.executable, "-m", *module, *words[2:]]]


def _slurm(words: list[str]) -> list[list[str]]:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = []
    for rank in range(2):
        own = {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        tasks.append(["env", *(f"{name}={value}" for name, value in own.items()), *words])
    return tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [_torchrun, _torchrun_standalone, _accelerate, _deepspeed, _slurm], ids=lambda f: f.__name__[1:]
)
def test_every_launcher_gives_the_run_that_fovea_train_gives(
    plain: Path, shards: str, config: Path, tmp_path: Path, launcher: Callable[[list[str]], list[list[str]]]
) -> None:
    directory = tmp_path / "run"
    started = [
        subprocess.Popen(
            words,
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in launcher(command(config, shards, directory, LENGTH))
    ]
    said = [process.communicate(timeout=2000)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    for rank in (0, 1):
        ours, theirs = recorded(directory, rank), recorded(plain, rank)
        assert sorted(ours) == list(range(STEPS))
        assert ours == theirs
    assert weights(directory, STEPS) == weights(plain, STEPS)


def process_of(directory: Path, rank: int) -> int:
    """The process of a rank by its heartbeat, which is rewritten in place and may be empty for a moment."""
    end, path = time.monotonic() + 900, directory / "logs" / "attempt-0000" / "pulse" / f"rank-{rank}.json"
    while not (text := path.read_text()):
        assert time.monotonic() < end, "the rank writes no heartbeat"
    return int(json.loads(text)["pid"])


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_of_which_one_was_killed_and_nothing_is_lost(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    (words,) = _torchrun(command(config, shards, directory))
    words.insert(words.index("torch.distributed.run") + 1, "--max-restarts=2")
    with (tmp_path / "said").open("wb") as said:
        agent = started_and_held(words, 10, 1, stdout=said, stderr=said)
    wait_for_step(directory, 9, agent)
    os.kill(process_of(directory, 1), signal.SIGKILL)
    assert agent.wait(timeout=2000) == 0, (tmp_path / "said").read_text()
    assert RunDirectory(directory).next_attempt() == 2
    for rank in (0, 1):
        assert recorded(directory, rank) == recorded(undisturbed, rank)
    assert weights(directory, 24) == weights(undisturbed, 24)


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all_ranks(shards: str, config: Path, tmp_path: Path) -> None:
    words = command(config, shards, tmp_path / "run", "optim.lrr=1")
    (torchrun,) = _torchrun_standalone(words)
    done = subprocess.run(torchrun, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode != 0
    assert "optim.lrr" in done.stderr
    assert not os.path.exists(tmp_path / "run")
