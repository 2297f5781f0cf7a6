"""A whole run on stand-in devices: trained, evaluated, saved and resumed, each thread on its rank's device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic
from pipeline.training.signature_file import Signature, read
from tests.helpers.runs import TOY
from tests.helpers.standin import process
from tests.helpers.standin.recorder import Record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A config and its shards."""
    folder = tmp_path_factory.mktemp("standin")
    synthetic.write(folder / "scenes", train=48, val=20, size=32, seed=3)
    (folder / "toy.yaml").write_text(TOY.replace("precision: fp32", "precision: bf16").replace("log_every: 1,", "log_every: 4,"))
    return folder / "toy.yaml", f"{folder}/scenes/*train-*.tar"


def train(toy: tuple[Path, str], run: Path, *overrides: str, rank: int = 0, world: int = 1) -> Record:
    """Runs ``fovea train`` as one rank, to its end."""
    config, shards = toy
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    words = [
        *("train", str(config), f"data.shards={shards}", f"data.index={run.parent / 'index'}", f"run.directory={run}"),
        *("launch.num_processes=null", "evaluation.knn.enabled=true", "evaluation.knn.every=4 steps", "evaluation.knn.k=[3]"),
        *("train.record_batches=false", "train.compile=false", "checkpoint.every=4 steps", *overrides),
    ]
    out = run.parent / "record.json"
    done = process.run("train", str(out), *words, MASTER_PORT="29400", **place)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return Record.from_json(json.loads(out.read_text()))


def test_a_run_is_trained_evaluated_saved_and_resumed(toy: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = train(toy, run, "train.duration=6 steps")
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_000000004", "step_000000006"}
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["step"] == 6 and outcome["stop"] == "FINISHED" and "knn/k3" in outcome["scores"]
    assert {call.device for call in record.calls} == {0}
    shutil.rmtree(run / "checkpoints" / "step_000000006")
    train(toy, run, "train.duration=6 steps")
    notes = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [note["resumed_from"] for note in notes if note["event"] == "start"] == [None, 4]
    assert (run / "checkpoints" / "step_000000006").is_dir()


def test_every_thread_of_rank_3_uses_device_3(toy: tuple[Path, str], tmp_path: Path) -> None:
    record = train(toy, tmp_path / "run", "train.duration=6 steps", "data.canonical_streams=8", rank=3, world=8)
    assert {call.device for call in record.calls if call.kind == "kernel"} == {3}
    elsewhere = sorted({(call.thread, call.kind, call.device, call.name) for call in record.calls if call.device != 3})
    assert not elsewhere
    assert {call.thread for call in record.calls} >= {"main", "native", "fovea-data"}


def test_the_loader_neither_launches_on_the_training_stream_nor_waits_for_it(toy: tuple[Path, str], tmp_path: Path) -> None:
    record = train(toy, tmp_path / "run", "train.duration=6 steps")
    loads = [call for call in record.calls if call.thread == "fovea-data" and call.kind not in ("allocation", "select")]
    assert {call.kind for call in loads} == {"copy", "order"} and {call.stream for call in loads}.isdisjoint({"default"})
    assert {call.name for call in loads if call.kind == "copy"} == {"host to device, pinned"}
    assert not [block for block in record.blocks if block.thread == "fovea-data"]
    (side,) = {call.stream for call in loads}
    trains = [call for call in record.calls if call.thread == "main"]
    assert [
        call for call in trains if call.kind == "order" and call.name == "stream waits for event" and call.stream == "default"
    ]
    assert not [call for call in trains if call.stream == side and call.kind != "order"]


def test_signatures_are_read_from_the_device_without_waiting_in_a_step(toy: tuple[Path, str], tmp_path: Path) -> None:
    words = ("train.duration=6 steps", "evaluation.knn.enabled=false")
    record = train(toy, tmp_path / "run", *words)
    own = [block for block in record.blocks if "signature" in block.where]
    assert not [block.line for block in own if "settle" not in block.where], own
    assert sum(block.calls for block in own) <= 3, own  # at the log steps 4 and 6, where the host waits anyway, and the first
    steps = [one.step for one in read(tmp_path / "run" / "signatures" / "attempt-0000-rank-0.bin") if isinstance(one, Signature)]
    assert steps == list(range(6))
    off = train(toy, tmp_path / "off", *words, "train.signatures=false")
    assert not (tmp_path / "off" / "signatures").exists()
    names = {block.where for block in record.blocks} - {block.where for block in off.blocks}
    # The last checkpoint is saved while the host waits for it.
    assert not [name for name in names if "signature" not in name and "group_digests" not in name], names
