"""A measurement that does not end, or is not waited for, is killed with all that it has started."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.bench.probes import run_probe
from pipeline.errors import ConfigError
from tests.helpers.limits import deadline

SCRIPT = "sleep 3600 & echo $! > '{0}.new'; mv '{0}.new' '{0}'; wait"


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def end_of(file: Path) -> None:
    pid, end = int(file.read_text()), deadline()
    while not ended(pid):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.05)


def test_a_measurement_beyond_its_limit_ends_with_what_it_started(tmp_path: Path) -> None:
    argv = ["sh", "-c", SCRIPT.format(tmp_path / "pid")]
    with pytest.raises(ConfigError, match="the measurement did not end within 5 s") as late:
        run_probe(argv, os.environ, limit=5, what="the measurement", where="bench")
    assert late.value.hint
    end_of(tmp_path / "pid")


def test_an_interrupted_measurement_ends_with_what_it_started(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        if not (tmp_path / "pid").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_probe(["sh", "-c", SCRIPT.format(tmp_path / "pid")], os.environ, limit=600, what="it", where="bench")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    end_of(tmp_path / "pid")


def test_exit_code_and_output_come_back() -> None:
    done = run_probe(["sh", "-c", "echo out; echo err >&2; exit 3"], os.environ, limit=600, what="it", where="bench")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
