"""The stand-in records what CUDA would do: launches, waits and copies with their line, and devices by thread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.standin import process
from tests.helpers.standin.recorder import Record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("examples") / "examples.json"
    done = process.run("examples", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(out.read_text())
    return {**document, "records": {name: Record.from_json(record) for name, record in document["records"].items()}}


def test_launches_are_counted_by_name_thread_and_device(seen: dict[str, Any]) -> None:
    calls = seen["records"]["product"].calls
    assert sum(call.calls for call in calls if call.kind == "gemm") == 3  # forward, and both gradients
    assert {call.thread for call in calls if call.kind == "gemm"} == {"main", "native"}  # backward has a thread of its own
    assert {call.device for call in calls} == {2} and {call.stream for call in calls} == {"default"}
    assert any("reduce" in call.name for call in calls if call.kind == "kernel")
    assert not seen["records"]["product"].blocks


def test_a_product_by_the_library_that_adds_the_bias_is_one_launch(seen: dict[str, Any]) -> None:
    calls = [call for call in seen["records"]["product and bias"].calls if call.kind == "gemm"]
    assert [(call.name, call.calls) for call in calls] == [("cublasLtMatmul", 1)]  # not its descriptors


def test_waits_and_pageable_copies_are_found(seen: dict[str, Any]) -> None:
    records = seen["records"]
    assert [block.what for block in records["question"].blocks] == ["for a stream"]
    assert [block.what for block in records["pageable"].blocks] == ["host to device, pageable"]
    assert not records["pinned"].blocks
    assert [(call.name, call.bytes) for call in records["pinned"].calls if call.kind == "copy"] == [
        ("host to device, pinned", 16)
    ]


def test_a_new_thread_starts_on_device_0_and_events_belong_to_a_device(seen: dict[str, Any]) -> None:
    assert seen["new thread"] == 0
    assert "does not match" in seen["other device"]
