"""The catalog says what the manifests say, and where it says something else the manifests are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import catalog
from pipeline.checkpoint.catalog import CATALOG, Catalog, Row, latest, rows
from pipeline.checkpoint.files import read
from tests.checkpoint.test_manifest import GOOD, JSON, run_with

FIELDS = ["key", "name", "step", "serial", "samples", "world", "zero", "scores", "files", "origins"]


def folder_of(tmp_path: Path, number: int = 5) -> Path:
    """Checkpoints whose order of writing is not that of their steps, with their catalog."""
    listed = Catalog(tmp_path / "checkpoints")
    for serial, step in enumerate([3, 9, 6, 12, 7][:number]):
        path = run_with(tmp_path, {**GOOD, "step": step, "serial": serial}, f"step_{step:09d}")
        listed.add(Row.of(path.name, read(path).manifest), rows(path.parent)[:-1] if serial else [])
    return tmp_path / "checkpoints"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints whose manifests were read."""
    names: list[str] = []

    def reading(path: Path) -> Any:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(catalog, "read", reading)
    return names


def test_no_manifest_is_read_that_the_catalog_describes(tmp_path: Path, unread: list[str]) -> None:
    folder = folder_of(tmp_path)
    unread.clear()
    listed = rows(folder)
    assert unread == [] and [row.step for row in listed] == [3, 9, 6, 12, 7]
    (folder / CATALOG).unlink()
    assert rows(folder) == listed and len(unread) == 5
    newest = latest(folder)
    assert newest is not None and newest.step == 7


def test_a_changed_or_moved_manifest_is_read_and_a_deleted_checkpoint_is_none(tmp_path: Path, unread: list[str]) -> None:
    folder = folder_of(tmp_path)
    run_with(tmp_path, {**GOOD, "step": 9, "serial": 40}, "step_000000009")
    (folder / "step_000000012" / "manifest.json").unlink()
    os.utime(folder / "step_000000003" / "manifest.json", ns=(1, 1))
    unread.clear()
    assert [row.serial for row in rows(folder)] == [0, 2, 4, 40]
    assert sorted(unread) == ["step_000000003", "step_000000009", "step_000000012"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=JSON, drop=st.booleans())
def test_any_line_is_ignored_or_usable(tmp_path: Path, field: str, value: Any, drop: bool) -> None:
    folder = folder_of(tmp_path, 1)
    line = json.loads((folder / CATALOG).read_text().splitlines()[0])
    line |= {field: value}
    if drop:
        del line[field]
    (folder / CATALOG).write_text(json.dumps(line) + "\nno line\n")
    for row in rows(folder):
        assert row.name == "step_000000003" and row.size >= 0 and row.mark.step >= 0
        assert all("/" not in name for name, _ in row.files)
    assert latest(folder) is not None


def test_of_a_catalog_without_end_only_so_much_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: list[str]
) -> None:
    folder = folder_of(tmp_path)
    expected, size = rows(folder), (folder / CATALOG).stat().st_size
    with (folder / CATALOG).open("r+b") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(catalog, "_READ", size + (4 << 20))
    unread.clear()
    assert rows(folder) == expected and unread == []
    monkeypatch.setattr(catalog, "_READ", size // 2)
    assert rows(folder) == expected and 0 < len(unread) < 5


def test_a_fifo_or_a_link_as_catalog_is_not_read(tmp_path: Path, unread: list[str]) -> None:
    folder = folder_of(tmp_path, 2)
    (folder / CATALOG).unlink()
    os.mkfifo(folder / CATALOG)
    unread.clear()
    assert [row.step for row in rows(folder)] == [3, 9] and len(unread) == 2


def test_the_catalog_is_written_anew_before_it_outgrows_what_exists(tmp_path: Path) -> None:
    listed = Catalog(tmp_path / "checkpoints")
    path = run_with(tmp_path, {**GOOD, "step": 3})
    row = Row.of(path.name, read(path).manifest)
    longest = 0
    for _ in range(200):
        listed.add(row, [])
        longest = max(longest, len((path.parent / CATALOG).read_text().splitlines()))
    assert 1 < longest < 100
    assert rows(path.parent) == [row]
