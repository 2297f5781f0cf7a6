"""What a run says and does when one of its ranks stands still, breaks, or is killed: real ranks, broken on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, command, environment, recorded, weights
from tests.helpers.s3 import free_port

RESTART = 75


def living(directory: Path) -> list[str]:
    """Processes that have this run's directory among their words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(directory) in words:
                found.append(words)
    return found


def broken(
    config: Path, shards: str, directory: Path, fault: str, *overrides: str, torchrun: bool = False, delayed: bool = False
) -> subprocess.CompletedProcess[str]:
    words = command(config, shards, directory, *overrides)[2:]
    head = [sys.executable, "-m", "tests.helpers.faulty_ranks"]
    if torchrun:
        head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        head += ["-m", "tests.helpers.faulty_ranks"]
    return subprocess.run(
        [*head, *words[1:]],
        env=environment() | {"FAULT": fault} | ({"DELAYED": "1"} if delayed else {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Messages; the launcher shows the last lines of a failed rank's log behind a bar."""
    return [line.strip().removeprefix("| ") for line in done.stderr.splitlines() if "error: " in line]


QUICK = ("watchdog.hang_floor=1.5", "watchdog.hang_factor=5", "train.duration=12 steps")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "phase"), [("data", "data"), ("forward", "forward and backward"), ("step", "step")])
def test_a_rank_that_stands_still_is_named_with_its_phase_and_all_end(
    config: Path, shards: str, tmp_path: Path, place: str, phase: str
) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, f"1 7 {place} sleep", *QUICK)
    assert done.returncode == RESTART, done.stderr + done.stdout
    (message,) = errors(done)
    assert f"rank 1 has been in {phase} at step 7 for " in message and "the others wait for it in" in message
    folder = directory / "logs" / "attempt-0000"
    assert "_break" in (folder / "stacks-rank-1.txt").read_text()  # where it sleeps
    assert "stall of rank 0" in (folder / "stacks-rank-0.txt").read_text()
    assert not living(directory)


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_another(config: Path, shards: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, "1 7 forward freeze", *QUICK)
    assert done.returncode == RESTART, done.stderr + done.stdout
    (message,) = errors(done)
    assert "rank 1 does not respond; last heartbeat in " in message
    assert not living(directory)
    with contextlib.suppress(ProcessLookupError):  # stopped, a rank that was forked for the test cannot notice its launcher's end
        os.kill(json.loads((directory / "logs" / "attempt-0000" / "pulse" / "rank-1.json").read_text())["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True], ids=["fovea", "torchrun"])
def test_out_of_memory_is_one_message_with_the_mend(config: Path, shards: str, tmp_path: Path, torchrun: bool) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, "1 7 forward oom", "train.duration=12 steps", torchrun=torchrun)
    assert done.returncode == 1, done.stderr + done.stdout
    (message,) = errors(done)
    assert message.startswith("error: rank 1, forward and backward, step 7: out of GPU memory: CUDA out of memory. Tried")
    assert "Lower train.micro_batch_size" in message and "raise train.zero_stage (now 1)" in message
    assert "rank 0 ends because of rank 1: out of GPU memory" in done.stderr
    assert "Connection" not in done.stderr and ("Traceback" not in done.stderr or torchrun)
    assert not living(directory)


@pytest.mark.slow
def test_a_killed_rank_is_named_by_the_one_that_is_left(config: Path, shards: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, "1 7 forward kill", "train.duration=12 steps")
    assert done.returncode == 137, done.stderr + done.stdout
    (message,) = errors(done)
    assert "the connection to another rank broke: rank 1 has exited; last heartbeat in" in message and "log of rank 1" in message
    assert not living(directory)


@pytest.mark.slow
def test_a_collective_that_takes_too_long_names_who_is_missing(config: Path, shards: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, "1 7 data sleep", "train.duration=12 steps", "launch.timeout=20")
    assert done.returncode == RESTART, done.stderr + done.stdout
    (message,) = errors(done)
    # On a machine that is busy enough a beat of rank 1 may be late between the two looks at it.
    who = r"rank 1 (has been|does not respond; last heartbeat) in data at step 7"
    assert re.search(rf"a collective took longer than launch\.timeout: {who}", message)
    assert not living(directory)


@pytest.mark.slow
def test_a_mistake_of_ours_shows_its_traceback_once(config: Path, shards: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = broken(config, shards, directory, "0 3 step bug", "train.duration=12 steps")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "error: rank 0, step, step 3: KeyError" in done.stderr
    assert "Traceback" not in (directory / "logs" / "attempt-0000" / "rank-1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("delayed", [False, True], ids=["at-once", "delayed"])
def test_a_broken_loss_sends_the_run_back_and_its_batches_are_left_out_for_good(
    config: Path, shards: str, tmp_path: Path, delayed: bool
) -> None:
    directory = tmp_path / "run"
    words = ("train.duration=14 steps", "watchdog.rollback_after=3", "watchdog.rollback_margin=1", "checkpoint.keep_last=5")
    words = (*words, "train.log_every=5")  # so that steps are queued behind those that are not finite
    done = broken(config, shards, directory, "1 8 forward nan 10", *words, delayed=delayed)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads((directory / "skipped_steps.json").read_text()) == {"steps": [[7, 10]]}
    outcome = json.loads((directory / "outcome.json").read_text())
    assert outcome["step"] == 14 and outcome["skipped"] == 4
    for rank in range(2):
        lines = (directory / "batches" / f"attempt-0000-rank-{rank}.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == [*range(11), 6, 11, 12, 13]
        recorded(directory, rank)  # step 6 was the same again, so the state of the checkpoint was
    sixth = directory / "checkpoints" / "step_000000006"
    again = broken(config, shards, directory, "9 0 forward none", *words, f"checkpoint.resume={sixth}", delayed=delayed)
    assert again.returncode == 0, again.stderr
    lines = (directory / "batches" / "attempt-0001-rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 11, 12, 13]


@pytest.mark.slow
@pytest.mark.parametrize("delayed", [False, True], ids=["at-once", "delayed"])
def test_a_run_goes_back_only_so_often(config: Path, shards: str, tmp_path: Path, delayed: bool) -> None:
    directory = tmp_path / "run"
    words = (
        "watchdog.rollback_after=2",
        "watchdog.rollback_margin=1",
        "watchdog.max_rollbacks=1",
        "train.max_consecutive_nonfinite=3",
        "train.log_every=5",
    )
    done = broken(config, shards, directory, "1 8 forward nan 40", *words, delayed=delayed)
    assert done.returncode == 1
    (message,) = errors(done)
    assert "3 steps in a row were not finite" in message and "step 12, first keys on rank 1: [" in message
    assert json.loads((directory / "skipped_steps.json").read_text()) == {"steps": [[7, 9]]}


def _metrics(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """What a run has measured, but for times, memory and the machine."""
    (path,) = (directory / "tracking").glob("journal-*.jsonl")
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "metrics"]
    return [
        (row["step"], {key: value for key, value in row["values"].items() if key.split("/")[0] in ("train", "gradient_norm")})
        for row in rows
    ]


@pytest.mark.slow
def test_a_run_that_reads_later_whether_a_step_was_applied_is_the_run_that_reads_at_once(
    config: Path, shards: str, tmp_path: Path
) -> None:
    words = ("train.duration=14 steps", "train.log_every=4")
    delayed, at_once = tmp_path / "delayed", tmp_path / "at_once"
    for directory in (delayed, at_once):
        done = broken(config, shards, directory, "1 8 forward nan 9", *words, delayed=directory == delayed)
        assert done.returncode == 0, done.stderr + done.stdout
        lines = [line for line in done.stdout.splitlines() if "not finite, step skipped" in line]
        assert [re.findall(r"step (\d+):", line) for line in lines] == [["8"], ["9"]], done.stdout
    for rank in range(2):
        ours = recorded(delayed, rank)
        assert ours == recorded(at_once, rank) and [step for step, row in ours.items() if not row["applied"]] == [8, 9]
    assert _metrics(delayed) == _metrics(at_once) and len(_metrics(delayed)) > 4
    for step in (6, 12, 14):
        assert weights(delayed, step) == weights(at_once, step)
