"""Curation that is killed, stopped, short of space, or run twice at a time: the same bytes, one message, no leftovers."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.curation import clusters, near_duplicates, workspace
from pipeline.data.curation.dedup import DedupOptions, dedup
from pipeline.data.curation.outcome import earlier_weights
from pipeline.data.curation.vectors import unit
from pipeline.data.curation.workspace import Workspace
from pipeline.data.selections.file import Part, Selection, write_selection
from pipeline.data.storage import write_atomically
from pipeline.errors import DataError
from tests.helpers import small_disk, vector_sets
from tests.helpers.commands import fovea
from tests.helpers.runs import ROOT, environment

# Sends itself a signal at the n-th of the operations that make files visible or durable.
STOPS = """
import os, sys
from launch.cli.main import main
left, number = int(sys.argv[1]), int(sys.argv[2])
def counted(real):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return real(*arguments)
    return call
for name in ("replace", "fsync", "pwrite"):
    setattr(os, name, counted(getattr(os, name)))
code = 0
try:
    main(sys.argv[3:])
except SystemExit as stop:
    code = stop.code
print("operations", -left, file=sys.stderr)
sys.exit(code)
"""
COMMANDS = {
    "dedup": ["--against", "val", "--clusters", "3", "--workers", "2"],
    "balance": ["--levels", "9,3", "--target", "50%", "--workers", "2"],
}


@pytest.fixture(autouse=True)
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of 400 samples with 100 near-duplicates, and an evaluation set of 20, in the working directory."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    vector_sets.make(tmp_path / "emb", np.concatenate([values, values[:100] + 0.01]), shards=3)
    vector_sets.make(tmp_path / "val", values[290:] + 0.01, shards=1, contents=np.arange(1000, 1010))
    return tmp_path


def stopped(at: int, number: int, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["shards", verb, "emb", "--out", "o.parquet", *COMMANDS[verb], *more]
    command = [sys.executable, "-c", STOPS, str(at), str(number), *words]
    return subprocess.run(command, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["dedup", "balance"])
def test_killed_at_any_file_operation_it_gives_the_same_bytes_and_leaves_nothing(verb: str, sets: Path) -> None:
    whole = stopped(-1, 0, verb, "--work", "w")
    assert whole.returncode == 0, whole.stderr
    operations, expected = int(whole.stderr.split()[-1]) - 1, Path("o.parquet").read_bytes()
    chosen = np.random.default_rng(0).choice(operations - 2, size=4, replace=False) + 1
    leftovers = 0
    for at in (*chosen.tolist(), operations - 1, operations):
        Path("o.parquet").unlink()
        subprocess.run(["rm", "-r", "w"], check=True)
        assert stopped(at, signal.SIGKILL, verb, "--work", "w").returncode == -signal.SIGKILL
        assert not Path("o.parquet").exists()
        leftovers += len(list(sets.rglob(".*.tmp")))
        assert stopped(-1, 0, verb, "--work", "w").returncode == 0
        assert Path("o.parquet").read_bytes() == expected and not list(sets.rglob(".*.tmp"))
    assert leftovers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_message_and_the_same_command_continues(number: signal.Signals, sets: Path) -> None:
    ended = stopped(5, number, "dedup")
    assert ended.returncode == 128 + number, ended.stderr
    assert "fovea: stopped; the same command continues" in ended.stderr and "Traceback" not in ended.stderr
    assert not Path("o.parquet").exists()
    assert stopped(-1, 0, "dedup").returncode == 0
    assert sorted(path.name for path in sets.iterdir()) == ["emb", "o.parquet", "val"]


@pytest.mark.parametrize("may_mount", [True, False])
@pytest.mark.parametrize("words", [("--out", "o.parquet", "--work", "small/w"), ("--out", "small/o.parquet", "--work", "w")])
def test_a_full_disk_is_one_message_and_the_same_command_works_once_there_is_space(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, may_mount: bool
) -> None:
    if not may_mount:
        monkeypatch.setattr(small_disk, "mounted", lambda *_: False)
    with small_disk.small_disk(tmp_path / "small", "4k" if words[1].startswith("small") else "16k") as resize:
        command = ("shards", "dedup", "emb", *words, "--workers", 1)
        assert fovea(*command) == 2
        error = capsys.readouterr().err
        assert "small/" in error and "No space left on device). Free space there, or choose another" in error, error
        assert not list(Path().rglob("o.parquet")) and not list(Path().rglob(".*.tmp"))
        resize("9m")
        assert fovea(*command) == 0


def test_a_full_disk_while_samples_are_grouped_is_named(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    vectors = vector_sets.Vectors.of(vector_sets.opened(sets / "emb"))
    monkeypatch.setattr(clusters, "_write_at", full)
    with pytest.raises(DataError, match=r"w/grouped.vectors: an intermediate result cannot be written \(No space left"):
        dedup(vectors, DedupOptions(), sets / "w", progress=vector_sets.quiet)
    assert not list((sets / "w").glob("grouped*"))
    monkeypatch.undo()
    assert dedup(vectors, DedupOptions(), sets / "w", progress=vector_sets.quiet) is not None


def test_an_error_of_an_open_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "a.json", b"{}")
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(OSError, match="No space left") as caught:
        vector_sets.make(tmp_path / "more", np.ones((3, 4), dtype=np.float32), shards=1)
    assert caught.value.filename == str(tmp_path / "more" / "00000-0.parquet")


def test_one_command_at_a_time_works_in_a_folder_and_parts_share_it(tmp_path: Path) -> None:
    key = {"data": "a"}
    with Workspace(tmp_path / "w", key), pytest.raises(DataError, match="another process works in this folder"):
        Workspace(tmp_path / "w", key)
    with Workspace(tmp_path / "w", key, shared=True), Workspace(tmp_path / "w", key, shared=True):
        for shared in (False, True):
            if not shared:
                with pytest.raises(DataError, match="another process"):
                    Workspace(tmp_path / "w", key)
        workspace.remove(tmp_path / "w")
        assert (tmp_path / "w" / "work.json").exists()
    workspace.remove(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_leftovers_of_killed_processes_are_removed_unless_another_works_there(tmp_path: Path) -> None:
    key, leftover = {"data": "a"}, tmp_path / "w" / "links" / ".000001.npz.12.0abc.tmp"
    with Workspace(tmp_path / "w", key, shared=True):
        leftover.parent.mkdir()
        leftover.write_bytes(b"half")
        Workspace(tmp_path / "w", key, shared=True).__exit__()
        assert leftover.exists()
    Workspace(tmp_path / "w", key).__exit__()
    assert not leftover.exists()


def test_settings_of_a_refused_command_do_not_block_the_folder(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("shards", "dedup", "emb", "--out", "o.parquet", "--clusters", 1000) == 2
    assert fovea("shards", "dedup", "emb", "--out", "o.parquet", "--clusters", 2) == 0


def test_damaged_vectors_of_clusters_are_refused(sets: Path) -> None:
    vectors = vector_sets.Vectors.of(vector_sets.opened(sets / "emb"))
    for name in ("positions", "vectors"):
        dedup(vectors, DedupOptions(), sets / name, progress=vector_sets.quiet)
        path = sets / name / f"grouped.{name}"
        path.write_bytes(b"\xff" * path.stat().st_size)
        (sets / name / "links" / "000000.npz").unlink()
        with pytest.raises(DataError, match="an intermediate file is damaged"):
            dedup(vectors, DedupOptions(), sets / name, progress=vector_sets.quiet)


def test_a_selection_removes_temporary_files_of_the_dead_only(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".s[1].parquet.1.aa.tmp", tmp_path / ".s[1].parquet.2.bb.tmp"
    dead.write_bytes(b"x")
    with alive.open("wb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        write_selection(tmp_path / "s[1].parquet", [Part(0, np.arange(3), np.ones(3))], fingerprint="a", total=3, made={})
        assert not dead.exists() and alive.exists()
    Selection(tmp_path / "s[1].parquet").verify()


@pytest.mark.parametrize("weight", [-1.0, 0.0, np.nan, np.inf, 1e30])
def test_weights_that_cannot_be_read_are_not_written(weight: float, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a weight of shard 0 does not lie between"):
        write_selection(tmp_path / "s", [Part(0, np.arange(2), np.array([1.0, weight]))], fingerprint="a", total=3, made={})
    assert not list(tmp_path.glob("*s*tmp")) and not (tmp_path / "s").exists()


def test_rows_that_do_not_exist_are_refused(sets: Path) -> None:
    vectors = vector_sets.Vectors.of(vector_sets.opened(sets / "emb"))
    parts = [Part(1, np.array([999]), np.ones(1))]
    write_selection(sets / "s.parquet", parts, fingerprint=vector_sets.FINGERPRINT, total=400, made={})
    with pytest.raises(DataError, match="row 999 of shard 1 does not exist: it has 133 samples"):
        earlier_weights([sets / "s.parquet"], vectors)


@pytest.mark.parametrize("scale", [3e38, 1e-40])
def test_vectors_of_extreme_lengths_become_unit_vectors(scale: float) -> None:
    values = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        scaled = unit(np.concatenate([values * np.float32(scale), values]))
    assert np.allclose(scaled[:3], scaled[3:], atol=1e-5) and np.allclose(scaled[0], 0.5, atol=1e-5)


def test_another_set_is_compared_in_blocks_with_the_same_result(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vector_sets.Vectors.of(vector_sets.opened(sets / "emb"))
    draw = np.random.default_rng(1).normal(size=(1000, 16)).astype(np.float32)
    others = vector_sets.make(sets / "large", np.concatenate([draw, unit(draw[:7])]), shards=5)
    held: list[int] = []
    real = near_duplicates._nearest_of_block

    def watched(*arguments: object) -> object:
        held.append(arguments[1].numel() * 4)  # type: ignore[attr-defined]
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(near_duplicates, "_nearest_of_block", watched)
    results = []
    for limit in (1 << 28, 100 * 16 * 4):
        monkeypatch.setattr(near_duplicates, "_HELD", limit)
        monkeypatch.setattr(near_duplicates, "_PIECE", 50)
        held.clear()
        with Workspace(sets / f"w{limit}", {}) as work:
            results.append(near_duplicates.nearest_of_others(vectors, others, work, "a", 2, vector_sets.quiet))
        assert max(held) <= limit
    assert len(held) == 11 * 3
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))
    exact = np.concatenate([vectors.read(shard) for shard in range(3)]) @ np.concatenate([others.read(s) for s in range(5)]).T
    assert np.allclose(results[0][1], exact.max(axis=1), atol=1e-6)


def test_hashes_among_others_are_found() -> None:
    draw = np.random.default_rng(0).integers(0, 2, size=(40, 16), dtype=np.uint8)  # with trailing zeros
    draw[:, 3:] = 0
    others = draw[::7]
    expected = [any((row == other).all() for other in others) for row in draw]
    assert near_duplicates.among(draw, others).tolist() == expected
    assert not near_duplicates.among(draw, others[:0]).any()
