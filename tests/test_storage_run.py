"""Training from a bucket that misbehaves, on any number of ranks, killed in a download: the samples are those of a disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from tests.helpers.runs import ROOT, command, environment, started_and_held, train, wait_for_step
from tests.helpers.s3 import KEYS, Proxy, Trouble, proxy, upload

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, s3_port: int) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=320, val=24, size=32, seed=3, samples_per_shard=40)
    upload(s3_port, "training", {path.name: path for path in folder.glob("*.tar")})
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folder: Path, config: Path) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(config, f"{folder}/*train-*.tar", directory)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


@pytest.fixture
def door(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with proxy(s3_port) as found:
        yield found


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            except OSError:
                continue
            if ours:
                found += [int(entry.name), *_children(int(entry.name))]
    return found


def settings(door: Proxy, directory: Path, *more: str) -> list[str]:
    cache = f"data.storage.cache={directory.parent / 'cache'}"
    return [f"data.storage.endpoint={door.endpoint}", cache, "data.storage.timeout=3", "data.storage.outage_timeout=60", *more]


def batches(directory: Path) -> dict[int, tuple[str, ...]]:
    """Keys of each step's global batch, whatever the number of ranks; a step done twice must have had the same."""
    found: dict[int, tuple[str, ...]] = {}
    attempts: dict[str, dict[int, dict[int, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for path in (directory / "batches").glob("attempt-*-rank-*.jsonl"):
        attempt, rank = path.stem.split("-rank-")
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by the kill
                continue
            attempts[attempt][row["step"]][int(rank)] = row["keys"]
    for steps in attempts.values():
        ranks = max(len(step) for step in steps.values())
        for step, by_rank in steps.items():
            if sorted(by_rank) == list(range(ranks)):  # a rank may be ahead of the others in writing
                keys = tuple(key for rank in range(ranks) for key in by_rank[rank])
                assert found.setdefault(step, keys) == keys, f"step {step} was not repeated exactly"
    return found


def pixels(directory: Path) -> list[str]:
    rows = [json.loads(line) for path in (directory / "batches").glob("*-rank-0.jsonl") for line in path.read_text().splitlines()]
    return [row["pixels"] for row in sorted(rows, key=lambda row: row["step"])]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cache", "range_read"])
def test_a_bucket_in_trouble_gives_the_batches_of_a_disk(
    undisturbed: Path, door: Proxy, config: Path, tmp_path: Path, mode: str
) -> None:
    directory = tmp_path / "run"
    # Indexing asks once for each of the eight shards; everything later is training.
    kinds = ("503", "cut", "stall", "403")
    door.troubles = [Trouble(kind, times=2, match="train-", after=9 + number) for number, kind in enumerate(kinds)]
    done = train(
        config,
        "s3://training/*train-*.tar",
        directory,
        *settings(door, directory, f"data.storage.access={mode}", "data.num_workers=1"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert all(trouble.hit == trouble.times for trouble in door.troubles), door.troubles
    assert batches(directory) == batches(undisturbed)
    assert pixels(directory) == pixels(undisturbed)


@pytest.mark.slow
def test_stopped_and_resumed_on_one_two_and_four_ranks_the_global_batches_are_the_same(
    undisturbed: Path, door: Proxy, config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    for attempt, (ranks, steps) in enumerate(((2, 8), (4, 16), (1, STEPS))):
        door.troubles = [Trouble("503", times=3, match="train-", after=2)]
        # The length decides the schedules, so the run is stopped, not shortened.
        words = command(
            config, "s3://training/*train-*.tar", directory, *settings(door, directory, f"launch.num_processes={ranks}")
        )
        launcher = started_and_held(words, steps, attempt=attempt, stderr=subprocess.PIPE)
        if steps < STEPS:
            wait_for_step(directory, steps - 1, launcher)
            launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=2000)
        assert launcher.returncode == 0, errors
    assert batches(directory) == batches(undisturbed)


@pytest.mark.slow
def test_killed_while_downloading_and_prefetching_the_batches_are_the_same(
    undisturbed: Path, door: Proxy, config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    words = command(config, "s3://training/*train-*.tar", directory, *settings(door, directory))
    cache = tmp_path / "cache"
    for begun in ("index", "cache"):  # what is being filled when it happens
        kill = False

        def watch(method: str, path: str, begun: str = begun) -> None:
            nonlocal kill
            asked = door.total("GET") if begun == "index" else len(list(cache.glob("*.tar")))
            kill = kill or (method == "GET" and "train-" in path and asked >= 3)

        door.seen.clear()
        door.on_request, door.delay = watch, 0.3
        launcher = subprocess.Popen(
            words, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 900
        while not kill and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert launcher.poll() is None, f"it ended before it was killed while filling the {begun}"
        ranks = _children(launcher.pid)
        for process in [launcher.pid, *ranks]:
            os.kill(process, signal.SIGKILL)
        launcher.wait()
    door.on_request, door.delay = None, 0.0
    done = train(config, "s3://training/*train-*.tar", directory, *settings(door, directory))
    assert done.returncode == 0, done.stderr + done.stdout
    assert batches(directory) == batches(undisturbed)
    assert not list(cache.glob(".*.part"))


@pytest.mark.slow
def test_an_object_replaced_while_training_stops_the_run_and_the_old_one_put_back_lets_it_go_on(
    undisturbed: Path, door: Proxy, config: Path, tmp_path: Path, folder: Path, s3_port: int
) -> None:
    directory = tmp_path / "run"
    names = sorted(path.name for path in folder.glob("*train-*.tar"))
    upload(s3_port, "changing", {name: folder / name for name in names})
    other = tmp_path / "other.tar"
    shutil.copyfile(folder / names[3], other)
    with other.open("r+b") as file:
        file.seek(2000)
        file.write(b"other bytes")
    changed = False

    def watch(method: str, path: str) -> None:
        nonlocal changed
        if not changed and door.total("GET") > 2 * len(names) + 3:
            changed = True
            upload(s3_port, "changing", dict.fromkeys(names, other))

    door.on_request = watch
    stopped = train(config, "s3://changing/*train-*.tar", directory, *settings(door, directory, "data.storage.access=range_read"))
    assert changed
    assert stopped.returncode == 2, stopped.stderr + stopped.stdout
    assert "was replaced since it was indexed" in stopped.stderr + stopped.stdout
    upload(s3_port, "changing", {name: folder / name for name in names})
    done = train(config, "s3://changing/*train-*.tar", directory, *settings(door, directory))
    assert done.returncode == 0, done.stderr + done.stdout
    assert batches(directory) == batches(undisturbed)
