"""The GPU path of decoder and augmenter: the calling thread's stream, the rank's device, buffers held until they are read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.standin import process
from tests.helpers.standin.recorder import Record
from tests.helpers.standin.views import DEVICE


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("views") / "views.json"
    done = process.run("views", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(out.read_text())
    return document


@pytest.mark.slow
def test_images_and_views_are_made_on_the_calling_threads_stream_and_device(result: dict[str, Any]) -> None:
    assert set(result["fed on"]) == set(result["given on"]) == {result["side"]} and result["decoded on"] == [result["side"]]
    assert result["devices"] == [DEVICE] and result["blank on"] == f"cuda:{DEVICE}"
    assert result["views"] == {f"view{side}": [[4, 3, side, side]] * 2 for side in (32, 16, 8)}
    record = Record.from_json(result["record"])
    made = [call for call in record.calls if call.kind not in ("allocation", "select")]
    assert {(call.device, call.stream) for call in made} == {(DEVICE, str(result["side"]))}
    assert {block.what for block in record.blocks} == {"for a stream"}  # its own, for images that are read in place


@pytest.mark.slow
def test_the_buffers_of_all_groups_are_held_until_their_copies_have_ended(result: dict[str, Any]) -> None:
    assert result["held while busy"] == 6  # two runs of three groups
    assert result["held when done"] == 3  # those of the last run, released by the next
