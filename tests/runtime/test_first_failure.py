"""What an exception in a rank is called."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipeline.runtime import failure_claim as claims
from pipeline.runtime import first_failure as failure
from pipeline.runtime.watchdog import Limits, Watchdog

FACTS = {"micro_batch": "all", "zero": 0}


def test_what_the_system_refuses_needs_no_traceback_and_keeps_it_beside_the_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watchdog = Watchdog(tmp_path, 0, 1, Limits())
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/run/bad_samples")
    except OSError as error:
        code = failure.report_failure(error, watchdog, FACTS)
    told = capsys.readouterr().err
    assert code == 1 and told.count("\n") == 1 and "Traceback" not in told
    assert "/scratch/run/bad_samples: No space left on device. Free space there" in told
    assert "Traceback" in watchdog.stacks.read_text()
    claim = claims.claimed(tmp_path)
    assert claim is not None and claim["cause"] == "disk" and claim["retryable"]


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    assert not failure.read(OSError("a library's own"), FACTS).expected
    assert not failure.read(KeyError("x"), FACTS).expected
