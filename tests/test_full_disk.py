"""A disk that is full for a while: no step, no record and no bit is lost, and the run says what it lacks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from pipeline.errors import CheckpointWriteError, failure_fields
from pipeline.tracking.journal import read
from tests.helpers import small_disk
from tests.helpers.cluster_runs import until
from tests.helpers.runs import ROOT, TOY, command, environment, train, weights

STEPS = 200


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not small_disk.mounted(folder, "16m"):
        pytest.skip("no file system can be mounted")
    yield folder
    small_disk.unmount(folder)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@pytest.mark.slow
def test_a_run_goes_on_when_there_is_space_again_as_if_nothing_had_happened(tmp_path: Path, small: Path) -> None:
    scenes.write(tmp_path / "data", train=320, val=24, size=32, seed=3, samples_per_shard=40)
    config, shards = tmp_path / "toy.yaml", f"{tmp_path}/data/*train-*.tar"
    config.write_text(TOY)
    same = [f"train.duration={STEPS} steps", "checkpoint.every=40 steps", "train.record_batches=false"]
    same += ["tracking.enabled=true", "tracking.uri=http://127.0.0.1:1", f"data.index={tmp_path / 'index'}"]
    reference = tmp_path / "reference"
    assert train(config, shards, reference, *same).returncode == 0

    run, log = small / "run", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(config, shards, run, *same), env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        seconds = run / "logs" / "attempt-0000" / "train_seconds.json"
        until(lambda: seconds.exists() and json.loads(seconds.read_text() or "{}").get("step", 0) > 10, "it does not train")
        fill(small / "fill")
        until(lambda: "no checkpoint of step 40" in log.read_text() or process.poll() is not None, "nothing was missed")
        (small / "fill").unlink()
        assert process.wait(timeout=1200) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "journal-0000.jsonl cannot be written (No space left on device)" in text and "is written again" in text
    assert weights(run, STEPS) == weights(reference, STEPS)
    logged = [
        record["step"] for _, record in read(run / "tracking" / "journal-0000.jsonl") if "train/loss" in record.get("values", {})
    ]
    assert logged == list(range(1, STEPS + 1)), "a record is missing"


def test_a_checkpoint_that_cannot_be_written_ends_an_attempt_and_not_the_run() -> None:
    assert failure_fields(CheckpointWriteError("x")) == {"kind": "CheckpointWriteError", "retryable": True, "cause": "disk"}
