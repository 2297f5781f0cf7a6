"""A file that is appended to: nothing is lost silently, and nothing is written once it is closed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.runtime.append_file import AppendFile


def test_what_a_full_disk_does_not_take_waits_and_what_is_left_at_the_end_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = AppendFile(tmp_path / "rows", kept=100)
    file.append(b"one\n")
    file.flush()
    real, full = os.write, [True]

    def write(descriptor: int, data: bytes) -> int:
        if full[0] and descriptor == file._descriptor:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for _ in range(2):
        file.append(b"two\n")
        file.flush()
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1
    full[0] = False
    file.flush()
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\ntwo\n" and "is written again" in capsys.readouterr().err
    full[0] = True
    file.append(b"three\n")
    file.close()
    assert "6 bytes are lost" in capsys.readouterr().err
    full[0] = False
    file.append(b"four\n")
    file.flush()
    file.close()
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\ntwo\n" and file.dropped == 1
