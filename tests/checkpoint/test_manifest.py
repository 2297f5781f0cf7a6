"""A checkpoint's manifest is checked at one door: whatever stands in it ends in a CheckpointError or in a usable manifest."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.cli.checkpoint import app
from pipeline.checkpoint.files import committed_checkpoints, entry, read, verify
from pipeline.checkpoint.manifest import check_manifest
from pipeline.checkpoint.retention import Mark, read_best
from pipeline.checkpoint.selection import newest
from pipeline.config.upgrade import upgrade
from pipeline.errors import CheckpointError, FoveaError

GOOD: dict[str, Any] = {
    "format": 1,
    "step": 3,
    "serial": 1,
    "applied": 3,
    "skipped": 0,
    "samples_seen": 48,
    "seconds": 1.5,
    "attempt": 0,
    "world": 1,
    "run": "toy",
    "config": {"train": {"zero": 1}},
    "data": {"samples": 40, "seen": 48, "fingerprint": "f00d", "substituted": {"truncated": 1}, "quarantine": {"7": "truncated"}},
    "origins": [{"id": "a", "path": "/x"}],
    "scores": {"knn/k20": 0.5},
    "scored": 3,
    "judged": ["knn/k20"],
    "shapes": {"w": [2, 3]},
    "fragments": [{"w": [0, 6]}],
    "files": [
        {"name": "rank_00000.safetensors", "size": 10, "xxh3": "00"},
        {"name": "whole.safetensors", "size": 10, "xxh3": "00"},
    ],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [place for key, value in inner for place in ((*way, key), *places(value, (*way, key)))]


PLACES = places(GOOD)


def put(way: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    node: Any = document
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = value
    return document


def run_with(folder: Path, manifest: Any, name: str = "step_000000003") -> Path:
    path = folder / "checkpoints" / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return path


def test_a_good_manifest_passes_as_it_is() -> None:
    assert check_manifest(copy.deepcopy(GOOD), where="m") == GOOD


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(way=st.sampled_from(PLACES), value=JSON)
def test_any_value_in_any_place_is_refused_or_usable(tmp_path: Path, way: tuple[Any, ...], value: Any) -> None:
    path = run_with(tmp_path, put(way, value))
    try:
        saved = read(path)
    except CheckpointError:
        assert committed_checkpoints(path.parent) == []
    else:
        assert saved.step >= 0 and saved.serial >= 0 and saved.id and isinstance(saved.origins, list)
        Mark.of(path.name, saved.manifest)
        with pytest.raises(CheckpointError):
            verify(saved)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(way=st.sampled_from(PLACES), value=JSON)
def test_commands_show_no_traceback_of_a_wrong_manifest(tmp_path: Path, way: tuple[Any, ...], value: Any) -> None:
    path = run_with(tmp_path, put(way, value))
    for words in (["list"], ["list", "--json"], ["verify"], ["inspect"], ["inspect", "--tensors"]):
        result = CliRunner().invoke(app, [*words, str(path if words[0] == "inspect" else tmp_path)])
        assert result.exception is None or isinstance(result.exception, FoveaError | SystemExit), result.exception


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON)
def test_any_document_is_refused(tmp_path: Path, document: Any) -> None:
    path = run_with(tmp_path, document)
    with pytest.raises(CheckpointError):
        read(path)
    with pytest.raises(CheckpointError):
        newest(path.parent)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\x00", '"\ud83d"'.encode("utf-8", "surrogatepass")]
)
def test_no_json_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = run_with(tmp_path, "")
    (path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"cannot be read|something else"):
        read(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\nb", "\x1b[2J", "manifest.json", "x" * 300])
def test_names_of_files_are_plain(name: str) -> None:
    with pytest.raises(CheckpointError):
        check_manifest(put(("files", 0, "name"), name), where="m")


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "link to a file", "folder", "device size"])
def test_only_regular_files_of_the_checkpoint_are_read(tmp_path: Path, kind: str) -> None:
    path = run_with(tmp_path, GOOD)
    (tmp_path / "secret").write_bytes(b"0123456789")
    file = path / "rank_00000.safetensors"
    known = {**entry(tmp_path / "secret"), "name": file.name}
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if "device" in kind else tmp_path / "secret")
    run_with(tmp_path, put(("files", 0), known if kind != "device size" else {**known, "size": 0}))
    with pytest.raises(CheckpointError, match=r"link|regular"):
        verify(read(path))
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="regular file"):
        read(path)


def test_nothing_is_hashed_of_a_file_of_another_size(tmp_path: Path) -> None:
    path = run_with(tmp_path, GOOD)
    with (path / "rank_00000.safetensors").open("wb") as file:
        file.truncate(1 << 42)  # hashing it would take minutes
    with pytest.raises(CheckpointError, match="size is wrong"):
        verify(read(path))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"checkpoint": "../../x", "step": 1, "metric": "m", "score": 1}',
        '{"checkpoint": "step_1", "step": 1, "metric": "m", "score": "x"}',
        '{"checkpoint": 3}',
        '{"checkpoint": "step_1", "step": 1e999, "metric": "m", "score": 1}',
    ],
)
def test_what_names_the_best_checkpoint_is_checked(tmp_path: Path, text: str) -> None:
    run_with(tmp_path, GOOD)
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    assert read_best(tmp_path / "checkpoints").get("checkpoint") in (None, "step_1")
    result = CliRunner().invoke(app, ["list", str(tmp_path)])
    assert result.exception is None, result.exception


def test_names_on_disk_reach_the_terminal_escaped(tmp_path: Path) -> None:
    run_with(tmp_path, {**GOOD, "run": "\x1b]0;title\x07"}, name="step_1\x1b[2J")
    for words in (["list"], ["verify"]):
        assert "\x1b" not in CliRunner().invoke(app, [*words, str(tmp_path)]).output
    output = CliRunner().invoke(app, ["inspect", str(tmp_path / "checkpoints" / "step_1\x1b[2J")]).output
    assert "\x1b" not in output and r"\x1b]0;title\x07" in output


def test_of_another_format_only_the_common_fields_are_kept(tmp_path: Path) -> None:
    hostile = {**GOOD, "format": 2, "serial": 7, "origins": [1], "data": [], "scores": {"a": "x"}, "shapes": 3, "config": []}
    path = run_with(tmp_path, hostile)
    (saved,) = committed_checkpoints(tmp_path / "checkpoints")
    assert saved.manifest.keys() == {"format", "step", "files", "serial"} and saved.serial == 7
    for words in (["list", str(tmp_path)], ["inspect", str(path)], ["verify", str(path)]):
        assert not isinstance(CliRunner().invoke(app, words).exception, TypeError | AttributeError | ValueError)


def test_settings_with_the_same_dotted_key_are_shown(tmp_path: Path) -> None:
    path = run_with(tmp_path, {**GOOD, "config": {"a": {"b": 1}, "a.b": "x"}})
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0 and result.stdout.count("a.b = ") == 2


@pytest.mark.parametrize(
    ("shape", "valid"), [([1 << 25, 1 << 25], True), ([1 << 25, (1 << 25) + 1], False), ([0, 1 << 40], True)]
)
def test_a_tensor_has_at_most_so_many_elements(shape: list[int], valid: bool) -> None:
    document = put(("shapes", "w"), shape)
    if valid:
        assert check_manifest(document, where="m") == document
    else:
        with pytest.raises(CheckpointError, match="a tensor is too large"):
            check_manifest(document, where="m")
        with pytest.raises(CheckpointError, match="a tensor is too large"):
            check_manifest(put(("shapes",), {"v": [1], "w": shape}), where="m")


def test_a_manifest_of_another_format_needs_three_fields() -> None:
    least = {"format": 2, "step": 3, "files": []}
    assert check_manifest(dict(least), where="m") == least


def test_files_are_listed_once_and_every_rank_has_one() -> None:
    two = put(("fragments",), [{"w": [0, 3]}, {"w": [3, 3]}])
    with pytest.raises(CheckpointError, match=r"files: rank_00001\.safetensors is not listed"):
        check_manifest(two, where="m")
    two["files"].append({"name": "rank_00001.safetensors", "size": 10, "xxh3": "00"})
    assert check_manifest(two, where="m") == two
    with pytest.raises(CheckpointError, match=r"files: whole\.safetensors is not listed"):
        check_manifest({**two, "files": [two["files"][0], two["files"][2]]}, where="m")
    with pytest.raises(CheckpointError, match="named twice"):
        check_manifest({**two, "files": [*two["files"], two["files"][0]]}, where="m")


def test_a_wrong_value_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"invalid \(files\.1\.size: .*greater than or equal") as caught:
        check_manifest(put(("files", 1, "size"), -1), where="m")
    assert len(caught.value.what) < 230
    for lacking in ("format", "step", "files"):
        with pytest.raises(CheckpointError, match="something else"):
            check_manifest({name: value for name, value in GOOD.items() if name != lacking}, where="m")
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        read(tmp_path / "absent")


def test_old_settings_come_with_their_new_names(tmp_path: Path) -> None:
    old = {**GOOD, "config": {"recipe": {"name": "dinov2"}}}
    assert read(run_with(tmp_path, old)).manifest["config"] == upgrade(copy.deepcopy(old["config"])) != old["config"]
