"""Copies of checkpoints in a bucket and in a folder: whole or not there, whatever the storage does."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.files import Saved, committed_checkpoints, entry, read, verify
from pipeline.checkpoint.mirror import Copies, fetch
from pipeline.checkpoint.retention import Retention
from pipeline.data.settings import StorageSettings
from pipeline.data.storage import Storage, StorageUnavailable
from pipeline.errors import CheckpointError
from tests.helpers.limits import deadline
from tests.helpers.s3 import KEYS, Proxy, Trouble, proxy, upload


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def door(s3_port: int, tmp_path: Path) -> Iterator[Proxy]:
    upload(s3_port, tmp_path.name.replace("_", "-"), {})
    with proxy(s3_port) as found:
        yield found


@pytest.fixture(params=["bucket", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Storage]:
    if request.param == "folder":
        return str(tmp_path / "copies" / "run"), Storage()
    return bucket(request.getfixturevalue("door"), tmp_path)


def bucket(door: Proxy, tmp_path: Path, grace: float = 3.0) -> tuple[str, Storage]:
    settings = StorageSettings(endpoint=door.endpoint, part_size_mb=5, timeout=2.0, retries=0, outage_timeout=grace)
    return f"s3://{tmp_path.name.replace('_', '-')}/runs/run", Storage(settings)


def save(folder: Path, step: int, size: int = 1000) -> Saved:
    """A checkpoint with bytes where the tensors would be."""
    path = folder / f"step_{step:09d}"
    path.mkdir(parents=True)
    files = ["rank_00000.safetensors", "whole.safetensors"]
    for number, name in enumerate(files):
        (path / name).write_bytes(bytes((step + number + i) % 251 for i in range(251)) * (size // 251 + 1))
    manifest = {"format": 1, "step": step, "serial": step, "files": [entry(path / name) for name in files]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return read(path)


def copy(place: tuple[str, Storage], *saved: Saved, keep: int = 9) -> tuple[list[str], bool]:
    told: list[str] = []
    copies = Copies(*place, Retention(keep), told.append)
    copies.start()
    for one in saved:
        copies.offer(one)
    return told, copies.close()


def names(place: tuple[str, Storage]) -> set[str]:
    target, storage = place
    return {url.removeprefix(target).strip("/") for url in storage.list(target)}


def test_what_is_copied_comes_back_whole_where_there_is_nothing(place: tuple[str, Storage], tmp_path: Path) -> None:
    own = [save(tmp_path / "own", step, size) for step, size in ((3, 1000), (6, 12_000_000))]
    assert copy(place, *own) == ([], True)
    found, told = fetch(place[0], tmp_path / "new" / "checkpoints", place[1])
    assert found is not None
    assert found.path == tmp_path / "new" / "checkpoints" / "step_000000006"
    assert found.id == own[1].id
    verify(found)
    assert "fetched" in told[-1]
    assert [path.name for path in found.path.parent.iterdir()] == ["step_000000006"]


def test_copies_are_pruned_by_the_same_rule(place: tuple[str, Storage], tmp_path: Path) -> None:
    copy(place, *(save(tmp_path / "own", step) for step in (1, 2)), keep=2)
    copy(place, *(save(tmp_path / "own", step) for step in (3, 4)), keep=2)  # another attempt, which has to look first
    assert {name.split("/")[0] for name in names(place)} == {"step_000000003", "step_000000004"}


def test_no_copy_is_no_fault(place: tuple[str, Storage], tmp_path: Path) -> None:
    assert fetch(place[0], tmp_path / "new", place[1]) == (None, [])


def test_a_copy_without_its_manifest_is_none_and_a_damaged_one_is_passed_over_loudly(
    place: tuple[str, Storage], tmp_path: Path
) -> None:
    target, storage = place
    copy(place, *(save(tmp_path / "own", step) for step in (1, 2, 3, 4)))
    storage.delete(f"{target}/step_000000004/manifest.json")
    storage.delete(f"{target}/step_000000003/whole.safetensors")
    other = tmp_path / "other"
    other.write_bytes(b"other")
    storage.put(other, f"{target}/step_000000002/whole.safetensors")
    found, told = fetch(target, tmp_path / "new", storage)
    assert found is not None
    assert found.step == 1
    assert len(told) == 3
    assert "missing" in told[0]
    assert "size" in told[1]
    storage.delete(f"{target}/step_000000001/whole.safetensors")
    with pytest.raises(CheckpointError, match="none of the 3 copies is complete"):
        fetch(target, tmp_path / "newer", storage)
    assert not list((tmp_path / "newer").iterdir())


def test_another_checkpoint_of_the_same_step_replaces_the_copy(place: tuple[str, Storage], tmp_path: Path) -> None:
    copy(place, save(tmp_path / "own", 3))
    shutil.rmtree(tmp_path / "own")
    again = save(tmp_path / "own", 3, size=5000)
    copy(place, again)
    found, _ = fetch(place[0], tmp_path / "new", place[1])
    assert found is not None
    assert found.id == again.id


def test_the_manifest_goes_last_and_a_trouble_before_it_leaves_no_copy(door: Proxy, tmp_path: Path) -> None:
    place = bucket(door, tmp_path, grace=0.5)
    door.troubles = [Trouble("503", times=10_000, match=r"manifest\.json$", method="PUT")]
    told, complete = copy(place, save(tmp_path / "own", 3))
    assert not complete
    assert "step_000000003 is not copied yet" in told[0]
    assert names(place) == {"step_000000003/rank_00000.safetensors", "step_000000003/whole.safetensors"}
    door.troubles = []
    assert fetch(place[0], tmp_path / "new", place[1]) == (None, [])


def test_an_outage_is_told_and_the_next_checkpoint_takes_the_others_along(door: Proxy, tmp_path: Path) -> None:
    place = bucket(door, tmp_path, grace=0.5)
    door.troubles = [Trouble("503", times=10_000, match=".", method=method) for method in ("PUT", "POST", "GET")]
    told: list[str] = []
    copies = Copies(*place, Retention(9), told.append)
    copies.start()
    first, second = (save(tmp_path / "own", step) for step in (3, 6))
    copies.offer(first)
    end = deadline()
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    assert "training continues" in told[0]
    door.troubles = []
    copies.offer(second)
    assert copies.close()
    assert {name.split("/")[0] for name in names(place)} == {"step_000000003", "step_000000006"}


def test_one_that_was_pruned_before_its_turn_is_no_trouble(door: Proxy, tmp_path: Path) -> None:
    place = bucket(door, tmp_path)
    gone, there = save(tmp_path / "own", 3), save(tmp_path / "own", 6)
    shutil.rmtree(gone.path)
    assert copy(place, gone, there) == ([], True)
    assert {name.split("/")[0] for name in names(place)} == {"step_000000006"}


def test_a_storage_that_is_away_is_not_taken_for_one_without_copies(door: Proxy, tmp_path: Path) -> None:
    place = bucket(door, tmp_path, grace=0.5)
    copy(place, save(tmp_path / "own", 3))
    door.troubles = [Trouble("503", times=10_000, match=".")]
    with pytest.raises(StorageUnavailable):
        fetch(place[0], tmp_path / "new", place[1])
    assert committed_checkpoints(tmp_path / "new") == []


@pytest.mark.parametrize("name", ["../../../victim", "{tmp}/victim", "a/../../../../victim"])
def test_a_copy_writes_nothing_outside_its_own_folder(tmp_path: Path, name: str) -> None:
    target, victim = tmp_path / "copies" / "run", tmp_path / "victim"
    victim.write_text("mine")
    save(target, 9)
    name = name.replace("{tmp}", str(tmp_path))
    document = json.loads((target / "step_000000009" / "manifest.json").read_text())
    document["files"][0]["name"] = name
    (target / "step_000000009" / "manifest.json").write_text(json.dumps(document))
    evil = target / f"step_000000009{name}" if name.startswith("/") else target / "step_000000009" / name
    evil.parent.mkdir(parents=True, exist_ok=True)
    if evil.resolve() != victim:
        evil.write_text("theirs")
    assert fetch(str(target), tmp_path / "new" / "checkpoints", Storage()) == (None, [])
    assert victim.read_text() == "mine" and not list((tmp_path / "new").rglob("*"))


def test_a_copy_of_another_size_or_kind_is_not_fetched(tmp_path: Path) -> None:
    target = tmp_path / "copies" / "run"
    one = save(target, 9)
    with (one.path / "whole.safetensors").open("wb") as file:
        file.truncate(1 << 42)  # fetching it would fill the disk
    with pytest.raises(CheckpointError, match="its size differs"):
        fetch(str(target), tmp_path / "new" / "checkpoints", Storage())
    (one.path / "whole.safetensors").unlink()
    (one.path / "whole.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="missing"):
        fetch(str(target), tmp_path / "new" / "checkpoints", Storage())
    (one.path / "manifest.json").unlink()
    (one.path / "manifest.json").symlink_to("/dev/zero")
    assert fetch(str(target), tmp_path / "new" / "checkpoints", Storage()) == (None, [])


def test_no_file_is_copied_that_a_link_in_the_checkpoint_means(tmp_path: Path) -> None:
    one = save(tmp_path / "own", 3)
    (tmp_path / "secret").write_text("secret")
    (one.path / "whole.safetensors").unlink()
    (one.path / "whole.safetensors").symlink_to(tmp_path / "secret")
    said, whole = copy((str(tmp_path / "copies"), Storage()), one)
    assert not whole and "regular file" in said[0]
    assert not any("secret" in file.read_text(errors="replace") for file in (tmp_path / "copies").rglob("whole*"))
