"""A replay is equal to the run, bit for bit; and what was planted is named: step, rank, and sample, term, norm or tensor."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load
from pipeline.data.inputs import prepare
from pipeline.data.pack import synthetic
from pipeline.data.selections.file import Part, write_selection
from pipeline.runtime.run_directory import RunDirectory
from pipeline.training.rollback import SkippedSteps
from pipeline.training.signature_file import STEP_BYTES, Damage, Signature, _record, _records, read
from tests.golden_runs import FOLDER
from tests.helpers.matrix import matrix
from tests.helpers.replays import contents, edit_tensor, replace_image, replay
from tests.helpers.runs import ROOT, command, environment, train
from tests.test_extension import copy_packages
from tests.test_health import broken

pytestmark = pytest.mark.slow

EQUAL = r"equal: {} steps?, bit for bit"


def assert_equal(done: subprocess.CompletedProcess[str], steps: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(EQUAL.format(steps), done.stdout), done.stdout + done.stderr


def first_difference(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("first difference: ")]
    return line.removeprefix("first difference: ")


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "copy", copy_function=shutil.copy2)
    return folder / "copy"


# ---- equal --------------------------------------------------------------------------------------------------------------

CASES = matrix(["dinov2", "clip", "detailclip"], [1, 2], [0, 2, 3], together=1, always=[("dinov2", 2, 2), ("clip", 2, 0)])


@pytest.mark.parametrize(("method", "ranks", "zero"), CASES)
def test_a_replay_is_the_run_bit_for_bit_and_leaves_it_alone(
    method: str, ranks: int, zero: int, shards: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"launch.num_processes={ranks}", f"train.zero_stage={zero}", "train.record_batches=false")
    done = train(FOLDER / f"{method}.yaml", shards, run, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    before = contents(run)
    done = replay(run, "--step", "7", "--until", "9", "--with", "optim.name=adamw")
    assert_equal(done, 5)
    assert "tensors of the checkpoint of step 10" in done.stdout
    assert contents(run) == before
    for rank in range(ranks):
        steps = [record.step for record in read(RunDirectory(run).signatures(0, rank)) if isinstance(record, Signature)]
        assert steps == list(range(10))
        sizes = [9 + len(payload) for kind, payload in _records(RunDirectory(run).signatures(0, rank), Damage()) if kind == b"S"]
        assert len(sizes) == 10 and max(sizes) <= STEP_BYTES


def test_signatures_take_at_most_200_bytes_a_step_with_all_that_belongs_to_them(undisturbed: Path) -> None:
    for rank in (0, 1):  # header and names, and the digests of four checkpoints in 24 steps
        assert RunDirectory(undisturbed).signatures(0, rank).stat().st_size <= 24 * STEP_BYTES


def test_a_run_is_replayed_from_its_start_before_its_first_checkpoint(shards: str, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, shards, run, "train.duration=4 steps", "train.record_batches=false").returncode == 0
    shutil.rmtree(run / "checkpoints")
    done = replay(run, "--step", "2")
    assert_equal(done, 3)
    assert "from the start on 2 ranks" in done.stdout


def test_fewer_ranks_are_equal_within_bounds(undisturbed: Path) -> None:
    done = replay(undisturbed, "--step", "20", "--ranks", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    (deviation,) = re.findall(r"the largest difference is ([0-9.e-]+)\)", done.stdout)
    assert "equal within bounds: 3 steps" in done.stdout and "number of ranks was 2 and is 1" in done.stdout
    assert float(deviation) < 1e-4


def test_a_run_that_continued_on_other_ranks_is_replayed_on_those_of_the_step(shards: str, config: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ("train.duration=12 steps", "checkpoint.keep_last=9")
    assert train(config, shards, run, *words, "train.pause_at=8 steps").returncode == 0
    assert train(config, shards, run, *words, "launch.num_processes=1", "train.zero_stage=0").returncode == 0
    later = replay(run, "--step", "9")
    assert_equal(later, 2)
    assert "from the checkpoint of step 8 on 1 rank\n" in later.stdout
    earlier = replay(run, "--step", "7")
    assert_equal(earlier, 2)
    assert "from the checkpoint of step 6 on 2 ranks\n" in earlier.stdout


def test_steps_that_a_killed_run_repeats_have_the_same_signatures(shards: str, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert broken(config, shards, run, "0 9 step kill", "train.duration=12 steps").returncode  # killed in step 9
    steps = [record.step for record in read(RunDirectory(run).signatures(0, 0)) if isinstance(record, Signature)]
    assert steps == list(range(9))
    done = train(config, shards, run, "train.duration=12 steps")
    assert done.returncode == 0 and "resuming at step 6 " in done.stdout, done.stdout + done.stderr
    done = replay(run, "--step", "11", "--from-start")
    assert_equal(done, 12)
    assert "the run did 3 of these steps twice, equal bit for bit" in done.stdout


@pytest.mark.parametrize(
    ("margin", "first"),
    [pytest.param(1, 7, id="after-the-checkpoint", marks=pytest.mark.full), pytest.param(4, 6, id="reaching-before-it")],
)
def test_steps_around_a_rollback_are_replayed_as_the_run_did_them(
    margin: int, first: int, shards: str, config: Path, tmp_path: Path
) -> None:
    """The run goes back to its checkpoint of step 6; what this contains has been trained, whatever the margin."""
    run = tmp_path / "run"
    words = (
        "train.duration=14 steps",
        "watchdog.rollback_after=3",
        f"watchdog.rollback_margin={margin}",
        "checkpoint.keep_last=5",
    )
    done = broken(config, shards, run, "1 8 forward nan 10", *words, "train.log_every=5", "checkpoint.keep_last=5", delayed=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SkippedSteps(run / "skipped_steps.json").stretches == [(first, 10)]
    after = replay(run, "--step", "13", "--from-start")
    assert_equal(after, 14 - (10 - first + 1))
    assert ("the run did 1 of these steps twice, equal bit for bit" in after.stdout) == (first == 7)
    if first == 7:
        inside = replay(run, "--step", "7", "--until", "9")  # here nothing makes the loss NaN
        assert first_difference(inside).startswith("step 8, rank 1, loss terms: dino_local was nan and is ")
        assert "step 7 was left out after a rollback" in inside.stdout


def test_a_run_begun_on_ranks_that_are_no_power_of_two_keeps_its_order(shards: str, config: Path, tmp_path: Path) -> None:
    """Its order has a stream for each of three ranks; a selection, and an index inside the run, change nothing about it."""
    run, chosen = tmp_path / "run", tmp_path / "chosen.parquet"
    every = prepare(load(config, [f"data.shards={shards}", f"data.index={tmp_path / 'index'}"]).config, 1).train
    parts = [Part(number, np.arange(0, size, 2), np.full(-(-size // 2), 1.5)) for number, size in enumerate(every.sizes)]
    write_selection(chosen, parts, fingerprint=every.fingerprint, total=every.total, made={"by": "a test"})
    data = (
        "data.canonical_streams=null",
        f"data.selection={chosen}",
        f"data.index={run / 'index'}",
        "train.record_batches=false",
    )
    words = ("train.global_batch_size=12", "train.duration=8 steps", "checkpoint.keep_last=9", "checkpoint.every=3 steps", *data)
    assert train(config, shards, run, *words, "launch.num_processes=3", "train.pause_at=6 steps").returncode == 0
    assert train(config, shards, run, *words).returncode == 0
    before = contents(run)
    assert_equal(replay(run, "--step", "7"), 2)
    fewer = replay(run, "--step", "1", "--ranks", "1", "--with", "schedule.lr.peak=1e-6")
    assert "first difference: step 1, schedules: learning rate was " in fewer.stdout, fewer.stdout + fewer.stderr
    later = replay(run, "--step", "7", "--from-start")
    assert later.returncode == 0, later.stdout + later.stderr
    assert "equal: 8 steps (samples, inputs, schedules)" in later.stdout
    assert "note: number of ranks of 6 of these steps was another, such as 3 of step 0" in later.stdout
    assert contents(run) == before


def test_a_step_without_the_signature_of_a_rank_is_not_called_equal(undisturbed: Path, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path)
    path = RunDirectory(run).signatures(0, 1)
    records = [(kind, payload) for kind, payload in _records(path, Damage()) if not (kind == b"S" and payload[0] == 23)]
    path.write_bytes(b"".join(_record(kind, payload) for kind, payload in records))
    done = replay(run, "--step", "23")
    assert done.returncode == 1 and "not compared: step 23" in done.stdout and "equal" not in done.stdout, (
        done.stdout + done.stderr
    )


# ---- planted ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checked", [True, False], ids=["checksums", "no-checksums"])
def test_another_image_in_a_shard_is_named_with_step_rank_and_key(config: Path, tmp_path: Path, checked: bool) -> None:
    synthetic.write(tmp_path / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    run, shards = tmp_path / "run", str(tmp_path / "scenes" / "*train-*.tar")
    words = ("train.duration=8 steps", f"data.verify_checksums={checked}".lower(), "train.record_batches=false")
    assert train(config, shards, run, *words).returncode == 0
    listed = subprocess.run(
        [*command(config, shards, run)[:3], "shards", "ls", str(run / "config.yaml"), "--step", "7"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    rows = [line.split() for line in listed.splitlines() if re.match(r"\s*\d", line)]
    row = next(row for row in rows if row[1] == "1" and row[0] == "10")
    replace_image(tmp_path / "scenes" / row[4], row[6], (250, 10, 200))
    stage = "samples" if checked else "inputs"  # with checksums it is substituted
    expected = f"step 7, rank 1, {stage}: {row[6]} (sample 2 of the rank, micro-batch 0)"
    assert first_difference(replay(run, "--step", "7")) == expected


CODE = {
    "loss term": (
        "pipeline/losses/koleo.py",
        "return -torch.log(distance + eps).mean()",
        "loss terms: koleo was",
    ),
    "gradient norm": ("pipeline/training/engine.py", "for term in terms.values()]).sum())", "gradient norms: backbone was"),
    "schedule": (
        "pipeline/training/settings.py",
        'return lr * (ratio**0.5 if self.rule == "sqrt" else ratio)',
        "schedules: learning",
    ),
}


@pytest.mark.parametrize("what", ["loss term", *(pytest.param(name, marks=pytest.mark.full) for name in [*CODE][1:])])
def test_changed_code_is_named_by_what_it_changes_first(what: str, undisturbed: Path, tmp_path: Path) -> None:
    root = copy_packages(tmp_path / "other")
    file, line, expected = CODE[what]
    text = (root / file).read_text()
    assert text.count(line) == 1
    changed = f"{line[:-1]} * 1.0001)" if what == "gradient norm" else f"{line} * 1.0001"
    (root / file).write_text(text.replace(line, changed))
    done = replay(undisturbed, "--step", "19", root=root)
    text = first_difference(done)
    assert text.startswith(f"step 18, rank 0, {expected}"), done.stdout
    assert text.endswith("; also on rank 1") == (what == "loss term")  # norms and schedules are the same on all ranks
    assert "note: fovea's source was " in done.stdout


def test_a_changed_tensor_of_a_later_checkpoint_is_named(undisturbed: Path, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path)
    edit_tensor(run / "checkpoints" / "step_000000024", 1, "exp_avg/ibot_head.last.direction")
    text = first_difference(replay(run, "--step", "23"))
    assert re.match(r"weights after 24 steps, rank 1: exp_avg/ibot_head\S+ \(1 of \d+ elements, by up to ", text), text


def test_a_changed_checkpoint_to_start_from_is_named_with_its_network(undisturbed: Path, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path)
    edit_tensor(run / "checkpoints" / "step_000000018", 0, "master/backbone.vit.cls_token")
    text = first_difference(replay(run, "--step", "20"))
    start = "weights of the checkpoint that the replay starts from, rank 0, are not those that the run saved"
    assert text == f"{start}: master/backbone"


# ---- other settings, and what is written --------------------------------------------------------------------------------


def test_other_settings_are_compared_side_by_side(undisturbed: Path) -> None:
    done = replay(undisturbed, "--step", "18", "--until", "20", "--with", "schedule.lr.peak=1e-3", "--without", "train_0000057")
    assert first_difference(done, code=0).startswith("step 18, rank 0, schedules: learning rate was ")
    rows = [line.split() for line in done.stdout.splitlines() if re.fullmatch(r"\s+\d+\s+\S+\s+\S+", line)]
    assert [row[0] for row in rows] == ["18", "19", "20"] and rows[0][1] == rows[0][2] and rows[2][1] != rows[2][2]
    assert "schedule.lr.peak was 0.01, replayed with 0.001" in done.stdout and "without train_0000057" in done.stdout


def test_a_sample_that_is_left_out_is_substituted_and_nothing_before_it_changes(undisturbed: Path) -> None:
    done = replay(undisturbed, "--step", "20", "--without", "train_0000057")
    assert first_difference(done, code=0) == "step 20, rank 1, samples: train_0000057 (sample 0 of the rank, micro-batch 0)"
    assert "1 of 3 steps differ" in done.stdout


def test_a_sample_and_a_spike_are_replayed(undisturbed: Path) -> None:
    sample = replay(undisturbed, "--sample", "train_0000057")
    assert_equal(sample, 3)
    assert "train_0000057 is in steps 1, 14, 20" in sample.stdout
    spike = replay(undisturbed, "--spike", "--from-start")
    assert spike.returncode == 0, spike.stdout + spike.stderr
    assert re.search(r"the loss rises most at step \d+, from [0-9.]+ to [0-9.]+\n", spike.stdout) and "equal: " in spike.stdout


def test_batches_activations_and_gradients_are_written(undisturbed: Path, tmp_path: Path) -> None:
    done = replay(undisturbed, "--step", "19", "--until", "20", "--dump", str(tmp_path / "dump"))
    assert_equal(done, 3)  # observing changes nothing
    names = {path.name for path in (tmp_path / "dump").iterdir()}
    each = {
        f"{kind}-0000{step}-rank-{rank}.{end}"
        for kind, end in (("step", "html"), ("activations", "csv"))
        for step in (19, 20)
        for rank in (0, 1)
    }
    assert names == each | {"gradients-000019.csv", "gradients-000020.csv"}
    page = (tmp_path / "dump" / "step-000020-rank-1.html").read_text()
    assert "train_0000057" in page and page.count("<img") == 8 * 4
    with (tmp_path / "dump" / "gradients-000020.csv").open() as file:
        norms = {row["parameter"]: float(row["norm"]) for row in csv.DictReader(file)}
    records = [record for record in read(RunDirectory(undisturbed).signatures(0, 0)) if isinstance(record, Signature)]
    for network in ("backbone", "dino_head", "ibot_head"):
        total = sum(norm**2 for name, norm in norms.items() if name.startswith(network)) ** 0.5
        assert total == pytest.approx(records[20].values[f"norm/{network}"], rel=1e-4)
    with (tmp_path / "dump" / "activations-000020-rank-0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["block"] for row in rows} == {"backbone.vit.blocks.0", "teacher.backbone.vit.blocks.0"}
    assert all(float(row["largest"]) >= float(row["rms"]) > 0 for row in rows)


# ---- errors -------------------------------------------------------------------------------------------------------------


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


def test_what_cannot_be_replayed_is_refused_with_a_hint(undisturbed: Path, tmp_path: Path) -> None:
    assert "were deleted by checkpoint.keep_last; the nearest is that of step 18" in refusal(replay(undisturbed, "--step", "5"))
    assert "step 24 is beyond the last recorded one, 23" in refusal(replay(undisturbed, "--step", "24"))
    assert "needs one of --step, --spike and --sample" in refusal(replay(undisturbed))
    assert "are not a range" in refusal(replay(undisturbed, "--step", "20", "--until", "19"))
    assert "3 ranks are more than the 2 of the run" in refusal(replay(undisturbed, "--step", "20", "--ranks", "3"))
    assert "unknown key" in refusal(replay(undisturbed, "--step", "20", "--with", "train.rate=3"))
    assert "no shard has a sample with the key" in refusal(replay(undisturbed, "--step", "20", "--without", "nothing"))
    assert "has no meaning with --spike" in refusal(replay(undisturbed, "--spike", "--until", "20"))
    inside = refusal(replay(undisturbed, "--step", "20", "--dump", str(undisturbed / "dump")))
    assert "must lie outside the run" in inside and not (undisturbed / "dump").exists()
    assert "cannot be read" in refusal(replay(tmp_path / "nothing", "--step", "20"))
    run = copied(undisturbed, tmp_path)
    shutil.rmtree(run / "signatures")
    assert "the run has no signatures to compare with" in refusal(replay(run, "--step", "20"))
    (run / "signatures").mkdir()
    (run / "signatures" / "attempt-0000-rank-0.bin").write_bytes(os.urandom(5000))
    assert "the run has no signatures to compare with" in refusal(replay(run, "--step", "20"))
    damaged = run / "checkpoints" / "step_000000018" / "rank_00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copytree(undisturbed / "signatures", run / "signatures", dirs_exist_ok=True)
    assert "no checkpoint at or before step 20 is complete" in refusal(replay(run, "--step", "20"))


def test_a_run_without_signatures_can_still_be_dumped(undisturbed: Path, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path)
    shutil.rmtree(run / "signatures")
    beyond = refusal(replay(run, "--step", "99", "--dump", str(tmp_path / "dump")))
    assert "step 99 is beyond the last recorded one, 23" in beyond
    assert "are not a range" in refusal(replay(run, "--step", "9", "--until", "3", "--dump", str(tmp_path / "dump")))
    done = replay(run, "--step", "18", "--dump", str(tmp_path / "dump"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "dump" / "gradients-000018.csv").exists()


def test_data_that_changed_is_refused_with_the_runs_own_message(config: Path, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    run = tmp_path / "run"
    assert train(config, str(tmp_path / "scenes" / "*train-*.tar"), run, "train.duration=8 steps").returncode == 0
    (tmp_path / "scenes" / "scenes-train-00002.tar").unlink()
    done = replay(run, "--step", "3", "--until", "5")  # from the start, which nothing forbids: other samples
    assert first_difference(done).startswith("step 0, rank 0, samples: ")
    shutil.rmtree(run / "signatures")
    done = replay(run, "--step", "6", "--dump", str(tmp_path / "dump"))
    assert done.returncode == 2 and "the data of this run have changed" in done.stderr and "1 gone: " in done.stderr


def test_a_replay_that_is_interrupted_says_so(undisturbed: Path, tmp_path: Path) -> None:
    """The first rank waits in its third step until the signal has reached it."""
    root = copy_packages(tmp_path / "other")
    source = root / "launch" / "replay" / "rank.py"
    waits = "        while done == 3 and not self.requests.requested:\n            __import__('time').sleep(0.01)\n"
    changes = {
        '        """Print one line."""\n': '        """Print one line."""\n' + waits,
        "    trainer = assemble(\n": "    show.requests = rank.requests\n    trainer = assemble(\n",
    }
    text = source.read_text()
    for old, changed in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, changed)
    source.write_text(text)
    words = [*command(Path("x"), "y", undisturbed)[:3], "replay", str(undisturbed), "--step", "23", "--from-start"]
    started = subprocess.Popen(
        words,
        env=environment() | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    for line in started.stderr:
        if line.startswith("step "):
            started.send_signal(signal.SIGINT)
            break
    output, _ = started.communicate(timeout=600)
    assert started.returncode == 130 and re.search(r"^the replay was stopped before step [1-4]$", output, re.MULTILINE), output
