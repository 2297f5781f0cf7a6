"""Output that nobody reads any more ends no run."""

from __future__ import annotations

import os
import sys

import pytest

from launch.streams import DetachableStream, outlive_terminal


def test_what_can_no_longer_be_shown_is_dropped() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as stream:
        stream_of_run = DetachableStream(stream)
        print("shown", file=stream_of_run, flush=True)
        assert os.read(read, 100) == b"shown\n"
        os.close(read)
        for _ in range(3):
            print("lost", file=stream_of_run, flush=True)
        assert stream_of_run.fileno() == write and not stream_of_run.isatty()


def test_both_streams_are_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", None)
    outlive_terminal()
    once = sys.stdout
    outlive_terminal()
    assert isinstance(once, DetachableStream) and sys.stdout is once and sys.stderr is None
